"""Paired activations of chosen layers: what a layer reads and what it returns, for the same images."""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import parallel
from common.cmi.inputs import out_of_memory
from common.data import FileSplit, Split
from common.errors import InputError, reason
from common.masks import KINDS, Blocks, plain_layer

FIRST_IMAGES = 1000  # among which two are looked for: a data set of millions is not listed for two
GRADIENT_BATCH, GRADIENT_PIXELS = 100, 2**19  # of images at most; gradients need the maps of all layers at once


def draw_positions(maps: Tensor, count: int, random: torch.Generator) -> tuple:
    """An index of `count` random positions, or all, of every image's map (b, c, ...); of vectors (b, c), of all."""
    if maps.ndim == 2:
        return (...,)
    images, shape = torch.arange(len(maps), device=maps.device)[:, None], maps.shape[2:]
    places = torch.rand(len(maps), shape.numel(), generator=random).argsort(1)[:, :count]
    return images, slice(None), *torch.unravel_index(places.to(maps.device), shape)


def rows_at(maps: Tensor, where: tuple) -> Tensor:
    """The vectors, or all values at these positions of maps, a row for each position of each image."""
    return maps[where] if maps.ndim == 2 else maps[where].flatten(0, 1).flatten(1)


def windows(layer: nn.Module, read: Tensor) -> Tensor:
    """What every output of a layer reads: a view (b, c, *positions, *kernel) of a padded map; vectors as they are."""
    if isinstance(layer, nn.Linear):
        return read
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    views = F.pad(read, layer._reversed_padding_repeated_twice, mode)
    for axis, (size, step, apart) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        views = views.unfold(axis, (size - 1) * apart + 1, step)[..., ::apart]
    return views


@contextlib.contextmanager
def forward_hooks(network: nn.Module, keys: list[str], see: Callable[[str, Tensor | None, Tensor], None]):
    """Within it, `see` is called with (key, input, output) at the moment when one of these layers has run.

    What runs afterwards may change the input in place; the output stays, since the network goes on with a copy. The
    input is None where the layer was called with anything else than one tensor.
    """

    def on_run(key: str, _module, inputs: tuple, output: Tensor) -> Tensor:
        see(key, inputs[0] if len(inputs) == 1 else None, output)
        return output.clone() if isinstance(output, Tensor) else output

    with contextlib.ExitStack() as hooks:
        for key in keys:
            layer = network.get_submodule(key.removesuffix(".weight"))
            hooks.enter_context(layer.register_forward_hook(partial(on_run, key)))
        yield


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


def check_outputs(network: nn.Module, split: Split | FileSplit, classes: int) -> None:
    """Refuse a network that does not return a number for each of so many classes."""
    _, outputs, count = _try(network, [], split)
    if outputs.shape != (count, classes) or not outputs.is_floating_point():
        returned = f"{tuple(outputs.shape)} in {outputs.dtype}"
        raise InputError(f"the network returns {returned} for {count} images; legal: floats ({count}, {classes})")


def output_layer(network: nn.Module, split: Split | FileSplit) -> str | None:
    """The layer that gives the outputs: the last to run of those that have as many outputs as the network, if any."""
    layers = {f"{name}.weight": layer for name, layer in network.named_modules() if isinstance(layer, KINDS)}
    ran, outputs, _ = _try(network, list(layers), split)
    return next((key for key, _ in reversed(ran) if len(layers[key].weight) == outputs.shape[1]), None)


