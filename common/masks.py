"""Groups of units, blocks of weights between groups, and masks that keep pruned blocks at zero."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from common.cmi.inputs import check_samples, standardise
from common.errors import InputError


def contiguous_groups(units: int, groups: int) -> np.ndarray:
    """Group label (units,) of every unit: neighbours share a group, sizes differ by at most one, none is left out."""
    if not 1 <= groups <= units:
        raise InputError(f"{groups} groups of {units} units; legal: 1 to {units}")
    return np.repeat(np.arange(groups), [len(part) for part in np.array_split(np.arange(units), groups)])


@dataclass(frozen=True)
class Blocks:
    """The blocks of one layer's weight: rows grouped by `child_groups` (c,), columns by `parent_groups` (p,)."""

    child_groups: np.ndarray
    parent_groups: np.ndarray
    kernel: int = 1  # weights per (output, input) connection: k * k of a convolution

    @property
    def weights(self) -> np.ndarray:
        """Number of weights (H, G) in every block."""
        return np.outer(np.bincount(self.child_groups), np.bincount(self.parent_groups)) * self.kernel

    def expand(self, values: np.ndarray) -> np.ndarray:
        """Spread one value per block (H, G) over the connections (c, p)."""
        return values[np.ix_(self.child_groups, self.parent_groups)]

    def mean_magnitude(self, weight: Tensor) -> np.ndarray:
        """Mean absolute weight (H, G) of every block of a weight (c, p, ...)."""
        magnitude = (
            weight.detach().double().abs().flatten(2).sum(2) if weight.ndim > 2 else weight.detach().double().abs()
        )
        sums = np.zeros((self.child_groups.max() + 1, self.parent_groups.max() + 1))
        np.add.at(sums, np.ix_(self.child_groups, self.parent_groups), magnitude.cpu().numpy())
        return sums / self.weights


def contiguous_blocks(network: nn.Module, key: str, parents: int, children: int) -> Blocks:
    """Blocks of a layer's weight with so many groups of inputs and of outputs; the last layer's outputs stay single."""
    weight = network.get_parameter(key)
    outputs, inputs = weight.shape[:2]
    last = [name for name, parameter in network.named_parameters() if parameter.ndim > 1][-1]
    children = outputs if key == last else children
    for flag, groups, units in (("parent_clusters", parents, inputs), ("children_clusters", children, outputs)):
        if groups > units:
            raise InputError(f"--{flag} {groups}: {key} has {units} of these units; legal: 1 to {units}")
    return Blocks(contiguous_groups(outputs, children), contiguous_groups(inputs, parents), weight[0, 0].numel())


def correlated_blocks(blocks: Blocks, children: np.ndarray, parents: np.ndarray) -> Blocks:
    """As many blocks, of groups whose units are alike; `children` (n, c) and `parents` (n, p) are their activations."""
    counts = (len(np.unique(groups)) for groups in (blocks.child_groups, blocks.parent_groups))
    labels = (correlated_groups(units, count) for units, count in zip((children, parents), counts, strict=True))
    return Blocks(*labels, blocks.kernel)


def correlated_groups(units: np.ndarray, groups: int) -> np.ndarray:
    """Group label (d,) of every column of (n, d) activations: neighbours in a tree of correlations share a group.

    Average linkage by one minus the magnitude of the correlation, leaves in optimal order (Bar-Joseph et al., 2001),
    cut into groups whose sizes differ by at most one. Constant units are like no other.
    """
    labels = contiguous_groups(units.shape[1], groups)
    if groups in (1, len(labels)):
        return labels
    scaled = standardise(check_samples(units, "activations"))[0]
    distance = 1 - np.abs(scaled.T @ scaled / len(scaled)).clip(max=1)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return labels[np.argsort(leaves_list(tree))]


