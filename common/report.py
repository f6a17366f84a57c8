"""From records to tables and figures.

python -m common.report results/demo       table.md and figure.png of one folder of runs, in that folder
python -m common.report                    all committed folders: results/README.md, the tables in README.md, figures
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from common import artifacts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "cmi": "tab:blue",
    "cmi (forward)": "tab:cyan",
    "cmi-magnitude": "tab:green",
    "magnitude": "tab:orange",
    "random": "tab:gray",
}


def runs(folder: Path, stage: int) -> list[dict]:
    """The records of a stage's finished runs below a folder, in a fixed order."""
    records = [artifacts.read_json(path) for path in sorted(folder.rglob("*.json"))]
    return [r for r in records if r.get("stage") == stage and r.get("status") == "complete"]


def baselines(folder: Path) -> list[dict]:
    """The records of the dense networks' best epochs."""
    return [r for r in runs(folder, 1) if "best" in r]


def rule(record: dict) -> str:
    """What chose the mask of a pruned run, in words; scores are named unless they have stage 2's default name."""
    arguments = record["arguments"]
    scores = Path(arguments.get("Retrain_mask") or "").stem.removeprefix("I_parent_")
    criterion = arguments["Criterion"]
    named = f" ({scores})" if criterion.startswith("cmi") and scores not in ("", "cmi") else ""
    return criterion + named + "".join(f", {name.lower()}" for name in ("Even", "Refit") if arguments.get(name))


def by_point(folder: Path) -> dict[tuple[float, str], list[dict]]:
    """Pruned runs by (requested percentage, rule)."""
    points = defaultdict(list)
    for record in runs(folder, 3):
        points[record["requested_percent"], rule(record)].append(record)
    return dict(sorted(points.items()))


def accuracies(records: list[dict], when: str = "test") -> list[float]:
    """Test accuracies of runs at a point in time; runs that did not record it are left out."""
    return [r[when]["accuracy"] for r in records if when in r]


def mean_std(values: list[float]) -> str:
    """Mean and sample standard deviation, the latter only of two or more values."""
    if not values:
        return ""
    return f"{np.mean(values):.2f}" + ("" if len(values) < 2 else f" ± {np.std(values, ddof=1):.2f}")


