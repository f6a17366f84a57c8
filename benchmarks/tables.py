"""Records of benchmarks and of `make soak` as tables of all pages and as figures; part of `make tables`."""

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "experiments")]
from common import files, records
from figures import colour, save
from output import FOLDER
from report import accuracies, difference, fill, markdown, mean_std

BEST = "CMI, gaussian given kept, correlated groups, balanced, refit"  # of the rules in results/mnist_mlp


def pivot(rows: list[dict], index: dict[str, str], cell: Callable[[dict], str]) -> str:
    """One line per combination of the index, one column per estimator; `index` maps keys to headings."""
    lines = {}
    for row in rows:
        key = tuple(str(row[k]) for k in index)
        lines.setdefault(key, dict(zip(index.values(), key, strict=True)))[row["estimator"]] = cell(row)
    return markdown(list(lines.values()))


def summarised(row: dict) -> str:
    return f"{row['mean']:.2f} ± {row['std']:.2f}"


def costs(scoring: dict, training: dict, speed: dict) -> str:
    """What scoring and training cost."""
    wall, epochs, last = scoring["wall_seconds_by_cores"], training["epochs_per_minute"], speed["published"][-1]
    n, (parents, children) = scoring["samples"], scoring["groups"]
    small = " x ".join(map(str, speed["by_samples"][0]["groups"]))
    pairwise = last["seconds_per_pair"] * (n / last["samples"]) ** 2 * parents * children
    days, times = f"{pairwise / 86400:.0f} CPU-days", f"{pairwise / wall['1']:,.0f} times as much"
    memory = f"{scoring['peak_memory_mib']} MiB in all"
    rows = [
        (
            f"score {parents} x {children} groups, {n:,} images",
            f"{wall['1']:.0f} s on one core, {wall['2']:.0f} s on two; {memory}",
            f"{100 * scoring['share_of_floor_one_core']:.0f} % on one core",
            f"pair by pair, as published: {days}, {times} (extrapolated)",
        ),
        (
            f"score {small} groups, {last['samples']:,} images",
            f"{last['kde_layer_seconds']:.2f} s on one core",
            "",
            f"pair by pair, as published: {last['layer_seconds']:,.0f} s, {last['ratio']:,} times as much "
            f"(from {last['extrapolated_from_calls']} measured pairs)",
        ),
        (
            "train the MLP on MNIST",
            f"{epochs['project']:.0f} epochs per minute on two cores",
            f"{100 * training['share_of_matmul_floor']:.0f} % (matrix products alone)",
            f"torchvision's DataLoader with 2 workers: {epochs['dataloader']:.0f} epochs per minute",
        ),
    ]
    return markdown([dict(zip(("", "here", "of the hardware's floor", "otherwise"), r, strict=True)) for r in rows])


def peers(speed: dict) -> str:
    """One pair of groups at a time, extrapolated to all pairs of the layer."""
    named = [{"routine": "published, reimplemented literally", **row} for row in speed["published"]]
    named += [{"routine": f"{r['package']} {r['version']}, {r['method']}", **r} for r in speed["peers"] if "value" in r]
    return markdown(
        [
            {
                "routine": row["routine"],
                "samples": f"{row['samples']:,}",
                "seconds per pair": f"{row['seconds_per_pair']:.2f}",
                "seconds per layer, extrapolated": f"{row['layer_seconds']:,.0f}",
                "kde, seconds per layer": f"{row['kde_layer_seconds']:.2f}",
                "ratio": f"{row['ratio']:,}",
            }
            for row in named
        ]
    )


def sweep(rows: list[dict]) -> str:
    return markdown(
        [
            {
                "samples": f"{row['samples']:,}",
                "groups": " x ".join(map(str, row["groups"])),
                "cores": row["cores"],
                "seconds": f"{row['seconds']:.2f}",
                "share of the floor (%)": f"{100 * row['share_of_floor']:.0f}",
                "memory above inputs (MiB)": row["peak_memory_above_inputs_mib"],
            }
            for row in rows
        ]
    )


def scale_table(scale: dict) -> str:
    """Hours of ResNet50's scores by number of workers, as simulated."""
    return markdown(
        [
            {
                "workers": f"{row['workers']:,}",
                "hours": f"{row['hours']:,.1f}",
                "times as fast": f"{row['speed_up']:,.0f}",
                "of the workers' time (%)": f"{100 * row['share_at_work']:.0f}",
            }
            for row in scale["workers"]
        ]
    )