def select(scores: list[np.ndarray], weights: list[np.ndarray], share: float, caps: list[float]) -> list[np.ndarray]:
    """Choose the blocks of lowest score, over all layers together, until the requested share of weights is reached.

    Parameters
    ----------
    scores : one (H, G) array per layer; low scores are pruned first, equal ones in an order that is fixed and arbitrary
    weights : how many weights each block holds, same shapes
    share : share of all these weights to prune, in [0, 1]
    caps : largest share of each layer that may be pruned

    Returns
    -------
    One boolean (H, G) array per layer, True where a block is pruned. Their share is at least `share` and exceeds it by
    less than one block; no layer's share exceeds its cap.

    Raises
    ------
    InputError
        If the caps do not allow the share, or a score is not a number.
    """
    flat = np.concatenate([s.ravel() for s in scores])
    if np.isnan(flat).any():
        raise InputError("scores hold NaN")
    size = np.concatenate([w.ravel() for w in weights])
    layer = np.repeat(np.arange(len(scores)), [s.size for s in scores])
    room = np.array([cap * w.sum() for cap, w in zip(caps, weights, strict=True)]) * (1 + 1e-12)
    target = share * size.sum() * (1 - 1e-12)
    shuffled = np.random.default_rng(0).permutation(len(flat))
    pruned, total = np.zeros(len(flat), bool), 0
    for block in shuffled[np.argsort(flat[shuffled], kind="stable")]:
        if total >= target:
            break
        if size[block] <= room[layer[block]]:
            pruned[block] = True
            room[layer[block]] -= size[block]
            total += size[block]
    if total < target:
        most = 100 * total / size.sum()
        raise InputError(f"{100 * share:g} % cannot be pruned: --upper_prune_limit allows at most {most:.2f} %")
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(pruned, ends), scores, strict=True)]


