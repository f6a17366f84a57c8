"""Kernel widths and precision on a real layer: fc1 -> fc2 of a trained MNIST-MLP, 250 x 100 groups.

    python benchmarks/real_layer.py [--weights_dir mlp/baseline/0] [--samples_per_class N] [--widths X ...]

For every width: the rank correlation of the scores from two disjoint halves of the images (reliability), and of the
scores from all images with the Gaussian closed form (another estimator of the same quantity, and itself reliable). Then
single against double precision at the default width. Needs a network that train_stage1.py made. Writes
results/benchmarks/real_layer.json.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "mlp"), str(ROOT / "benchmarks")]
from common import activations, artifacts, cli, files, masks
from common.cmi import kde, layer_cmi
from common.data import load, sample_per_class
from model import GROUPS, MLP, PAIRS
from output import FOLDER, save


def rank_correlation(a, b) -> float:
    return round(float(spearmanr(a.ravel(), b.ravel()).statistic), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights_dir", default="mlp/baseline/0")
    parser.add_argument("--Data_dir", type=Path, default=ROOT / "data")
    parser.add_argument("--samples_per_class", type=cli.COUNT, default=650)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.15, 0.18, 0.2, 0.22, 0.25, 0.3, 0.4])
    args = parser.parse_args()
    network, child = MLP(), PAIRS[0][1]
    checkpoint = artifacts.load_weights(network, files.under_results(args.weights_dir) / "logits_best.pkl")
    train = load("MNIST", args.Data_dir, val_size=checkpoint["val_size"], device=torch.device("cpu")).train
    rows = sample_per_class(train.labels, args.samples_per_class, seed=0)
    parents, children = (t.numpy() for t in activations.collect_activations(network, [child], train[rows])[child])
    blocks = masks.contiguous_blocks(network, child, *GROUPS[child])
    groups = blocks.child_groups, blocks.parent_groups
    half = len(rows) // 2

    def scores(rows=slice(None), **options):
        return layer_cmi(children[rows], parents[rows], *groups, n_jobs=os.cpu_count(), **options)

    gaussian = scores(estimator="gaussian")
    sweep = []
    for width in args.widths:
        whole, first, second = (
            scores(rows, width=width, precision="single")
            for rows in (slice(None), slice(0, half), slice(half, 2 * half))
        )
        sweep.append(
            {
                "width": width,
                "split_half": rank_correlation(first, second),
                "with_gaussian": rank_correlation(whole, gaussian),
                "negative_share": round(float((whole < 0).mean()), 4),
            }
        )
        print(sweep[-1], flush=True)
    single, double = (scores(precision=p) for p in ("single", "double"))
    record = {
        "samples": len(rows),
        "groups": [250, 100],
        "default_width": kde.WIDTH,
        "widths": sweep,
        "single_with_double": float(spearmanr(single.ravel(), double.ravel()).statistic),
        "largest_difference_of_single": float(abs(single - double).max()),
        "standard_deviation_of_scores": float(double.std()),
    }
    save(FOLDER, "real_layer", record)


if __name__ == "__main__":
    cli.run(main)
