"""What this machine can do at best: the floor that timings are compared with."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(size: int = 2048) -> float:
    """Floating-point operations per second of a float32 matrix product, with the threads torch has now."""
    a, b, out = (torch.rand(size, size) for _ in range(3))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out))


def exp2_rate(size: int = 2**17) -> float:
    """Float32 exponentials to base 2 per second of one core, in its cache."""
    values, out = -20 * torch.rand(size), torch.empty(size)
    return 100 * size / seconds(lambda: [torch.exp2(values, out=out) for _ in range(100)])
