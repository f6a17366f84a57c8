"""Refit what a mask keeps, so that a pruned network does, before any retraining, as much as is left of it can."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import parallel
from common.activations import forward_hooks
from common.data import FileSplit, Split
from common.masks import Mask

RIDGE = 1e-3  # of the inputs' mean square
BATCH = 32  # images of maps; their patches take k * k times the memory of the maps


@torch.no_grad()
def refit(network: nn.Module, dense: nn.Module, mask: Mask, split: Split | FileSplit) -> None:
    """Least squares, layer by layer: the kept weights that best give the dense layer's outputs from what is left.

    A layer is fitted to the inputs that it has in the pruned network, so it makes up for the layers before it as well
    as for its own mask. In the end batch norm takes its statistics from the same images.

    Parameters
    ----------
    network : with the mask applied; changed in place
    dense : the network before pruning
    mask : its layers are refitted in its order, which is the one in which they run
    split : the images

    Notes
    -----
    Reconstruction of a layer's output by least squares after pruning: He, Zhang and Sun, ICCV 2017 (channels); Frantar
    and Alistarh, NeurIPS 2022.
    """
    network.eval()
    dense.eval()
    for key, kept in mask.items():
        layer = network.get_submodule(key.removesuffix(".weight"))
        _solve(layer, kept, *_moments(network, dense, key, layer, split))
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        recalibrate_batch_norm(network, split)


@torch.no_grad()
def recalibrate_batch_norm(network: nn.Module, split: Split | FileSplit) -> None:
    """Set the running statistics of batch norm to the means over the split's batches."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    for images, _ in split.batches():
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
    parallel.broadcast_buffers(network)


def _moments(
    network: nn.Module, dense: nn.Module, key: str, layer: nn.Module, split: Split | FileSplit
) -> tuple[Tensor, Tensor]:
    """X'X (d, d) and X'Y (d, c): X what the pruned layer reads, in patches, and 1; Y what the dense one returns."""
    seen, gram, cross = {}, 0, 0
    with (
        forward_hooks(network, [key], lambda _k, read, _: seen.update(read=read)),
        forward_hooks(dense, [key], lambda _k, _, returned: seen.update(returned=returned)),
    ):
        for images, _ in split.batches(BATCH if isinstance(layer, nn.Conv2d) else None):
            network(images)
            dense(images)
            read, returned = _rows(layer, seen["read"]), seen["returned"]
            returned = returned.flatten(2).transpose(1, 2).flatten(0, 1) if returned.ndim > 2 else returned
            gram, cross = gram + (read.T @ read).double(), cross + (read.T @ returned).double()
    return parallel.all_reduce(gram), parallel.all_reduce(cross)


def _rows(layer: nn.Module, read: Tensor) -> Tensor:
    """The layer's inputs as rows, one per position, so that its output is rows times weights; a last column of ones."""
    if isinstance(layer, nn.Conv2d):
        read = F.unfold(read, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        read = read.transpose(1, 2).flatten(0, 1)
    return torch.cat([read, read.new_ones(len(read), 1)], 1)


def _solve(layer: nn.Module, kept: Tensor, gram: Tensor, cross: Tensor) -> None:
    """Put the solution into the layer; outputs that keep the same inputs share one factorisation."""
    kept = kept.flatten(1)
    patterns, which = torch.unique(kept, dim=0, return_inverse=True)
    ridge = (RIDGE * gram.diagonal()[:-1].mean()).clamp(min=torch.finfo(torch.float32).tiny)  # inputs may all be 0
    weight, bias = torch.zeros_like(kept, dtype=torch.float64), None if layer.bias is None else layer.bias.double()
    for k, pattern in enumerate(patterns):
        outputs, inputs = torch.nonzero(which == k).flatten(), torch.nonzero(pattern).flatten()
        if bias is not None:
            inputs = torch.cat([inputs, inputs.new_tensor([len(pattern)])])
        if not len(inputs):
            continue
        system = gram[inputs[:, None], inputs]
        system.diagonal()[: pattern.sum()] += ridge
        solution = torch.linalg.solve(system, cross[inputs[:, None], outputs]).T
        weight[outputs[:, None], inputs[: pattern.sum()]] = solution[:, : pattern.sum()]
        if bias is not None:
            bias[outputs] = solution[:, -1]
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if bias is not None:
        layer.bias.copy_(bias)
