"""Scores on the workers of a Dask scheduler: the tasks that this machine's cores would do, added up in one order."""

import ctypes
import logging
import math
import operator
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version

import torch
from threadpoolctl import threadpool_limits

from common import records
from common.errors import InputError, reason

PATIENCE = 10.0  # seconds until a scheduler, or the first of its workers, is taken to be absent
SECONDS = 1.0  # that one task takes at least, of several of ours if they are shorter: long against sending it
# glibc keeps freed blocks, as it does by default: dask's setting makes it give them back at once, at twice the time
MALLOPT = {-1: 2**26, -3: 2**25}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


@cache
def connect(address: str) -> Callable[[Callable, Sequence], Iterator]:
    """What does tasks on the workers of a scheduler: `n_jobs` of `layer_cmi`.

    Raises
    ------
    InputError
        If dask is not installed, nobody answers, or a worker has other versions or not this code.
    """
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise InputError("`scheduler`: dask is not installed; pip install -r requirements-cluster.txt") from error
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="distributed")
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
        client.wait_for_workers(1, PATIENCE)
        client.run(_check, _versions())
    except Exception as error:  # a worker that cannot even read the question is a plain Exception
        needed = "start it and its workers with the packages of requirements-cluster.txt and PYTHONPATH=<this checkout>"
        raise InputError(f"`scheduler` {address}: {reason(error)}; {needed}") from error
    return partial(_in_order, client)


def _versions() -> dict[str, str]:
    """What decides the bits of a result, but for the kind of processor."""
    packages = {name: version(name) for name in records.PACKAGES}
    return {"python": platform.python_version(), **packages, "common/": records.common_hash()[:8]}


def _check(wanted: dict[str, str]) -> None:
    """Raise an ImportError unless these are the versions here."""
    for name, here in _versions().items():
        if here != wanted[name]:
            raise ImportError(f"a worker has {name} {here}, not {wanted[name]}")


def _in_order(client, function: Callable, tasks: Sequence) -> Iterator:
    """What the function returns for every task, in order.

    The function goes to the scheduler once, with all that it holds, as a task whose result the others need: where its
    copies are lost with their workers, the scheduler makes new ones. What `scatter` sends it could not.
    """
    import cloudpickle
    from dask.distributed import CancelledError, KilledWorker

    began = time.perf_counter()
    first = [function(task) for task in tasks[:1]]  # here, to see how long one takes
    size = math.ceil(SECONDS / (time.perf_counter() - began))
    yield from first
    if len(tasks) < 2:
        return
    try:
        sent = client.submit(cloudpickle.loads, cloudpickle.dumps(partial(_run, _versions(), function)), pure=False)
        parts = [tasks[k : k + size] for k in range(1, len(tasks), size)]
        for future in [client.submit(operator.call, sent, part, pure=False) for part in parts]:
            yield from _awaited(client, future)
    except (ImportError, CancelledError, KilledWorker) as error:
        raise ConnectionError(f"{client.scheduler.address}: {reason(error)}") from error


def _awaited(client, future) -> list:
    """The future's result; while there is no worker to give it, one line says so."""
    said = False
    while True:
        try:
            return future.result(PATIENCE)
        except TimeoutError:
            if future.status == "error":  # the task's own
                raise
            if not (said or client.scheduler_info(-1)["workers"]):
                said = True
                print(f"{client.scheduler.address} has no workers left; waiting for new ones", file=sys.stderr)


def _run(versions: dict[str, str], function: Callable, tasks: Sequence) -> list:
    """On a worker, on one thread: what the function returns for some tasks."""
    _check(versions)
    torch.set_num_threads(1)
    threadpool_limits(1)
    libc = ctypes.CDLL(None)
    for option, size in MALLOPT.items() if hasattr(libc, "mallopt") else ():
        libc.mallopt(option, size)
    return [function(task) for task in tasks]
