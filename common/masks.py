"""Groups of units, blocks of weights between groups, and the mask that keeps pruned blocks at zero."""

import io
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from common.cmi.inputs import check_samples, standardise
from common.errors import InputError

CRITERIA = ("cmi", "cmi-magnitude", "random", "magnitude")


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
        magnitude = weight.detach().double().abs().reshape(*weight.shape[:2], -1).sum(2)
        sums = np.zeros((self.child_groups.max() + 1, self.parent_groups.max() + 1))
        np.add.at(sums, np.ix_(self.child_groups, self.parent_groups), magnitude.cpu().numpy())
        return sums / self.weights


def contiguous_blocks(network: nn.Module, key: str, parents: int, children: int) -> Blocks:
    """Blocks of a layer's weight with so many groups of inputs and of outputs; the last layer's outputs stay single."""
    weight = network.get_parameter(key)
    outputs, inputs = weight.shape[:2]
    last = [name for name, parameter in network.named_parameters() if parameter.ndim > 1][-1]
    children = outputs if key == last else children
    for name, groups, units in (("parent_clusters", parents, inputs), ("children_clusters", children, outputs)):
        if groups > units:
            raise InputError(f"`{name}` {groups}: {key} has {units} of these units; legal: 1 to {units}")
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


def rank(
    criterion: str, network: nn.Module, blocks: dict[str, Blocks], scores: dict[str, np.ndarray] | None, seed: int = 0
) -> dict[str, np.ndarray]:
    """What a criterion thinks of every block: by layer an (H, G) array; blocks of lowest rank are pruned first.

    Parameters
    ----------
    criterion : "cmi": the scores; "magnitude": mean absolute weight; "random"; "cmi-magnitude": square root of the
        score times mean absolute weight
    scores : one (H, G) array per layer; needed for "cmi" and "cmi-magnitude"
    seed : of the random ranks
    """
    rng = np.random.default_rng([seed, 1])

    def magnitude(key: str) -> np.ndarray:
        return blocks[key].mean_magnitude(network.get_parameter(key))

    of_layer = {
        "cmi": lambda key: scores[key],
        "magnitude": magnitude,
        "random": lambda key: rng.random(blocks[key].weights.shape),
        "cmi-magnitude": lambda key: np.sqrt(np.maximum(scores[key], 0)) * magnitude(key),
    }[criterion]
    return {key: of_layer(key) for key in blocks}


def select_blocks(
    ranks: dict[str, np.ndarray],
    blocks: dict[str, Blocks],
    sparsity: float,
    max_sparsity: list[float],
    *,
    like: dict[str, np.ndarray] | None = None,
    balanced: bool = False,
) -> dict[str, np.ndarray]:
    """Keep the blocks of highest rank, over all layers together, at the requested sparsity.

    Parameters
    ----------
    ranks : one (H, G) array per layer
    sparsity, max_sparsity : as for `select`
    like : other ranks, which decide how much of each layer is kept: a control that differs from them within layers only
    balanced : spread what each layer keeps evenly over its child and over its parent groups, see `select_balanced`

    Returns
    -------
    One boolean (H, G) array per layer, True where a block is kept.
    """
    sizes = [block.weights for block in blocks.values()]
    kept = select([(like or ranks)[key] for key in blocks], sizes, sparsity, max_sparsity)
    if balanced or like is not None:
        shares = [size[~k].sum() / size.sum() for size, k in zip(sizes, kept, strict=True)]
        within = select_balanced if balanced else lambda rank, size, share: select([rank], [size], share, [1.0])[0]
        kept = [within(ranks[key], w, s) for key, w, s in zip(blocks, sizes, shares, strict=True)]
    return dict(zip(blocks, kept, strict=True))


