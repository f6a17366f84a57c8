"""Cost of scoring a layer: against its size, the floor of its arithmetic, the published routine and public packages.

    python benchmarks/speed.py [--quick] [--full] [--samples N ...] [--parent_groups G ...] [--headline N] [--out DIR]

The KDE in single precision on rectified units: against the number of samples (10 x 10 groups), of parent groups (with
100 child groups), and of cores; the published routine and public packages (benchmarks/peers.txt, skipped where not
installed) on one pair of groups of the same layer, times the number of pairs. The floor is (G + H) n^2 exponentials and
2 (G H + units) n^2 operations of matrix products (all pairs' sums, all groups' distances), each at the rate that
benchmarks/machine.py measures on one core. Every row is measured in a process of its own, so that no memory peak hides
another. Writes results/benchmarks/speed.json and, for the layer of the paper's headline, 250 x 100 groups of fc1 -> fc2
of the MNIST-MLP, results/benchmarks/scoring.json.
"""

import argparse
import importlib.metadata
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import published
from common.cmi import layer_cmi
from common.masks import contiguous_groups
from machine import exp2_rate, matmul_rate
from output import FOLDER, save

UNITS = 500, 300  # of the parent and of the child layer
SMALL = 10, 10  # groups of the layer that one pair at a time can still be compared on
HEADLINE = 250, 100
CORES = 1, 2
QUICK = {"samples": [500, 1000], "parent_groups": [5], "group_samples": 500, "headline": 1000}
QUICK |= {"published": [250], "peer_samples": 600, "calls": 1}


