"""Groups of units, blocks of weights between groups, and the mask that keeps pruned blocks at zero."""

import io
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from common.cmi.inputs import check_samples, standardise
from common.errors import InputError

CRITERIA = ("cmi", "cmi-magnitude", "random", "magnitude", "taylor")
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
Arrays = list[np.ndarray]


def plain_layer(network: nn.Module, key: str) -> nn.Module:
    """The layer whose weight has this name in the state_dict; an InputError if blocks of it are not defined."""
    layer = dict(network.named_modules(remove_duplicate=False)).get(key.removesuffix(".weight"))
    if not key.endswith(".weight") or layer is None:
        raise InputError(f"{key}: the network has no such layer")
    if type(layer) not in KINDS:  # weight norm and other parametrizations make it a class of their own
        raise InputError(f"{key} is of a {type(layer).__name__}; legal: Linear, Conv1d, Conv2d")
    if "weight" not in layer._parameters:
        raise InputError(f"{key} is computed from other parameters (weight norm, pruning); legal: a plain parameter")
    if getattr(layer, "groups", 1) != 1:
        raise InputError(f"{key} is of a convolution in {layer.groups} groups; legal: 1")
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if nn.parameter.is_lazy(parameter):
            raise InputError(f"{name} has no size yet; run the network once on images first")
        if name != key and parameter.data_ptr() == layer.weight.data_ptr():
            raise InputError(f"{key} is {name} too; legal: a weight that one layer has for itself")
    return layer


def contiguous_groups(units: int, groups: int) -> np.ndarray:
    """Group label (units,) of every unit: neighbours share a group, sizes differ by at most one, none is left out."""
    if not 1 <= groups <= units:
        raise InputError(f"{groups} groups of {units} units; legal: 1 to {units}")
    return np.repeat(np.arange(groups), [len(part) for part in np.array_split(np.arange(units), groups)])


@dataclass(frozen=True)
class Blocks:
    """The blocks of one layer's weight: rows grouped by `child_groups` (c,), columns by `parent_groups` (p,).

    Labels are any integers; groups count in their ascending order, from 0 without gaps, as in `layer_cmi`.
    """

    child_groups: np.ndarray
    parent_groups: np.ndarray
    kernel: int = 1  # weights per (output, input) connection: k * k of a convolution
    positions: int = 1  # what each of its weights counts towards a pruned share: 1, or its multiply-adds for an image

    def __post_init__(self) -> None:
        for name in ("child_groups", "parent_groups"):
            object.__setattr__(self, name, np.unique(getattr(self, name), return_inverse=True)[1])

    @property
    def weights(self) -> np.ndarray:
        """Number of weights (H, G) in every block."""
        return np.outer(np.bincount(self.child_groups), np.bincount(self.parent_groups)) * self.kernel

    @property
    def cost(self) -> np.ndarray:
        """What every block (H, G) counts towards a pruned share."""
        return self.weights * self.positions

    def expand(self, values: np.ndarray) -> np.ndarray:
        """Spread one value per block (H, G) over the connections (c, p)."""
        return values[np.ix_(self.child_groups, self.parent_groups)]

    def sum(self, values: Tensor) -> np.ndarray:
        """Sum (H, G) over every block of values (c, p, ...)."""
        sums = np.zeros((self.child_groups.max() + 1, self.parent_groups.max() + 1))
        by_connection = values.double().reshape(*values.shape[:2], -1).sum(2).cpu().numpy()
        np.add.at(sums, np.ix_(self.child_groups, self.parent_groups), by_connection)
        return sums

    def mean_magnitude(self, weight: Tensor) -> np.ndarray:
        """Mean absolute weight (H, G) of every block of a weight (c, p, ...)."""
        return self.sum(weight.detach().double().abs()) / self.weights


def contiguous_blocks(network: nn.Module, key: str, parents: int, children: int, last: str | None = None) -> Blocks:
    """Blocks of a layer's weight with so many groups of inputs and of outputs; the outputs of `last` stay single.

    That is the layer that gives the network's outputs (see `output_layer`), if any.
    """
    weight = plain_layer(network, key).weight
    outputs, inputs = weight.shape[:2]
    children = outputs if key == last else children
    for name, groups, units in (("parent_clusters", parents, inputs), ("children_clusters", children, outputs)):
        if groups > units:
            raise InputError(f"`{name}` {groups}: {key} has {units} of these units; legal: 1 to {units}")
    return Blocks(contiguous_groups(outputs, children), contiguous_groups(inputs, parents), weight[0, 0].numel())