def select_evenly(scores: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """As `select` for one layer, but the blocks that are kept are spread evenly over child and over parent groups.

    Blocks are taken from the highest score down, as long as their child group and their parent group have not had
    their even part of the blocks; when no more can be taken, both parts grow by one block.

    Parameters
    ----------
    scores : (H, G)
    weights : how many weights each block holds, same shape
    share : share of the layer's weights to prune, in [0, 1]

    Returns
    -------
    Boolean (H, G), True where a block is pruned; the share is reached and exceeded by less than one block.
    """
    if np.isnan(scores).any():
        raise InputError("scores hold NaN")
    shuffled = np.random.default_rng(0).permutation(scores.size)
    order = shuffled[np.argsort(-scores.ravel()[shuffled], kind="stable")]
    room = (1 - share) * weights.sum() * (1 + 1e-12)
    parts = np.ceil(room / weights.sum() * weights.size / np.array(scores.shape) - 1e-9).astype(int)
    kept, children, parents = np.zeros(scores.shape, bool), *(np.zeros(n, int) for n in scores.shape)
    while order.size:
        left = []
        for block in order:
            j, i = divmod(block, scores.shape[1])
            if weights[j, i] > room:
                continue
            if children[j] >= parts[0] or parents[i] >= parts[1]:
                left.append(block)
                continue
            kept[j, i] = True
            children[j] += 1
            parents[i] += 1
            room -= weights[j, i]
        order, parts = np.array(left), parts + 1
    return ~kept


def build(pruned: dict[str, np.ndarray], blocks: dict[str, Blocks], network: nn.Module) -> dict[str, Tensor]:
    """Boolean masks, shaped as the weights and on their device, True where a weight is kept."""
    masks = {}
    for key, choice in pruned.items():
        weight = network.get_parameter(key)
        kept = torch.from_numpy(~blocks[key].expand(choice)).to(weight.device)
        masks[key] = kept.reshape(kept.shape + (1,) * (weight.ndim - 2)).expand_as(weight).contiguous()
    return masks


def holder(network: nn.Module, masks: dict[str, Tensor]) -> Callable[[], None]:
    """A function that sets every masked weight to exactly 0.

    Called after each optimizer step this is all that holds a mask: names in the state_dict stay plain, and whatever
    momentum or weight decay add to a masked weight is gone before the next forward pass.
    """
    pruned = [(network.get_parameter(key), ~mask) for key, mask in masks.items()]

    @torch.no_grad()
    def hold() -> None:
        for weight, gone in pruned:
            weight.masked_fill_(gone, 0)

    return hold


def choose(
    criterion: str,
    network: nn.Module,
    blocks: dict[str, Blocks],
    share: float,
    caps: list[float],
    *,
    scores: dict[str, np.ndarray] | None = None,
    even: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The blocks that a criterion prunes, by layer.

    Parameters
    ----------
    criterion : "cmi" takes the blocks of lowest `scores`; "magnitude" those of lowest mean absolute weight; "random"
        any. The two controls prune in each layer what "cmi" prunes there if `scores` are given, so that only the
        choice within layers differs, else they rank all layers together. "cmi-magnitude" ranks by the square root of
        the score times mean absolute weight.
    share, caps : as for `select`
    scores : one (H, G) array per layer; needed for "cmi" and "cmi-magnitude"
    even : spread what each layer keeps evenly over its child and over its parent groups, see `select_evenly`
    seed : of the random choice

    Returns
    -------
    One boolean (H, G) array per layer, True where a block is pruned.
    """
    rng = np.random.default_rng([seed, 1])

    def magnitude(key: str) -> np.ndarray:
        return blocks[key].mean_magnitude(network.get_parameter(key))

    rank = {
        "cmi": lambda key: scores[key],
        "magnitude": magnitude,
        "random": lambda key: rng.random(blocks[key].weights.shape),
        "cmi-magnitude": lambda key: np.sqrt(np.maximum(scores[key], 0)) * magnitude(key),
    }[criterion]
    ranked, sizes = [rank(key) for key in blocks], [b.weights for b in blocks.values()]
    own = criterion.startswith("cmi") or scores is None
    reference = ranked if own else [scores[key] for key in blocks]
    chosen = select(reference, sizes, share, caps)
    if even or reference is not ranked:
        shares = [w[c].sum() / w.sum() for w, c in zip(sizes, chosen, strict=True)]
        within = select_evenly if even else lambda rank, size, part: select([rank], [size], part, [1.0])[0]
        chosen = [within(r, w, s) for r, w, s in zip(ranked, sizes, shares, strict=True)]
    return dict(zip(blocks, chosen, strict=True))


def percent_zero(tensors: list[Tensor]) -> float:
    """Percentage of values that are exactly 0."""
    return 100 * sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def measures(network: nn.Module, masks: dict[str, Tensor]) -> dict:
    """Pruned percentages (of weights, without biases and batch norm) and memory, measured on the weights."""
    masked = {key: network.get_parameter(key) for key in masks}
    modules = [network.get_submodule(key.removesuffix(".weight")) for key in masks]
    return {
        "pruned_percent_masked_layers": percent_zero(list(masked.values())),
        "pruned_percent_network": percent_zero([p for p in network.parameters() if p.ndim > 1]),
        "pruned_percent_by_layer": {key: percent_zero([weight]) for key, weight in masked.items()},
        "memory_mib_masked_layers": memory(modules),
        "memory_mib_network": memory(list(network.modules())),
    }


def memory(modules: list[nn.Module]) -> float:
    """The paper's memory measure: MiB of all weights and biases but batch norm's as compressed sparse files.

    Each tensor counts the size of `scipy.sparse.save_npz` of its float32 values in CSR form, (out, in * k * k).
    """
    total = 0
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        for tensor in module.parameters(recurse=False):
            file = io.BytesIO()
            scipy.sparse.save_npz(
                file, scipy.sparse.csr_matrix(tensor.detach().float().cpu().reshape(len(tensor), -1).numpy())
            )
            total += len(file.getbuffer())
    return total / 2**20
