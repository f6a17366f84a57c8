"""What scores of ResNet50 with single channels as groups would cost on 1 to 1,000 workers, and where more stop paying.

    python benchmarks/scale.py [--images N] [--gigabits B] [--check W ...] [--out DIR]

Measured here, in seconds of one core: a task of every shape of layer, on few images (its cost is proportional to their
number); packing and unpacking what is sent, per byte; a task of dask's that does nothing. Taken from --gigabits: a
message's time between two machines. Layers come one after the other: this machine does the first task of each, then
sends the kernels to the scheduler, which has one worker unpack them; workers pass them on, twice as many at every step;
then tasks are done in waves, or as fast as their results arrive, whichever is slower. The check runs a layer on a local
cluster and compares the processor time of its workers, whatever else this machine does, and the wall time, which that
decides too, with what the model says. Writes results/benchmarks/scale.json.
"""

import argparse
import math
import os
import sys
import time
from functools import cache
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import torch
from dask.distributed import Client, LocalCluster

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "resnet50"), str(ROOT / "benchmarks")]
import model
from common import cluster
from common.cmi import kde, layer_cmi
from common.cmi.inputs import Layer, one_thread_per_worker
from output import FOLDER, save

WORKERS = 1, 3, 10, 30, 100, 300, 1000
FEW = 1000  # images that tasks are measured on
CHECK = (1500, (128, 128))  # images; parent and child groups
PAYS = 0.5  # share of all workers' time that is work on scores, below which more workers do not pay


def kernels(n: int, groups: tuple[int, int]) -> kde._Kernels:
    """Those of a layer of so many images and single units, (parents, children)."""
    parents, children = (np.random.default_rng(0).normal(size=(n, units)) for units in groups)
    layer = Layer(children, parents, np.arange(groups[1]), np.arange(groups[0]))
    return kde._Kernels(layer, kde.widths(groups[0]), torch.float32, torch.device("cpu"))


def busy(work) -> float:
    """Seconds of a core that a call takes."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


@cache
def measured(groups: tuple[int, int]) -> dict:
    """Seconds of one row and one image, and bytes of one image, of a layer; seconds of packing and unpacking a byte."""
    few = kernels(FEW, groups)
    rows = max(2, min(kde.TASK_ROWS, 2 * 10**9 // (FEW * math.prod(groups))))
    with one_thread_per_worker():
        few.sum_rows(0, 1)
        seconds = busy(lambda: few.sum_rows(0, rows)) / rows / FEW
    packed = cloudpickle.dumps(few)
    pack, unpack = (busy(lambda: cloudpickle.dumps(few)), busy(lambda: cloudpickle.loads(packed)))
    return {"seconds": seconds, "bytes": len(packed) / FEW, "pack": pack / len(packed), "unpack": unpack / len(packed)}


def costs(images: int, groups: tuple[int, int]) -> dict:
    """Tasks of a layer, the seconds of one, the bytes that are sent, and those of a task's result."""
    one, pairs = measured(groups), (groups[0] + 1) * (groups[1] + 1)
    rows = min(kde.TASK_ROWS, max(1, kde.TASK_OPERATIONS // (2 * images * pairs)))
    known = {"tasks": math.ceil(images / rows), "task_seconds": rows * images * one["seconds"]}
    return {**known, "sent": images * one["bytes"], "result": 8 * math.prod(groups), **one}


def layer_seconds(cost: dict, workers: int, per_byte: float, per_task: float) -> float:
    """Wall time of one layer by the model."""
    left = cost["tasks"] - 1
    together = math.ceil(cluster.SECONDS / cost["task_seconds"])  # of our tasks, in one of dask's
    parts = math.ceil(left / together)
    copies = 2 + math.ceil(math.log2(min(workers, max(parts, 1))))
    sending = cost["sent"] * (cost["pack"] + copies * per_byte + (copies - 1) * (cost["pack"] + cost["unpack"]))
    waves = math.ceil(parts / workers) * together * cost["task_seconds"]
    return cost["task_seconds"] + sending + max(waves, left * cost["result"] * per_byte + parts * per_task)


def task_overhead(client: Client) -> float:
    """Wall seconds of one of dask's tasks that does nothing, of many."""
    start = time.perf_counter()
    client.gather(client.map(abs, range(500), pure=False))
    return (time.perf_counter() - start) / 500


def check(counts: list[int]) -> tuple[list[dict], float]:
    """The model against a local cluster, by number of workers; and a task's overhead."""
    n, groups = CHECK
    cost, rows, cores = costs(n, groups), [], os.cpu_count()
    layer = [np.random.default_rng(0).normal(size=(n, units)) for units in reversed(groups)]
    layer += [np.arange(units) for units in reversed(groups)]
    with LocalCluster(n_workers=max(counts), threads_per_worker=1, dashboard_address=None) as local:
        run = cluster.connect(local.scheduler_address)
        client = run.args[0]
        client.wait_for_workers(max(counts))
        overhead = task_overhead(client)
        for workers in sorted(counts, reverse=True):
            local.scale(workers)
            while len(client.ncores()) > workers:
                time.sleep(0.1)
            processes = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
            before, start = sum(sum(p.cpu_times()[:2]) for p in processes), time.perf_counter()
            layer_cmi(*layer, precision="single", n_jobs=run)
            wall = time.perf_counter() - start
            spent = sum(sum(p.cpu_times()[:2]) for p in processes) - before
            by_model = (cost["tasks"] - 1) * cost["task_seconds"]
            row = {"workers": workers, "core_seconds": spent, "core_seconds_by_model": by_model}
            row |= {
                "wall_seconds": wall,
                "wall_seconds_by_model": layer_seconds(cost, min(workers, cores), 0, overhead),
            }
            rows.append({**row, "load_average": os.getloadavg()[0]})
    return rows[::-1], overhead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50000)
    parser.add_argument("--gigabits", type=float, default=10.0, help="per second between two machines")
    parser.add_argument("--check", type=int, nargs="+", default=[1, 2, 4], help="workers of the local cluster")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the record")
    args = parser.parse_args()
    checked, per_task = check(args.check)
    weights, per_byte = model.build(1000).state_dict(), 8e-9 / args.gigabits
    layers = [costs(args.images, (weights[child].shape[1], weights[child].shape[0])) for _, child in model.PAIRS]
    work = sum(cost["tasks"] * cost["task_seconds"] for cost in layers)
    table = []
    for workers in WORKERS:
        seconds = sum(layer_seconds(cost, workers, per_byte, per_task) for cost in layers)
        share = work / seconds / workers
        table.append({"workers": workers, "hours": seconds / 3600, "speed_up": work / seconds, "share_at_work": share})
    record = {
        "check": checked,
        "images": args.images,
        "gigabits_per_second": args.gigabits,
        "tasks": sum(cost["tasks"] for cost in layers),
        "task_seconds": [f(cost["task_seconds"] for cost in layers) for f in (min, max)],
        "gib_sent_per_layer": [f(cost["sent"] for cost in layers) / 2**30 for f in (min, max)],
        "mib_of_a_result": [f(cost["result"] for cost in layers) / 2**20 for f in (min, max)],
        "seconds_per_gib_packed_and_unpacked": [layers[-1][kind] * 2**30 for kind in ("pack", "unpack")],
        "overhead_seconds_per_task": per_task,
        "core_days": work / 86400,
        "pays_up_to_workers": max(row["workers"] for row in table if row["share_at_work"] >= PAYS),
        "workers": table,
    }
    save(args.out, "scale", record)


if __name__ == "__main__":
    main()
