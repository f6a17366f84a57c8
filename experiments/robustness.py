"""Accuracy of networks on images that are changed against them: the paper's adversarial study.

    python experiments/robustness.py NETWORK CHECKPOINT [CHECKPOINT ...] [--Data_dir DIR] [--images N] [--eps EPS ...]

Two attacks that see the network (Kurakin et al., ICLR workshop 2017): five steps of size eps along the sign of the
gradient, up the loss of the true class (iterative FGSM), or down that of the class that the clean image makes least
likely. eps is in the network's input units, where CIFAR-10 has standard deviation 1; no image moves by more than 5 eps
or leaves the pixels' range. CHECKPOINTs are below results/. Writes one record each below results/robustness/attacks/;
those that are there already are passed over.
"""

import argparse
import runpy
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
from common import artifacts, cli, files, parallel, records
from common.data import Data, Split, load
from common.errors import InputError
from rules import rule

STEPS = 5
ATTACKS = {"fgsm": "iterative FGSM", "least_likely": "iterative least-likely class"}
EPS = tuple(k / 1000 for k in range(1, 10))  # of the paper
TARGET = files.RESULTS / "robustness" / "attacks"


def attack(network: nn.Module, images: Tensor, labels: Tensor, step: float, among: tuple[Tensor, Tensor]) -> Tensor:
    """Images (n, ...) after STEPS steps up the loss of the labels (n,), or down it where the step is negative.

    Each step has the gradient's sign at every pixel, and ends among the lowest and the highest values. The network is
    in evaluation mode, so that images do not depend on each other.
    """
    changed = images.detach()
    for _ in range(STEPS):
        changed.requires_grad_()
        loss = F.cross_entropy(network(changed), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, changed)
        changed = (changed.detach() + step * gradient.sign()).clamp(*among)
    return changed.detach()


def limits(split: Split) -> tuple[Tensor, Tensor]:
    """The lowest and the highest values that images of a split can have, by channel."""
    mean, std = (0, 1) if split.mean is None else (split.mean, split.std)
    return tuple(torch.as_tensor((value - mean) / std) for value in (0.0, 1.0))


def accuracies(network: nn.Module, split: Split, grid: list[float]) -> dict[str, dict[str, float]]:
    """Accuracy in per cent by attack and eps, as "fgsm_0.001"; at 0 on the images as they are."""
    right, among = Counter(), limits(split)
    for images, labels in split.batches():
        images = images.contiguous(memory_format=torch.channels_last)
        logits = network(images)
        for kind in ATTACKS:
            towards, up = (labels, 1) if kind == "fgsm" else (logits.argmin(1), -1)
            right[f"{kind}_0"] += int((logits.argmax(1) == labels).sum())
            for eps in grid:
                changed = attack(network, images, towards, up * eps, among)
                right[f"{kind}_{eps:g}"] += int((network(changed).argmax(1) == labels).sum())
    return {name: {"accuracy": 100 * count / len(split)} for name, count in right.items()}


@cache
def data_of(name: str, val_size: int, folder: Path) -> Data:
    return load(name, folder, val_size=val_size, device=torch.device("cpu"))


def study(model, path: Path, args: argparse.Namespace) -> None:
    """Attack the network of one checkpoint and write the record."""
    known = records.of(path)
    if known.get("status") != "complete":
        raise InputError(f"{path}: no checkpoint of a finished run")
    network = model.build(known["arguments"]["Dims"])
    checkpoint = artifacts.load_weights(network, path)
    data = data_of(checkpoint["dataset"], checkpoint["val_size"], args.Data_dir)
    rows = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[: args.images].sort().values
    asked = {"Model": model.NAME, "eps": list(args.eps), "steps": STEPS, "images": len(rows)}
    record = {"stage": "attack", "arguments": asked, "inputs": records.checksums(path), "data": data.describe()}
    target = TARGET / files.display_path(path).removeprefix("results/")
    if records.record_path(target).is_file():
        there = records.read(records.record_path(target))
        records.check_same(target, there, record, "remove its record")
        print(f"{files.display_path(path)}: attacked already")
        return
    began, pruned = time.perf_counter(), known["stage"] == 3
    network = parallel.place(network, data.device).eval().requires_grad_(False)
    record |= {"rule": rule(known) if pruned else "dense", "requested_percent": known.get("requested_percent", 0)}
    record["dense"] = known["arguments"]["Retrain"] if pruned else files.display_path(path)
    record |= {**records.environment(data.device), "status": "complete"}
    record |= accuracies(network, data.test[rows], args.eps)
    records.write(records.record_path(target), {**record, "wall_seconds": round(time.perf_counter() - began, 1)})
    shown = ", ".join(f"{record[f'{kind}_{args.eps[-1]:g}']['accuracy']:.2f} % by {kind}" for kind in ATTACKS)
    print(f"{files.display_path(path)}: {record['fgsm_0']['accuracy']:.2f} %; at eps {args.eps[-1]:g} {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", metavar="NETWORK", choices=("mlp", "vgg16", "resnet56"))
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--Data_dir", type=Path, default=files.ROOT / "data")
    parser.add_argument("--images", type=cli.COUNT, help="test images, drawn once for all networks; default: all")
    parser.add_argument("--eps", type=cli.number(float, 0, above=True), nargs="+", default=EPS)
    args = parser.parse_args()
    model = SimpleNamespace(**runpy.run_path(str(files.ROOT / args.network / "model.py")))
    for name in args.checkpoints:
        study(model, files.under_results(name), args)


if __name__ == "__main__":
    cli.run(main)
