"""Paired activations of chosen layers: what a layer reads and what it returns, for the same images."""

import torch
from torch import Tensor, nn

from common.data import FileSplit, Split


def pool(features: Tensor) -> Tensor:
    """One value per channel: the mean over everything behind the channel axis; (b, c, ...) becomes (b, c)."""
    return features.flatten(2).mean(2) if features.ndim > 2 else features


@torch.inference_mode()
def paired(
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
    network.eval()
    seen = {key: ([], []) for key in keys}

    def keep(key):
        def hook(_module, inputs, output):
            for values, features in zip(seen[key], (inputs[0], output), strict=True):
                values.append(pool(features).float().cpu())

        return hook

    handles = [network.get_submodule(key.removesuffix(".weight")).register_forward_hook(keep(key)) for key in keys]
    try:
        for images, _ in split.batches(batch_size):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return {key: (torch.cat(inputs), torch.cat(outputs)) for key, (inputs, outputs) in seen.items()}
