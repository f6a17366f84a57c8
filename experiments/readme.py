"""What pages show that no single experiment does: results by network, history, flags; part of `make tables`.

python experiments/readme.py
"""

import argparse
import json
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import collect
from common import cli, files, records
from method import picture
from report import accuracies, baselines, by_point, fill, markdown, mean_std, of_stage, pruned_percent
from rules import DENSE, rule

POSITIONS = "CMI, gaussian given kept, positions"
NETWORKS = {  # rows of the README: the published experiment; our rule by experiment, the first that has been run
    "MLP, MNIST": ("mnist_mlp", {"mnist_mlp": "CMI, balanced, refit"}),
    "VGG16, CIFAR-10": (
        "cifar10_vgg16",
        {
            "cifar10_vgg16": "CMI",
            "cifar10_vgg16_retrained/3": f"{POSITIONS}, refit",
            "cifar10_vgg16_before": f"{POSITIONS}, refit",
        },
    ),
    "ResNet56, CIFAR-10": (
        "cifar10_resnet56",
        {
            "cifar10_resnet56": "CMI, single units",
            "cifar10_retrained/3": f"{POSITIONS}, single units, refit",
            "cifar10_before": f"{POSITIONS}, single units, refit",
        },
    ),
    "ResNet50, ImageNet": (
        "imagenet_resnet50",
        {"imagenet_before": f"{POSITIONS}, refit"},
    ),
}
COMMANDS = {  # that make the records
    "mnist_mlp": "experiments/mnist.sh fc2",
    "mnist_validated": "experiments/mnist.sh validated",
    "mnist_network": "experiments/mnist.sh network",
    "mnist_weights": "experiments/mnist.sh weights",
    "mnist_weights_long": "experiments/mnist.sh weights_long",
    "mnist_weights_rounds": "experiments/mnist.sh weights_rounds",
    "mnist_weights_few": "experiments/mnist.sh weights_few",
    "cifar10_vgg16": "experiments/cifar10.sh vgg16",
    "cifar10_vgg16_retrained": "EPOCHS={} experiments/rules.sh vgg16",
    "cifar10_vgg16_before": "experiments/rules.sh vgg16",
    "cifar10_resnet56": "experiments/cifar10.sh resnet56",
    "cifar10_retrained": "EPOCHS={} experiments/rules.sh resnet56",
    "cifar10_distilled": "DISTILLATION=0.9 EPOCHS={} experiments/rules.sh resnet56",
    "cifar10_before": "experiments/rules.sh resnet56",
    "imagenet_before": "experiments/rules.sh resnet50",
}
OWN = "MIT ([LICENSE](../LICENSE))"
BEGUN = "BSD 2-clause ([LICENSE](cifar10_jpeg/resnet56/LICENSE)): begun with akamaster's pytorch_resnet_cifar10"
TRAINED = "`train_stage1.py`, [flags](#resnet56-before-any-retraining)"
COMMITTED = {  # networks below results/ that come with a clone: what makes them, and their licence
    "robustness/baseline/0/logits_best.pkl": ("`experiments/mnist.sh robustness`", OWN),
    "robustness/correlated_even/0/0/logits_96.20.pkl": ("`experiments/mnist.sh robustness`", OWN),
    "robustness/correlated_even/0/0/logits_99.60.pkl": ("`experiments/mnist.sh robustness`", OWN),
    **{f"cifar10_jpeg/resnet56/baseline/{k}/0/logits_best.pkl": (TRAINED, BEGUN) for k in range(7)},
    "cifar10_before/positions/0_0/0/logits_70.00.pkl": ("`experiments/rules.sh resnet56`", BEGUN),
}
BY_MACHINE = {"cores": "all that there are", "Workers": "as many as cores, at most 8"}  # defaults of flags
OF = {"masked_layers": "masked layers", "network": "all"}
CONTROLS = ("magnitude", "random")
TREATMENT = ("correlated groups", "single units", "balanced", "refit", "in rounds")  # what controls share


@cache
def finished(experiment: str) -> list[dict]:
    """The records of an experiment, none if it has not been run."""
    return collect.finished(files.RESULTS / experiment)


