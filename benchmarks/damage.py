"""How much each layer loses: by one threshold over all scores, or by the damage that every layer alone does.

    python benchmarks/damage.py [--numbers 0 1 2] [--Data_dir DIR]

The committed ResNet56, scores of single channels at positions. Curves: each masked layer alone loses its blocks of
lowest score in steps of GRID and is refitted to its inputs in the dense network; the damage is what the loss on
calibration images grows by. Shares: those of least total damage that prune enough, by a dynamic programme (Frantar and
Alistarh, NeurIPS 2022). Both ways of sharing out are then masked, recalibrated and refitted as stage 3 does.

Writes results/benchmarks/damage.json, once for every network that is done; rows of other networks stay.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "resnet56"), str(ROOT / "benchmarks")]
import model
from common import artifacts, cli, files, records
from common.activations import collect_activations, output_sensitivity
from common.cmi import layer_cmi
from common.data import load, sample_per_class
from common.masks import Mask, contiguous_blocks, select, select_blocks
from common.refit import _moments, _solve, recalibrate_batch_norm, refit
from common.training import evaluate
from output import FOLDER, save

KEYS = list(model.MAX_SPARSITY)
GRID = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97)
SHARES = (0.5, 0.7, 0.8, 0.9)
LIMIT = 0.97  # of a layer, by either way
PARTS = 20_000  # of the budget, in the dynamic programme
IMAGES = {"scores": 300, "refit": 100, "damage": 30}  # of a class


def scored(network, sample) -> dict[str, np.ndarray]:
    """Information given what is kept, at positions: scores (H, G) of single channels by layer."""
    seen = collect_activations(network, KEYS, sample, positions=1)
    sensitivity, scores = output_sensitivity(network, KEYS, sample, positions=True), {}
    for key in KEYS:
        parents, children = (values.numpy() for values in seen.pop(key))
        units = network.get_parameter(key).shape[1]
        groups = np.arange(children.shape[1]), np.repeat(np.arange(units), parents.shape[1] // units)
        scores[key] = layer_cmi(children, parents, *groups, estimator="gaussian", given="kept", snr=sensitivity[key])
    return scores


@torch.no_grad()
def curves(network, scores: dict, blocks: dict, sample, judges) -> np.ndarray:
    """Growth (layers, grid) of the loss when one layer alone loses a share of its blocks and is refitted."""
    found, dense = np.zeros((len(KEYS), len(GRID))), evaluate(network, judges).loss
    moments = _moments(network, network, KEYS, sample)[1]
    for k, key in enumerate(KEYS):
        layer = network.get_submodule(key.removesuffix(".weight"))
        before = layer.weight.clone()
        for s, share in enumerate(GRID[1:], 1):
            kept = select([scores[key]], [blocks[key].weights], share, [1.0])
            mask = Mask.of_blocks({key: kept[0]}, blocks, network)
            mask.apply(network)
            _solve(layer, mask[key], *moments[key])
            found[k, s] = evaluate(network, judges).loss - dense
            layer.weight.copy_(before)
        print(key, found[k].round(3), flush=True)
    return found


def shared_out(damage: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """The share of every layer: those of `GRID` with the least total damage (layers, grid) that prune this much of all.

    Weights (layers,) are counted in parts of the budget, rounded down, so that it is met.
    """
    gains = np.floor(np.outer(sizes, GRID) / (share * sizes.sum()) * PARTS + 1e-6).astype(int)
    asked, best, chosen = np.arange(PARTS + 1), np.full(PARTS + 1, np.inf), []
    best[0] = 0  # least damage of the layers so far with which at least so many parts are pruned
    for growth, gain in zip(damage, gains, strict=True):
        totals = best[np.maximum(asked - gain[:, None], 0)] + growth[:, None]  # (grid, parts)
        chosen.append(totals.argmin(0))
        best = totals.min(0)
    left, shares = PARTS, np.zeros(len(sizes))
    for k in reversed(range(len(sizes))):
        s = chosen[k][left]
        shares[k], left = GRID[s], max(left - gains[k, s], 0)
    return shares


def accuracies(dense, kept: dict, blocks: dict, sample, test) -> dict[str, float]:
    """Test accuracy recalibrated and refitted."""
    network, mask = copy.deepcopy(dense), Mask.of_blocks(kept, blocks, dense)
    mask.apply(network)
    found = {"recalibrated": evaluate(recalibrate_batch_norm(copy.deepcopy(network), sample), test).accuracy}
    refit(network, dense, mask, sample)
    return {**found, "refitted": evaluate(network, test).accuracy, "pruned_percent": mask.percent_pruned()}


def compared(number: int, folder: Path) -> list[dict]:
    """Rows of one dense network: both ways of sharing out at every share."""
    network, began = model.build(model.TRAINING["Dims"]).eval(), time.perf_counter()
    weights = files.under_results(f"cifar10_jpeg/resnet56/baseline/{number}/0") / "logits_best.pkl"
    checkpoint = artifacts.load_weights(network, weights)
    images = load("CIFAR10", folder, val_size=checkpoint["val_size"], device=torch.device("cpu"))
    train, seed = images.train, 10 * number
    sample = {use: train[sample_per_class(train.labels, count, seed)] for use, count in IMAGES.items()}
    blocks = {key: contiguous_blocks(network, key, *model.GROUPS[key]) for key in KEYS}
    scores = scored(network, sample["scores"])
    damage = curves(network, scores, blocks, sample["refit"], sample["damage"])
    seconds, sizes = time.perf_counter() - began, np.array([blocks[key].weights.sum() for key in KEYS])
    rows = []
    for share in SHARES:
        shares = shared_out(damage, sizes, share)
        kept = {k: select([scores[k]], [blocks[k].weights], s, [1.0])[0] for k, s in zip(KEYS, shares, strict=True)}
        pruned = (shares * sizes).sum() / sizes.sum()  # a little more than asked: the same for both
        ways = {"damage": kept, "threshold": select_blocks(scores, blocks, pruned, [LIMIT] * len(KEYS))}
        for way, chosen in ways.items():
            row = {"network": number, "share": share, "way": way}
            rows.append(
                {**row, **accuracies(network, chosen, blocks, sample["refit"], images.test), "seconds": seconds}
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--Data_dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    for number in args.numbers:
        new, path = compared(number, args.Data_dir), FOLDER / "damage.json"
        known = records.read(path)["rows"] if path.is_file() else []
        others = [row for row in known if row["network"] != number]
        save(FOLDER, "damage", {"rows": sorted(others + new, key=lambda row: (row["network"], row["share"]))})


if __name__ == "__main__":
    cli.run(main)
