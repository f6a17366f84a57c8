"""Kernel density estimate of a whole layer's conditional mutual information.

With a product Gaussian kernel the squared distances of groups add up: D(P) = sum_i D(P_i), so the distance in all
parents but group i is D(P) - D(P_i). With C_j and R_i = P without P_i, the leave-one-out plug-in estimate is

    I(C_j; P_i | R_i) = mean_a [ log p(c_a, P_a) + log p(r_a) - log p(P_a) - log p(c_a, r_a) ],

each p(a) = sum_{b != a} of the kernels. For a few rows a at a time, all sums over b of all pairs (j, i) are one batched
matrix product of the children's kernels with those of the R_i. An extra "rest" that leaves nothing out gives p(c, P),
an extra child with a constant kernel gives p(r), and both together p(P). Normalising constants cancel.

Cost: (G + H) n^2 exponentials and 2 (G + 1) (H + 1) n^2 operations, in blocks that stay in the processor's cache.
"""

import contextlib
import sys
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from common.cmi.inputs import Layer, check_choice, check_number, in_parallel, out_of_memory

WIDTH = 0.25  # kernel width per square root of the number of parent units; see `widths`
FEW, MANY = 2, 10  # parent units up to which "auto" takes the likeliest widths, and from which those of `widths`
CHILDREN, ROWS = 8, 32  # child groups that widths are the likeliest for, at most, and rows of each, at least
KERNELS = 2**20  # values of their kernels
TIED = 1e-6  # standard deviations apart at most: equal but for single precision
SEARCH = {"ftol": 1e-5, "maxiter": 50}  # for the likeliest widths
TASK_ROWS = 64  # rows of one task, at most: the unit of parallel work, of progress and of resuming
TASK_OPERATIONS = 4 * 10**11  # of one task, unless it is one row: ten seconds of a core
TILE = 2**21  # kernel values in one tile: what a core's share of the cache holds
TILE_COLUMNS = 128
GPU_TILE = 2**28  # 1 GiB of single precision
PRECISIONS = {"single": torch.float32, "double": torch.float64}


def widths(n_units: int, factor: float = WIDTH) -> tuple[float, float]:
    """Standard deviations of the kernels of the parents and of a child group.

    A parent unit of variance 1 is given the width factor * sqrt(n_units): the mean exponent between two rows is then
    1 / factor^2 whatever the number of units, so that the number of effective neighbours does not collapse as a layer
    grows. A child group, scaled to mean squared norm 1, is given the same width, but at most 1: beyond, scores
    shrink and do not become more reliable.

    Parameters
    ----------
    n_units : number of parent units that are not constant
    factor : larger is smoother and more reliable, smaller conditions more sharply

    Returns
    -------
    (parent width per unit, child width per group)
    """
    width = factor * np.sqrt(max(n_units, 1))
    return width, min(width, 1.0)


def auto_widths(layer: Layer) -> tuple[np.ndarray | float, float]:
    """Likeliest widths for few parent units, those of `widths` for many, and their geometric means between.

    The likelihood is that of child groups given all parents, each row by the others (Hall, Racine and Li, 2004). Where
    nothing depends on a unit its likeliest width is infinite: all are at most twice those of `widths`. A row's copies
    in the child, but for rounding, are left out with it: for tied values the narrowest kernel would be the likeliest.

    Returns
    -------
    As `widths`, but with a width (p,) of each parent unit where they are few.
    """
    n_units = layer.parent_units.sum()
    parent_width, child_width = widths(n_units)
    if n_units >= MANY or not layer.live.any():
        return parent_width, child_width
    logs = np.log([parent_width] * layer.parents.shape[1] + [child_width])
    with torch.inference_mode(False), torch.enable_grad():
        bounds = [(log - np.log(16), log + np.log(2)) for log in logs]
        likeliest = minimize(_surprise(layer), logs, jac=True, method="L-BFGS-B", bounds=bounds, options=SEARCH).x
    share = np.log(max(n_units, FEW) / FEW) / np.log(MANY / FEW)
    logs = share * logs + (1 - share) * likeliest
    return np.exp(logs[:-1]), np.exp(logs[-1])


