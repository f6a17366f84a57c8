"""What makes a good mask: rules to score and choose blocks, and ways to prepare what is kept, before long retraining.

    python benchmarks/selection.py [--baselines mnist_mlp/baseline] [--networks N] [--shares X ...] [--Data_dir DIR]

fc2 of trained MNIST-MLPs, in 250 x 100 groups. For every rule: test accuracy of the masked network as it is, with the
means of what was removed folded into the biases, with the kept weights refitted, and trained for one epoch after that.
The rules that earned a place are flags of stages 2 and 3 (--given, --Criterion, --Even, --Refit); the others live here
only. Needs networks that train_stage1.py made. Writes results/benchmarks/selection.json.
"""

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "mlp"), str(ROOT / "benchmarks")]
from common import activations, artifacts, cli, files, masks, refit, scoring
from common.cmi import layer_cmi
from common.data import Data, Split, derived_seed, load, sample_per_class
from common.training import evaluate, make_optimizer, make_schedule, train_epoch
from model import GROUPS, MLP, PAIRS, TRAINING
from output import FOLDER, mean, save, std

CHILD = PAIRS[0][1]
HALVES, PERMUTATIONS = 4, 2  # for standard errors and for the scores without dependence
PICTURED = {"kde given the rest": "threshold", "correlated groups: gaussian given what is kept": "even"}
PREPARED = ("masked", "means_folded", "refitted", "after_1_epoch")


