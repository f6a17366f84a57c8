"""From records to tables and figures.

python -m common.report results/demo       table.md and figure.png of one folder of runs, in that folder
python -m common.report                    all committed records: results/README.md, the tables in README.md, figures
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import ttest_rel

from common import artifacts, cli, collect
from common.errors import InputError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "cmi": "tab:blue",
    "cmi (kept)": "tab:cyan",
    "cmi (correlated)": "tab:green",
    "cmi-magnitude (kept)": "tab:purple",
    "magnitude": "tab:orange",
    "random": "tab:gray",
}
MOMENTS = {
    "test_before_retraining": "accuracy before retraining (%)",
    "test_after_1_epoch": "after 1 epoch (%)",
    "test": "accuracy (%)",
}


def runs(folder: Path, stage: int) -> list[dict]:
    """The records of a stage's finished runs below a folder, in a fixed order."""
    return [record for record in collect.finished(folder) if record["stage"] == stage]


def baselines(folder: Path) -> list[dict]:
    """The records of the dense networks' best epochs."""
    return [r for r in runs(folder, 1) if "best" in r]


def rule(record: dict) -> str:
    """What chose the mask of a pruned run, in words; scores are named unless they have stage 2's default name."""
    arguments = record["arguments"]
    scores = Path(arguments.get("Retrain_mask") or "").stem.removeprefix("I_parent_")
    named = f" ({scores})" if scores not in ("", "cmi") else ""
    changes = "".join(f", {name.lower()}" for name in ("Even", "Refit") if arguments.get(name))
    return arguments["Criterion"] + named + changes


def by_point(folder: Path) -> dict[tuple[float, str], list[dict]]:
    """Pruned runs by (requested percentage, rule)."""
    points = defaultdict(list)
    for record in runs(folder, 3):
        points[record["requested_percent"], rule(record)].append(record)
    return dict(sorted(points.items()))