def networks_table(paper: dict) -> str:
    """One row per network: what the paper says, and what was run here."""
    rows = []
    for network, (name, choices) in NETWORKS.items():
        dense, mint = paper[name]["points"][:2]
        of, share = paper[name]["pruned_of"], mint["pruned_percent"]
        row = {
            "network": network,
            "paper": f"{dense['accuracy']:.2f} → {mint['accuracy']:.2f} ({share:.1f} % of {OF[of]})",
        }
        row |= dict.fromkeys(("rule here", "pruned", "epochs", "dense", "**here**", *CONTROLS, "n"), "")
        experiment = next(filter(finished, choices), None)
        here = measured(experiment, choices[experiment], share, of) if experiment else {"**here**": "not run yet"}
        rows.append({**row, **here, "record, command": made_by(experiment or list(choices)[-1])})
    return markdown(rows)


def measured(experiment: str, ours: str, share: float, of: str) -> dict[str, str]:
    """Our rule and the controls with the same treatment, at the share nearest to the published one.

    All are of the networks that every rule of the row pruned.
    """
    points = by_point(finished(experiment))
    at = min(
        (s for s, name in points if name == ours), key=lambda s: abs(pruned_percent(points[s, ours][0], of) - share)
    )
    same = [part for part in ours.split(", ") if part in TREATMENT]
    runs = {"**here**": points[at, ours]}
    runs |= {control: points.get((at, ", ".join([control, *same])), []) for control in CONTROLS}
    seeds = set.intersection(*({r["seed"] for r in found} for found in runs.values() if found))
    runs = {name: [r for r in found if r["seed"] in seeds] for name, found in runs.items()}
    first = runs["**here**"][0]
    pruned = ", ".join(f"{pruned_percent(first, layers):.1f} % of {words}" for layers, words in OF.items())
    cells = {name: before_and_after(found) for name, found in runs.items()}
    again = [r for r in points.get((0, DENSE), []) if r["seed"] in seeds]
    dense = mean_std(accuracies(dense_of(runs["**here**"]))) + (f" → {mean_std(accuracies(again))}" if again else "")
    row = {"rule here": ours, "pruned": pruned, "epochs": first["arguments"]["Epoch"], "dense": dense, **cells}
    return {**row, "n": len({r["arguments"]["Retrain"] for r in runs["**here**"]})}


def before_and_after(records: list[dict]) -> str:
    """Accuracy before -> after retraining, if there was any, of every network the mean over its runs."""
    networks = defaultdict(list)
    for record in records:
        networks[record["arguments"]["Retrain"]].append(record)
    before, after = (
        [np.mean(accuracies(runs, when)) for runs in networks.values()] for when in ("test_before_retraining", "test")
    )
    if not records:
        return "not run yet"
    retrained = records[0]["arguments"]["Epoch"]
    return f"{np.mean(before):.1f} → {mean_std(after)}" if retrained else mean_std(before)


def dense_of(records: list[dict]) -> list[dict]:
    """The records of the networks that were pruned, as far as they were collected."""
    paths = {Path(r["arguments"]["Retrain"]).with_suffix(".json").as_posix() for r in records}
    experiments = sorted({Path(path).parts[1] for path in paths})
    lines = [line for experiment in experiments for line in baselines(finished(experiment))]
    return [line for line in lines if f"results/{line['path']}" in paths]


def made_by(experiment: str, results: str = "results/") -> str:
    """An experiment's records, if there are any, and the command that makes them."""
    name = experiment.split("/")[0]
    record = f"[{name}]({results}{name}.jsonl)" if (files.RESULTS / f"{name}.jsonl").is_file() else name
    epochs = next((run["arguments"]["Epoch"] for run in of_stage(finished(experiment), 3)), "N")
    return f"{record}: `{COMMANDS[name].format(epochs)}`"


