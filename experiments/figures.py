"""From records to figures, as SVG and PNG.

python experiments/figures.py results/demo    figure.svg and figure.png of one folder of runs, in that folder
python experiments/figures.py                 all committed records: results/figures/

One style (figures.mplstyle); a rule has one colour everywhere, which the colour-blind tell from others (Okabe and Ito,
2008); bands and bars are ± sample standard deviation over runs; n stands in every title.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.stats import t

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import collect
from common import artifacts, cli, files
from report import (
    ATTACKS,
    BEFORE,
    COMPARED,
    MOMENTS,
    accuracies,
    attacked,
    baselines,
    by_groups,
    by_point,
    gains,
    paired,
    pruned_percent,
    runs_of,
)
from rules import unchanged

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.style.use(Path(__file__).with_suffix(".mplstyle"))

COLOURS = {
    "CMI": "#56B4E9",
    "CMI x magnitude": "#CC79A7",
    "CMI, given kept": "#0072B2",
    "CMI, given kept, positions": "#882255",
    "CMI, given kept, correlated groups": "#009E73",
    "magnitude": "#D55E00",
    "taylor": "#E69F00",
    "random": "#808080",
}
IMPLIED = ("single units", "gaussian")  # what a short name leaves out
ENDS = {"test_before_retraining": "before retraining", "test": "after retraining"}
BEST = "CMI, gaussian given kept, correlated groups, balanced, refit"
ATTACKED = {"mlp": "MLP, 96.2 % of fc2 pruned", "resnet56": "ResNet56, 70 % pruned"}
FIRST = {  # committed checkpoints, dense and pruned; their first layer and the one that reads it
    "mlp": (
        "robustness/baseline/0/logits_best.pkl",
        "robustness/correlated_even/0/0/logits_99.60.pkl",
        "fc1.weight",
        "fc2.weight",
    ),
    "resnet56": (
        "cifar10_jpeg/resnet56/baseline/0/0/logits_best.pkl",
        "cifar10_before/positions/0_0/0/logits_70.00.pkl",
        "conv1.weight",
        "layer1.0.conv1.weight",
    ),
}
TARGET = files.RESULTS / "figures"


def short(name: str) -> str:
    """A rule's name without its treatment and what a title says."""
    parts = [part.removeprefix("gaussian ") for part in unchanged(name).split(", ")]
    return ", ".join(part for part in parts if part not in IMPLIED)


def treatment(name: str) -> str:
    """What is done with a ranking: how blocks are chosen and fitted."""
    return ", ".join(name.split(", ")[unchanged(name).count(",") + 1 :]) or "one threshold, not refitted"


def colour(name: str) -> str:
    return COLOURS.get(short(name), COLOURS.get(short(name).split(",")[0], "black"))


def deviation(values: list[float]) -> float:
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def said(groups) -> str:
    """How many runs there are in each of the groups."""
    counts = [len(group) for group in groups]
    return f"n = {min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "")


