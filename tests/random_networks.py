"""Random networks of all kinds of layers: each is scored, masked and refitted rightly, or refused in one line."""

import contextlib
import copy
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

from common import activations, refit, scoring
from common.cmi import layer_cmi
from common.data import Split
from common.errors import InputError
from common.masks import CRITERIA, KINDS, Mask, contiguous_blocks, rank, select_blocks
from trials import refusal_only_if


class First(nn.Module):
    """A layer that returns more than one tensor, read by as many as it wants."""

    def __init__(self, inner: nn.Module, reads: int) -> None:
        super().__init__()
        self.inner, self.reads = inner, reads

    def forward(self, x):
        return self.inner(*[x] * self.reads)[0]


class Words(nn.Embedding):
    """An embedding that reads numbers as words."""

    def forward(self, x):
        return super().forward((9 * x.sigmoid()).long())


class Own(nn.Module):
    """Steps, each a layer or an operation by name, and which of the values so far it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.steps = nn.ModuleDict(), []

    def forward(self, images):
        values = [images]
        for name, *sources in self.steps:
            step = self.layers[name] if name in self.layers else OPERATIONS[name]
            values.append(step(*(values[source] for source in sources)))
        return values[-1]


OPERATIONS = {  # by number of values that they read; those that do not fit the values' shapes fail, and are not taken
    "relu": torch.relu,
    "relu_": torch.relu_,
    "add_": lambda x: x.add_(0.3),
    "mul_": lambda x: x.mul_(1.5),
    "gelu": nn.functional.gelu,
    "detach": lambda x: x.detach(),
    "softmax": lambda x: x.softmax(-1),
    "flatten": lambda x: x.flatten(1),
    "sequence": lambda x: x.flatten(2),
    "tokens": lambda x: x.flatten(2).mT,
    "swap": lambda x: x.transpose(1, 2),
    "mean": lambda x: x.mean(2),
    "fold": lambda x: x.unflatten(1, (2, -1)),
    "tuple": lambda x: (x, x),
    "dict": lambda x: {"out": x},
    "numbers": lambda x: x.sum(1),
    "sum": lambda x, y: torch.stack([x, y]).sum(0),
    "concatenation": lambda x, y: torch.cat([x, y], 1),
    "gate": lambda x, y: torch.stack([x, y.sigmoid()]).prod(0),
}
ONE, TWO = list(OPERATIONS)[:13], list(OPERATIONS)[16:]


def layer(rng: np.random.Generator, x: torch.Tensor) -> nn.Module:
    """A layer that may or may not read x (images, ...)."""
    inputs, last, outputs = x.shape[1], x.shape[-1], int(rng.choice([2, 3, 4, 6, 8, 12]))
    sizes = zip(("kernel_size", "stride", "padding", "dilation", "groups"), (3, 2, 3, 2, 1.2), strict=True)
    window = {name: int(rng.random() * count) + (name != "padding") for name, count in sizes}
    modes = {
        "bias": bool(rng.random() < 0.7),
        "padding_mode": str(rng.choice(["zeros", "zeros", "circular", "reflect", "replicate"])),
    }
    if rng.random() < 0.1:
        modes |= {"padding": str(rng.choice(["same", "valid"])), "stride": 1}
    plain = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[x.ndim]
    convolution = plain(inputs, outputs, **({} if x.ndim == 2 else window | modes))
    if rng.random() < 0.5:
        return convolution
    norm, upper = getattr(nn, f"BatchNorm{max(1, x.ndim - 2)}d"), {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d}
    others = [
        lambda: norm(inputs, momentum=rng.choice([None, 0.1]), affine=bool(rng.random() < 0.8)),
        lambda: nn.Linear(last, outputs),
        lambda: nn.LayerNorm(last),
        lambda: nn.GroupNorm(1, inputs),
        lambda: nn.Dropout(0.5, inplace=bool(rng.random() < 0.5)),
        lambda: nn.PReLU(inputs),
        lambda: {2: Words}[x.ndim](10, outputs),
        lambda: upper[x.ndim](inputs, outputs, window["kernel_size"]),
        lambda: First(nn.MultiheadAttention(last, 1, batch_first=True), 3),
        lambda: First(nn.LSTM(last, outputs, batch_first=True), 1),
        lambda: nn.TransformerEncoderLayer(last, 1, 8, batch_first=True),
        lambda: nn.utils.parametrizations.weight_norm(convolution),
        lambda: nn.utils.spectral_norm(convolution),
        lambda: nn.utils.parametrizations.spectral_norm(convolution),
        lambda: prune.random_unstructured(convolution, "weight", 0.3),
        lambda: nn.Sequential(nn.ReLU(), convolution),
    ]
    return others[rng.integers(len(others))]()


@torch.no_grad()
def own(rng: np.random.Generator, images: torch.Tensor) -> tuple[Own, set[str]]:
    """A random network, and the names of its weights that can be scored and pruned without any doubt."""
    network, values, reads = Own().eval(), [images], defaultdict(list)

    def append(name: str, *sources: int) -> None:
        read = [values[source] for source in sources]
        step = network.layers[name] if name in network.layers else OPERATIONS[name]
        values.append(step(*(x.clone() for x in read)))
        network.steps.append((name, *sources))
        reads[name].append(read[0].ndim)

    for k in range(rng.integers(2, 12)):
        x, kind = values[-1], rng.random()
        with contextlib.suppress(RuntimeError, ValueError, KeyError, TypeError, IndexError, AssertionError):
            if kind < 0.5 or k == 0:
                made = layer(rng, x).eval()
                made(x.clone())
                network.layers[str(k)] = made
                if rng.random() < 0.93:  # others are never used
                    append(str(k), len(values) - 1)
            elif kind < 0.75:
                append(str(rng.choice(ONE)), len(values) - 1)
            elif kind < 0.95:
                append(str(rng.choice(TWO)), len(values) - 1, int(rng.integers(len(values))))
            else:
                append(str(rng.choice(list(network.layers))), len(values) - 1)
    if rng.random() < 0.8:
        if values[-1].ndim > 2:
            append("flatten", len(values) - 1)
        network.layers["head"] = nn.Linear(values[-1].shape[1], 5)
        append("head", len(values) - 1)
        if rng.random() < 0.3:
            append(str(rng.choice(["relu_", "add_", "mul_"])), len(values) - 1)
    plain = {
        f"layers.{name}.weight"
        for name, made in network.layers.items()
        if type(made) in KINDS and "weight" in made._parameters and getattr(made, "groups", 1) == 1
        and reads[name] == [made.weight.ndim]
    }  # fmt: skip
    kinds = [network.get_submodule(key.removesuffix(".weight")) for key in sorted(plain)]
    for first, second in itertools.pairwise(kinds):
        if first.weight.shape == second.weight.shape and rng.random() < 0.5:
            second.weight = first.weight
            plain -= {key for key in plain if network.get_parameter(key) is first.weight}
    for parameter in network.parameters():
        parameter.requires_grad_(bool(rng.random() < 0.95))
    if rng.random() < 0.1:
        append(str(rng.choice(["tuple", "dict", "numbers"])), len(values) - 1)
    whole = isinstance(values[-1], torch.Tensor) and values[-1].ndim > 1
    return network, plain if whole else set()


def hooked(network: nn.Module, keys: list[str], split: Split) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What layers read and return, by copies that are made when they run."""
    found, handles = {key: ([], []) for key in keys}, []
    for key in keys:
        made = network.get_submodule(key.removesuffix(".weight"))
        handles.append(made.register_forward_pre_hook(lambda _, read, key=key: found[key][0].append(read[0].clone())))
        handles.append(made.register_forward_hook(lambda _, read, out, key=key: found[key][1].append(out.clone())))
    with torch.inference_mode():
        for images, _ in split.batches():
            network(images)
    for handle in handles:
        handle.remove()
    return {key: tuple(map(torch.cat, parts)) for key, parts in found.items()}


