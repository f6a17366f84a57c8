"""Refit what a mask keeps, so that a pruned network does, before any retraining, as much as is left of it can."""

import copy

import torch
from torch import Tensor, nn

from common import parallel
from common.activations import draw_positions, forward_hooks, rows_at, run_order, windows
from common.data import FileSplit, Split
from common.errors import InputError
from common.masks import Mask, plain_layer

RIDGE = 1e-3  # of the inputs' mean square
BATCH = 32  # images of maps
POSITIONS = 16  # of every image's map, drawn anew in every batch


@torch.no_grad()
def refit(network: nn.Module, dense: nn.Module, mask: Mask, split: Split | FileSplit, sweeps: int = 3) -> None:
    """Least squares: the kept weights of every layer that best give the dense layer's outputs from what is left.

    All layers are fitted at once: first to their inputs in the dense network, then, once a sweep, to those in the
    pruned one, which makes up for what other layers lack. n layers in a row are settled after n - 1 sweeps. After each,
    batch norm takes its statistics from the same images. A sweep after which the network's outputs are no nearer to the
    dense ones, on these images, is the last and is undone: layers that do not know of each other's changes can add
    them up.

    Parameters
    ----------
    network : the dense one with the mask applied; changed in place
    dense : the network before pruning
    mask : of the layers to refit, in any order
    split : the images
    sweeps : passes of the pruned network

    Notes
    -----
    Reconstruction of a layer's output by least squares after pruning: He, Zhang and Sun, ICCV 2017 (channels); Frantar
    and Alistarh, NeurIPS 2022.
    """
    keys = run_order(dense, list(mask), split)
    found = []  # squared error of the outputs and state after every sweep
    for source in (dense, *[network] * min(sweeps, len(keys) - 1)):
        error, moments = _moments(source.eval(), dense, keys, split)
        if source is network:
            found.append((error, copy.deepcopy(network.state_dict())))
            if len(found) > 1 and found[-1][0] >= found[-2][0]:
                break
        for key in keys:
            _solve(network.get_submodule(key.removesuffix(".weight")), mask[key], *moments.pop(key))
        recalibrate_batch_norm(network, split)
    else:
        found.append((_moments(network.eval(), dense, [], split)[0], network.state_dict()))
    network.load_state_dict(min(found, key=lambda sweep: sweep[0])[1])


@torch.no_grad()
def recalibrate_batch_norm(network: nn.Module, split: Split | FileSplit | None) -> nn.Module:
    """Set the running statistics of batch norm, if any, to the means over the split's batches; returns the network.

    An InputError if there are fewer than two images.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:  # then no images are needed, and `split` may be None
        return network.eval()
    if len(split) < 2:
        raise InputError(f"statistics of batch norm cannot be taken from {len(split)} images; legal: 2 or more")
    network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the plain mean over all batches
    for images, _ in split.batches():
        if len(images) > 1:  # of one, maps of a pixel have no variance
            network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
    parallel.broadcast_buffers(network)
    return network


def _moments(source: nn.Module, dense: nn.Module, keys: list[str], split: Split | FileSplit) -> tuple[Tensor, dict]:
    """Squared error () of the outputs of `source`, and X'X (d, d) and X'Y (d, c) by key.

    X is what the layer reads in `source`, and 1; Y what it returns in `dense`.
    """
    layers = {key: plain_layer(dense, key) for key in keys}
    error = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    random, wanted, sums = torch.Generator().manual_seed(0), {}, {}
    for key, layer in layers.items():
        children, inputs = layer.weight.flatten(1).shape
        sums[key] = [layer.weight.new_zeros(inputs + 1, n, dtype=torch.float64) for n in (inputs + 1, children)]

    def remember(key: str, _, returned: Tensor) -> None:
        where = draw_positions(returned, POSITIONS, random)
        wanted[key] = where, rows_at(returned, where)

    def add(key: str, read: Tensor, _) -> None:
        where, returned = wanted.pop(key)
        read = rows_at(windows(layers[key], read), where)
        read = torch.cat([read, read.new_ones(len(read), 1)], 1)
        for total, other in zip(sums[key], (read, returned), strict=True):
            total += read.T @ other  # in place: of 4,608 inputs it is 170 MB

    with forward_hooks(dense, keys, remember), forward_hooks(source, keys, add):
        for images, _ in split.batches(BATCH if any(layer.weight.ndim > 2 for layer in layers.values()) else None):
            outputs = dense(images.clone())
            if source is not dense:
                error = error + (source(images) - outputs).double().square().sum()
    moments = {key: tuple(map(parallel.all_reduce, moments)) for key, moments in sums.items()}
    return parallel.all_reduce(error).nan_to_num(nan=torch.inf), moments


def _solve(layer: nn.Module, kept: Tensor, gram: Tensor, cross: Tensor) -> None:
    """Put the solution into the layer; outputs that keep the same inputs share one factorisation.

    What is solved for is the change: the ridge holds weights near what they are, not near 0.
    """
    kept, weight = kept.flatten(1), layer.weight.flatten(1).double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    found = torch.cat([weight * kept, bias[:, None]], 1)
    free = torch.cat([kept, kept.new_full((len(kept), 1), layer.bias is not None)], 1)
    lacking = cross - gram @ found.T
    ridge = (RIDGE * gram.diagonal()[:-1].mean()).clamp(min=torch.finfo(torch.float32).tiny)  # inputs may all be 0
    patterns, which = torch.unique(free, dim=0, return_inverse=True)
    for k, pattern in enumerate(patterns):
        outputs, inputs = torch.nonzero(which == k), torch.nonzero(pattern).flatten()
        system = gram[inputs[:, None], inputs]
        system.diagonal()[: pattern[:-1].sum()] += ridge
        found[outputs, inputs] += torch.linalg.solve(system, lacking[inputs[:, None], outputs.flatten()]).T
    layer.weight.copy_(found[:, :-1].reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(found[:, -1])