def save(figure: plt.Figure, target: Path) -> None:
    """Both forms, the same bytes of the same records."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for kind, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        figure.savefig(target.with_suffix(kind), metadata=metadata)
    plt.close(figure)


def legend(figure: plt.Figure, axes: np.ndarray) -> None:
    """One for all panels."""
    found = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(3, len(found)))


def mostly(points: dict) -> dict:
    """The points of rules that ran at more than half of the shares; the others are left to the tables."""
    ran, shares = Counter(rule for _, rule in points), {share for share, _ in points}
    return {(share, rule): runs for (share, rule), runs in points.items() if 2 * ran[rule] > len(shares)}


def accuracy_figure(records: list[dict], target: Path, title: str, moments: dict, paper: dict | None = None) -> None:
    """Accuracy against kept weights: a row per treatment of the rankings, a column per moment."""
    points, of = mostly(by_point(records)), (paper or {}).get("pruned_of", "masked_layers")
    rows = sorted({treatment(rule) for _, rule in points}, reverse=True)
    size = 7, 0.9 + 1.9 * len(rows)
    figure, axes = plt.subplots(len(rows), len(moments), figsize=size, sharex=True, sharey="col", squeeze=False)
    for line, how in zip(axes, rows, strict=True):
        for axis, moment in zip(line, moments, strict=True):
            for name in dict.fromkeys(rule for _, rule in points if treatment(rule) == how):
                curve(axis, [runs for (_, rule), runs in points.items() if rule == name], name, moment, of)
            if moment == "test":
                references(axis, records, paper)
        line[0].set(ylabel="test accuracy (%)" if len(rows) == 1 else f"{how}\ntest accuracy (%)")
    for axis, label in zip(axes[0], moments.values(), strict=True):
        axis.set(title=label)
    for axis in axes[-1]:
        axis.set(xlabel="kept weights (%)" if of == "network" else "kept weights, masked layers (%)")
    ticks = sorted({round(kept(runs, of), 1) for runs in points.values()} - {0.0})
    for axis in axes.flat:
        axis.margins(x=0.04)  # 0.05 put a point on a tie of the last digit, where processors differ
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0, 0].xaxis.set_minor_locator(NullLocator())
    axes[0, 0].invert_xaxis()
    legend(figure, axes)
    figure.suptitle(f"{title} ({said(points.values())}, ± s.d.)")
    save(figure, target)


def kept(runs: list[dict], of: str) -> float:
    return 100 - np.mean([pruned_percent(record, of) for record in runs])


def curve(axis: plt.Axes, points: list[list[dict]], name: str, moment: str, of: str) -> None:
    """One rule's means and deviations over runs against what they keep."""
    x, values = [kept(runs, of) for runs in points], [accuracies(runs, moment) for runs in points]
    mean, std = ([f(found) if found else np.nan for found in values] for f in (np.mean, deviation))
    axis.plot(x, mean, "o-", color=colour(name), label=short(name))
    axis.fill_between(x, np.subtract(mean, std), np.add(mean, std), color=colour(name), alpha=0.2, lw=0)


def references(axis: plt.Axes, records: list[dict], paper: dict | None) -> None:
    """The dense networks and the published points."""
    if dense := accuracies(baselines(records)):
        axis.axhline(np.mean(dense), color="black", lw=0.8, ls="--")
        axis.annotate("dense", (1, np.mean(dense)), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    for point in (point for point in (paper or {}).get("points", []) if point["name"] == "MINT"):
        at = 100 - point["pruned_percent"], point["accuracy"]
        axis.plot(*at, "*", ms=10, color="black", zorder=5)
        axis.annotate("paper", at, xytext=(6, -10), textcoords="offset points")


def forest(records: list[dict], target: Path, ours: str, title: str, moments: dict) -> None:
    """By how much a rule is ahead of controls treated alike: 99 % intervals; where 0 is outside it is shown."""
    points, rows = by_point(records), []
    for (share, control), theirs in points.items():
        if not control.startswith("CMI") and treatment(control) == treatment(ours) and (share, ours) in points:
            rows.append((f"{short(control)}, {share:.4g} %", colour(control), paired(points[share, ours], theirs)))
    rows.sort(key=lambda row: row[0].split(",")[0])
    figure, axes = plt.subplots(1, len(moments), figsize=(7, 0.8 + 0.22 * len(rows)), sharey=True)
    for axis, (moment, label) in zip(axes, moments.items(), strict=True):
        for y, (_, tint, pairs) in enumerate(rows):
            values = gains(pairs, moment)
            if len(values) > 1:
                half = t.ppf(0.995, len(values) - 1) * deviation(values) / np.sqrt(len(values))
                axis.errorbar(np.mean(values), y, xerr=half, fmt="o", color=tint)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=label.removesuffix(" (%)"), xlabel="points ahead")
    axes[0].set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes[0].invert_yaxis()
    figure.suptitle(f"{title} ({said(pairs for *_, pairs in rows)}, 99 % intervals)")
    save(figure, target)


