"""Cost of scoring a layer of the paper's headline size, against the floor of arithmetic and exponentials.

    python benchmarks/scoring.py [--samples N]

500 rectified units in 250 groups, 300 children in 100 groups, as in fc1 -> fc2 of the MNIST-MLP. Writes
results/benchmarks/scoring.json.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from machine import exp2_rate, matmul_rate

from common import artifacts
from common.cmi import layer_cmi
from common.masks import contiguous_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6500)
    n = parser.parse_args().samples
    rng = np.random.default_rng(0)
    parents = np.maximum(rng.normal(size=(n, 20)) @ rng.normal(size=(20, 500)) + rng.normal(size=(n, 500)), 0)
    children = parents @ rng.normal(size=(500, 300))
    groups = contiguous_groups(300, 100), contiguous_groups(500, 250)
    torch.set_num_threads(1)
    floor = 350 * n**2 / exp2_rate() + 2 * 100 * 250 * n**2 / matmul_rate()
    layer_cmi(children[:500], parents[:500], *groups, precision="single")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall = {}
    for cores in (1, 2):
        start = time.perf_counter()
        layer_cmi(children, parents, *groups, precision="single", n_jobs=cores)
        wall[cores] = round(time.perf_counter() - start, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {
        "samples": n,
        "groups": [250, 100],
        "wall_seconds_by_cores": wall,
        "floor_seconds_one_core": round(floor, 1),
        "share_of_floor_one_core": round(floor / wall[1], 3),
        "speedup_two_cores": round(wall[1] / wall[2], 2),
        "peak_memory_mib": round(peak / 1024),
        "peak_memory_above_inputs_mib": round((peak - before) / 1024),
        **artifacts.circumstances(torch.device("cpu")),
    }
    artifacts.write_json(artifacts.RESULTS / "benchmarks" / "scoring.json", record)
    print(*(f"{key}: {value}" for key, value in record.items()), sep="\n")


if __name__ == "__main__":
    main()