def check_scores(network: nn.Module, blocks: dict, split: Split, read: dict) -> dict[str, np.ndarray]:
    """Scores of what was collected are those of what the hooks saw; returns them."""
    collected, scores = activations.collect_activations(network, list(blocks), split), {}
    for key, pair in collected.items():
        pooled = [t.flatten(2).mean(2) if t.ndim > 2 else t for t in read[key]]
        torch.testing.assert_close(pair, tuple(pooled))
        exact = all(map(torch.equal, pair, pooled))  # hooks may lead torch to other kernels
        groups = {"child_groups": blocks[key].child_groups, "parent_groups": blocks[key].parent_groups}
        estimate = scoring.Estimator(Path("none"), blocks[key], {"estimator": "gaussian", "seed": 0})
        scores[key] = estimate(pair[1], pair[0])
        wanted = layer_cmi(pooled[1].numpy(), pooled[0].numpy(), **groups, estimator="gaussian")
        np.testing.assert_allclose(scores[key], wanted, atol=0 if exact else 0.01, rtol=0 if exact else 0.01)
    return scores


def check_mask(network: nn.Module, blocks: dict, kept: dict, read: dict) -> Mask:
    """Dropped blocks are 0, also after a step, and contribute nothing to a layer's outputs; all else is as it was."""
    mask, pruned = Mask.of_blocks(kept, blocks, network), copy.deepcopy(network)
    mask.apply(pruned)
    for key, block in blocks.items():
        layer, before = pruned.get_submodule(key.removesuffix(".weight")), network.get_parameter(key)
        gone = ~torch.from_numpy(kept[key])[block.child_groups][:, block.parent_groups]
        assert torch.equal(layer.weight, torch.where(gone.reshape(*gone.shape, *[1] * (before.ndim - 2)), 0, before))
        for group in range(len(kept[key])):
            some, rows = read[key][0][:5].clone(), torch.from_numpy(block.child_groups == group)
            without = some.clone()
            without[:, gone[rows][0]] = 0
            expected = network.get_submodule(key.removesuffix(".weight"))(without)[:, rows]
            torch.testing.assert_close(layer(some)[:, rows], expected, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    mask.hold(pruned, optimizer)
    for parameter in pruned.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((pruned.get_parameter(key)[~whole] == 0).all() for key, whole in mask.items())
    return mask


def check_refit(network: nn.Module, mask: Mask, split: Split) -> None:
    """A refit of what is whole changes nothing; one of what is pruned leaves 0 what is 0."""
    whole = Mask({key: torch.ones_like(kept) for key, kept in mask.items()})
    refit.recalibrate_batch_norm(network, split)
    fitted, pruned = copy.deepcopy(network), copy.deepcopy(network)
    with torch.no_grad():
        refit.refit(fitted, network, whole, split)
        for key, (read, returned) in hooked(network, list(mask), split).items():
            name = key.removesuffix(".weight")
            change, sizes = fitted.get_submodule(name)(read) - returned, copy.deepcopy(network.get_submodule(name))
            for parameter in sizes.parameters():
                parameter.abs_()
            assert change.abs().max() <= 0.01 * sizes(read.abs()).square().mean().sqrt(), key
    mask.apply(pruned)
    refit.refit(pruned, network, mask, split)
    for key, kept in mask.items():
        assert (pruned.get_parameter(key)[~kept] == 0).all()
        assert pruned.get_parameter(key).isfinite().all()


def own_network(rng: np.random.Generator, folder: Path) -> None:
    """A random network: its layers are scored, masked and refitted rightly, or refused."""
    torch.manual_seed(rng.integers(2**31))
    split = Split(torch.randint(0, 256, (200, 2, 8, 8), dtype=torch.uint8), torch.arange(200) % 5)
    network, plain = own(rng, split.images[:17] / 255.0)  # a number that no other axis has
    before, legal, refusal = copy.deepcopy(network.state_dict()), [], InputError("no weights")
    for name in [name for name, made in network.named_modules() if getattr(made, "weight", None) is not None]:
        try:
            with refusal_only_if(f"{name}.weight" not in plain):
                legal += activations.run_order(network, [f"{name}.weight"], split)
        except InputError as error:
            refusal = error
    if not legal:
        raise refusal
    keys = activations.run_order(network, [str(key) for key in rng.permutation(legal)[:3]], split)
    last = activations.output_layer(network, split)
    shapes = {key: network.get_parameter(key).shape for key in keys}
    blocks = {
        key: contiguous_blocks(network, key, *(int(rng.integers(1, n + 1)) for n in shape[1::-1]), last)
        for key, shape in shapes.items()
    }
    read = hooked(network, keys, split)
    scores = check_scores(network, blocks, split, read)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    sparsity, balanced = rng.uniform(0, 1), bool(rng.random() < 0.5)
    ranks = rank(str(rng.choice(CRITERIA)), network, blocks, scores)
    kept = select_blocks(ranks, blocks, sparsity, [1.0] * len(keys), balanced=balanced)
    mask = check_mask(network, blocks, kept, read)
    over = mask.percent_pruned() / 100 - sparsity
    # shares of layers exceed the sparsity by less than a block, a balanced layer its share by less than another
    largest = max(block.weights.max() for block in blocks.values()) * (1 + len(keys) * balanced)
    assert -1e-9 <= over < largest / sum(kept.numel() for kept in mask.values()) + 1e-9, (sparsity, over)
    check_refit(network, mask, split)
    with contextlib.suppress(InputError):  # there are no slopes where values are changed in place or detached
        for key, slopes in activations.output_sensitivity(network, keys, split).items():
            assert len(slopes) == shapes[key][0]
            assert ((slopes >= 0) & np.isfinite(slopes)).all()
