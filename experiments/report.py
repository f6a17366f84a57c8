"""From records to tables.

python experiments/report.py results/demo    table.md of one folder of runs, in that folder
python experiments/report.py                 all committed records: tables in README.md and results/README.md
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, ttest_1samp

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import collect
from common import cli, files
from common.errors import InputError
from robustness import ATTACKS
from rules import DENSE, ROUNDS, estimate, rule, scores_of, unchanged

MOMENTS = {
    "test_before_retraining": "accuracy before retraining (%)",
    "test_after_1_epoch": "after 1 epoch (%)",
    "test": "accuracy (%)",
}
BEFORE = {  # retraining; see `retrain` in the convolutional folders' stage 3
    "test_masked": "masked (%)",
    "test_recalibrated": "recalibrated (%)",
    "test_before_retraining": "refitted (%)",
}
SPARSITY = {"masked_layers": "sparsity, masked layers (%)", "network": "sparsity, network (%)"}
MEMORY = "memory, masked layers (MiB)"
COMPARED = ("CMI", "random", "magnitude")  # the rules of Experiment 2
EMPTY = dict.fromkeys(("", *SPARSITY.values(), *MOMENTS.values(), MEMORY, "runs"), "")  # a row of `table`


def of_stage(records: list[dict], stage: int) -> list[dict]:
    """The records of one stage."""
    return [record for record in records if record["stage"] == stage]


def baselines(records: list[dict]) -> list[dict]:
    """The records of the dense networks' best epochs."""
    return [record for record in of_stage(records, 1) if "best" in record]


def by_point(records: list[dict]) -> dict[tuple[float, str], list[dict]]:
    """Pruned runs by (requested percentage, rule)."""
    points = defaultdict(list)
    for record in of_stage(records, 3):
        points[record["requested_percent"], rule(record)].append(record)
    return dict(sorted(points.items()))


def accuracies(records: list[dict], when: str = "test") -> list[float]:
    """Test accuracies of runs at a point in time; runs that did not record it are left out."""
    return [r[when]["accuracy"] for r in records if when in r]


def pruned_percent(record: dict, of: str) -> float:
    """Pruned percentage of the "masked_layers" or of the "network", by the mask: in its file's name to two decimals.

    Older records count every weight that is 0: also those that a refit left there, as it does of dead inputs.
    """
    by_mask = float(Path(record["path"]).stem.removeprefix("logits_"))
    counted = record["pruned_percent_masked_layers"]
    return record[f"pruned_percent_{of}"] * (by_mask / counted if counted else 1)


def mean_std(values: list[float]) -> str:
    """Mean and, of two or more values, sample standard deviation, in words."""
    std = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{std}" if values else ""


def markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table, named by the keys of the first."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def table(records: list[dict], paper: dict | None = None) -> str:
    """The runs of an experiment as a Markdown table, beside the published figures where there are any."""
    rows, dense, points = published(paper) if paper else [], baselines(records), by_point(records)
    if dense:
        accuracy = {MOMENTS["test"]: mean_std(accuracies(dense)), "runs": len(dense)}
        rows.append({**EMPTY, "": "**dense**", **dict.fromkeys(SPARSITY.values(), "0"), **accuracy})
    elif not points:
        rows.append({**EMPTY, "": "**here**", MOMENTS["test"]: "not run yet", "runs": 0})
    for (_, name), found in points.items():
        row = {**EMPTY, "": f"**{name}**", "runs": len(found)}
        row |= {title: f"{np.mean([pruned_percent(r, of) for r in found]):.2f}" for of, title in SPARSITY.items()}
        row |= {title: mean_std(accuracies(found, moment)) for moment, title in MOMENTS.items()}
        rows.append({**row, MEMORY: f"{np.mean([r['memory_mib_masked_layers'] for r in found]):.3f}"})
    return markdown(rows)


