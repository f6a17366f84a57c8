"""Training speed of the convolutional networks: this project's loop against a plain DataLoader loop in float32.

    python benchmarks/epochs.py [--Data_dir DIR] [--steps N] [--networks vgg16 resnet56 resnet50] [--workers N]

VGG16 and ResNet56 train on CIFAR-10 with batches of 128; ResNet50 on made-up 224 x 224 images that lie on the device,
with batches of 64. Every way trains the same number of steps, after a warm-up of its own, in turn; medians over rounds.
Meant for a GPU, runs anywhere. Writes results/benchmarks/epochs.json.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from common import cli, parallel
from common.data import Split, crop_and_flip, load
from common.datasets import torchvision
from common.training import make_optimizer, make_schedule, train_epoch
from output import FOLDER, save

CIFAR_IMAGES, ROUNDS = 50_000, 3
WAYS = {  # bfloat16 or not; how it is launched: see `parallel.wrap`
    "float32": (False, False),
    "bfloat16": (True, False),
    "bfloat16, CUDA graphs": (True, None),
    "bfloat16, compiled": (True, True),
}


def network_of(name: str, classes: int, device: torch.device) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(classes).to(device)


class Photographs(torch.utils.data.Dataset):
    """Images as a user of torchvision would feed them: decoded one by one, transformed on the CPU."""

    def __init__(self, split: Split) -> None:
        transforms = torchvision().transforms
        self.images, self.labels = split.images.cpu(), split.labels.cpu()
        steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        scale = transforms.Normalize(split.mean.flatten().tolist(), split.std.flatten().tolist())
        self.transform = transforms.Compose([transforms.ToPILImage(), *steps, scale])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[row]), int(self.labels[row])


def plain_epoch(network, optimizer, batches, device) -> None:
    network.train()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(images.to(device)), labels.to(device)).backward()
        optimizer.step()


def measure(name: str, split: Split, batch: int, batches, device: torch.device, classes: int) -> list[dict]:
    """Seconds per step of every way of training on the split, and of the plain loop over `batches`."""
    loss, augment = torch.nn.CrossEntropyLoss(reduction="sum"), None if name == "resnet50" else crop_and_flip()
    plain = network_of(name, classes, device)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    work = {"plain DataLoader loop, float32": lambda: plain_epoch(plain, optimizer, batches, device)}
    for way, (amp, compile) in WAYS.items():
        if compile is not False and device.type == "cpu":
            continue
        network = network_of(name, classes, device).to(memory_format=torch.channels_last)
        ours = make_optimizer("sgd", network.parameters(), 0.01, 1e-4, True)
        schedule = make_schedule(ours, "steps", 1, split.steps(batch), [], 1.0, 0.0)
        trained = parallel.wrap(network, compile=compile)
        work[way] = lambda trained=trained, ours=ours, schedule=schedule, amp=amp: train_epoch(
            trained, ours, schedule, split.shuffled(batch, 0, augment), loss, amp=amp
        )
    times = {way: [] for way in work}
    for _ in range(ROUNDS + 1):
        for way, epoch in work.items():
            start = time.perf_counter()
            epoch()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[way].append((time.perf_counter() - start) / (len(split) // batch))
    rows = []
    for way, values in times.items():
        step = statistics.median(values[1:])
        row = {"network": name, "way": way, "step_ms": round(1000 * step, 2), "images_per_second": round(batch / step)}
        if name != "resnet50":
            row["epoch_seconds"] = round(step * CIFAR_IMAGES / batch, 2)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--Data_dir", type=Path, default=ROOT / "data")
    parser.add_argument("--steps", type=cli.COUNT, default=100)
    networks = ["vgg16", "resnet56", "resnet50"]
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()))
    args = parser.parse_args()
    device, rows = cli.choose_device(0), []
    for name in args.networks:
        batch, classes = (64, 1000) if name == "resnet50" else (128, 10)
        if name == "resnet50":
            images = torch.randint(256, (args.steps * batch, 3, 224, 224), dtype=torch.uint8, device=device)
            labels = torch.randint(classes, (len(images),), device=device)
            scale = torch.full((3, 1, 1), 0.45, device=device), torch.full((3, 1, 1), 0.22, device=device)
            split = Split(images, labels, *scale)
            batches = [(x.contiguous(), y) for x, y in Split(images[: 4 * batch], labels[: 4 * batch]).batches(batch)]
            batches = [batches[k % len(batches)] for k in range(args.steps)]  # on the device: no loading at all
        else:
            train = load("CIFAR10", args.Data_dir, val_size=0, device=device).train
            split = train[torch.arange(args.steps * batch, device=device)]
            batches = torch.utils.data.DataLoader(Photographs(split), batch, shuffle=True, num_workers=args.workers)
        rows += measure(name, split, batch, batches, device, classes)
    save(FOLDER, "epochs", {"steps": args.steps, "loader_workers": args.workers, "training": rows}, device)


if __name__ == "__main__":
    cli.run(main)
