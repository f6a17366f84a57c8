"""Whether information that is not linear would choose other blocks: kernel entropies given what is kept.

    python benchmarks/kernels.py [--network resnet56|mlp] [--weights_dir DIR ...] [--Data_dir DIR]

Scores of `--given kept` are the growth of h(e + N) while parents go one by one: e is what the best linear function of
the parents that are still kept leaves of the child, N the noise through which the outputs see it. The estimator takes e
as Gaussian: h(e + N) - h(N) = log(1 + var(e)) / 2. Here it is also estimated by kernels, whose width is the noise
itself, in the same order of removal; also at 100 times the signal-to-noise ratio. Groups are single units,
of convolutions channels.

Writes results/benchmarks/kernels_<network>.json.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from scipy.special import xlogy
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from common import artifacts, cli, files
from common.activations import collect_activations, output_sensitivity
from common.cmi import layer_cmi
from common.cmi.inputs import standardise
from common.data import load, sample_per_class
from common.masks import contiguous_blocks, select_blocks
from output import FOLDER, save

DENSE = {"mlp": ["robustness/baseline/0"], "resnet56": [f"cifar10_jpeg/resnet56/baseline/{k}/0" for k in range(3)]}
IMAGES = {"mlp": 100, "resnet56": 200}  # of a class
TIMES = (1, 100)  # the signal-to-noise ratio
SHARES = (0.5, 0.7, 0.9)
RIDGE = 1e-9  # of units of variance 1
STEP = 0.25  # of the integral, in standard deviations of the noise: far finer than what is as smooth needs


def kernel_growth(residuals: np.ndarray) -> np.ndarray:
    """h(e + N) - h(N) in nats of samples (k, n) of e, N standard normal: of the kernel density with N's kernel."""
    at = np.arange(residuals.min() - 9, residuals.max() + 9, STEP)[:, None]
    density = np.stack([np.exp(-((at - e) ** 2) / 2).mean(1) for e in residuals]) / np.sqrt(2 * np.pi)
    return -xlogy(density, density).sum(1) * STEP - np.log(2 * np.pi * np.e) / 2


def gaussian_growth(residuals: np.ndarray) -> np.ndarray:
    return np.log1p(residuals.var(1)) / 2


def residuals(parents: np.ndarray, child: np.ndarray, groups: np.ndarray, order: np.ndarray) -> np.ndarray:
    """What least squares leaves of the child (n,) while parent groups go in this order: (number of groups + 1, n)."""
    units = [np.flatnonzero(groups == group) for group in order[::-1]]  # kept longest first
    ridge = np.sqrt(RIDGE * len(child)) * np.eye(parents.shape[1])  # so that copies and constants change nothing
    basis = np.linalg.qr(np.vstack([parents[:, np.concatenate(units)], ridge]))[0][: len(child)]
    parts = basis * (basis.T @ child)
    ends = np.cumsum([len(own) for own in units])
    explained = [parts[:, begin:end].sum(1) for begin, end in pairwise([0, *ends])]
    return (child - np.cumsum([np.zeros_like(child), *explained], axis=0))[::-1]


def scored(parents: np.ndarray, children: np.ndarray, groups: np.ndarray, snr: np.ndarray) -> dict[tuple, np.ndarray]:
    """Scores (children, groups) by (times the signal-to-noise ratio, kind)."""
    options = {"estimator": "gaussian", "given": "kept", "snr": snr}
    orders = layer_cmi(children, parents, np.arange(len(snr)), groups, **options).argsort(1, kind="stable")
    parents, children = standardise(parents)[0], standardise(children)[0]
    found = {(times, kind): np.zeros(orders.shape) for times in TIMES for kind in ("gaussian", "kernels")}
    for j, order in enumerate(orders):
        left = residuals(parents, children[:, j], groups, order)
        for (times, kind), scores in found.items():
            growth = kernel_growth if kind == "kernels" else gaussian_growth
            scores[j, order] = isotonic_regression(np.diff(growth(left * np.sqrt(times * snr[j])))).x
    return found


def compared(network, model, sample) -> list[dict]:
    """A row for each signal-to-noise ratio: rank correlation and share of other choices over all masked layers."""
    keys = list(model.MAX_SPARSITY)
    positions = None if model.NAME == "mlp" else 1
    seen = collect_activations(network, keys, sample, positions=positions)
    sensitivity = output_sensitivity(network, keys, sample, positions=positions is not None)
    found, blocks = {}, {}
    for key in keys:
        parents, children = (values.numpy().astype(float) for values in seen.pop(key))
        units = network.get_parameter(key).shape[1]
        blocks[key] = contiguous_blocks(network, key, units, children.shape[1])
        groups = np.repeat(np.arange(units), parents.shape[1] // units)
        found[key] = scored(parents, children, groups, sensitivity[key])
        print(key, flush=True)
    rows = []
    for times in TIMES:
        kinds = [{key: found[key][times, kind] for key in keys} for kind in ("gaussian", "kernels")]
        flat = [np.concatenate([scores.ravel() for scores in kind.values()]) for kind in kinds]
        row = {"times_snr": times, "largest_score": flat[0].max(), "rank_correlation": spearmanr(*flat).statistic}
        for share in SHARES:
            kept = [select_blocks(kind, blocks, share, [0.97] * len(keys)) for kind in kinds]
            row[f"other_{share}"] = np.mean(np.concatenate([(kept[0][k] != kept[1][k]).ravel() for k in keys]))
        rows.append({key: float(value) for key, value in row.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=DENSE, default="resnet56")
    parser.add_argument("--weights_dir", nargs="+")
    parser.add_argument("--Data_dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / args.network))
    import model

    rows = []
    for folder in args.weights_dir or DENSE[args.network]:
        network = model.build(model.TRAINING["Dims"]).eval()
        checkpoint = artifacts.load_weights(network, files.under_results(folder) / "logits_best.pkl")
        options = {"val_size": checkpoint["val_size"], "device": torch.device("cpu")}
        train = load(model.TRAINING["Dataset"], args.Data_dir, **options).train
        sample = train[sample_per_class(train.labels, IMAGES[args.network], seed=0)]
        rows += [{"network": folder, **row} for row in compared(network, model, sample)]
    save(FOLDER, f"kernels_{args.network}", {"images": len(sample), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
