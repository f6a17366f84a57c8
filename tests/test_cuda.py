"""What runs on a GPU, tried without one: on tensors that claim to lie there, and with a graph's rules on the CPU."""

import copy
import ctypes
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, model_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import activations, cli, parallel, refit, runs, training
from common.cmi import kde
from common.cmi.inputs import Layer
from common.data import Split, crop_and_flip
from common.errors import InputError
from common.masks import Mask, contiguous_blocks
from common.training import evaluate, make_optimizer, make_schedule, train_epoch

GPU = torch.device("cuda", 0)
CUDA, META = 1, 14  # numbers of kinds of devices in torch


class Waits(TorchDispatchMode):
    """Notes operations after which Python knows values, so that it has waited for the device, and on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in read if tensor.ndim}
        if name in ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal"):
            self.found.append(name)
        elif getattr(result, "is_cpu", False) and "cuda" in devices:
            self.found.append(f"{name} to the CPU")
        elif len(devices) > 1 and name != "copy_":
            self.found.append(f"{name} of two devices")
        return result


@pytest.fixture
def gpu(monkeypatch):
    """Within it, tensors "on" a GPU have shapes, kinds and a device, no values: torch checks them without the hardware.

    A build of torch for CPUs has nothing that switches between GPUs: the switch that does nothing takes its place, so
    "cuda" without a number is unknown. Nor has it a backward pass there: every gradient is 0.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    switches = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, switches[CUDA] = switches[CUDA], switches[META]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: id(tensor), raising=False)
    monkeypatch.setattr(FakeTensor, "numpy", lambda tensor: np.zeros(tensor.shape), raising=False)
    monkeypatch.setattr(torch, "tensor", lambda data, **kind: torch.empty(np.shape(data), **kind))
    monkeypatch.setattr(torch.autograd, "grad", lambda _, inputs, **__: [torch.zeros_like(value) for value in inputs])
    monkeypatch.setattr(parallel, "total", lambda *values: [1.0 for value in values if value.device == GPU])
    with torch.library._scoped_library("aten", "IMPL") as operations, FakeTensorMode(allow_non_fake_inputs=True):
        operations.impl("_fused_sgd_", lambda *_, **__: None, "Meta")
        yield
    switches[CUDA] = before


def on_gpu(network):
    """As `parallel.place`, which torch does not do with tensors without values."""
    for module in network.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                order = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
                module._parameters[name] = nn.Parameter(torch.empty_like(weight, device=GPU, memory_format=order))
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return network


def images_on_gpu(count=21, side=32, channels=3):
    images = torch.zeros(count, channels, side, side, dtype=torch.uint8, device=GPU)
    scale = (torch.ones(channels, 1, 1, device=GPU) for _ in range(2))
    return Split(images, torch.zeros(count, dtype=torch.int64, device=GPU), *scale)


def masks_of(network, count=3):
    keys = [name for name, weight in network.named_parameters() if weight.ndim > 1][1 : 1 + count]
    return Mask({key: torch.ones_like(network.get_parameter(key), dtype=torch.bool) for key in keys})


@pytest.mark.parametrize(
    ("folder", "opt", "amp"),
    [("vgg16", "sgd", False), ("vgg16", "adam", True), ("resnet56", "sgd", True), ("resnet56", None, False)],
)
def test_a_step_of_training_waits_for_nothing(gpu, monkeypatch, folder, opt, amp):
    """With torch's own SGD, not fused, too."""
    model = model_of(folder)
    network, split, kinds = on_gpu(model.build(10)), images_on_gpu(), []
    mask = masks_of(network)
    mask.apply(network)
    weights = network.parameters()
    optimizer = make_optimizer(opt, weights, 0.1, 1e-4, True) if opt else torch.optim.SGD(weights, 0.1, momentum=0.9)
    mask.hold(network, optimizer)
    schedule = make_schedule(optimizer, "one-cycle", 1, 3, [], 0.1, 0.3)
    network.register_forward_hook(lambda _module, _read, logits: kinds.append(logits.dtype))

    def backward(loss):
        assert (loss.dtype, loss.device) == (torch.float32, GPU)
        for weight in network.parameters():
            assert weight.grad is None  # from the step before
            weight.grad = torch.zeros_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    with Waits() as waits:
        train_epoch(network, optimizer, schedule, split.shuffled(8, 0, crop_and_flip()), loss, amp=amp)
    assert not waits.found
    assert kinds == 3 * [torch.bfloat16 if amp else torch.float32]
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert isinstance(optimizer.param_groups[0]["lr"], float)  # the schedule moves it without a look at the device