def _surprise(layer: Layer) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """What maps logarithms of widths (p + 1,) to -log p(child group | parents), a mean, and its gradient."""
    groups = _spaced(np.flatnonzero(layer.child_units), CHILDREN)
    rows = _spaced(np.arange(layer.n), max(ROWS, KERNELS // (layer.n * len(groups))))
    units = torch.from_numpy(layer.child_units[groups])
    parents, children = torch.from_numpy(layer.parents), torch.from_numpy(layer.children)
    own = [children[:, layer.child_groups == j] for j in groups]
    squares = [torch.cdist(c[rows], c, compute_mode="donot_use_mm_for_euclid_dist").square() for c in own]
    squares = torch.stack(squares) / units[:, None, None]
    copies = torch.where(squares > TIED**2, 0.0, -torch.inf)
    itself = torch.zeros(len(rows), layer.n, dtype=torch.float64)
    itself[np.arange(len(rows)), rows] = -torch.inf

    def surprise(logs: np.ndarray) -> tuple[float, np.ndarray]:
        logs = torch.tensor(logs, requires_grad=True)
        scaled = parents / logs[:-1].exp()
        given = itself + scaled[rows] @ scaled.T - scaled.square().sum(1) / 2
        joint = given + copies - squares / (2 * logs[-1].exp().square())
        value = units.double().mean() * logs[-1] + (given.logsumexp(1) - joint.logsumexp(2)).mean()
        value.backward()
        return value.item(), logs.grad.numpy()

    return surprise


def _spaced(items: np.ndarray, count: int) -> np.ndarray:
    """So many of the items at most, at equal distances."""
    return items[np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def scores(
    layer: Layer,
    *,
    n_jobs: int = 1,
    seed: int = 0,
    width: float | str = WIDTH,
    precision: str = "double",
    device: str | torch.device = "cpu",
    start: tuple[int, np.ndarray] | None = None,
    on_rows: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Leave-one-out KDE scores of all pairs; see `common.cmi.layer_cmi`. Nothing is random: `seed` is not used.

    Parameters
    ----------
    width : factor of `widths`, from 1e-6 to 1e6, or "auto": `auto_widths`
    precision : "double", or "single" at less than half the cost
    device : where the tensors live; on a GPU there is one worker, and results differ from the CPU's by rounding
    start : (rows done, sum over these rows) as last given to `on_rows`, to continue an interrupted run
    on_rows : called in order after every task with (rows done, sum over these rows in bits)

    Returns
    -------
    (H, G) float64 ndarray, in nats

    Notes
    -----
    The plug-in estimator with kernels is due to Ahmad and Lin (1976) for entropies and Moon, Rajagopalan and Lall
    (1995) for mutual information. It ranks groups reliably in wide layers; its absolute value is biased towards 0
    there.
    """
    if not (auto := isinstance(width, str) and width == "auto"):
        check_number(width, 'width (or "auto")', 1e-6, 1e6)
    check_choice(precision, "precision", PRECISIONS)
    done, total = start or (0, np.zeros(layer.shape))
    if not 0 <= done <= layer.n or np.shape(total) != layer.shape:
        raise ValueError(f"start does not belong to {layer.n} rows and scores of shape {layer.shape}")
    chosen = auto_widths(layer) if auto else widths(layer.parent_units.sum(), width)
    kernels = _Kernels(layer, chosen, PRECISIONS[precision], _usable(device))
    of_row = 2 * layer.n * (layer.shape[0] + 1) * (layer.shape[1] + 1)
    rows = min(TASK_ROWS, max(1, TASK_OPERATIONS // of_row))
    tasks = [(row, min(row + rows, layer.n)) for row in range(done, layer.n, rows)]
    workers = n_jobs if kernels.device.type == "cpu" else 1
    with contextlib.closing(in_parallel(lambda task: kernels.sum_rows(*task), tasks, workers)) as parts:
        for (_, end), part in zip(tasks, parts, strict=True):
            total = total + part
            if on_rows is not None:
                on_rows(end, total)
    return total * (np.log(2) / layer.n)


def _usable(device) -> torch.device:
    """The device, if there is one of that name that computes in double precision."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


class _Kernels:
    """Factors from which any tile of exponents (to base 2) is one small matrix product per group."""

    def __init__(self, layer: Layer, widths: tuple, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.dtype, self.device = layer.n, dtype, device
        self.tile_columns = TILE_COLUMNS if device.type == "cpu" else self.n
        self.n_children, self.n_parents = layer.shape
        parent_width, child_width = widths
        scale = np.sqrt(np.log2(np.e) / 2)
        child_widths = child_width * np.sqrt(np.maximum(layer.child_units, 1))[layer.child_groups]
        parents, children = layer.parents * (scale / parent_width), layer.children * (scale / child_widths)
        self.whole = self._factors([parents], -1)
        self.rests = self._factors(_split(parents, layer.parent_groups), +1)
        self.kids = self._factors(_split(children, layer.child_groups), -1)

    def _factors(self, groups: list[np.ndarray], sign: int) -> tuple[Tensor, Tensor]:
        """Left (k, n, d + 2) and right (k, d + 2, n) factors whose product is sign * squared distance, per group."""
        units = max(group.shape[1] for group in groups)
        left, right = np.zeros((len(groups), self.n, units + 2)), np.zeros((len(groups), units + 2, self.n))
        for k, group in enumerate(groups):
            d, norms = group.shape[1], (group**2).sum(axis=1)
            left[k, :, :d], right[k, :d] = -2 * sign * group, group.T
            left[k, :, units], right[k, units] = sign * norms, 1
            left[k, :, units + 1], right[k, units + 1] = sign, norms
        return tuple(torch.from_numpy(factor).to(self.device, self.dtype) for factor in (left, right))

    def sum_rows(self, first: int, end: int) -> np.ndarray:
        """Sum over rows first <= a < end of the four logarithms (base 2) of every pair.

        Kernels just above underflow would cost four times the time: in this thread they are 0 meanwhile.
        """
        flushed = sys.float_info.min / 2 == 0  # what the caller has
        torch.set_flush_denormal(True)
        try:
            return self._sum_tiles(first, end)
        finally:
            torch.set_flush_denormal(flushed)

    def _sum_tiles(self, first: int, end: int) -> np.ndarray:
        """As `sum_rows`, in tiles that fit into the memory."""
        tile = TILE if self.device.type == "cpu" else GPU_TILE
        step = max(1, tile // (self.tile_columns * (len(self.rests[0]) + len(self.kids[0]))))
        total, row = np.zeros((self.n_children, self.n_parents)), first
        while row < end:
            try:
                total += self._sum_terms(slice(row, min(row + step, end)))
            except (MemoryError, RuntimeError) as error:  # a smaller tile may fit
                if step == 1 or not out_of_memory(error):
                    raise
                step //= 2
                continue
            row += step
        return total

    def _sum_terms(self, rows: slice) -> np.ndarray:
        """As `sum_rows`, in one tile."""
        logs = self._log_sums(rows)
        given_all, given_rest = logs[:, :-1, -1:], logs[:, :-1, :-1]
        terms = given_all - given_rest + logs[:, -1:, :-1] - logs[:, -1:, -1:]
        return terms.sum(0, dtype=torch.float64).cpu().numpy()

    def _whole(self, rows: slice) -> Tensor:
        """Exponents (rows, n) of the kernel of all parents; the largest of each row moved to 0, its own -inf.

        Moving a row's exponents multiplies all four sums of a pair alike. With the largest at 0, sums over the rests'
        kernels are at least 1, however far from all others a row is.
        """
        whole = self.whole[0][0, rows] @ self.whole[1][0]
        whole.diagonal(rows.start).fill_(-torch.inf)
        return whole.sub_(whole.amax(1, keepdim=True))

    def _exponents(self, whole: Tensor, rows: slice, cols: slice, out: tuple) -> tuple[Tensor, Tensor]:
        """Exponents of the rests' kernels (G + 1, rows, cols) and of the children's, in these arrays or in new ones."""
        rests, kids = out
        rests = torch.baddbmm(whole[:, cols], self.rests[0][:, rows], self.rests[1][:, :, cols], out=rests)
        return rests, torch.bmm(self.kids[0][:, rows], self.kids[1][:, :, cols], out=kids)

    def _log_sums(self, rows: slice) -> Tensor:
        """Logarithms (rows, H + 1, G + 1) of the sums over all other rows, up to terms that cancel between the four."""
        whole, n_rests, n_kids = self._whole(rows), self.n_parents + 1, self.n_children + 1
        # sizes that matrix products like; memory that is written again is in the cache
        n, h, g = len(whole), n_kids + -n_kids % 8, n_rests + -n_rests % 8
        sums, *buffers = (whole.new_zeros(k) for k in ((n, h, g), g * n * self.tile_columns, h * n * self.tile_columns))
        for col in range(0, self.n, self.tile_columns):
            cols = slice(col, min(col + self.tile_columns, self.n))
            shape = -1, n, cols.stop - col
            rests, kids = (b[: k * n * shape[2]].view(shape) for b, k in zip(buffers, (g, h), strict=True))
            for exponents in self._exponents(whole, rows, cols, (rests[:n_rests], kids[:n_kids])):
                exponents.exp2_()
            sums.baddbmm_(kids.transpose(0, 1), rests.permute(1, 2, 0))
        sums = sums[:, :n_kids, :n_rests]
        limits = torch.finfo(self.dtype)
        safe = ((sums > limits.tiny * 2**24) & (sums < limits.max)).flatten(1).all(1)
        logs = sums.log2()
        for a in torch.nonzero(~safe).flatten().tolist():
            logs[a] = self._log_sums_of(slice(rows.start + a, rows.start + a + 1))
        return logs

    def _log_sums_of(self, row: slice) -> Tensor:
        """As `_log_sums` for one row whose kernels under- or overflow: slower, in double precision.

        Each kernel's largest exponent is moved to 0; children of which a sum still vanishes are summed in logarithms.
        """
        rests, kids = (e[:, 0].double() for e in self._exponents(self._whole(row), row, slice(0, self.n), (None, None)))
        rests, kids = (e - e.amax(1, keepdim=True) for e in (rests, kids))
        sums = kids.exp2() @ rests.exp2().T
        logs = sums.log2()
        for j in torch.nonzero((sums < 2.0**-900).any(1)).flatten().tolist():
            logs[j] = torch.logsumexp((kids[j] + rests) * np.log(2), dim=1) / np.log(2)
        return logs


def _split(samples: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """The samples of each group, and of the extra one, that is empty."""
    return [samples[:, groups == g] for g in range(groups.max() + 2)]