def correlated_blocks(blocks: Blocks, children: np.ndarray, parents: np.ndarray) -> Blocks:
    """As many blocks, of groups whose units are alike by their activations: `children` (n, c) and `parents` (n, p).

    Of windows of maps, parents (n, p * kernel), every place of the window counts as a row of its own.
    """
    parents = np.asarray(parents).reshape(len(parents), len(blocks.parent_groups), -1).swapaxes(1, 2)
    units = np.asarray(children), parents.reshape(-1, len(blocks.parent_groups))
    counts = (len(np.unique(groups)) for groups in (blocks.child_groups, blocks.parent_groups))
    child_groups, parent_groups = map(correlated_groups, units, counts)
    return replace(blocks, child_groups=child_groups, parent_groups=parent_groups)


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
    criterion : "cmi", "taylor": the scores; "magnitude": mean absolute weight; "random"; "cmi-magnitude": square root
        of the score times mean absolute weight
    scores : one (H, G) array per layer: conditional mutual information, or for "taylor" `activations.block_taylor`
    seed : of the random ranks
    """
    if criterion not in CRITERIA:
        raise InputError(f"`criterion` {criterion} is none of {', '.join(CRITERIA)}")
    if criterion in ("cmi", "taylor"):
        return {key: scores[key] for key in blocks}
    if criterion == "random":
        rng = np.random.default_rng([seed, 1])
        return {key: rng.random(block.weights.shape) for key, block in blocks.items()}
    sizes = {key: block.mean_magnitude(network.get_parameter(key)) for key, block in blocks.items()}
    if criterion == "magnitude":
        return sizes
    roots = {key: np.sqrt(np.maximum(scores[key], 0).astype(np.float64)) for key in blocks}
    # no weight has no rank, of an infinite score neither
    return {key: np.multiply(roots[key], size, where=size != 0, out=np.zeros_like(size)) for key, size in sizes.items()}


def select_blocks(
    ranks: dict[str, np.ndarray],
    blocks: dict[str, Blocks],
    sparsity: float,
    max_sparsity: list[float],
    like: dict[str, np.ndarray] | None = None,
    balanced: bool = False,
    within: dict[str, Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """Keep the blocks of highest rank, over all layers together, at the requested sparsity.

    Parameters
    ----------
    ranks : one (H, G) array per layer
    sparsity, max_sparsity : as for `select`; with `like` or `balanced` a maximum may leave less than a block too much
    like : other ranks, which decide how much of each layer is kept: a control that differs from them within layers only
    balanced : spread what each layer keeps evenly over its child and over its parent groups, see `select_balanced`
    within : the mask of a network that is pruned already: what is gone stays gone, and counts as pruned

    Returns
    -------
    One boolean (H, G) array per layer, True where a block is kept.
    """
    sizes, within = [block.cost for block in blocks.values()], within or {}
    ranks = {k: np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v) for k, v in ranks.items()}
    for key, block in blocks.items():
        if (shape := ranks[key].shape if key in ranks else "absent") != block.weights.shape:
            raise InputError(f"ranks of {key}: {shape}; legal: one value for every block, {block.weights.shape}")
    rest = [b.positions * b.sum(within[key]).astype(int) if key in within else b.cost for key, b in blocks.items()]
    kept = select([(like or ranks)[key] for key in blocks], sizes, sparsity, max_sparsity, rest)
    if balanced or like is not None:
        one = select_balanced if balanced else lambda rank, w, share, r: select([rank], [w], share, [1.0], [r])[0]
        layers = list(zip(blocks, sizes, rest, kept, strict=True))
        kept = [one(ranks[key], w, (w.sum() - r[k].sum()) / w.sum(), r) for key, w, r, k in layers]
        for (key, w, r, _), k, limit in zip(layers, kept, max_sparsity, strict=True):
            lacking = (1 - limit) * w.sum() * (1 - 1e-12) - r[k].sum()  # blocks differ in size: less than one of them
            if lacking > 0 and (spare := np.flatnonzero(~k & (r >= lacking))).size:
                k.flat[spare[ranks[key].ravel()[spare].argmax()]] = True
    return dict(zip(blocks, kept, strict=True))


def select(
    scores: Arrays, weights: Arrays, sparsity: float, max_sparsity: list[float], rest: Arrays | None = None
) -> Arrays:
    """Drop the blocks of lowest score, over all layers together, until the requested share of weights is gone.

    Parameters
    ----------
    scores : one (H, G) array per layer; low scores are pruned first, equal ones in an order that is fixed and arbitrary
    weights : how many weights each block holds, same shapes
    sparsity : share of all these weights to prune, in [0, 1]
    max_sparsity : largest share of each layer that may be pruned
    rest : how many weights of each block are not pruned yet, same shapes; default: all

    Returns
    -------
    One boolean (H, G) array per layer, True where a block is kept. The share of the others is at least `sparsity` and
    exceeds it by less than one block; no layer's exceeds its maximum.

    Raises
    ------
    InputError
        If the maxima do not allow the sparsity, more is gone already, or a score is not a number.
    """
    flat = np.concatenate([s.ravel() for s in scores])
    _check(flat, sparsity, *max_sparsity)
    rest = weights if rest is None else rest
    size, total = np.concatenate([w.ravel() for w in rest]), sum(w.sum() for w in weights)
    layer = np.repeat(np.arange(len(scores)), [s.size for s in scores])
    limits = zip(max_sparsity, weights, rest, strict=True)
    room = np.array([limit * w.sum() * (1 + 1e-12) - (w.sum() - r.sum()) for limit, w, r in limits])
    target = sparsity * total * (1 - 1e-12)
    kept, pruned = size > 0, total - size.sum()
    if target < pruned * (1 - 1e-9):
        raise InputError(f"{100 * sparsity:g} % pruned: {100 * pruned / total:.2f} % are pruned already; legal: more")
    shuffled = np.random.default_rng(0).permutation(len(flat))
    for block in shuffled[np.argsort(flat[shuffled], kind="stable")]:
        if pruned >= target:
            break
        if size[block] <= room[layer[block]]:
            kept[block] = False
            room[layer[block]] -= size[block]
            pruned += size[block]
    if pruned < target:
        most = 100 * pruned / total
        raise InputError(f"{100 * sparsity:g} % cannot be pruned: `upper_prune_limit` allows at most {most:.2f} %")
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(kept, ends), scores, strict=True)]


def _check(scores: np.ndarray, *shares: float) -> None:
    if np.isnan(scores).any():
        raise InputError("scores hold NaN")
    for share in shares:
        if not 0 <= share <= 1:
            raise InputError(f"a share of weights is {share:g}; legal: 0 to 1")


def select_balanced(
    scores: np.ndarray, weights: np.ndarray, sparsity: float, rest: np.ndarray | None = None
) -> np.ndarray:
    """As `select` for one layer, but the blocks that are kept are spread evenly over child and over parent groups.

    Blocks are taken from the highest score down, as long as their child group and their parent group have not had
    their even part of the blocks; when no more can be taken, both parts grow by one block.

    Parameters
    ----------
    scores : (H, G)
    weights : how many weights each block holds, same shape
    sparsity : share of the layer's weights to prune, in [0, 1], at least what is gone already
    rest : how many weights of each block are not pruned yet, same shape; default: all

    Returns
    -------
    Boolean (H, G), True where a block is kept; the sparsity is reached and exceeded by less than one block.
    """
    _check(scores, sparsity)
    shuffled = np.random.default_rng(0).permutation(scores.size)
    order = shuffled[::-1]
    order = order[np.argsort(scores.ravel()[order], kind="stable")][::-1]  # unsigned scores have no negative
    rest = weights if rest is None else rest
    room = (1 - sparsity) * weights.sum() * (1 + 1e-12)
    parts = np.ceil(room / weights.sum() * weights.size / np.array(scores.shape) - 1e-9).astype(int)
    kept, children, parents = np.zeros(scores.shape, bool), *(np.zeros(n, int) for n in scores.shape)
    while order.size:
        later = []
        for block in order:
            j, i = divmod(block, scores.shape[1])
            if not 0 < rest[j, i] <= room:
                continue
            if children[j] >= parts[0] or parents[i] >= parts[1]:
                later.append(block)
                continue
            kept[j, i] = True
            children[j] += 1
            parents[i] += 1
            room -= rest[j, i]
        order, parts = np.array(later), parts + 1
    return kept


class Mask(dict):
    """By key of the state_dict a boolean tensor of the weight's shape and device: True where a weight is kept."""

    def __init__(self, *kept, **more) -> None:
        super().__init__(*kept, **more)
        if wrong := [k for k, one in self.items() if not isinstance(one, Tensor) or one.dtype != torch.bool]:
            raise InputError(f"the mask of {wrong[0]} is no tensor of bool; legal: True where a weight is kept")

    @classmethod
    def of_blocks(cls, kept: dict, blocks: dict[str, Blocks], network: nn.Module, within: dict | None = None) -> "Mask":
        """The mask of a network of which these blocks (H, G) are kept, and no weight that `within`, if given, drops."""
        mask = cls({key: earlier.to(network.get_parameter(key).device) for key, earlier in (within or {}).items()})
        for key, choice in kept.items():
            weight, choice = network.get_parameter(key), np.asarray(choice)
            if choice.shape != (shape := blocks[key].weights.shape) or choice.dtype != bool:
                raise InputError(f"kept blocks of {key}: {choice.shape} of {choice.dtype}; legal: {shape} of bool")
            whole = torch.from_numpy(blocks[key].expand(choice)).to(weight.device)
            whole = whole.reshape(whole.shape + (1,) * (weight.ndim - 2)).expand_as(weight)
            mask[key] = whole & mask[key] if key in mask else whole.contiguous()
        return mask

    @classmethod
    def of_checkpoint(cls, checkpoint: dict, network: nn.Module) -> "Mask":
        """The mask that a checkpoint of a pruned network holds; an empty one of a dense network."""
        mask, state = checkpoint.get("masks", {}), network.state_dict()
        for key, kept in mask.items() if isinstance(mask, dict) else [("masks", mask)]:
            shape = getattr(state.get(key), "shape", None)
            if not (isinstance(kept, Tensor) and kept.dtype == torch.bool and kept.shape == shape):
                raise InputError(f"the checkpoint's mask of {key} is of another network; name another checkpoint")
        return cls(mask)

    @torch.no_grad()
    def apply(self, network: nn.Module) -> None:
        """Set every masked weight to exactly 0."""
        for key, kept in self.items():
            weight = plain_layer(network, key).weight
            if kept.shape != weight.shape:
                raise InputError(f"the mask of {key} is {tuple(kept.shape)}; legal: {tuple(weight.shape)}")
            weight.masked_fill_(~kept, 0)

    def hold(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the masked weights at exactly 0 after every step of the optimizer.

        This is all that holds a mask: names in the state_dict stay plain, and whatever momentum or weight decay add to
        a masked weight is gone before the next forward pass. The weights' bits are multiplied as integers: NaN becomes
        +0 too.
        """
        weights = [network.get_parameter(key) for key in self]

        def bits() -> list[Tensor]:  # where the weights are now: in another memory format they lie elsewhere
            return [weight.detach().view(getattr(torch, f"int{8 * weight.itemsize}")) for weight in weights]

        kept = [torch.empty_like(own).copy_(self[key]) for key, own in zip(self, bits(), strict=True)]
        if kept:
            optimizer.register_step_post_hook(lambda *_: torch._foreach_mul_(bits(), kept))  # all layers at once

    def pruned_by_layer(self) -> dict[str, float]:
        """Percentage of every masked layer's weights that is pruned."""
        return {key: 100 * int((~kept).sum()) / kept.numel() for key, kept in self.items()}

    def percent_pruned(self, of: int | None = None) -> float:
        """Percentage of the masked layers' weights that is pruned, or of so many weights."""
        pruned = sum(int((~kept).sum()) for kept in self.values())
        return 100 * pruned / (of or sum(kept.numel() for kept in self.values()) or 1)  # of a dense network 0


def sparsity_report(network: nn.Module, mask: Mask) -> dict:
    """Pruned percentages by the mask (of weights, without biases and batch norm), and memory of what is there."""
    zeros = sum(int((network.get_parameter(key)[kept] == 0).sum()) for key, kept in mask.items())
    return {
        "pruned_percent_masked_layers": mask.percent_pruned(),
        "pruned_percent_network": mask.percent_pruned(of=weight_count(network)),
        "pruned_percent_by_layer": mask.pruned_by_layer(),
        "kept_weights_that_are_0": zeros,
        "memory_mib_masked_layers": memory([network.get_submodule(key.removesuffix(".weight")) for key in mask]),
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
        for tensor in map(torch.atleast_1d, module.parameters(recurse=False)):
            values = tensor.detach().float().cpu().reshape(len(tensor), -1).numpy()
            scipy.sparse.save_npz(file := io.BytesIO(), scipy.sparse.csr_matrix(values))
            total += len(file.getbuffer())
    return total / 2**20