@pytest.mark.parametrize(("few", "found"), [(20, []), (21, ["to to the CPU"])])
def test_evaluation_waits_for_nothing_before_its_end(gpu, monkeypatch, few, found):
    monkeypatch.setattr(training, "FEW", few)  # of at most so many images the answers come too, after the sums
    with Waits() as waits:
        evaluate(on_gpu(model_of("vgg16").build(10)), images_on_gpu(21), batch_size=8)
    assert waits.found == found


def test_activations_and_sensitivities_are_of_one_device(gpu):
    network, split = on_gpu(model_of("resnet56").build(10)), images_on_gpu()
    keys = list(masks_of(network))
    blocks = {key: contiguous_blocks(network, key, 4, 4) for key in keys}
    with Waits() as waits:
        for positions in (None, 2):
            seen = activations.collect_activations(network, keys, split, batch_size=8, positions=positions)
            for read, returned in seen.values():
                assert (read.device.type, returned.dtype) == ("cpu", torch.float32)
            for shares in activations.output_sensitivity(
                network, keys, split, positions=positions is not None
            ).values():
                assert isinstance(shares, np.ndarray)
        for changes in activations.block_taylor(network, blocks, split).values():
            assert changes.shape == (4, 4)
    assert set(waits.found) <= {"_to_copy to the CPU", "to to the CPU", "index of two devices"}  # kept; rows by number


def test_what_a_killed_run_left_on_the_cpu_is_compared_on_one_device(gpu, monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda one, other: one.device == other.device)
    there, here = ({"weight": torch.ones(2, device=device)} for device in (GPU, "cpu"))
    assert runs._same(there, here)
    assert runs._same(here, there)


@pytest.mark.parametrize("folder", ["vgg16", "resnet56"])
def test_moments_of_the_refit_are_of_one_device(gpu, folder):
    network, split = on_gpu(model_of(folder).build(10)).eval(), images_on_gpu()
    dense = copy.copy(network)
    error, moments = refit._moments(network, dense, list(masks_of(network)), split)
    assert error.device == GPU
    for gram, cross in moments.values():
        assert (gram.device, cross.device, gram.dtype) == (GPU, GPU, torch.float64)


@pytest.mark.parametrize("precision", ["single", "double"])
def test_scores_are_of_one_device(gpu, monkeypatch, rng, precision):
    monkeypatch.setattr(kde, "_usable", torch.device)
    monkeypatch.setattr(torch, "nonzero", lambda values: torch.empty(0))
    layer = Layer(rng.normal(size=(40, 4)), rng.normal(size=(40, 6)), np.arange(4) // 2, np.arange(6) // 2)
    with Waits() as waits:
        assert kde.scores(layer, precision=precision, device="cuda:0").shape == (2, 3)
    assert waits.found == ["_to_copy to the CPU"]  # the sums, once a tile


def replayed(module, samples, allow_unused_input):
    """`torch.cuda.make_graphed_callables` on the CPU: three trials, one input buffer, gradients in fixed places."""
    assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
    (static,), run, weights = samples, module.forward, tuple(module.parameters())

    def gradients(logits, gradient):
        return torch.autograd.grad(logits, weights, gradient, allow_unused=allow_unused_input)

    def capture(outputs):
        return gradients(outputs, torch.randn_like(outputs))

    for _ in range(3):
        places = capture(run(static))

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images, *_):
            static.copy_(images)
            with torch.enable_grad():
                ctx.logits = run(static)
            return ctx.logits.detach()

        @staticmethod
        def backward(ctx, gradient):
            for place, value in zip(places, gradients(ctx.logits, gradient), strict=True):
                place.copy_(value)
            return None, *(place.detach() for place in places)

    module.forward = lambda images: Replay.apply(images, *weights)
    return module


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", replayed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: torch.empty(0))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)