def published(paper: dict) -> list[dict]:
    """The published figures as rows of `table`."""
    rows = []
    for point in paper["points"]:
        row = {**EMPTY, "": f"paper: {point['name']}", SPARSITY[paper["pruned_of"]]: f"{point['pruned_percent']:.2f}"}
        row[MEMORY] = f"{point['memory_mib']:.3f}" if "memory_mib" in point else ""
        rows.append({**row, MOMENTS["test"]: f"{point['accuracy']:.2f}"})
    return rows


def overview(records: list[dict], moments: dict = MOMENTS) -> str:
    """One line per rule, one column per pruned share: accuracy before -> after 1 epoch -> after retraining."""
    points, dense = by_point(records), mean_std(accuracies(baselines(records)))
    shares, names = ({key[k] for key in points} for k in (0, 1))
    titles = {share: f"{share:.4g} % pruned" for share in sorted(shares)}
    rows = [{"rule": "dense", **dict.fromkeys(titles.values(), ""), titles[min(shares)]: dense}] if dense else []
    for name in sorted(names):
        rows.append(
            {"rule": name, **{titles[share]: trajectory(points.get((share, name), []), moments) for share in titles}}
        )
    return markdown(rows)


def trajectory(records: list[dict], moments: dict = MOMENTS) -> str:
    """Accuracies one moment after the other, as before -> after 1 epoch -> after retraining."""
    *early, last = (accuracies(records, moment) for moment in moments)
    means = [f"{np.mean(values):.1f}" if values else "?" for values in early]
    return " → ".join([*means, mean_std(last)]) if last else ""


def differences(records: list[dict], name: str, moments: dict = MOMENTS) -> str:
    """By how much one rule is ahead of each control at each pruned share, as a Markdown table.

    It is compared with what it is made of too: CMI alone, the same ranking neither balanced nor refitted, all at once
    instead of in rounds, with scores of means of maps instead of at positions, and with the paper's scores treated
    alike. Runs are paired by seed: they prune the same dense network; n networks.
    """
    at_once = name.removesuffix(f", {ROUNDS}")
    parts = {name.replace("CMI x magnitude", "CMI"), unchanged(name), at_once, name.replace(", positions", "")} - {name}
    if name.startswith("CMI, gaussian"):
        parts.add(", ".join(part for part in name.split(", ") if "given" not in part and part != "positions"))
    points, rows = by_point(records), []
    for share, ours in ((share, runs) for (share, rule_), runs in points.items() if rule_ == name):
        for (at, control), theirs in points.items():
            if (at == share or control == DENSE) and (not control.startswith("CMI") or control in parts):
                pairs = paired(ours, theirs)
                cells = {title: difference(pairs, moment) for moment, title in moments.items()}
                row = {f"{name}, ahead of": control, "pruned (%)": f"{share:.4g}", **cells}
                rows.append({**row, "n": len(by_network(pairs))})
    return markdown(rows)


def paired(ours: list[dict], theirs: list[dict], by: str = "seed") -> list[tuple[dict, dict]]:
    """Runs of two rules by seed: they prune the same dense network."""
    first, second = ({r[by]: r for r in records} for records in (ours, theirs))
    return [(first[key], second[key]) for key in sorted(first.keys() & second.keys())]


def by_network(pairs: list[tuple[dict, dict]]) -> list[list[tuple[dict, dict]]]:
    """Pairs of one dense network together: several samplings of images are no further networks."""
    found = defaultdict(list)
    for k, pair in enumerate(pairs):
        found[pair[0]["arguments"].get("Retrain", k)].append(pair)
    return list(found.values())


def gains(pairs: list[tuple[dict, dict]], moment: str) -> list[float]:
    """By how much the first of a pair is ahead, in points, of every network that recorded the moment the mean."""
    both = [[(a[moment], b[moment]) for a, b in same if moment in a and moment in b] for same in by_network(pairs)]
    return [np.mean([ours["accuracy"] - theirs["accuracy"] for ours, theirs in same]) for same in both if same]