def table(folder: Path, paper: dict | None = None) -> str:
    """The runs of one folder as a Markdown table, beside the published figures where there are any."""
    lines = [
        "| | pruned, masked layers (%) | pruned, network (%) | accuracy before retraining (%) | after 1 epoch (%) "
        "| accuracy (%) | memory, masked layers (MiB) | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(name: str, *cells: str) -> None:
        lines.append("| " + " | ".join((name, *cells)) + " |")

    def published(name: str, point: dict) -> None:
        pruned = f"{point['pruned_percent']:.2f}"
        shares = (pruned, "") if paper["pruned_of"] == "masked_layers" else ("", pruned)
        memory = f"{point['memory_mib']:.3f}" if "memory_mib" in point else ""
        row(f"paper: {name}", *shares, "", "", f"{point['accuracy']:.2f}", memory, "")

    if paper:
        dense = {
            "pruned_percent": 0,
            "accuracy": paper["baseline_accuracy"],
            "memory_mib": paper["baseline_memory_mib"],
        }
        published("dense", dense)
        for point in paper["mint"]:
            published("MINT", point)
        for point in paper["others"]:
            published(point["name"], point)
    dense = baselines(folder)
    if dense:
        row("**dense**", "0", "0", "", "", mean_std(accuracies(dense)), "", str(len(dense)))
    else:
        row("**here**", "", "", "", "", "not run yet", "", "0")
    for (_, criterion), records in by_point(folder).items():
        cells = (
            f"{np.mean([r['pruned_percent_masked_layers'] for r in records]):.2f}",
            f"{np.mean([r['pruned_percent_network'] for r in records]):.2f}",
            mean_std(accuracies(records, "test_before_retraining")),
            mean_std(accuracies(records, "test_after_1_epoch")),
            mean_std(accuracies(records)),
            f"{np.mean([r['memory_mib_masked_layers'] for r in records]):.3f}",
            str(len(records)),
        )
        row(f"**{criterion}**", *cells)
    return "\n".join(lines) + "\n"


def scoring_table(folder: Path) -> str:
    """What it cost to score all layer pairs of the networks in a folder."""
    scored = runs(folder, 2)
    seconds = [r["wall_seconds"] for r in scored]
    groups = [np.prod(r["scores"]["shape"]) for r in scored]
    cells = (
        str(len(scored)),
        f"{min(groups):,} to {max(groups):,}",
        f"{scored[0]['scores']['samples']:,}",
        f"{sum(seconds):,.0f}",
        f"{np.median(seconds):.1f}",
        f"{max(seconds):.1f}",
        f"{max(r['peak_memory_mib'] for r in scored):,}",
        scored[0]["device"],
    )
    return (
        "| layer pairs | scores per pair | images | seconds in all | median per pair | longest | memory (MiB) | on |\n"
        "|---|---|---|---|---|---|---|---|\n| " + " | ".join(cells) + " |\n"
    )


def figure(folder: Path, target: Path, title: str, paper: dict | None = None) -> None:
    """Accuracy against pruned share, before and after retraining: mean and standard deviation over runs."""
    points = by_point(folder)
    shares = sorted({share for share, _ in points})
    of = paper["pruned_of"] if paper else "masked_layers"
    pruned = [
        np.mean([r[f"pruned_percent_{of}"] for (s, _), rs in points.items() if s == x for r in rs]) for x in shares
    ]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, when, moment in zip(axes, ("test_before_retraining", "test"), ("before", "after"), strict=True):
        names = sorted({rule for _, rule in points})
        for k, name in enumerate(names):
            values = [accuracies(points.get((share, name), []), when) for share in shares]
            x = np.arange(len(shares)) + 0.06 * (k - (len(names) - 1) / 2)
            mean = [np.mean(v) if v else np.nan for v in values]
            std = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            criterion, *more = name.split(", ")
            style = {"color": COLOURS.get(criterion), "ls": "-" if more else "--"}
            axis.errorbar(x, mean, std, marker="o", capsize=3, label=name, **style)
        axis.set(
            title=f"{moment} retraining",
            xlabel=f"pruned weights of the {of.replace('_', ' ')} (%)",
            ylabel="test accuracy (%)",
        )
        axis.set_xticks(np.arange(len(shares)), [f"{percent:.4g}" for percent in pruned])
    dense = accuracies(baselines(folder))
    if dense:
        axes[1].axhline(np.mean(dense), color="black", lw=1, ls="--", label="dense")
    for k, point in enumerate(paper["mint"] if paper else []):
        x = np.interp(point["pruned_percent"], pruned, np.arange(len(shares)))
        label = None if k else "paper: MINT"
        axes[1].plot(x, point["accuracy"], "*", ms=13, color="tab:red", label=label, zorder=5)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title)
    save_figure(figure, target)


def fill(page: Path, name: str, content: str) -> None:
    """Replace what stands between the markers <!-- name --> and <!-- end name --> of a page."""
    marked = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    artifacts.write_bytes(page, marked.sub(lambda m: m[1] + content + m[2], page.read_text()).encode())


def save_figure(figure: plt.Figure, target: Path) -> None:
    """Write a figure so that the same records give the same bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def everything() -> None:
    """Regenerate all that is committed from the committed records: figures, and what stands between markers of pages.

    <!-- table FOLDER --> is the table of results/FOLDER, beside the published figures of that name if there are any;
    <!-- scoring FOLDER --> what its scores cost.
    """
    paper = artifacts.read_json(artifacts.RESULTS / "paper.json")
    for name in (n for n in paper if isinstance(paper[n], dict)):
        if runs(artifacts.RESULTS / name, 3):
            target = artifacts.RESULTS / "figures" / f"{name}.png"
            figure(artifacts.RESULTS / name, target, paper[name]["title"], paper[name])
    for page in (artifacts.ROOT / "README.md", artifacts.RESULTS / "README.md"):
        for kind, name in re.findall(r"<!-- (table|scoring) (\S+) -->", page.read_text()):
            folder = artifacts.RESULTS / name
            fill(page, f"{kind} {name}", table(folder, paper.get(name)) if kind == "table" else scoring_table(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of runs; none: everything that is committed")
    folder = parser.parse_args().folder
    if folder is None:
        everything()
        return 0
    if not runs(folder, 3):
        print(f"report: error: {folder} holds no finished run of stage 3", file=sys.stderr)
        return 2
    (folder / "table.md").write_text(table(folder))
    figure(folder, folder / "figure.png", folder.name)
    print((folder / "table.md").read_text() + f"\ntable: {folder / 'table.md'}\nfigure: {folder / 'figure.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