def layers_figure(records: list[dict], target: Path, share: float, title: str) -> None:
    """What every rule keeps of every layer of a deep network at one pruned share: means over runs."""
    points = {rule: runs for (at, rule), runs in by_point(records).items() if abs(at - share) < 0.005}
    layers = list(next(iter(points.values()))[0]["pruned_percent_by_layer"])
    stages = [layer.split(".")[0] for layer in layers]
    figure, axis = plt.subplots(figsize=(7, 2.8))
    for rule, runs in points.items():
        left = np.mean([kept_by_layer(record) for record in runs], 0)
        axis.plot(range(len(layers)), left, drawstyle="steps-mid", color=colour(rule), label=short(rule))
    if len(set(stages)) == len(layers):  # a network without stages
        axis.set_xticks(range(len(layers)), stages)
    else:
        for k in (k for k in range(1, len(layers)) if stages[k] != stages[k - 1]):
            axis.axvline(k - 0.5, color="black", lw=0.5, ls=":")
        axis.set(xlabel="masked layers, first to last; dotted: stages")
    axis.set(ylabel="kept weights (%)", ylim=(0, None))
    axis.set(title=f"{title} ({said(points.values())})")
    figure.legend(loc="outside lower center", ncols=5)
    save(figure, target)


def rules_figure(records: list[dict], target: Path, title: str) -> None:
    """What every rule keeps of the few layers of a network, at its one pruned share: a panel per layer."""
    points = {rule: runs for (_, rule), runs in by_point(records).items()}
    layers = list(next(iter(points.values()))[0]["pruned_percent_by_layer"])
    figure, axes = plt.subplots(1, len(layers), figsize=(7, 0.8 + 0.2 * len(points)), sharey=True)
    for y, (rule, runs) in enumerate(points.items()):
        for axis, *values in zip(axes, *map(kept_by_layer, runs), strict=True):
            axis.errorbar(np.mean(values), y, xerr=deviation(values), fmt="o", color=colour(rule))
    for axis, layer in zip(axes, layers, strict=True):
        axis.set(title=layer.removesuffix(".weight"), xlabel="kept weights (%)", xlim=(0, None))
    axes[0].set_yticks(range(len(points)), points)
    axes[0].invert_yaxis()
    figure.suptitle(f"{title} ({said(points.values())}, ± s.d.)")
    save(figure, target)


def kept_by_layer(record: dict) -> list[float]:
    return [100 - pruned for pruned in record["pruned_percent_by_layer"].values()]


def retraining_figure(records: list[dict], target: Path, share: float, title: str) -> None:
    """Test error along retraining at one pruned share: what a mask leaves, and how retraining makes it alike."""
    points = {rule: runs for (at, rule), runs in mostly(by_point(records)).items() if at == share}
    columns = sorted({treatment(rule) for rule in points}, reverse=True)
    figure, axes = plt.subplots(1, len(columns), figsize=(7, 2.8), sharey=True, squeeze=False)
    epochs, dense = max(len(run["epochs"]) for runs in points.values() for run in runs), accuracies(baselines(records))
    for axis, how in zip(axes[0], columns, strict=True):
        for rule in (rule for rule in points if treatment(rule) == how):
            errors = [[100 - accuracy for accuracy in accuracies(points[rule], moment)] for moment in MOMENTS]
            bars = [np.mean(values) for values in errors], [deviation(values) for values in errors]
            axis.errorbar(range(len(MOMENTS)), *bars, fmt="o-", color=colour(rule), label=short(rule))
        axis.axhline(100 - np.mean(dense), color="black", lw=0.8, ls="--")
        axis.annotate("dense", (0, 100 - np.mean(dense)), va="bottom")
        axis.set(title=how, yscale="log")
        axis.set_xticks(range(len(MOMENTS)), ["before\nretraining", "after\n1 epoch", f"after\n{epochs}"])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes[0, 0].set(ylabel="test error (%)")
    legend(figure, axes)
    figure.suptitle(f"{title} ({said(points.values())}, ± s.d.)")
    save(figure, target)