def difference(pairs: list[tuple[dict, dict]], moment: str) -> str:
    """Mean paired difference of accuracies ± its standard error, of two networks or more, and what a t-test says.

    Its p-value is two-sided; a difference is shown below 0.01 only. n is named where not all pairs recorded the moment.
    Of a single pair whose records know every answer: over the images, by `mcnemar`.
    """
    if len(pairs) == 1 and all("right" in run.get(moment, {}) for run in pairs[0]):
        return stated(*mcnemar(*(run[moment]["right"] for run in pairs[0])))
    ahead = np.array(gains(pairs, moment))
    if len(ahead) < 2:
        return ""
    error = np.std(ahead, ddof=1) / np.sqrt(len(ahead))
    p = ttest_1samp(ahead, 0).pvalue if error else np.nan
    return stated(np.mean(ahead), error, p, [f"n = {len(ahead)}"] if len(ahead) < len(by_network(pairs)) else [])


def mcnemar(ours: str, theirs: str) -> tuple[float, float, float]:
    """Difference of two networks' accuracies on the same images, its standard error, in points, and a p-value.

    Exact and two-sided: of the images that one of them alone has right, half would be either's (McNemar, 1947).
    """
    won, lost = (sum(a > b for a, b in zip(x, y, strict=True)) for x, y in ((ours, theirs), (theirs, ours)))
    n, p = len(ours), binomtest(won, won + lost).pvalue if won + lost else 1.0
    return 100 * (won - lost) / n, 100 * np.sqrt(won + lost - (won - lost) ** 2 / n) / n, p


def stated(mean: float, error: float, p: float, notes: list[str] = ()) -> str:
    """A difference ± its standard error, and whether it is shown."""
    notes = list(notes)
    if error:
        notes.append("p < 0.001" if p < 0.001 else f"p = {p:.{4 if round(p, 3) == 0.01 else 3}f}")
    shown = f"{mean:+.2f} ± {error:.2f}" + (f" ({', '.join(notes)})" if notes else "")
    return shown if p < 0.01 else f"{shown}, no difference shown"


def by_groups(records: list[dict]) -> dict[tuple[int, int, str], list[dict]]:
    """Pruned runs of Experiment 2 by (groups, images per class of the scores, rule)."""
    found = defaultdict(list)
    for record in of_stage(records, 3):
        images = scores_of(record).get("samples_per_class")
        found[record["arguments"]["parent_clusters"][0], images, rule(record)].append(record)
    return found


def groups_table(records: list[dict], paper: list[dict]) -> str:
    """Experiment 2 beside the published figures: one line per number of groups and of images, one column per rule.

    The rank correlation is that of scores from two halves of the images.
    """
    found, reliability, rows = by_groups(records), defaultdict(list), []
    for record in of_stage(records, 2):
        if "split_half_rank_correlation" in record["scores"]:
            key = record["arguments"]["parent_clusters"][0], record["arguments"]["samples_per_class"]
            reliability[key].append(record["scores"]["split_half_rank_correlation"])
    for point in paper:
        key = point["groups"], point["samples_per_class"]
        runs = {name: found[*key, name] for name in COMPARED}
        ours = runs["CMI"]
        row = {"groups": key[0], "images per class": key[1], "paper: pruned (%)": f"{point['pruned_percent']:.2f}"}
        row["paper: accuracy (%)"] = f"{point['accuracy']:.2f}"
        row["pruned (%)"] = f"{np.mean([r['pruned_percent_masked_layers'] for r in ours]):.2f}" if ours else ""
        row |= {f"{name} (%)": trajectory(runs[name]) for name in COMPARED}
        row |= {f"CMI ahead of {name}": difference(paired(ours, runs[name]), "test") for name in COMPARED[1:]}
        rows.append({**row, "rank correlation": mean_std(reliability[key]), "n": len(ours)})
    return markdown(rows)