def small_network():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(4 * 36, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def trained(wrap, split, opt, amp):
    """The weights after three epochs of 16, 16, 16 and 8 images, the last epoch's figures, and a random number."""
    network = parallel.place(small_network(), split.labels.device)
    optimizer = make_optimizer(opt, network.parameters(), 0.05, 1e-4, True)
    masks_of(network, 1).hold(network, optimizer)
    schedule = make_schedule(optimizer, "one-cycle", 3, 4, [], 0.1, 0.3)
    module, loss = wrap(network), nn.CrossEntropyLoss(reduction="sum")
    for epoch in range(3):
        torch.manual_seed(epoch)
        metrics = train_epoch(module, optimizer, schedule, split.shuffled(16, epoch), loss, amp=amp)
        evaluate(network, split)
    return network.state_dict(), metrics, torch.rand(1)


@pytest.fixture
def coloured():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(56) % 2
    images = torch.randint(0, 200, (56, 3, 8, 8), generator=random) + 50 * labels[:, None, None, None]
    return Split(images.to(torch.uint8), labels)


@pytest.mark.parametrize("opt", ["sgd", "adam"])
@pytest.mark.parametrize("amp", [False, True])
def test_training_by_graphs_is_training_to_the_bit(graphs, coloured, opt, amp):
    """Weights, momenta, running statistics, dropout: trials leave no trace, and a smaller last batch is itself."""
    wrapped = []
    plain = trained(lambda network: network, coloured, opt, amp)
    graph = trained(lambda network: wrapped.append(parallel.Graphed(network)) or wrapped[0], coloured, opt, amp)
    for key, value in plain[0].items():
        assert torch.equal(graph[0][key], value), key
    assert graph[1:] == plain[1:]
    assert wrapped[0].shape == (16, 3, 8, 8)
    assert not any("network." in key for key in graph[0])


def test_what_torch_says_of_its_own_thread_is_not_shown(graphs, monkeypatch, recwarn):
    """Seen on an H100, at the first backward pass."""

    def warn(*_, **__):
        warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context!", stacklevel=2)
        warnings.warn("something else", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", warn)
    parallel.Graphed(small_network())(torch.zeros(4, 3, 8, 8))
    assert [str(warning.message) for warning in recwarn] == ["something else"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("not permitted when stream is capturing"), InputError),
        (torch.OutOfMemoryError(), torch.OutOfMemoryError),
    ],
)
def test_a_network_that_is_no_graph_is_one_line_that_says_what_to_do(graphs, monkeypatch, error, raised):
    """Want of memory stays what it is."""

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with pytest.raises(raised) as caught:
        parallel.Graphed(small_network())(torch.zeros(4, 3, 8, 8))
    assert caught.value is error or "is capturing); train with `no-compile`" in str(caught.value)


def test_only_a_single_gpu_replays_graphs(gpu, monkeypatch):
    network = on_gpu(small_network())
    assert isinstance(parallel.wrap(network), parallel.Graphed)
    assert parallel.wrap(network, compile=False) is network
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda network, **_: network)
    assert parallel.wrap(network) is network


@pytest.mark.parametrize(("flag", "compiles"), [((), False), (("--Compile",), True)])
def test_images_that_are_read_as_needed_are_trained_on_without_graphs(photographs, monkeypatch, flag, compiles):
    """The thread that pins their memory would end the capture, and the capture that thread."""
    flags = ["--Data_dir", str(photographs), "--Dims", "2", "--Select", "last", *flag]
    monkeypatch.setattr(sys, "argv", ["train_stage1.py", *flags])
    args = cli.parse(str(ROOT / "resnet50/train_stage1.py"), "", model_of("resnet50"), stage=1)
    cli.load_data(args)
    assert args.Compile is compiles


def test_compiled_training_compiles_each_size_of_batch_once(coloured):
    shapes = []

    def backend(graph, inputs):
        shapes.extend({value.shape[0] for value in inputs if value.ndim == 4 and value.shape[1:] == (3, 8, 8)})
        return graph.forward

    trained(lambda network: parallel.wrap(network, compile=True, backend=backend), coloured, "sgd", False)
    assert shapes == [16, 8]


def test_no_part_of_a_step_waits(coloured):
    """On the CPU, where there is a backward pass."""
    with Waits() as waits:
        trained(lambda network: network, coloured, "adam", True)
    assert not waits.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_on_a_gpu_graphs_train_as_without(coloured):
    """Up to the order of sums; the same random numbers."""
    split = Split(coloured.images.to(GPU), coloured.labels.to(GPU))
    plain, graph = (
        trained(lambda n, way=way: parallel.wrap(n, compile=way), split, "sgd", False) for way in (False, None)
    )
    for key, value in plain[0].items():
        torch.testing.assert_close(graph[0][key], value, rtol=1e-3, atol=1e-4)