def by_threshold(scores: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    return masks.select([scores], [weights], share, [1.0])[0]


def by_child(scores: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """The same share of every child group: ranks within rows, equal ones ordered by score."""
    ranks = scores.argsort(1).argsort(1) + scores.argsort(None).argsort().reshape(scores.shape) / (2 * scores.size)
    return masks.select([ranks], [weights], share, [1.0])[0]


CHOICES = {"threshold": by_threshold, "quota": by_child, "even": masks.select_balanced}


def scored(parents: np.ndarray, children: np.ndarray, network: MLP, sample: Split, scratch: Path) -> dict:
    """By name of the rule: (blocks, scores (H, G), ways of choosing)."""
    blocks = masks.contiguous_blocks(network, CHILD, *GROUPS[CHILD])
    correlated = masks.correlated_blocks(blocks, children, parents)
    options = {"n_jobs": os.cpu_count(), "seed": 0}
    inputs = (children, parents, blocks.child_groups, blocks.parent_groups)
    kde = layer_cmi(*inputs, precision="single", **options)
    draws = {"estimator": "kde", "precision": "single", **options}
    estimate = scoring.Estimator(scratch / "kde.state", blocks, draws)
    errors = scoring.standard_errors(estimate, children, parents, HALVES)
    null = scoring.permutation_null(estimate, children, parents, PERMUTATIONS)
    gaussian = layer_cmi(*inputs, estimator="gaussian", **options)
    seen = {
        "estimator": "gaussian",
        "given": "kept",
        "snr": activations.output_sensitivity(network, [CHILD], sample)[CHILD],
    }
    kept, noiseless = layer_cmi(*inputs, **seen, **options), layer_cmi(*inputs, **{**seen, "snr": None}, **options)
    regrouped = layer_cmi(children, parents, correlated.child_groups, correlated.parent_groups, **seen, **options)
    magnitude, random = blocks.mean_magnitude(network.get_parameter(CHILD)), np.random.default_rng(1).random(kde.shape)
    every = ("threshold", "quota", "even")
    return {
        "kde given the rest": (blocks, kde, every),
        "kde over its standard error": (blocks, kde / np.maximum(errors, 1e-12), ("even",)),
        "kde over its null": (blocks, (kde - null[:, :1]) / np.maximum(null[:, 1:2], 1e-12), ("even",)),
        "gaussian given the rest": (blocks, gaussian, ("even",)),
        "gaussian given what is kept, no noise": (blocks, noiseless, every),
        "gaussian given what is kept": (blocks, kept, every),
        "gaussian given what is kept, times magnitude": (blocks, np.sqrt(kept) * magnitude, every),
        "magnitude": (blocks, magnitude, every),
        "random": (blocks, random, ("threshold", "even")),
        "correlated groups: gaussian given what is kept": (correlated, regrouped, ("threshold", "even")),
        "correlated groups: magnitude": (
            correlated,
            correlated.mean_magnitude(network.get_parameter(CHILD)),
            ("even",),
        ),
        "correlated groups: random": (correlated, random, ("even",)),
    }


def picture(scores: np.ndarray, kept: np.ndarray) -> dict:
    """Scores as percentiles, one byte each and a row of child groups' as hexadecimal digits, and the kept blocks."""
    percentiles = scores.argsort(None).argsort().reshape(scores.shape) * 256 // scores.size
    return {"scores": [bytes(row.tolist()).hex() for row in percentiles], "kept": np.argwhere(kept).tolist()}


def measure(dense: MLP, blocks: masks.Blocks, kept: np.ndarray, data: Data, sample: Split, seed: int) -> dict:
    """Test accuracies (%) of the masked network, prepared in several ways."""
    mask = masks.Mask.of_blocks({CHILD: kept}, {CHILD: blocks}, dense)

    def prepared(change: Callable[[MLP], None]) -> MLP:
        network = copy.deepcopy(dense)
        mask.apply(network)
        change(network)
        return network

    def fold(network: MLP) -> None:
        means = activations.collect_activations(dense, [CHILD], sample)[CHILD][0].mean(0)
        with torch.no_grad():
            network.fc2.bias += (dense.fc2.weight - network.fc2.weight) @ means

    def train(network: MLP) -> None:
        refit.refit(network, dense, mask, sample)
        optimizer = make_optimizer("sgd", network.parameters(), TRAINING["Lr"], TRAINING["Weight_decay"], True)
        mask.hold(network, optimizer)
        batch, epoch = TRAINING["Batch_size"], derived_seed(seed, 1)
        schedule = make_schedule(optimizer, "steps", 1, data.train.steps(batch), [], 1.0, 0.0)
        torch.manual_seed(epoch)
        batches = data.train.shuffled(batch, epoch)
        train_epoch(network, optimizer, schedule, batches, torch.nn.CrossEntropyLoss(reduction="sum"))

    changes = (lambda _: None, fold, lambda network: refit.refit(network, dense, mask, sample), train)
    kept = mask[CHILD]
    return {
        **{name: evaluate(prepared(c), data.test).accuracy for name, c in zip(PREPARED, changes, strict=True)},
        "units_read": int(kept.any(0).sum()),
        "units_reached": int(kept.any(1).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baselines", default="mnist_mlp/baseline")
    parser.add_argument("--networks", type=cli.COUNT, default=5)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.996, 0.984])
    parser.add_argument("--Data_dir", type=Path, default=ROOT / "data")
    parser.add_argument("--samples_per_class", type=cli.COUNT, default=650)
    args = parser.parse_args()
    data, found, pictures = None, {}, {}
    for seed in range(args.networks):
        network = MLP()
        folder = files.under_results(args.baselines) / str(seed)
        checkpoint = artifacts.load_weights(network, folder / "logits_best.pkl")
        data = data or load("MNIST", args.Data_dir, val_size=checkpoint["val_size"], device=torch.device("cpu"))
        sample = data.train[sample_per_class(data.train.labels, args.samples_per_class, seed=0)]
        parents, children = (t.numpy() for t in activations.collect_activations(network, [CHILD], sample)[CHILD])
        with tempfile.TemporaryDirectory() as scratch:
            rules = scored(parents, children, network, sample, Path(scratch))
        for name, (blocks, scores, choices) in rules.items():
            for choice in choices:
                for share in args.shares:
                    kept = CHOICES[choice](scores, blocks.weights, share)
                    if PICTURED.get(name) == choice and (seed, share) == (0, args.shares[0]):
                        pictures[f"{name}, {choice}"] = picture(scores, kept)
                    row = measure(network, blocks, kept, data, sample, seed)
                    found.setdefault((share, name, choice), []).append(row)
                    print(seed, share, name, choice, *row.values(), flush=True)
    rows = []
    for (share, name, choice), runs in found.items():
        row = {"pruned_percent": 100 * share, "score": name, "chosen_by": choice}
        for key in runs[0]:
            values = [run[key] for run in runs]
            row |= {key: mean(values)} | ({f"{key}_std": std(values)} if key in PREPARED else {})
        rows.append({**row, "networks": len(runs)})
    save(FOLDER, "selection", {"samples_per_class": args.samples_per_class, "rules": rows, "pictures": pictures})


if __name__ == "__main__":
    cli.run(main)