def validated_table(records: list[dict]) -> str:
    """Runs by rule and recipe: accuracy on the held-out images, which choose, and on the test set.

    In bold: the recipe with which CMI is best on the held-out images, at the largest pruned share.
    """
    columns = ("rule", "pruned (%)", "epochs", "weight decay", "dropout", "distillation")
    found, rows = defaultdict(list), []
    for record in [*baselines(records), *of_stage(records, 3)]:
        name, arguments = rule(record) if record["stage"] == 3 else "dense", record["arguments"]
        dropout = "as dense" if arguments.get("Dropout") is None else f"{arguments['Dropout']:g}"
        recipe = arguments["Epoch"], arguments["Weight_decay"], dropout, arguments.get("Distillation", 0)
        found[name, f"{record.get('requested_percent', 0):.2f}", *recipe].append(record)
    held_out = {key: [r["best"]["val_accuracy"] for r in runs] for key, runs in found.items()}
    ours = [key for key in found if key[0].startswith("CMI")]
    chosen = max(ours, key=lambda key: (float(key[1]), np.mean(held_out[key])), default=None)
    for key, runs in sorted(found.items()):
        row = dict(zip(columns, (f"**{part}**" if key == chosen else part for part in key), strict=True))
        row |= {"held-out accuracy (%)": mean_std(held_out[key]), MOMENTS["test"]: mean_std(accuracies(runs))}
        rows.append({**row, "n": len(runs)})
    return markdown(rows)


def scoring_table(records: list[dict]) -> str:
    """What it cost to score all layer pairs of a network, by kind of scores; of several networks the mean."""
    kinds, rows = defaultdict(list), []
    for record in of_stage(records, 2):
        whole = ["channels"] * (record["arguments"].get("granularity") == "channel")
        kinds[", ".join(["CMI", *estimate(record["arguments"]), *whole])].append(record)
    for kind, runs in kinds.items():
        networks = {(Path(record["path"]).parent, record["arguments"]["name_postfix"]) for record in runs}
        seconds, groups = [r["wall_seconds"] for r in runs], [np.prod(r["scores"]["shape"]) for r in runs]
        row = {
            "scores": kind,
            "layer pairs": f"{len(runs) / len(networks):.0f}",
            "scores per pair": f"{min(groups):,} to {max(groups):,}",
            "images": f"{runs[0]['scores']['samples']:,}",
            "seconds in all": f"{sum(seconds) / len(networks):,.0f}",
            "median per pair": f"{np.median(seconds):.1f}",
            "longest": f"{max(seconds):.1f}",
            "memory (MiB)": f"{max(r['peak_memory_mib'] for r in runs):,}",
            "networks": len(networks),
            "on": runs[0]["device"],
        }
        rows.append(row)
    return markdown(rows)


def exported(record: dict) -> str:
    """The name of an export by its folder."""
    return Path(record["path"]).parent.name.replace("_", " ")


def exports_table(records: list[dict]) -> str:
    """What stage 4 made of checkpoints: bytes by form and multiply-adds as shares of the dense network's."""
    rows = []
    for record in of_stage(records, 4):
        size, shrunk, masked = record["bytes"], record["shrunk"], record["masked"]
        row = {"export": exported(record), "dense (bytes)": f"{size['dense']:,}"}
        row |= {suffix: f"{size[suffix] / size['dense']:.2f}" for suffix in (".safetensors", ".pt2", ".onnx")}
        row["weights not 0"] = f"{masked['not_zero'] / masked['parameters']:.4f}"
        row["parameters, shrunk"] = f"{shrunk['parameters'] / masked['parameters']:.2f}"
        row["multiply-adds, shrunk"] = f"{shrunk['multiply_adds'] / masked['multiply_adds']:.2f}"
        rows.append({**row, "largest difference": f"{max(record['difference'].values()):.1e}"})
    return markdown(rows)


def latency_table(records: list[dict]) -> str:
    """Latency of masked and shrunk networks as shares of the dense ones', medians in the same run."""
    rows = []
    for record in of_stage(records, 4):
        for timed in record["latency"]:
            row = {"export": exported(record), **{key: timed[key] for key in ("threads", "batch")}}
            for engine in ("torch", "onnxruntime"):
                dense = timed["ms"][f"{engine} dense"]
                row[f"{engine}: dense (ms)"] = f"{dense:.3g}"
                for form in ("masked", "shrunk"):
                    row[f"{engine}: {form}"] = f"{timed['ms'][f'{engine} {form}'] / dense:.2f}"
            rows.append({**row, "on": record["device"]})
    return markdown(rows)


