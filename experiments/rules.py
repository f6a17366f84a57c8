"""What chose the mask of a pruned network, in words that its record and that of its scores hold.

In this order: criterion, estimator and condition of the scores, groups, changes; as in "CMI, gaussian given kept,
correlated groups, balanced, refit, in rounds".
"""

import hashlib
import re
from functools import cache
from pathlib import Path

import numpy as np

import collect
from common import artifacts, files

CRITERIA = {"cmi": "CMI", "cmi-magnitude": "CMI x magnitude"}
DENSE = "dense, retrained"  # with the recipe of the pruned ones, a control
ROUNDS, PRUNED = "in rounds", re.compile(r"logits_[\d.]+\.pkl")  # from a network that is pruned already
CHANGES = {"Even": "balanced", "Refit": "refit"}


def rule(record: dict) -> str:
    """The name of a pruned run's rule.

    Of scores that are given to a control only what it takes is named: groups and, of several layers, the shares.
    """
    if "rule" in record:  # an own one, named by who wrote it
        return record["rule"]
    if not record.get("requested_percent", True):
        return DENSE
    arguments, scores = record["arguments"], scores_of(record)
    criterion, file = arguments["Criterion"], Path(arguments.get("Retrain_mask") or "").stem
    parts = [CRITERIA.get(criterion, criterion)]
    if scores and criterion not in CRITERIA and len(arguments.get("children_key", ())) > 1:
        parts.append("shares of CMI")
    if "CMI" in parts[-1]:
        parts += estimate(scores)
    if not scores and file not in ("", "I_parent_cmi"):
        parts.append(file.replace("I_parent_", "scores "))  # all that is known of them
    if scores.get("grouping") == "correlation":
        parts.append("correlated groups")
    if single_units(record):
        parts.append("single units")
    if arguments.get("Granularity") == "channel":
        parts.append("channels")
    parts += [change for flag, change in CHANGES.items() if arguments.get(flag)]
    return ", ".join(parts + [ROUNDS] * bool(PRUNED.fullmatch(Path(arguments.get("Retrain") or "").name)))


def estimate(scores: dict) -> list[str]:
    """The parts of a rule's name that tell stage 2's arguments; none: the default, kernel density of means of maps."""
    estimator, given = scores.get("estimator", "kde"), " given kept" * (scores.get("given") == "kept")
    return [estimator + given] * (estimator != "kde") + ["positions"] * (scores.get("sampling") == "positions")


def unchanged(name: str) -> str:
    """The rule without the changes in how blocks are chosen and fitted."""
    return ", ".join(part for part in name.split(", ") if part not in CHANGES.values())


def scores_of(record: dict) -> dict:
    """What is known of the scores that a pruned run was given: by its own record, else by theirs; or nothing."""
    made = (scored()[0].get(checksum) for checksum in record.get("inputs", {}).values())
    return {**next(filter(None, made), {}), **(record.get("scores") or {})}


def single_units(record: dict) -> bool:
    """Whether every block of a pruned run is known to lie between two single units."""
    flags = ("parent_key", "children_key", "parent_clusters", "children_clusters")
    pairs = list(zip(*(record["arguments"].get(flag, ()) for flag in flags), strict=False))
    model = record["arguments"].get("Model")
    return bool(pairs) and all((model, f"{parent}_{child}", *groups) in scored()[1] for parent, child, *groups in pairs)


@cache
def scored() -> tuple[dict[str, dict], set[tuple]]:
    """What the collected records of stage 2 tell.

    Returns
    -------
    made : the arguments of stage 2, by the checksum of the scores
    single : (model, layer pair, parent groups, child groups) where every group is one unit, by the labels' checksums
    """
    made, single = {}, set()
    for file in sorted(files.RESULTS.glob("*.jsonl")):
        for record in collect.read(file).values():
            if record["stage"] == 2:
                arguments, (children, parents) = record["arguments"], record["scores"]["shape"]
                name, checksums = next(iter(record["files"])), list(record["files"].values())
                made[checksums[0]] = arguments
                if checksums[1:3] == [_one_each(parents), _one_each(children)]:
                    pair = name.removeprefix(f"I_parent_{arguments['name_postfix']}_").removesuffix(".npy")
                    single.add((arguments["model"], pair, parents, children))
    return made, single


@cache
def _one_each(units: int) -> str:
    """The checksum of labels that make every unit a group."""
    return hashlib.sha256(artifacts.array_bytes(np.arange(units))).hexdigest()