def epochs_figure(records: list[dict], target: Path, title: str) -> None:
    """Test error against the epochs of a whole retraining, a panel per pruned share: how long a lead lasts."""
    found = {}  # runs by share, rule and epochs
    for record in records:
        for (share, rule), runs in by_point([record]).items():
            found.setdefault((share, rule), {}).setdefault(record["arguments"]["Epoch"], []).extend(runs)
    shares, lengths = sorted({share for share, _ in found} - {0.0}), [0, *sorted(set().union(*found.values()))]
    figure, axes = plt.subplots(1, len(shares), figsize=(7, 2.8), sharey=True)
    for axis, share in zip(axes, shares, strict=True):
        for rule, by_epochs in ((rule, runs) for (at, rule), runs in sorted(found.items()) if at in (0, share)):
            values = {0: accuracies(next(iter(by_epochs.values())), "test_before_retraining")}
            values |= {epochs: accuracies(runs) for epochs, runs in sorted(by_epochs.items())}
            bars = [100 - np.mean(value) for value in values.values()], list(map(deviation, values.values()))
            style = {"fmt": "o-", "color": colour(rule), "label": short(rule)}
            axis.errorbar([lengths.index(epochs) for epochs in values], *bars, **style)
        pruned = pruned_percent(found[share, rule][lengths[1]][0], "network")
        axis.set(title=f"{pruned:.4g} % of all weights pruned", xlabel="epochs of retraining", yscale="log")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.yaxis.set_major_locator(FixedLocator((10, 15, 20, 30, 50, 80)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    axes[0].set(ylabel="test error (%)")
    legend(figure, axes)
    figure.suptitle(f"{title} ({said(runs for by_epochs in found.values() for runs in by_epochs.values())}, ± s.d.)")
    save(figure, target)


def groups_figure(records: list[dict], target: Path, paper: list[dict]) -> None:
    """Experiment 2: accuracy against the number of groups, and against the images per class."""
    found = by_groups(records)
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
    panels = (("groups", "samples_per_class", 250), ("samples_per_class", "groups", 20))
    for axis, (varied, fixed, value) in zip(axes, panels, strict=True):
        shown = sorted((point for point in paper if point[fixed] == value), key=lambda point: point[varied])
        keys = list(dict.fromkeys((point["groups"], point["samples_per_class"]) for point in shown))
        ticks = list(dict.fromkeys(point[varied] for point in shown))
        for k, name in enumerate(COMPARED):
            values = [accuracies(found[*key, name]) for key in keys]
            bars = [np.mean(value) for value in values], [deviation(value) for value in values]
            axis.errorbar(np.arange(len(keys)) + 0.06 * (k - 1), *bars, fmt="o-", color=colour(name), label=name)
        stars = [ticks.index(point[varied]) for point in shown], [point["accuracy"] for point in shown]
        axis.plot(*stars, "*", ms=8, color="black", label="paper")
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set(xlabel=f"{varied}, {fixed} {value}".replace("samples_per_class", "images per class"))
    axes[0].set(ylabel="test accuracy (%)")
    legend(figure, axes)
    figure.suptitle(f"MNIST-MLP, Experiment 2 ({said(runs for runs in found.values() if runs)}, ± s.d.)")
    save(figure, target)


def attacks_figure(records: list[dict], target: Path, models: dict[str, str]) -> None:
    """Accuracy under attacks against the size of their steps: a row per kind of network, a column per attack."""
    figure, axes = plt.subplots(len(models), len(ATTACKS), figsize=(7, 0.9 + 2 * len(models)), squeeze=False)
    for line, (model, title) in zip(axes, models.items(), strict=True):
        found, grid = attacked(records, model)
        for axis, (kind, name) in zip(line, ATTACKS.items(), strict=True):
            for rule, runs in found.items():
                values = [accuracies(runs, f"{kind}_{eps:g}") for eps in grid]
                mean, std = ([f(value) for value in values] for f in (np.mean, deviation))
                axis.plot(grid, mean, "o-", color=colour(rule), label=short(rule))
                axis.fill_between(grid, np.subtract(mean, std), np.add(mean, std), color=colour(rule), alpha=0.2, lw=0)
            axis.set(title=f"{title} ({said(found.values())})\n{name}", xlabel="eps, the size of each of 5 steps")
        line[0].set(ylabel="test accuracy (%)")
    legend(figure, axes)
    figure.suptitle("Under attack (± s.d.)")
    save(figure, target)


def filters_figure(target: Path, shown: int = 40, columns: int = 20) -> None:
    """First layers of committed networks: the MLP's units that fc2 reads or not, ResNet56's by how many read them."""
    figure, axes = plt.subplots(3, figsize=(7, 3), height_ratios=(2, 2, 1.3))
    weights, readers = first_layer(*FIRST["mlp"])
    norms = np.linalg.norm(weights, axis=1)
    for axis, which, word in ((axes[0], readers > 0, "still read"), (axes[1], readers == 0, "no longer read")):
        order = np.flatnonzero(which)[np.argsort(-norms[which])]
        tiles = weights[order[np.linspace(0, len(order) - 1, shown).round().astype(int)]]
        mosaic = beside(tiles.reshape(-1, columns, 28, 28), 2, np.nan)
        axis.imshow(mosaic, cmap="RdBu", vmin=-0.15, vmax=0.15, interpolation="nearest")
        norm = f"norm {norms[which].mean():.2f} ± {norms[which].std(ddof=1):.2f}, the largest first"
        axis.set(title=f"{len(order)} units are {word} when 99.6 % of fc2 is pruned, {shown} of them here; {norm}")
    weights, readers = first_layer(*FIRST["resnet56"])
    order = np.argsort(-readers, kind="stable")
    mosaic = beside((0.5 + weights[order].transpose(0, 2, 3, 1)[None] / 1.2).clip(0, 1), 1, 1.0)
    axes[2].imshow(mosaic, interpolation="nearest")
    for k, channel in enumerate(order):
        axes[2].text(4 * k + 1, 3, f"{readers[channel]}", ha="center", va="top")
    axes[2].set(title="ResNet56's conv1, 70 % pruned: how many of the next convolution's 16 channels read each filter")
    for axis in axes:
        axis.axis("off")
    save(figure, target)


def first_layer(dense: str, pruned: str, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """The weights of a dense network's first layer, and how many units of the second read each of its units."""
    before, after = (artifacts.load_checkpoint(files.under_results(path)) for path in (dense, pruned))
    mask = after["masks"][second]
    readers = mask.reshape(*mask.shape[:2], -1).any(2).sum(0)
    return before["state_dict"][first].numpy(), readers.numpy()


def beside(tiles: np.ndarray, gap: int, between: float) -> np.ndarray:
    """Pictures (rows, columns, height, width, ...) as one, with gaps."""
    around = [(0, 0), (0, 0), (0, gap), (0, gap), *[(0, 0)] * (tiles.ndim - 4)]
    padded = np.pad(tiles, around, constant_values=between).swapaxes(1, 2)
    rows, height, columns, width, *colours = padded.shape
    return padded.reshape(rows * height, columns * width, *colours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of runs; none: everything that is committed")
    folder = parser.parse_args().folder
    if folder is not None:
        accuracy_figure(runs_of(folder), folder / "figure", folder.name, ENDS)
        print(f"figure: {folder / 'figure.png'}")
        return
    paper = json.loads((files.RESULTS / "paper.json").read_text(encoding="utf-8"))
    runs = {file.stem: collect.finished(file.with_suffix("")) for file in sorted(files.RESULTS.glob("*.jsonl"))}
    for name in ("mnist_mlp", "mnist_short"):
        accuracy_figure(runs[name], TARGET / name, paper[name]["title"], ENDS, paper[name])
    for name in ("mnist_network", "mnist_weights"):
        rules_figure(runs[name], TARGET / name, paper[name]["title"])
    groups_figure(runs["mnist_groups"], TARGET / "mnist_groups", paper["mnist_groups"])
    forest(runs["mnist_mlp"], TARGET / "mnist_differences", BEST, f"{short(BEST)}, against", MOMENTS)
    retraining_figure(runs["mnist_mlp"], TARGET / "mnist_retraining", 99.6, "MNIST-MLP, 99.6 % of fc2 pruned")
    before = {moment: label.removesuffix(" (%)") for moment, label in BEFORE.items()}
    accuracy_figure(runs["cifar10_before"], TARGET / "cifar10_before", "ResNet56, not retrained", before)
    epochs_figure(runs["cifar10_retrained"], TARGET / "cifar10_retrained", "ResNet56, refitted and retrained")
    layers_figure(runs["cifar10_before"], TARGET / "cifar10_layers", 70.0, "ResNet56, 70 % of the masked layers pruned")
    layers_figure(runs["cifar10_vgg16_before"], TARGET / "vgg16_layers", 84.96, "VGG16, 83.46 % of all weights pruned")
    attacks_figure(runs["robustness"], TARGET / "robustness", ATTACKED)
    filters_figure(TARGET / "filters")


if __name__ == "__main__":
    cli.run(main)