def layer(n: int, groups: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Children, correlated and rectified parents, and their groups; `groups` counts those of (parents, children)."""
    rng = np.random.default_rng(0)
    parents = np.maximum(rng.normal(size=(n, 20)) @ rng.normal(size=(20, UNITS[0])) + rng.normal(size=(n, UNITS[0])), 0)
    children = parents @ rng.normal(size=UNITS)
    return children, parents, contiguous_groups(UNITS[1], groups[1]), contiguous_groups(UNITS[0], groups[0])


def pair(n: int, which: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A child group, a parent group and all other parents of the small layer."""
    children, parents, child_groups, parent_groups = layer(n, SMALL)
    return children[:, child_groups == which], parents[:, parent_groups == which], parents[:, parent_groups != which]


def apart(work: Callable, *arguments):
    """The result of a call in a process of its own, on one thread but for the workers it asks for."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as process:
        return process.submit(work, *arguments).result()


def _one_thread() -> None:
    torch.set_num_threads(1)
    threadpool_limits(1)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _seconds(work: Callable[[], object]) -> float:
    """Median wall time of the calls that a second has room for, and of at least one."""
    times = []
    while sum(times) < 1:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def score_layer(n: int, groups: tuple[int, int], cores: tuple[int, ...] = (1,)) -> dict:
    """Seconds by number of cores, memory, and the floor of one core."""
    children, parents, *labels = layer(n, groups)
    layer_cmi(children[:64], parents[:64], *labels, precision="single")
    before = _peak_mib()
    seconds = {}
    for k in cores:
        seconds[k] = _seconds(lambda k=k: layer_cmi(children, parents, *labels, precision="single", n_jobs=k))
    peak = _peak_mib()  # read before the rates, which need memory too
    operations = 2 * (sum(UNITS) + groups[0] * groups[1]) * n**2
    floor = sum(groups) * n**2 / exp2_rate() + operations / matmul_rate()
    return {"seconds": seconds, "floor": floor, "peak": round(peak), "above_inputs": round(peak - before)}


def sweep_row(n: int, groups: tuple[int, int], cores: int = 1) -> dict:
    measured = apart(score_layer, n, groups, (cores,))
    return {
        "samples": n,
        "groups": groups,
        "cores": cores,
        "seconds": round(measured["seconds"][cores], 3),
        "floor_seconds_one_core": round(measured["floor"], 3),
        "share_of_floor": round(measured["floor"] / cores / measured["seconds"][cores], 3),
        "peak_memory_mib": measured["peak"],
        "peak_memory_above_inputs_mib": measured["above_inputs"],
    }


def headline(n: int) -> dict:
    """The record of the paper's largest layer of the MNIST-MLP."""
    measured = apart(score_layer, n, HEADLINE, CORES)
    wall, floor = measured["seconds"], measured["floor"]
    return {
        "samples": n,
        "groups": HEADLINE,
        "wall_seconds_by_cores": {cores: round(seconds, 1) for cores, seconds in wall.items()},
        "floor_seconds_one_core": round(floor, 1),
        "share_of_floor_one_core": round(floor / wall[1], 3),
        "speedup_two_cores": round(wall[1] / wall[2], 2),
        "peak_memory_mib": measured["peak"],
        "peak_memory_above_inputs_mib": measured["above_inputs"],
    }


@cache
def small_layer_seconds(n: int) -> float:
    """What the small layer takes this project on one core."""
    return apart(score_layer, n, SMALL)["seconds"][1]


def score_pairs(score: Callable[..., float], n: int, calls: int) -> tuple[float, float]:
    """Median seconds of one call for each of so many pairs, and the last value."""
    score(*(part[:, :2] for part in pair(60, 0)))  # imports and compiles
    times = []
    for k in range(calls):
        data = pair(n, k)
        start = time.perf_counter()
        value = score(*data)
        times.append(time.perf_counter() - start)
    return statistics.median(times), float(value)


def pairwise(score: Callable[..., float], n: int, calls: int) -> dict:
    """The cost of a routine that takes one pair at a time: measured, and extrapolated to the small layer."""
    seconds, value = apart(score_pairs, score, n, calls)
    layer_seconds = seconds * SMALL[0] * SMALL[1]
    return {
        "samples": n,
        "seconds_per_pair": round(seconds, 3),
        "value": round(value, 4),
        "layer_seconds": round(layer_seconds, 1),
        "extrapolated_from_calls": calls,
        "kde_layer_seconds": round(small_layer_seconds(n), 3),
        "ratio": round(layer_seconds / small_layer_seconds(n)),
    }


def frites_copula(x, y, z) -> float:
    from frites.core import gccmi_1d_ccc

    return gccmi_1d_ccc(x.T, y.T, z.T) * np.log(2)


def infomeasure_kernel(x, y, z) -> float:
    import infomeasure

    return infomeasure.cmi(x, y, cond=z, approach="kernel", kernel="gaussian", bandwidth=0.5)


def infomeasure_neighbours(x, y, z) -> float:
    import infomeasure

    return infomeasure.cmi(x, y, cond=z, approach="ksg", k=3)


def npeet_neighbours(x, y, z) -> float:
    from npeet_plus import mi

    return mi(x, y, z, k=3, base=np.e)


def tigramite_neighbours(x, y, z) -> float:
    from tigramite.independence_tests.cmiknn import CMIknn

    roles = np.repeat([0, 1, 2], [part.shape[1] for part in (x, y, z)])
    return CMIknn(knn=3, significance="fixed_thres", workers=1).get_dependence_measure(np.hstack([x, y, z]).T, roles)


PEERS = [
    ("frites", "Gaussian copula", frites_copula),
    ("infomeasure", "kernel", infomeasure_kernel),
    ("infomeasure", "nearest neighbours", infomeasure_neighbours),
    ("npeet-plus", "nearest neighbours", npeet_neighbours),
    ("tigramite", "nearest neighbours", tigramite_neighbours),
]


def peer_row(package: str, method: str, score: Callable[..., float], n: int, calls: int) -> dict:
    row = {"package": package, "method": method}
    try:
        return {**row, "version": importlib.metadata.version(package), **pairwise(score, n, calls)}
    except ImportError as error:  # also what `version` raises
        return {**row, "skipped": str(error)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 1000, 2000, 4000, 8000])
    parser.add_argument("--parent_groups", type=int, nargs="+", default=[5, 10, 25, 50, 125, 250])
    parser.add_argument("--group_samples", type=int, default=2000, help="samples of the rows by parent groups")
    parser.add_argument("--headline", type=int, default=6500, help="samples of the layer of scoring.json")
    parser.add_argument(
        "--published", type=int, nargs="+", default=[500, 1000], help="samples of the published routine"
    )
    parser.add_argument("--full", action="store_true", help="the published routine at 2,000 and 2,500 samples too")
    parser.add_argument("--peer_samples", type=int, default=1000, help="samples of the public packages, above 500")
    parser.add_argument("--calls", type=int, default=3, help="pairs that a routine for one pair is measured on")
    parser.add_argument("--quick", action="store_true", help="small values for all of these that are not named")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the records")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    sizes = args.published + [2000, 2500] * args.full
    record = {
        "by_samples": [sweep_row(n, SMALL) for n in args.samples],
        "by_parent_groups": [sweep_row(args.group_samples, (g, HEADLINE[1])) for g in args.parent_groups],
        "by_cores": [sweep_row(max(args.samples), SMALL, cores) for cores in CORES],
        "published": [pairwise(published.score, n, args.calls) for n in sizes],
        "peers": [peer_row(*peer, args.peer_samples, args.calls) for peer in PEERS],
    }
    save(args.out, "speed", record)
    save(args.out, "scoring", headline(args.headline))


if __name__ == "__main__":
    main()