def accuracies(records: list[dict], when: str = "test") -> list[float]:
    """Test accuracies of runs at a point in time; runs that did not record it are left out."""
    return [r[when]["accuracy"] for r in records if when in r]


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation: nan and 0 where there are too few values."""
    return np.mean(values) if values else np.nan, np.std(values, ddof=1) if len(values) > 1 else 0


def mean_std(values: list[float]) -> str:
    """The same in words, the deviation only of two or more values."""
    if not values:
        return ""
    mean, std = mean_and_std(values)
    return f"{mean:.2f}" + (f" ± {std:.2f}" if len(values) > 1 else "")


def table(folder: Path, paper: dict | None = None) -> str:
    """The runs of one folder as a Markdown table, beside the published figures where there are any."""
    lines = [
        "| | pruned, masked layers (%) | pruned, network (%) | "
        + " | ".join(MOMENTS.values())
        + " | memory, masked layers (MiB) | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(name: str, *cells: str) -> None:
        lines.append("| " + " | ".join((name, *cells)) + " |")

    def published(name: str, point: dict) -> None:
        pruned = f"{point['pruned_percent']:.2f}"
        shares = (pruned, "") if paper["pruned_of"] == "masked_layers" else ("", pruned)
        memory = f"{point['memory_mib']:.3f}" if "memory_mib" in point else ""
        row(f"paper: {name}", *shares, "", "", f"{point['accuracy']:.2f}", memory, "")

    if paper and "baseline_accuracy" in paper:
        dense = {
            "pruned_percent": 0,
            "accuracy": paper["baseline_accuracy"],
            "memory_mib": paper["baseline_memory_mib"],
        }
        published("dense", dense)
    if paper:
        for point in paper["mint"]:
            published("MINT", point)
        for point in paper["others"]:
            published(point["name"], point)
    dense = baselines(folder)
    if dense:
        row("**dense**", "0", "0", "", "", mean_std(accuracies(dense)), "", str(len(dense)))
    elif not by_point(folder):
        row("**here**", "", "", "", "", "not run yet", "", "0")
    for (_, criterion), records in by_point(folder).items():
        cells = (
            f"{np.mean([r['pruned_percent_masked_layers'] for r in records]):.2f}",
            f"{np.mean([r['pruned_percent_network'] for r in records]):.2f}",
            *(mean_std(accuracies(records, moment)) for moment in MOMENTS),
            f"{np.mean([r['memory_mib_masked_layers'] for r in records]):.3f}",
            str(len(records)),
        )
        row(f"**{criterion}**", *cells)
    return "\n".join(lines) + "\n"


def overview(folder: Path) -> str:
    """One line per rule, one column per pruned share: accuracy before -> after 1 epoch -> after retraining."""
    points = by_point(folder)
    shares = sorted({share for share, _ in points})
    lines = [
        "| rule | " + " | ".join(f"{share:.4g} % pruned" for share in shares) + " |",
        "|---" * (len(shares) + 1) + "|",
    ]
    if baselines(folder):
        lines.append(f"| dense | {mean_std(accuracies(baselines(folder)))}" + " |" * len(shares))
    for name in sorted({name for _, name in points}):
        cells = [course(points.get((share, name), [])) for share in shares]
        lines.append("| " + " | ".join((name, *cells)) + " |")
    return "\n".join(lines) + "\n"


def course(records: list[dict]) -> str:
    """Accuracy before -> after 1 epoch -> after retraining."""
    *early, last = (accuracies(records, moment) for moment in MOMENTS)
    means = [f"{np.mean(values):.1f}" if values else "?" for values in early]
    return " → ".join([*means, mean_std(last)]) if last else ""


def differences(folder: Path, name: str) -> str:
    """By how much one rule is ahead of each control at each pruned share, as a Markdown table.

    It is compared with what it is made of too: CMI alone, and the same ranking without the even spread or the refit.
    Runs are paired by seed: they prune the same dense network. Difference of means ± its standard error, and the
    two-sided p-value of the paired t-test.
    """
    lines = [
        f"| {name}, ahead of | pruned (%) | " + " | ".join(MOMENTS.values()) + " | networks |",
        "|---|---|---|---|---|---|",
    ]
    points, parts = by_point(folder), {name.replace("cmi-magnitude", "cmi"), name.split(",")[0]} - {name}
    for share, control in points:
        if (control.startswith("cmi") and control not in parts) or (share, name) not in points:
            continue
        pairs = paired(points[share, name], points[share, control])
        cells = [difference(pairs, moment) for moment in MOMENTS]
        lines.append("| " + " | ".join((control, f"{share:.4g}", *cells, str(len(pairs)))) + " |")
    return "\n".join(lines) + "\n"


def paired(ours: list[dict], theirs: list[dict]) -> list[tuple[dict, dict]]:
    """Runs of two rules by seed: they prune the same dense network."""
    first, second = ({r["seed"]: r for r in records} for records in (ours, theirs))
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def difference(pairs: list[tuple[dict, dict]], moment: str) -> str:
    """Mean paired difference of accuracies ± its standard error, and the p-value, of two pairs or more."""
    pairs = [(a[moment]["accuracy"], b[moment]["accuracy"]) for a, b in pairs if moment in a and moment in b]
    if len(pairs) < 2:
        return ""
    ours, theirs = np.array(pairs).T
    error = np.std(ours - theirs, ddof=1) / np.sqrt(len(pairs))
    shown = f"{np.mean(ours - theirs):+.2f} ± {error:.2f}"
    if not error:
        return shown
    p = ttest_rel(ours, theirs).pvalue
    return shown + (" (p < .001)" if p < 0.001 else f" (p = {p:.3f})".replace("= 0.", "= ."))


def by_groups(folder: Path) -> dict[tuple[int, int, str], list[dict]]:
    """Pruned runs of Experiment 2 by (groups, images per class, criterion), as their scores are named."""
    found = defaultdict(list)
    for record in runs(folder, 3):
        scores = Path(record["arguments"]["Retrain_mask"]).stem.removeprefix("I_parent_")
        found[*map(int, scores.split("_")), record["arguments"]["Criterion"]].append(record)
    return found


def groups_table(folder: Path, paper: list[dict]) -> str:
    """Experiment 2 beside the published figures: one line per number of groups and of images, one column per rule.

    The rank correlation is that of scores from two halves of the images.
    """
    found, reliability = by_groups(folder), defaultdict(list)
    for record in runs(folder, 2):
        if "split_half_rank_correlation" in record["scores"]:
            reliability[record["arguments"]["name_postfix"]].append(record["scores"]["split_half_rank_correlation"])
    lines = [
        "| groups | images per class | paper: pruned (%) | paper: accuracy (%) | pruned (%) | cmi (%) | random (%) "
        "| magnitude (%) | cmi ahead of random | cmi ahead of magnitude | rank correlation | networks |",
        "|---" * 12 + "|",
    ]
    for point in paper:
        key = point["groups"], point["samples_per_class"]
        cmi, *controls = (found[*key, criterion] for criterion in ("cmi", "random", "magnitude"))
        cells = (
            *map(str, key),
            f"{point['pruned_percent']:.2f}",
            f"{point['accuracy']:.2f}",
            f"{np.mean([r['pruned_percent_masked_layers'] for r in cmi]):.2f}" if cmi else "",
            *(course(records) for records in (cmi, *controls)),
            *(difference(paired(cmi, records), "test") for records in controls),
            mean_std(reliability["{}_{}".format(*key)]),
            str(len(cmi)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def validated_table(folder: Path) -> str:
    """Runs by rule and recipe: accuracy on the held-out images, which choose, and on the test set.

    In bold: the recipe with which CMI is best on the held-out images.
    """
    found = defaultdict(list)
    for record in [*baselines(folder), *runs(folder, 3)]:
        name, arguments = rule(record) if record["stage"] == 3 else "dense", record["arguments"]
        dropout = arguments.get("Dropout")
        dropout = "as dense" if dropout is None else f"{dropout:g}"
        found[name, arguments["Epoch"], arguments["Weight_decay"], dropout].append(record)
    held_out = {key: [r["best"]["val_accuracy"] for r in records] for key, records in found.items()}
    ours = [key for key in found if key[0].startswith("cmi")]
    chosen = max(ours, key=lambda key: np.mean(held_out[key]), default=None)
    lines = [
        "| rule | epochs | weight decay | dropout | pruned (%) | held-out accuracy (%) | accuracy (%) | networks |",
        "|---" * 8 + "|",
    ]
    for key, records in sorted(found.items()):
        recipe = (f"**{part}**" if key == chosen else str(part) for part in key)
        pruned = f"{np.mean([r.get('pruned_percent_masked_layers', 0) for r in records]):.2f}"
        cells = (*recipe, pruned, mean_std(held_out[key]), mean_std(accuracies(records)), str(len(records)))
        lines.append("| " + " | ".join(cells) + " |")
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


def campaigns_table(record: dict) -> str:
    """What the campaigns of `make soak` tried, and how it ended."""
    lines = ["| tried | times | how it ended |", "|---|---|---|"]

    def row(name: str, count: int, end: str) -> None:
        lines.append(f"| {name} | {count:,} | {end} |")

    for stage in "123":
        kills = record[f"kills_of_stage_{stage}"]
        same = kills["finished"] - kills["other_bytes"]
        end = f"{same} of {kills['finished']} runs that finished have the bytes of an undisturbed one; "
        row(f"kill of stage {stage}", kills["kills"], end + f"{kills['not_whole']} files were seen half written")
    for kind, damage in record["damaged_files"].items():
        row(f"damage to a file: {kind}", damage["tried"], f"{damage['refused']:,} refused")
    hostile, flags = record["hostile_files"], record["illegal_flags"]
    end = f"{hostile['refused']} refused; {hostile['executed']} executed what they hold"
    row("hostile file", hostile["tried"], end)
    row("illegal flag or value", flags["tried"], f"{flags['refused']} refused in one line, exit code 2")
    for name, kind, good in (("file", "files", "read"), ("command line", "command_lines", "taken")):
        fuzz = record[f"fuzzed_{kind}"]
        refused = fuzz["tried"] - fuzz[good] - fuzz["other_ends"]
        row(
            f"random {name}",
            fuzz["tried"],
            f"{refused:,} refused, {fuzz[good]:,} {good}, {fuzz['other_ends']} otherwise",
        )
    return "\n".join(lines) + "\n"


def figure(folder: Path, target: Path, title: str, paper: dict | None = None) -> None:
    """Accuracy against pruned share, before and after retraining: mean and standard deviation over runs.

    Rules that ran at a single share of several are left to the tables.
    """
    points = by_point(folder)
    shares = sorted({share for share, _ in points})
    ran = Counter(name for _, name in points)
    points = {point: runs for point, runs in points.items() if ran[point[1]] > 1 or len(shares) == 1}
    of = paper["pruned_of"] if paper else "masked_layers"
    pruned = [
        np.mean([r[f"pruned_percent_{of}"] for (s, _), rs in points.items() if s == x for r in rs]) for x in shares
    ]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, when, moment in zip(axes, ("test_before_retraining", "test"), ("before", "after"), strict=True):
        names = sorted({rule for _, rule in points})
        for k, name in enumerate(names):
            values = [accuracies(points.get((share, name), []), when) for share in shares]
            criterion, *more = name.split(", ")
            style = {"color": COLOURS.get(criterion), "ls": "-" if more else "--"}
            draw(axis, values, 0.04 * (k - (len(names) - 1) / 2), label=name, **style)
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


def draw(axis: plt.Axes, values: list[list[float]], shift: float, **style) -> None:
    """Mean and standard deviation of every list, side by side; `shift` keeps several rules apart."""
    mean, std = zip(*map(mean_and_std, values), strict=True)
    axis.errorbar(np.arange(len(values)) + shift, mean, std, marker="o", capsize=3, **style)


def layers_figure(folder: Path, target: Path, title: str) -> None:
    """What every rule keeps of every layer, at one pruned share: means over runs."""
    points = by_point(folder)
    layers = list(next(iter(points.values()))[0]["pruned_percent_by_layer"])
    figure, axis = plt.subplots(figsize=(9, 0.5 + 0.32 * len(points) * max(1, len(layers) / 3)), layout="constrained")
    for k, ((_, name), records) in enumerate(points.items()):
        kept = [100 - np.mean([r["pruned_percent_by_layer"][layer] for r in records]) for layer in layers]
        y = np.arange(len(layers)) + 0.8 * (k / len(points) - 0.5)
        axis.barh(y, kept, 0.75 / len(points), label=name)
    axis.set_yticks(np.arange(len(layers)), layers)
    axis.set(xscale="log", xlabel="kept weights of the layer (%)", title=title)
    axis.invert_yaxis()
    figure.legend(loc="outside right upper")
    save_figure(figure, target)


def groups_figure(folder: Path, target: Path, paper: list[dict]) -> None:
    """Experiment 2: accuracy against the number of groups, and against the images per class."""
    found = by_groups(folder)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
    panels = (("groups", "samples_per_class", 250), ("samples_per_class", "groups", 20))
    for axis, (varied, fixed, value) in zip(axes, panels, strict=True):
        points = sorted((point for point in paper if point[fixed] == value), key=lambda point: point[varied])
        keys = list(dict.fromkeys((point["groups"], point["samples_per_class"]) for point in points))
        ticks = list(dict.fromkeys(point[varied] for point in points))
        for k, criterion in enumerate(("cmi", "random", "magnitude")):
            values = [accuracies(found[*key, criterion]) for key in keys]
            draw(axis, values, 0.06 * (k - 1), label=criterion, color=COLOURS[criterion])
        stars = [ticks.index(point[varied]) for point in points], [point["accuracy"] for point in points]
        axis.plot(*stars, "*", ms=13, color="tab:red", label="paper: MINT")
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set(xlabel=f"{varied}, {fixed} {value}".replace("samples_per_class", "images per class"))
    axes[0].set(ylabel="test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
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
    <!-- overview FOLDER --> its runs by rule and share; <!-- differences FOLDER: RULE --> by how much a rule is ahead
    of the controls; <!-- groups FOLDER --> Experiment 2; <!-- validated FOLDER --> what held-out images choose;
    <!-- scoring FOLDER --> what scores cost; <!-- campaigns soak.json --> those of that record.
    """
    paper = json.loads((artifacts.RESULTS / "paper.json").read_text())
    for name in (n for n in paper if isinstance(paper[n], dict)):
        folder, target = artifacts.RESULTS / name, artifacts.RESULTS / "figures" / f"{name}.png"
        shares = {share for share, _ in by_point(folder)}
        if len(shares) > 1:
            figure(folder, target, paper[name]["title"], paper[name])
        elif shares:
            layers_figure(folder, target, paper[name]["title"])
    groups = artifacts.RESULTS / "mnist_groups"
    if by_groups(groups):
        groups_figure(groups, artifacts.RESULTS / "figures" / "mnist_groups.png", paper["mnist_groups"])
    contents = {
        "table": lambda folder, _: table(folder, paper.get(folder.name)),
        "overview": lambda folder, _: overview(folder),
        "scoring": lambda folder, _: scoring_table(folder),
        "validated": lambda folder, _: validated_table(folder),
        "campaigns": lambda record, _: campaigns_table(artifacts.read_json(record)),
        "differences": differences,
        "groups": lambda folder, _: groups_table(folder, paper[folder.name]),
    }
    pages = (artifacts.ROOT / "README.md", artifacts.ROOT / "SECURITY.md", artifacts.RESULTS / "README.md")
    for page in pages:
        for mark in re.findall(rf"<!-- ((?:{'|'.join(contents)}) \S+(?:: .+)?) -->", page.read_text()):
            kind, name, *rest = re.fullmatch(r"(\w+) ([^:\s]+)(?:: (.+))?", mark).groups()
            fill(page, mark, contents[kind](artifacts.RESULTS / name, *rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of runs; none: everything that is committed")
    folder = parser.parse_args().folder
    if folder is None:
        everything()
        return
    if not runs(folder, 3):
        raise InputError(f"{folder} holds no finished run of stage 3")
    (folder / "table.md").write_text(table(folder))
    figure(folder, folder / "figure.png", folder.name)
    print((folder / "table.md").read_text() + f"\ntable: {folder / 'table.md'}\nfigure: {folder / 'figure.png'}")


if __name__ == "__main__":
    cli.run(main)
