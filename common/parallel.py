"""Several processes, one per GPU, as torchrun starts them. In a single process every function here does nothing."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import joblib
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.cmi.inputs import out_of_memory
from common.errors import InputError, reason

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # it sets all; a cluster some of them


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the group of processes that torchrun started, if it did: NCCL between GPUs, gloo between CPUs."""
    if not by_torchrun():
        yield
        return
    for name in TORCHRUN:
        if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
            raise InputError(f"the processes cannot be joined ({name} is no number); start them with torchrun")
    if rank() >= int(os.environ["WORLD_SIZE"]):  # it would wait for a process that is not there
        raise InputError(f"the processes cannot be joined (RANK {rank()} of fewer); start them with torchrun")
    gpus = torch.cuda.device_count()
    if gpus and max(_number("LOCAL_WORLD_SIZE"), local_gpu(0) + 1) > gpus:  # every process here sees it
        as_many = f"start as many (torchrun --nproc_per_node {gpus})"
        raise InputError(f"more processes than GPUs: there are {gpus}; {as_many}")
    options = {"backend": "nccl", "device_id": torch.device("cuda", local_gpu(0))} if gpus else {"backend": "gloo"}
    try:
        dist.init_process_group(**options)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"the processes cannot be joined ({reason(error)}); start them with torchrun") from error
    yield
    dist.destroy_process_group()  # after an error it stays, for `is_first`


def by_torchrun() -> bool:
    """Whether this process is one of several that were started to work together."""
    return all(os.environ.get(name) for name in TORCHRUN)


def rank() -> int:
    """This process's number; process 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else _number("RANK")


def _number(name: str) -> int:
    """What torchrun says of this process, 0 without it."""
    number = os.environ.get(name, "") if by_torchrun() else ""
    return int(number) if number.isdecimal() else 0


def is_first(message: str) -> bool:
    """Whether this process is the first that has this to say; of several that meet one fault only one says it.

    Before they have joined, the first on each machine.
    """
    if not dist.is_initialized():
        return not 0 < _number("LOCAL_RANK") < _number("LOCAL_WORLD_SIZE")  # no other speaks for one that cannot be
    try:
        return dist.distributed_c10d._get_default_store().add(f"said: {message}", 1) == 1
    except RuntimeError:  # the others are gone
        return True


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_gpu(index: int) -> int:
    """The GPU of this process: torchrun's choice, or the one that was asked for."""
    return int(os.environ["LOCAL_RANK"]) if by_torchrun() else index


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
    if any(map(nn.parameter.is_lazy, network.parameters())):
        raise InputError("the network has layers without a size yet; run it once on images in model.py's build")
    network = network.to(device, memory_format=torch.channels_last)
    if size() > 1 and next(network.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


class Graphed(nn.Module):
    """A network that one GPU replays as two CUDA graphs, forward and backward: small operations take longer to launch.

    Only batches of the first one's shape: others, such as an epoch's last, run as ever. Loss and optimizer stay
    outside. What is captured is repeated: the network must not depend on values or on Python's own random numbers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.replay, self.shape = network, None, None

    def forward(self, images: Tensor) -> Tensor:
        if self.replay is None:
            self.replay, self.shape = self._capture(images), images.shape
        return self.replay(images) if images.shape == self.shape else self.network(images)

    def _capture(self, images: Tensor) -> nn.Module:
        """A double of the network that replays; trials move random numbers and statistics, which are put back."""
        double, buffers = nn.Sequential(self.network), [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # trials have a stream of their own
        try:
            with torch.random.fork_rng([images.device]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Attempting to run cuBLAS")  # the backward pass's thread is new
                torch.cuda.make_graphed_callables(double, (images.clone(),), allow_unused_input=True)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise InputError(f"no CUDA graph of this network ({reason(error)}); train with `no-compile`") from error
        for buffer, before in buffers:
            buffer.copy_(before)
        return double


def wrap(network: nn.Module, *, compile: bool | None = None, **options) -> nn.Module:
    """A module to train: has the network's weights, averages gradients over processes.

    `compile` sends it through torch.compile, with options; None: a single GPU replays CUDA graphs; False: as it is.
    """
    if size() > 1:
        network = nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False)  # once an epoch will do
    elif compile is None and next(network.parameters()).is_cuda:
        return Graphed(network)
    return torch.compile(network, dynamic=False, **options) if compile else network


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
    here, everywhere = {name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()}, [None] * size()
    dist.all_gather_object(everywhere, joblib.hash(here))
    if len(set(everywhere)) > 1:
        raise RuntimeError(f"processes differ in {', '.join(tensors)}")