def attacked(records: list[dict], model: str) -> tuple[dict[str, list[dict]], list[float]]:
    """Records of robustness.py on one kind of network by rule, the dense ones first, and the eps that all have."""
    found = defaultdict(list)
    for record in of_stage(records, "attack"):
        if record["arguments"]["Model"] == model:
            found[record["rule"]].append(record)
    grids = [{0.0, *record["arguments"]["eps"]} for runs in found.values() for record in runs]
    by_rule = dict(sorted(found.items(), key=lambda item: (item[0] != "dense", item[0])))
    return by_rule, sorted(set.intersection(*grids)) if grids else []


def attacks_table(records: list[dict], model: str) -> str:
    """Accuracy under attacks by rule and eps; below, by how much CMI is ahead of the others, paired by network."""
    found, grid = attacked(records, model)
    ours = next((name for name in found if name.startswith("CMI")), None)
    some = [grid[k] for k in (0, len(grid) // 2, -1)] if grid else []
    rows, differences = [], []
    for kind, attack in ATTACKS.items():
        for name, runs in found.items():
            cells = {f"eps {eps:g}": mean_std(accuracies(runs, f"{kind}_{eps:g}")) for eps in grid}
            rows.append({"accuracy (%)": name, "attack": attack, **cells, "n": len(runs)})
            if ours and name != ours:
                pairs = paired(found[ours], runs, by="dense")
                cells = {f"eps {eps:g}": difference(pairs, f"{kind}_{eps:g}") for eps in some}
                differences.append({f"{ours}, ahead of": name, "attack": attack, **cells, "n": len(pairs)})
    return markdown(rows) + "\n" * bool(differences) + markdown(differences)


def fill(page: Path, name: str, content: str) -> None:
    """Replace what stands between the markers <!-- name --> and <!-- end name --> of a page."""
    marked = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    files.write_bytes(page, marked.sub(lambda m: m[1] + content + m[2], page.read_text(encoding="utf-8")).encode())


def pages(paper: dict) -> None:
    """All that stands between the markers <!-- KIND EXPERIMENT --> of pages, after "differences" EXPERIMENT: RULE."""
    kinds = {"table": table, "groups": groups_table, "overview": overview, "differences": differences}
    kinds |= {"scoring": scoring_table, "validated": validated_table}
    kinds |= {"exports": exports_table, "latency": latency_table, "attacks": attacks_table}
    kinds |= {f"{kind}-before": partial(kinds[kind], moments=BEFORE) for kind in ("overview", "differences")}
    for page in (files.ROOT / "README.md", files.RESULTS / "README.md"):
        marks = re.findall(rf"<!-- (({'|'.join(kinds)}) ([^:\s]+)(?:: (.+))?) -->", page.read_text(encoding="utf-8"))
        for mark, kind, name, ours in marks:
            more = [ours] if ours else [paper.get(name)] if kind in ("table", "groups") else []
            fill(page, mark, kinds[kind](collect.finished(files.RESULTS / name), *more))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of runs; none: everything that is committed")
    folder = parser.parse_args().folder
    if folder is None:
        paper = json.loads((files.RESULTS / "paper.json").read_text(encoding="utf-8"))
        pages(paper)
        return
    page = folder / "table.md"
    page.write_text(table(runs_of(folder)), encoding="utf-8")
    print(f"{page.read_text(encoding='utf-8')}\ntable: {page}")


def runs_of(folder: Path) -> list[dict]:
    """The records of a folder in which something was pruned."""
    records = collect.finished(folder)
    if not of_stage(records, 3):
        raise InputError(f"{folder} holds no finished run of stage 3")
    return records


if __name__ == "__main__":
    cli.run(main)
