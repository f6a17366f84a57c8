"""How far the confidence of dense and of pruned networks can be trusted: reliability and expected calibration error.

    python benchmarks/calibration.py FOLDER [FOLDER ...] [--Data_dir DIR]

FOLDERs are below results/ and hold finished runs of the MNIST-MLP with their checkpoints. Over the test set, by rule
and pruned share: mean confidence and accuracy in ten bins of equal width of the confidence, and the mean over images of
the absolute difference of the two (expected calibration error; Naeini et al., AAAI 2015). Writes
results/benchmarks/calibration.json.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "mlp"), str(ROOT / "benchmarks"), str(ROOT / "experiments")]
from common import artifacts, cli, files, records
from common.data import Split, load
from common.errors import InputError
from model import MLP
from output import FOLDER, mean, save, std
from rules import rule

BINS = 10


@torch.inference_mode()
def reliability(network: torch.nn.Module, split: Split) -> np.ndarray:
    """For every bin of the confidence (BINS, 3): number of images, sum of confidences, number of right answers."""
    network.eval()
    bins = np.zeros((BINS, 3))
    for images, labels in split.batches():
        confidence, answer = network(images).softmax(1).max(1)
        which = (confidence * BINS).long().clamp(max=BINS - 1).numpy()
        for column, values in enumerate((torch.ones_like(confidence), confidence, answer == labels)):
            bins[:, column] += np.bincount(which, values.double().numpy(), BINS)
    return bins


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error in per cent."""
    return 100 * np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--Data_dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    test = load("MNIST", args.Data_dir, val_size=0, device=torch.device("cpu")).test
    found = defaultdict(list)
    for path in sorted(p for folder in args.folders for p in files.under_results(folder).rglob("*.pkl")):
        record = records.read(records.found(path))
        if record.get("status") == "complete" and "best" in record:
            network = MLP()
            artifacts.load_weights(network, path)
            pruned = (record["requested_percent"], rule(record)) if record["stage"] == 3 else (0.0, "dense")
            found[pruned].append(reliability(network, test))
    if not found:
        raise InputError(f"{' '.join(args.folders)}: no checkpoint of a finished run; run experiments/mnist.sh")
    rows = []
    for (share, name), runs in sorted(found.items()):
        errors = [calibration_error(bins) for bins in runs]
        count, confidence, right = sum(runs).T
        filled = count > 0
        rows.append(
            {
                "pruned_percent": share,
                "rule": name,
                "calibration_error": mean(errors),
                "std": std(errors),
                "networks": len(runs),
                "confidence": (100 * confidence[filled] / count[filled]).round(2).tolist(),
                "accuracy": (100 * right[filled] / count[filled]).round(2).tolist(),
                "images": count[filled].astype(int).tolist(),
            }
        )
    save(FOLDER, "calibration", {"bins": BINS, "networks": rows})


if __name__ == "__main__":
    cli.run(main)
