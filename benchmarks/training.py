"""Training throughput on MNIST: this project's loop against the ordinary torchvision DataLoader loop, side by side.

    python benchmarks/training.py [--Data_dir DIR] [--epochs N]

Both train the same network with the same recipe, epochs in turn. Writes results/benchmarks/training.json.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "mlp"), str(ROOT / "benchmarks")]
from common import cli
from common.data import load
from common.datasets import torchvision
from common.training import make_optimizer, make_schedule, train_epoch
from machine import matmul_rate
from model import MLP, TRAINING
from output import FOLDER, save


def loader_epoch(network, optimizer, loader) -> None:
    network.train()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--Data_dir", type=Path, default=ROOT / "data")
    parser.add_argument("--epochs", type=cli.COUNT, default=3)
    args = parser.parse_args()
    batch = TRAINING["Batch_size"]
    train = load("MNIST", args.Data_dir, val_size=0, device=torch.device("cpu")).train
    tv = torchvision()
    dataset = tv.datasets.MNIST(args.Data_dir, train=True, transform=tv.transforms.ToTensor())
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=2)
    networks = [MLP(), MLP()]
    ours = make_optimizer("sgd", networks[0].parameters(), TRAINING["Lr"], TRAINING["Weight_decay"], True)
    schedule = make_schedule(ours, "steps", 1, train.steps(batch), [], 1.0, 0.0)
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    theirs = torch.optim.SGD(networks[1].parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    work = {
        "project": lambda: train_epoch(networks[0], ours, schedule, train.shuffled(batch, 0), loss),
        "dataloader": lambda: loader_epoch(networks[1], theirs, loader),
    }
    times = {name: [] for name in work}
    for _ in range(args.epochs + 1):
        for name, epoch in work.items():
            start = time.perf_counter()
            epoch()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    first, *later = ((m.in_features, m.out_features) for m in (networks[0].fc1, networks[0].fc2, networks[0].final))
    operations = len(train) * (4 * first[0] * first[1] + sum(6 * i * o for i, o in later))  # no gradient of the images
    floor = operations / matmul_rate()
    record = {
        "epochs_per_minute": {name: round(60 / value, 1) for name, value in medians.items()},
        "ratio": round(medians["dataloader"] / medians["project"], 2),
        "matmul_floor_seconds": round(floor, 3),
        "share_of_matmul_floor": round(floor / medians["project"], 3),
        "threads": torch.get_num_threads(),
    }
    save(FOLDER, "training", record)


if __name__ == "__main__":
    cli.run(main)