def select(
    scores: list[np.ndarray], weights: list[np.ndarray], sparsity: float, max_sparsity: list[float]
) -> list[np.ndarray]:
    """Drop the blocks of lowest score, over all layers together, until the requested share of weights is gone.

    Parameters
    ----------
    scores : one (H, G) array per layer; low scores are pruned first, equal ones in an order that is fixed and arbitrary
    weights : how many weights each block holds, same shapes
    sparsity : share of all these weights to prune, in [0, 1]
    max_sparsity : largest share of each layer that may be pruned

    Returns
    -------
    One boolean (H, G) array per layer, True where a block is kept. The share of the others is at least `sparsity` and
    exceeds it by less than one block; no layer's exceeds its maximum.

    Raises
    ------
    InputError
        If the maxima do not allow the sparsity, or a score is not a number.
    """
    flat = np.concatenate([s.ravel() for s in scores])
    if np.isnan(flat).any():
        raise InputError("scores hold NaN")
    size = np.concatenate([w.ravel() for w in weights])
    layer = np.repeat(np.arange(len(scores)), [s.size for s in scores])
    room = np.array([limit * w.sum() for limit, w in zip(max_sparsity, weights, strict=True)]) * (1 + 1e-12)
    target = sparsity * size.sum() * (1 - 1e-12)
    shuffled = np.random.default_rng(0).permutation(len(flat))
    kept, pruned = np.ones(len(flat), bool), 0
    for block in shuffled[np.argsort(flat[shuffled], kind="stable")]:
        if pruned >= target:
            break
        if size[block] <= room[layer[block]]:
            kept[block] = False
            room[layer[block]] -= size[block]
            pruned += size[block]
    if pruned < target:
        most = 100 * pruned / size.sum()
        raise InputError(f"{100 * sparsity:g} % cannot be pruned: `upper_prune_limit` allows at most {most:.2f} %")
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(kept, ends), scores, strict=True)]


def select_balanced(scores: np.ndarray, weights: np.ndarray, sparsity: float) -> np.ndarray:
    """As `select` for one layer, but the blocks that are kept are spread evenly over child and over parent groups.

    Blocks are taken from the highest score down, as long as their child group and their parent group have not had
    their even part of the blocks; when no more can be taken, both parts grow by one block.

    Parameters
    ----------
    scores : (H, G)
    weights : how many weights each block holds, same shape
    sparsity : share of the layer's weights to prune, in [0, 1]

    Returns
    -------
    Boolean (H, G), True where a block is kept; the sparsity is reached and exceeded by less than one block.
    """
    if np.isnan(scores).any():
        raise InputError("scores hold NaN")
    shuffled = np.random.default_rng(0).permutation(scores.size)
    order = shuffled[np.argsort(-scores.ravel()[shuffled], kind="stable")]
    room = (1 - sparsity) * weights.sum() * (1 + 1e-12)
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
    return kept


class Mask(dict):
    """By key of the state_dict a boolean tensor of the weight's shape and device: True where a weight is kept."""

    @classmethod
    def of_blocks(cls, kept: dict[str, np.ndarray], blocks: dict[str, Blocks], network: nn.Module) -> "Mask":
        """The mask of a network of which these blocks (H, G) are kept."""
        mask = cls()
        for key, choice in kept.items():
            weight = network.get_parameter(key)
            whole = torch.from_numpy(blocks[key].expand(choice)).to(weight.device)
            mask[key] = whole.reshape(whole.shape + (1,) * (weight.ndim - 2)).expand_as(weight).contiguous()
        return mask

    @torch.no_grad()
    def apply(self, network: nn.Module) -> None:
        """Set every masked weight to exactly 0."""
        for key, kept in self.items():
            network.get_parameter(key).masked_fill_(~kept, 0)

    def hold(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the masked weights at exactly 0 after every step of the optimizer.

        This is all that holds a mask: names in the state_dict stay plain, and whatever momentum or weight decay add to
        a masked weight is gone before the next forward pass.
        """
        masked = [(network.get_parameter(key), ~kept) for key, kept in self.items()]

        @torch.no_grad()
        def zero(*_) -> None:
            for weight, gone in masked:
                weight.masked_fill_(gone, 0)

        optimizer.register_step_post_hook(zero)

    def pruned_by_layer(self) -> dict[str, float]:
        """Percentage of every masked layer's weights that is pruned."""
        return {key: 100 * int((~kept).sum()) / kept.numel() for key, kept in self.items()}

    def percent_pruned(self, of: int | None = None) -> float:
        """Percentage of the masked layers' weights that is pruned, or of so many weights."""
        pruned = sum(int((~kept).sum()) for kept in self.values())
        return 100 * pruned / (of or sum(kept.numel() for kept in self.values()))


def sparsity_report(network: nn.Module, mask: Mask) -> dict:
    """Pruned percentages by the mask (of weights, without biases and batch norm), and memory of what is there."""
    modules = [network.get_submodule(key.removesuffix(".weight")) for key in mask]
    return {
        "pruned_percent_masked_layers": mask.percent_pruned(),
        "pruned_percent_network": mask.percent_pruned(of=weight_count(network)),
        "pruned_percent_by_layer": mask.pruned_by_layer(),
        "memory_mib_masked_layers": memory(modules),
        "memory_mib_network": memory(list(network.modules())),
    }


def weight_count(network: nn.Module) -> int:
    """Number of weights of the network, without biases and batch norm."""
    return sum(p.numel() for p in network.parameters() if p.ndim > 1)


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