def campaigns_table(record: dict) -> str:
    """What the campaigns of `make soak` tried, and how it ended."""
    rows = []

    def row(name: str, count: int, end: str) -> None:
        rows.append({"tried": name, "times": f"{count:,}", "how it ended": end})

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
    for kind, trials in record.items():
        if kind.startswith("random_"):
            end = f"{trials['right']:,} right, {trials['refused']:,} refused, {trials['other_ends']} otherwise"
            row(f"random {kind.removeprefix('random_').removesuffix('s').replace('_', ' ')}", trials["tried"], end)
    return markdown(rows)


def selection_table(study: dict, share: float) -> str:
    """The rules of the selection study at one pruned share."""
    moments = {"masked": "masked", "means_folded": "means folded", "refitted": "refitted", "after_1_epoch": "1 epoch"}
    return markdown(
        [
            {
                "score": row["score"],
                "blocks by": row["chosen_by"],
                **{title: f"{row[key]:.2f} ± {row[f'{key}_std']:.2f}" for key, title in moments.items()},
                "units read": f"{row['units_read']:.0f} of 500",
                "units reached": f"{row['units_reached']:.0f} of 300",
            }
            for row in study["rules"]
            if row["pruned_percent"] == share
        ]
    )


def kernels_table(benchmarks: list[dict]) -> str:
    """How far scores by kernels rank and choose blocks otherwise than Gaussian ones."""
    return markdown(
        [
            {
                "network": row["network"],
                "signal to noise": "as it is" if row["times_snr"] == 1 else f"x {row['times_snr']:g}",
                "largest score (nats)": f"{row['largest_score']:.2g}",
                "1 - rank correlation": f"{1 - row['rank_correlation']:.0e}",
                **{f"other choices at {s} % (%)": f"{100 * row[f'other_0.{s[0]}']:.2f}" for s in ("50", "70", "90")},
            }
            for benchmark in benchmarks
            for row in benchmark["rows"]
        ]
    )


def damage_table(benchmark: dict) -> str:
    """Accuracy by one threshold over all scores and by shares of least measured damage, and what the damage wins."""
    runs, moments = defaultdict(list), ("recalibrated", "refitted")
    for row in benchmark["rows"]:
        runs[row["share"], row["way"]].append({"arguments": {}, **{key: {"accuracy": row[key]} for key in moments}})
    lines = []
    for share in sorted({share for share, _ in runs}):
        damage, threshold = runs[share, "damage"], runs[share, "threshold"]
        line = {"pruned (%)": f"{100 * share:g}"}
        for key in moments:
            line[f"{key}: threshold"] = mean_std(accuracies(threshold, key))
            line[f"{key}: damage"] = mean_std(accuracies(damage, key))
            line[f"{key}: ahead by"] = difference(list(zip(damage, threshold, strict=True)), key)
        lines.append({**line, "n": len(damage)})
    return markdown(lines)


def pictures(study: dict) -> None:
    """Scores of one layer, brighter where they are higher, and the blocks that are kept."""
    figure, axes = plt.subplots(len(study["pictures"]), 1, figsize=(7, 6.5))
    for axis, (name, picture) in zip(axes, study["pictures"].items(), strict=True):
        axis.imshow([list(bytes.fromhex(row)) for row in picture["scores"]], cmap="viridis", aspect="auto")
        rows, columns = zip(*picture["kept"], strict=True)
        axis.plot(columns, rows, "o", ms=4, mfc="none", color="tab:red")
        axis.set(title=f"{name}; red: kept", xlabel="parent group", ylabel="child group")
    save(figure, files.RESULTS / "figures" / "scores")


def calibration_figure(calibration: dict) -> None:
    """Accuracy against confidence of dense and pruned networks, and their expected calibration errors."""
    rows = calibration["networks"]
    figure, axes = plt.subplots(1, 2, figsize=(7, 3))
    shown = [row for row in rows if row["rule"] in ("dense", BEST, "magnitude", "random")]
    shares = sorted({row["pruned_percent"] for row in shown})
    for row in shown:
        if row["pruned_percent"] in (0, shares[-1]):
            axes[0].plot(row["confidence"], row["accuracy"], "o-", color=colour(row["rule"]), label=row["rule"])
    axes[0].plot([0, 100], [0, 100], "k--", lw=1)
    axes[0].set(
        xlabel="confidence (%)",
        ylabel="accuracy (%)",
        title=f"dense, and {shares[-1]:g} % of fc2 pruned (n = {rows[0]['networks']})",
    )
    figure.legend(loc="outside lower center", ncols=2)
    for name in dict.fromkeys(row["rule"] for row in shown):
        own = [row for row in shown if row["rule"] == name]
        x = [shares.index(row["pruned_percent"]) for row in own]
        bars = [r["calibration_error"] for r in own], [r["std"] for r in own]
        axes[1].errorbar(x, *bars, fmt="o-", color=colour(name), label=name)
    axes[1].set_xticks(range(len(shares)), [f"{share:g}" for share in shares])
    axes[1].set(xlabel="pruned weights of fc2 (%)", ylabel="expected calibration error (%)")
    save(figure, files.RESULTS / "figures" / "calibration")


