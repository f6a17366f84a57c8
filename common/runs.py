"""One training run with its files: checkpoints, a line per epoch, a record. Stages 1 and 3 are this."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from common import artifacts, masks, parallel
from common.data import Data
from common.errors import Diverged
from common.training import Recipe, evaluate, fit


def train(
    network: nn.Module,
    data: Data,
    recipe: Recipe,
    best: Path,
    *,
    seed: int,
    select: str,
    record: dict,
    resume: bool = True,
    final: Path | None = None,
    held: dict[str, Tensor] | None = None,
) -> dict:
    """Train, keep the best epoch's checkpoint and its record up to date, and read the test set once, at the end.

    Parameters
    ----------
    network : on the data's device; if `held` is given, with these masks already applied
    best, final : where the checkpoints of the best and of the last epoch go
    seed : fixes order, augmentation and dropout
    select : what chooses the epoch that is kept: "val", "last" (nothing: the last epoch) or "test"
    record : what is known of the run before it starts
    resume : go on where an interrupted run of the same arguments was
    held : masks that are kept at zero; their measures, and the accuracy before training and after one epoch, are
        recorded

    Returns
    -------
    The record as written.
    """
    start = time.perf_counter()
    selects, tolerance = {"val": (data.val, 1.0), "last": (None, 0.0), "test": (data.test, 0.0)}[select]
    held = held or {}
    before = copy.deepcopy(network.state_dict()) if held else None
    record = {
        **record,
        "seed": seed,
        "epoch_chosen_by": select,
        "data": data.describe(),
        **artifacts.circumstances(data.train.labels.device),
    }
    if parallel.size() > 1:
        record["processes"] = parallel.size()
    state_file = best.with_suffix(".state")
    key = json.dumps({k: record.get(k) for k in ("arguments", "inputs", "seed", "processes")}, sort_keys=True)
    begun = artifacts.load_state(state_file, key, "remove it, or start over with --no-Resume") if resume else None
    begun = begun or {"epochs": [], "seconds": 0.0, "first": None, "fit": None}
    parallel.barrier()
    epochs, first, start = begun["epochs"], begun["first"], start - begun["seconds"]
    next_save = 0.0

    def checkpoint(state: dict, figures: dict) -> bytes:
        extra = {"masks": held} if held else {}
        return artifacts.checkpoint_bytes({"state_dict": state, "epoch": figures["epoch"], **trained_on(data), **extra})

    def keep(figures: dict, state: dict, status: str = "running", **measured) -> dict:
        nonlocal first
        if held and figures["epoch"] == 1:
            first = state  # the first epoch is always the best so far
        seconds = round(time.perf_counter() - start, 1)
        written = {**record, "status": status, "best": figures, **measured, "wall_seconds": seconds}
        artifacts.save({best: checkpoint(state, figures)}, written)
        return written

    def log(line: dict) -> None:
        epochs.append(line)
        artifacts.write_bytes(best.with_suffix(".jsonl"), "".join(json.dumps(x) + "\n" for x in epochs).encode())

    def save_state(state: Callable[[], dict]) -> None:
        """Now and then: so often that a twentieth of the time goes into it."""
        nonlocal next_save
        began = time.perf_counter()
        if began >= next_save:
            so_far = {"key": key, "epochs": epochs, "seconds": began - start, "first": first, "fit": state()}
            artifacts.save_state(state_file, so_far)
            next_save = time.perf_counter() + 20 * (time.perf_counter() - began)

    try:
        figures, state = fit(
            network,
            data.train,
            selects,
            recipe,
            seed=seed,
            tolerance=tolerance,
            after_step=masks.holder(network, held) if held else None,
            on_epoch=log,
            on_best=keep,
            on_state=save_state,
            start=begun["fit"],
        )
    except Diverged:
        if artifacts.record_of(best).is_file():
            artifacts.write_json(
                artifacts.record_of(best), {**artifacts.read_json(artifacts.record_of(best)), "status": "diverged"}
            )
        raise
    measured = {}
    if final is not None:
        last = epochs[-1]
        artifacts.save(
            {final: checkpoint(network.state_dict(), last)},
            {**record, "status": "complete", "last": last, "test": asdict(evaluate(network, data.test))},
        )
    for name, early in (("test_before_retraining", before), ("test_after_1_epoch", first)) if held else ():
        network.load_state_dict(early)
        measured[name] = asdict(evaluate(network, data.test))
    network.load_state_dict(state)
    measured["test"] = asdict(evaluate(network, data.test))
    if held:
        measured |= masks.measures(network, held)
    written = keep(figures, state, "complete", **measured)
    if parallel.rank() == 0:
        state_file.unlink(missing_ok=True)
    return written


def trained_on(data: Data) -> dict:
    """What a checkpoint says of its data, so that scores and retraining keep to the same images."""
    return {"dataset": data.name, "val_size": len(data.val), "classes": list(data.chosen) if data.chosen else None}


def show(record: dict) -> None:
    """Print what a finished run of stage 3 measured."""
    if parallel.rank():
        return
    print(
        f"pruned {record['pruned_percent_masked_layers']:.2f} % of the masked layers "
        f"(asked: {record['requested_percent']:.2f} %), {record['pruned_percent_network']:.2f} % of all weights; "
        f"test accuracy {record['test_before_retraining']['accuracy']:.2f} % before retraining, "
        f"{record['test_after_1_epoch']['accuracy']:.2f} % after 1 epoch, "
        f"{record['test']['accuracy']:.2f} % after (epoch {record['best']['epoch']} by {record['epoch_chosen_by']}); "
        f"memory {record['memory_mib_masked_layers']:.3f} MiB (masked layers), "
        f"{record['memory_mib_network']:.3f} MiB (network)"
    )