def history() -> str:
    """By network, layers and share, the highest mean accuracy of a day that is above all of the days before."""
    best, rows = {}, []
    runs = [run for experiment in COMMANDS for run in by_recipe(experiment)]
    for date, error, name, found in sorted(runs, key=lambda run: run[:2]):
        last, arguments = max(found, key=lambda r: r["date"]), found[0]["arguments"]
        layers, of = arguments["children_key"], "all" if arguments.get("Prune_of_network") else "these layers"
        layers = layers[0].removesuffix(".weight") if len(layers) == 1 else f"{len(layers)} layers"
        epochs = f"{arguments['Epoch']} epochs" if arguments["Epoch"] else "not retrained"
        epochs += ", distilled" * bool(arguments.get("Distillation"))
        key = f"{arguments['Model']}, {layers}", last["requested_percent"], of, not arguments["Epoch"]
        if error < best.get(key, 100):
            best[key] = error
            share = pruned_percent(last, "network") if of == "all" else key[1]
            row = {"network, layers": key[0], "pruned": f"{share:.4g} % of {of}", "rule": f"{name}; {epochs}"}
            row |= {"accuracy (%)": mean_std(accuracies(found)), "n": len(found)}
            row["last run"] = f"{date}, {last['commit'][:7]}"
            folder = "/".join(last["path"].split("/")[:2])  # of runs that are retrained for as many epochs
            rows.append((key, {**row, "record, command": made_by(folder, "")}))
    return markdown([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def by_recipe(experiment: str) -> list[tuple]:
    """An experiment's pruned runs by share, rule and recipe, at the end of every day: (day, mean error, rule, records).

    Rules that by then had run on fewer than half as many networks as another at that share are left out.
    """
    found, days = defaultdict(list), defaultdict(list)
    for record in of_stage(finished(experiment), 3):
        recipe = (record["arguments"].get(flag) for flag in ("Epoch", "Weight_decay", "Dropout"))
        if rule(record) != DENSE:
            found[record["requested_percent"], rule(record), *recipe].append(record)
    for (share, name, *_), runs in found.items():
        for day in {run["date"] for run in runs}:
            days[share, day].append((name, [run for run in runs if run["date"] <= day]))
    most = {at: max(len(runs) for _, runs in ran) for at, ran in days.items()}
    return [
        (day, 100 - np.mean(accuracies(runs)), name, runs)
        for (share, day), ran in days.items()
        for name, runs in ran
        if 2 * len(runs) >= most[share, day]
    ]


def committed_table() -> str:
    """The networks that come with a clone: what they are, what made them, their licence."""
    rows = []
    for path, (command, licence) in COMMITTED.items():
        record = records.read(records.record_path(files.RESULTS / path))
        model, share = record["arguments"]["Model"], record.get("requested_percent", 0)
        row = {"file": f"[{path}]({path})", "network": model, "rule": rule(record) if share else "dense"}
        row |= {"masked layers, pruned (%)": f"{share:.4g}", "test accuracy (%)": f"{record['test']['accuracy']:.2f}"}
        rows.append({**row, "made by": command, "licence": licence})
    return markdown(rows)


def flags_table(group: str) -> str:
    """One group of the flags of common/cli.py: every flag, the stages that have it, what it takes and means."""
    rows = []
    for name, flag in cli.HELP[group].items():
        switch, default = isinstance(flag.get("action"), type), flag["default"]
        written = f"`--{name}`" + (f", `--no-{name}`" if switch else "")
        default = BY_MACHINE.get(name) or (None if default is None else cli._shown(default))
        default = f" (default: {default})" if default and "default" not in flag["help"] else ""
        row = {"flag": written, "stages": ", ".join(flag["stages"]), "takes": "" if "action" in flag else legal(flag)}
        rows.append({**row, "meaning": (flag["help"] + default).replace("<", "\\<")})
    return markdown(rows)


def legal(flag: dict) -> str:
    """What a flag takes, in the words of its own refusal."""
    words = ", ".join(flag["choices"]) if "choices" in flag else "text"
    try:
        _ = flag.get("type", str)("/?")
    except argparse.ArgumentTypeError as error:
        words = str(error).removeprefix("'/?' is not ").removeprefix("'/?' may hold ").removesuffix(" only")
    else:
        words = "a path" if "type" in flag else words
    many = {"+": "; one or more", "*": "; none or more"}.get(flag.get("nargs"), "")
    return words.removesuffix(f" and at most {cli.MOST:g}") + many


def contents() -> list[tuple[Path, str, str]]:
    """What stands between the markers of pages: (page, marker, text)."""
    paper = json.loads((files.RESULTS / "paper.json").read_text(encoding="utf-8"))
    usage = [(files.ROOT / "docs" / "usage.md", f"flags {group}", flags_table(group)) for group in cli.HELP]
    found = [(files.ROOT / "README.md", "networks", networks_table(paper))]
    page = files.RESULTS / "README.md"
    return [*found, (page, "history", history()), (page, "committed", committed_table()), *usage]


def main() -> None:
    for page, name, content in contents():
        fill(page, name, content)
    picture(files.RESULTS / "figures" / "method.svg")


if __name__ == "__main__":
    main()
