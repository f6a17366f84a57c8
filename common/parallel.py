"""Several processes, one per GPU, as torchrun starts them. In a single process every function here does nothing."""

import contextlib
import hashlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the group of processes that torchrun started, if it did: NCCL between GPUs, gloo between CPUs."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_gpu(0)))
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; process 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def quiet() -> bool | None:
    """No progress bar but on process 0, and there only on a terminal: tqdm's `disable`."""
    return True if rank() else None


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_gpu(index: int) -> int:
    """The GPU of this process: torchrun's choice, or the one that was asked for."""
    return int(os.environ.get("LOCAL_RANK", index))


def barrier() -> None:
    """Wait until every process has come here."""
    if size() > 1:
        dist.barrier()


def shard(rows: Tensor) -> Tensor:
    """This process's part of a batch; parts differ by at most one row."""
    return torch.tensor_split(rows, size())[rank()]


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def total(*values: Tensor) -> list[float]:
    """The sums of scalars over all processes."""
    return all_reduce(torch.stack([value.double() for value in values])).tolist()


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, convolutions in the memory layout that is fastest on CPUs and GPUs alike.

    On several GPUs with batch norm over the whole batch; gloo has no such thing: there every process norms its part.
    """
    network = network.to(device, memory_format=torch.channels_last)
    if size() > 1 and next(network.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def wrap(network: nn.Module, *, compile: bool = False, **options) -> nn.Module:
    """A module to train: has the network's weights, averages gradients over processes, may be compiled with options."""
    wrapped = nn.parallel.DistributedDataParallel(network) if size() > 1 else network
    return torch.compile(wrapped, **options) if compile else wrapped


def broadcast_buffers(network: nn.Module) -> None:
    """Give every process the running statistics of process 0."""
    if size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def assert_in_sync(tensors: dict[str, Tensor]) -> None:
    """Compare a hash of named tensors over all processes.

    Raises
    ------
    RuntimeError
        If they are not the same everywhere.
    """
    if size() == 1:
        return
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    everywhere = [None] * size()
    dist.all_gather_object(everywhere, digest.hexdigest())
    if len(set(everywhere)) > 1:
        raise RuntimeError(f"processes differ in {', '.join(tensors)}")
