"""One training run with its files: checkpoints, a line per epoch, a record. Stages 1 and 3 are this."""

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from common import artifacts, masks
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
    final: Path | None = None,
    held: dict[str, Tensor] | None = None,
) -> dict:
    """Train, keep the best epoch's checkpoint and its record up to date, and read the test set once, at the end.

    Parameters
    ----------
    network : on the data's device; if `held` is given, with these masks already applied
    best, final : where the checkpoints of the best and of the last epoch go
    seed : fixes order and dropout
    select : what chooses the epoch that is kept: "val", "last" (nothing: the last epoch) or "test"
    record : what is known of the run before it starts
    held : masks that are kept at zero; their measures and the accuracy before training are recorded

    Returns
    -------
    The record as written.
    """
    start = time.perf_counter()
    selects, tolerance = {"val": (data.val, 1.0), "last": (None, 0.0), "test": (data.test, 0.0)}[select]
    epochs: list[dict] = []
    held = held or {}
    before = copy.deepcopy(network.state_dict()) if held else None
    record = {
        **record,
        "seed": seed,
        "epoch_chosen_by": select,
        "data": data.describe(),
        **artifacts.circumstances(data.train.labels.device),
    }

    def checkpoint(state: dict, figures: dict) -> bytes:
        extra = {"masks": held} if held else {}
        return artifacts.checkpoint_bytes(
            {"state_dict": state, "epoch": figures["epoch"], "dataset": data.name, "val_size": len(data.val), **extra}
        )

    def keep(figures: dict, state: dict, status: str = "running", **measured) -> dict:
        seconds = round(time.perf_counter() - start, 1)
        written = {**record, "status": status, "best": figures, **measured, "wall_seconds": seconds}
        artifacts.save({best: checkpoint(state, figures)}, written)
        return written

    def log(line: dict) -> None:
        epochs.append(line)
        artifacts.write_bytes(best.with_suffix(".jsonl"), "".join(json.dumps(x) + "\n" for x in epochs).encode())

    try:
        figures, state = fit(
            network,
            data.train,
            selects,
            recipe,
            seed=seed,
            tolerance=tolerance,
            after_step=(lambda: masks.apply(network, held)) if held else None,
            on_epoch=log,
            on_best=keep,
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
    if held:
        network.load_state_dict(before)
        measured["test_before_retraining"] = asdict(evaluate(network, data.test))
    network.load_state_dict(state)
    measured["test"] = asdict(evaluate(network, data.test))
    if held:
        measured |= masks.measures(network, held)
    return keep(figures, state, "complete", **measured)


def show(record: dict) -> None:
    """Print what a finished run of stage 3 measured."""
    print(
        f"pruned {record['pruned_percent_masked_layers']:.2f} % of the masked layers "
        f"(asked: {record['requested_percent']:.2f} %), {record['pruned_percent_network']:.2f} % of all weights; "
        f"test accuracy {record['test_before_retraining']['accuracy']:.2f} % before retraining, "
        f"{record['test']['accuracy']:.2f} % after (epoch {record['best']['epoch']} by {record['epoch_chosen_by']}); "
        f"memory {record['memory_mib_masked_layers']:.3f} MiB (masked layers), "
        f"{record['memory_mib_network']:.3f} MiB (network)"
    )


def seeded(build, seed: int) -> nn.Module:
    """A network whose initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    return build()