def output_positions(network: nn.Module, split: Split | FileSplit) -> dict[str, int]:
    """For how many positions of an image's map each weight of a layer is used, by key; 0 of layers that do not run."""
    layers = {f"{name}.weight": layer for name, layer in network.named_modules() if isinstance(layer, KINDS)}
    counts = dict.fromkeys(layers, 0)

    def count(key: str, _, output: Tensor) -> None:
        counts[key] += output.numel() // len(layers[key].weight)

    with forward_hooks(network, list(layers), count):
        *_, images = _try(network, [], split)
    return {key: positions // images for key, positions in counts.items()}


@torch.no_grad()
def _try(network: nn.Module, keys: list[str], split: Split | FileSplit) -> tuple[list, Tensor, int]:
    """Run the network on two images: (key, input's shape) of every layer that ran, the outputs, number of images."""
    if split is None:
        raise InputError("no images are drawn for this network with `no-refit`; add `refit`, or draw your own")
    ran, (images, _) = [], next(iter(split[torch.arange(min(len(split), FIRST_IMAGES))].batches(2 * parallel.size())))
    network.eval()
    with forward_hooks(network, keys, lambda key, read, _: ran.append((key, getattr(read, "shape", None)))):
        try:
            outputs = network(images)
        except (RuntimeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise InputError(f"the network cannot read images {tuple(images.shape)} ({reason(error)})") from error
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        returned = tuple(outputs.shape) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise InputError(f"the network returns {returned}; legal: a tensor (images, outputs)")
    return ran, outputs, len(images)


@torch.inference_mode()
def collect_activations(
    network: nn.Module,
    keys: list[str],
    split: Split | FileSplit,
    batch_size: int | None = None,
    *,
    positions: int | None = None,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of layers in one pass over the split, in evaluation mode, pooled per batch on the device.

    Parameters
    ----------
    network : any module
    keys : names of the layers' weights in the state_dict, such as "fc2.weight"
    split : the images, in the order of the rows returned
    positions : of every image's map at most so many random ones are seen, a row each; None: maps count as their means
    seed : of the positions; a layer's do not depend on the other layers, nor on the batch size

    Returns
    -------
    For each key the tensors (n, inputs) and (n, outputs), float32 on the CPU. The input is what the layer truly reads,
    so shortcuts, batch norm, activations and pooling before it are in it; the output is the layer's own, before any
    activation. At positions, the inputs of a convolution are all (channels x kernel) values that its filters read
    there, channel by channel. The network stays in evaluation mode, as after `training.evaluate`.
    """
    run_order(network, keys, split)
    seen, done, layers = {}, 0, {key: plain_layer(network, key) for key in keys}
    random = {key: torch.Generator().manual_seed(seed) for key in keys}

    def keep(key: str, read: Tensor, returned: Tensor) -> None:
        if positions is None:
            rows = _by_position(read).mean(2), _by_position(returned).mean(2)
        else:
            where = draw_positions(returned, positions, random[key])
            rows = rows_at(windows(layers[key], read), where), rows_at(returned, where)
        each = len(rows[0]) // len(images)  # rows of an image
        if key not in seen:  # in one piece: many small ones that stay would leave holes too small for the next maps
            seen[key] = tuple(torch.empty(each * len(split), values.shape[1]) for values in rows)
        for whole, values in zip(seen[key], rows, strict=True):
            whole[each * done : each * (done + len(images))] = values.float().cpu()

    with forward_hooks(network, keys, keep):
        for images, _ in split.batches(batch_size):
            network(images)
            if done == 0:
                _check_memory([values for pair in seen.values() for values in pair])
            done += len(images)
    return {key: tuple(values[: len(values) // len(split) * done] for values in pair) for key, pair in seen.items()}


def _check_memory(values: list[Tensor]) -> None:
    """Refuse values that the machine's memory does not hold."""
    gib = sum(value.nbytes for value in values) / 2**30
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if gib > most:
        few = "fewer `samples_per_class` or `positions`, or one `key_id` at a time"
        raise InputError(f"activations take {gib:.1f} GiB, this machine has {most:.1f}; {few}")


def output_sensitivity(
    network: nn.Module, keys: list[str], split: Split | FileSplit, seed: int = 0, *, positions: bool = False
) -> dict[str, np.ndarray]:
    """How much of the network's output goes through each unit of some layers: by key, a float64 array (outputs,).

    The variance of a unit over the images times the mean squared slope of the network's outputs in it, summed over
    outputs, as a share of the outputs' variance: what would be left of the output's signal, to first order, if the unit
    alone varied. One backward pass of a random combination of the outputs (Hutchinson, 1990) gives all slopes.

    Parameters
    ----------
    keys : names of the layers' weights in the state_dict
    seed : of the random combinations
    positions : a map's values vary each on its own, so that squared slopes are summed over its positions; otherwise
        the map counts as its mean, whose slope is their sum: that does not see what differs within the map
    """
    count, slopes, moments = 0, dict.fromkeys(keys, 0), dict.fromkeys([*keys, None], 0)
    random = torch.Generator().manual_seed(seed)

    def combination(logits: Tensor, _) -> Tensor:
        return (logits * torch.randn(logits.shape, generator=random).to(logits.device)).sum()

    for outputs, gradients in _gradients(network, keys, split, combination):
        for key, gradient in gradients.items():
            slope = _by_position(gradient)
            slope = slope.double().square().sum(2) if positions else slope.sum(2).double().square()
            slopes[key] = slopes[key] + slope.sum(0)
        for key, output in outputs.items():
            values = _by_position(output.detach())
            values = (values if positions else values.mean(2, keepdim=True)).double()
            moments[key] = moments[key] + torch.stack([values.mean(2).sum(0), values.square().mean(2).sum(0)])
        count += len(outputs[None])
    means = ((key, moment / count) for key, moment in moments.items())
    variances = {key: (square - mean**2).clamp(min=0) for key, (mean, square) in means}
    total = variances.pop(None).sum().clamp(min=torch.finfo(torch.float64).tiny)  # 0 where all images are the same
    return {key: (variance * slopes[key] / count / total).cpu().numpy() for key, variance in variances.items()}


def block_taylor(network: nn.Module, blocks: dict[str, Blocks], split: Split | FileSplit) -> dict[str, np.ndarray]:
    """Mean squared change (H, G) of an image's loss, to first order, if a block of weights went, by layer.

    The change is the sum over the block's weights of weight times gradient of the image's cross-entropy: the empirical
    Fisher information of a gate on the block (Theis et al., 2018; Molchanov et al., CVPR 2019, equation 8).

    Parameters
    ----------
    network : any module
    blocks : by key of the state_dict
    split : the images
    """
    sums, read, count = dict.fromkeys(blocks, 0), {}, 0
    loss = partial(F.cross_entropy, reduction="sum")
    with forward_hooks(network, list(blocks), lambda key, features, _: read.update({key: features.detach().clone()})):
        for outputs, gradients in _gradients(network, list(blocks), split, loss):
            for key, gradient in gradients.items():
                changes = _weight_times_gradient(plain_layer(network, key), read.pop(key), gradient)
                groups = blocks[key].child_groups, blocks[key].parent_groups
                children, parents = (F.one_hot(torch.from_numpy(g), g.max() + 1).to(changes) for g in groups)
                sums[key] = sums[key] + (children.T @ changes @ parents).double().square().sum(0)
            count += len(outputs[None])
    count = parallel.all_reduce(torch.tensor(count, device=outputs[None].device))
    return {key: (parallel.all_reduce(total) / count).cpu().numpy() for key, total in sums.items()}


@torch.inference_mode(False)
@torch.enable_grad()
def _gradients(network: nn.Module, keys: list[str], split: Split | FileSplit, objective: Callable) -> Iterator[tuple]:
    """For every batch the layers' outputs, with the network's under None, and objective(logits, labels)'s gradients."""
    run_order(network, keys, split)
    outputs = {}
    with forward_hooks(network, keys, lambda key, _, output: outputs.update({key: output.requires_grad_()})):
        for batch, targets in split.batches(GRADIENT_BATCH):
            size = max(1, GRADIENT_PIXELS // batch[0, 0].numel())
            for images, labels in zip(batch.split(size), targets.split(size), strict=True):
                outputs[None] = network(images)
                value, layers = objective(outputs[None], labels), [outputs[key] for key in keys]
                try:  # 0 of layers that reach no output
                    found = torch.autograd.grad(value, layers, materialize_grads=True)
                except RuntimeError as error:
                    if out_of_memory(error):
                        raise
                    raise InputError(f"the network's outputs have no slopes in its layers ({reason(error)})") from error
                yield outputs, dict(zip(keys, found, strict=True))


def _weight_times_gradient(layer: nn.Module, read: Tensor, gradient: Tensor) -> Tensor:
    """For every image and connection (b, c, p) the sum over the kernel of weight times gradient of the weight."""
    views, weight, total = windows(layer, read), layer.weight.detach(), 0
    for place in np.ndindex(*weight.shape[2:]):
        slope = _by_position(gradient) @ _by_position(views[(..., *place)]).transpose(1, 2)
        total = total + slope * weight[(..., *place)]
    return total


def _by_position(features: Tensor) -> Tensor:
    """Maps (b, c, ...) and vectors (b, c) as (b, c, positions)."""
    return features.flatten(2) if features.ndim > 2 else features[:, :, None]