def speed_figure(speed: dict) -> None:
    """Seconds against samples and against parent groups, both logarithmic, with the floor and the counted slope."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8))
    published = speed["published"]
    samples, groups = speed["by_samples"], speed["by_parent_groups"]
    panels = (
        (axes[0], samples, [row["samples"] for row in samples], "samples (10 x 10 groups)"),
        (
            axes[1],
            groups,
            [row["groups"][0] for row in groups],
            f"parent groups (100 child groups, n = {groups[0]['samples']:,})",
        ),
    )
    for axis, rows, x, label in panels:
        axis.loglog(x, [row["seconds"] for row in rows], "o-", label="kde, one core")
        axis.loglog(x, [row["floor_seconds_one_core"] for row in rows], "k--", lw=1, label="floor")
        axis.set(xlabel=label, ylabel="seconds per layer")
    first = published[0]
    axes[0].loglog([r["samples"] for r in published], [r["layer_seconds"] for r in published], "s-", label="published")
    guide = [
        first["layer_seconds"] * (n / first["samples"]) ** 2 for n in (samples[0]["samples"], samples[-1]["samples"])
    ]
    axes[0].loglog([samples[0]["samples"], samples[-1]["samples"]], guide, ":", color="gray", label="slope 2")
    for axis in axes:
        axis.legend()
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_minor_formatter(NullFormatter())
    save(figure, files.RESULTS / "figures" / "speed")


def main() -> None:
    names = "accuracy ranking speed scoring training real_layer selection calibration scale damage".split()
    accuracy, ranking, speed, scoring, training, real, study, calibration, scale, damage = (
        records.read(FOLDER / f"{name}.json") for name in names
    )
    for row in accuracy["calibration"]:
        row["dims"] = ", ".join(map(str, row["dims"]))
    page, soak = ROOT / "common" / "cmi" / "README.md", records.read(files.RESULTS / "soak.json")
    fill(ROOT / "SECURITY.md", "campaigns soak.json", campaigns_table(soak))
    fill(files.RESULTS / "README.md", "costs", costs(scoring, training, speed))
    fill(
        page,
        "accuracy",
        pivot(accuracy["calibration"], {"dims": "dims of x, y, z", "n": "n", "truth": "truth"}, summarised),
    )
    fill(page, "nulls", pivot(accuracy["truth_is_0"], {"data": "data", "n": "n"}, summarised))
    fill(
        page,
        "ranking",
        pivot(ranking["ranking"], {"layer": "layer", "n": "n"}, lambda r: f"{r['auc']:.3f} ± {r['auc_std']:.3f}"),
    )
    fill(
        page,
        "null pairs",
        pivot(
            [row for row in ranking["ranking"] if row["estimator"] in ("kde", "knn", "gaussian")],
            {"layer": "layer", "n": "n"},
            lambda r: f"{r['null_score']:.4f} ± {r['null_standard_error']:.4f} / {r['true_score']:.4f}",
        ),
    )
    fill(page, "widths", markdown(real["widths"]))
    fill(page, "narrow", markdown(ranking["narrow"]))
    fill(page, "speed", sweep(speed["by_samples"] + speed["by_parent_groups"] + speed["by_cores"]))
    fill(page, "kernels", kernels_table([records.read(path) for path in sorted(FOLDER.glob("kernels_*.json"))]))
    fill(page, "scale", scale_table(scale))
    fill(files.RESULTS / "README.md", "damage", damage_table(damage))
    fill(page, "peers", peers(speed))
    speed_figure(speed)
    for share in (99.6, 98.4):
        fill(files.RESULTS / "README.md", f"selection {share}", selection_table(study, share))
    pictures(study)
    calibration_figure(calibration)


if __name__ == "__main__":
    main()
