"""Paired activations of chosen layers: what a layer reads and what it returns, for the same images."""

import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from common import parallel
from common.cmi.inputs import out_of_memory
from common.data import FileSplit, Split
from common.errors import InputError, reason
from common.masks import KINDS, plain_layer

FIRST_IMAGES = 1000  # among which two are looked for: a data set of millions is not listed for two
SENSITIVITY_BATCH = 100  # images; gradients need the maps of all layers at once


def pool(features: Tensor) -> Tensor:
    """One value per channel, in memory of its own: the mean over all axes behind it; (b, c, ...) becomes (b, c)."""
    return features.flatten(2).mean(2) if features.ndim > 2 else features.clone()


@contextlib.contextmanager
def forward_hooks(network: nn.Module, keys: list[str], see: Callable[[str, Tensor | None, Tensor], None]):
    """Within it, `see` is called with (key, input, output) at the moment when one of these layers has run.

    What runs afterwards may change the input in place; the output stays, since the network goes on with a copy. The
    input is None where the layer was called with anything else than one tensor.
    """

    def on_run(key: str, _module, inputs: tuple, output: Tensor) -> Tensor:
        see(key, inputs[0] if len(inputs) == 1 else None, output)
        return output.clone() if isinstance(output, Tensor) else output

    layers = {key: network.get_submodule(key.removesuffix(".weight")) for key in keys}
    handles = [layer.register_forward_hook(partial(on_run, key)) for key, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_order(network: nn.Module, keys: list[str], split: Split | FileSplit) -> list[str]:
    """The keys in the order in which their layers run on the split's first images.

    An InputError says which layer does not run once, on one vector (images, features) or map (images, channels, ...)
    per image, or is not of a kind that can be pruned.
    """
    for key in keys:
        plain_layer(network, key)
    ran, _, count = _try(network, keys, split)
    for key in keys:
        reads, axes = [shape for name, shape in ran if name == key], network.get_parameter(key).ndim
        if len(reads) != 1:
            raise InputError(f"{key} runs {len(reads)} times in a forward pass; layers that run once can be pruned")
        if reads[0] is None or len(reads[0]) != axes or reads[0][0] != count:
            read = f"a tensor {tuple(reads[0])}" if reads[0] else "other arguments than one tensor"
            expected = {2: "features", 3: "channels, length", 4: "channels, height, width"}[axes]
            raise InputError(f"{key} reads {read} of {count} images; legal: (images, {expected})")
    return [key for key, _ in ran]


def output_layer(network: nn.Module, split: Split | FileSplit) -> str | None:
    """The layer that gives the outputs: the last to run of those that have as many outputs as the network, if any."""
    layers = {f"{name}.weight": layer for name, layer in network.named_modules() if isinstance(layer, KINDS)}
    ran, outputs, _ = _try(network, list(layers), split)
    return next((key for key, _ in reversed(ran) if len(layers[key].weight) == outputs.shape[1]), None)


@torch.no_grad()
def _try(network: nn.Module, keys: list[str], split: Split | FileSplit) -> tuple[list, Tensor, int]:
    """Run the network on two images: (key, input's shape) of every layer that ran, the outputs, number of images."""
    ran, (images, _) = [], next(iter(split[torch.arange(min(len(split), FIRST_IMAGES))].batches(2 * parallel.size())))
    network.eval()
    with forward_hooks(network, keys, lambda key, read, _: ran.append((key, getattr(read, "shape", None)))):
        outputs = network(images)
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        raise InputError(f"the network returns {type(outputs).__name__}; legal: a tensor (images, outputs)")
    return ran, outputs, len(images)


@torch.inference_mode()
def collect_activations(
    network: nn.Module, keys: list[str], split: Split | FileSplit, batch_size: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of layers in one pass over the split, in evaluation mode, pooled per batch on the device.

    Parameters
    ----------
    network : any module
    keys : names of the layers' weights in the state_dict, such as "fc2.weight"
    split : the images, in the order of the rows returned

    Returns
    -------
    For each key the tensors (n, inputs) and (n, outputs), float32 on the CPU. The input is what the layer truly reads,
    so shortcuts, batch norm, activations and pooling before it are in it; the output is the layer's own, before any
    activation.
    """
    run_order(network, keys, split)
    seen = {key: ([], []) for key in keys}

    def keep(key: str, *features: Tensor) -> None:
        for values, feature in zip(seen[key], features, strict=True):
            values.append(pool(feature).float().cpu())

    with forward_hooks(network, keys, keep):
        for images, _ in split.batches(batch_size):
            network(images)
    return {key: (torch.cat(inputs), torch.cat(outputs)) for key, (inputs, outputs) in seen.items()}


def output_sensitivity(
    network: nn.Module, keys: list[str], split: Split | FileSplit, seed: int = 0
) -> dict[str, np.ndarray]:
    """How much of the network's output goes through each unit of some layers: by key, a float64 array (outputs,).

    The variance of a unit over the images times the mean squared slope of the network's outputs in it, summed over
    outputs, as a share of the outputs' variance: what would be left of the output's signal, to first order, if the unit
    alone varied. One backward pass of a random combination of the outputs (Hutchinson, 1990) gives all slopes; maps
    count as their means.

    Parameters
    ----------
    network : any module
    keys : names of the layers' weights in the state_dict
    split : the images
    seed : of the random combinations
    """
    run_order(network, keys, split)
    outputs: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(seed)
    count, slopes = 0, dict.fromkeys(keys, 0)
    sums, squares = dict.fromkeys([*keys, None], 0), dict.fromkeys([*keys, None], 0)
    with forward_hooks(network, keys, lambda key, _, output: outputs.update({key: output.requires_grad_()})):
        for images, _ in split.batches(SENSITIVITY_BATCH):
            outputs[None] = logits = network(images)
            combination = (logits * torch.randn(logits.shape, generator=random).to(logits.device)).sum()
            try:  # 0 of layers that reach no output
                gradients = torch.autograd.grad(combination, [outputs[key] for key in keys], materialize_grads=True)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                raise InputError(f"the network's outputs have no slopes in its layers ({reason(error)})") from error
            for key, gradient in zip(keys, gradients, strict=True):
                slope = gradient.flatten(2).sum(2) if gradient.ndim > 2 else gradient
                slopes[key] = slopes[key] + slope.double().square().sum(0)
            for key, output in outputs.items():
                value = pool(output.detach()).double()
                sums[key], squares[key] = sums[key] + value.sum(0), squares[key] + value.square().sum(0)
            count += len(images)
    variances = {key: (squares[key] / count - (sums[key] / count) ** 2).clamp(min=0) for key in sums}
    total = variances.pop(None).sum().clamp(min=torch.finfo(torch.float64).tiny)  # 0 where all images are the same
    return {key: (variance * slopes[key] / count / total).cpu().numpy() for key, variance in variances.items()}
