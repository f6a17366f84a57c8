"""Scores of one layer pair: estimated with progress, resumed where they were killed, written with their reliability."""

import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from common import artifacts, records
from common.cmi import RESUMABLE, layer_cmi
from common.cmi.inputs import MIN_ROWS
from common.errors import InputError, reason
from common.masks import Blocks

SAVE_EVERY = 5.0  # seconds between two notes of how far the work has come


@dataclass(frozen=True)
class LayerPair:
    """A child layer whose parents are to be scored."""

    child: str  # key of the state_dict
    blocks: Blocks  # the groups that were asked for
    paths: tuple[Path, Path, Path]  # of the scores, the parents' labels and the children's labels
    record: dict  # what is known of the run before it starts

    def estimator(self, blocks: Blocks, **options) -> "Estimator":
        """What estimates the scores of these groups, with options of `layer_cmi`."""
        return Estimator(self.paths[0].with_suffix(".state"), blocks, options)

    def save(self, estimate: "Estimator", scores: np.ndarray, figures: dict, arrays: dict[str, np.ndarray]) -> None:
        """Write scores (H, G), labels, record and what `uncertainty` found; print what the scores are like."""
        blocks, (path, *_), scores = estimate.blocks, self.paths, np.asarray(scores, np.float64)
        if scores.shape != (shape := blocks.weights.shape) or not np.isfinite(scores).all():
            raise InputError(f"{path.stem}: {scores.shape} or not finite; legal: a number for every block, {shape}")
        contents = dict(zip(self.paths, (scores, blocks.parent_groups, blocks.child_groups), strict=True))
        contents |= {artifacts.sibling(path, kind): array for kind, array in arrays.items()}
        measured = {"shape": list(scores.shape), "mean": float(scores.mean()), "std": float(scores.std())}
        measured |= {"negative_share": float((scores < 0).mean()), **figures}
        seconds = round(time.perf_counter() - estimate.began, 1)
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        known = {"status": "complete", "scores": measured, "wall_seconds": seconds, "peak_memory_mib": peak}
        records.save({p: artifacts.array_bytes(array) for p, array in contents.items()}, {**self.record, **known})
        for leftover in path.parent.glob(f"{path.stem}*.state"):
            leftover.unlink()
        said = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in measured.items())
        print(f"{path}: {', '.join(said)}; {seconds} s", flush=True)


class Estimator:
    """`layer_cmi` that goes on where a killed run of the same work was.

    What it notes stays until the scores are written: they are then read off it at once.
    """

    def __init__(self, state_file: Path, blocks: Blocks, options: dict) -> None:
        self.state_file, self.blocks, self.options, self.began = state_file, blocks, options, time.perf_counter()

    def __call__(self, children, parents, name: str = "") -> np.ndarray:
        """Scores (H, G) of activations (n, c) and (n, p), or (n, p * kernel) of windows of maps, channel by channel.

        `name` tells several estimates of one pair apart.
        """
        children, parents = np.asarray(children), np.asarray(parents)
        window = parents.shape[1] // len(self.blocks.parent_groups)  # units of a channel
        inputs = children, parents, self.blocks.child_groups, np.repeat(self.blocks.parent_groups, window)
        try:
            return self._resumed(name, *inputs)
        except ValueError as error:
            more = "; try more `samples_per_class`" * (len(children) < MIN_ROWS)
            raise InputError(f"{self.state_file.stem}: {reason(error)}{more}") from error

    def _resumed(self, name: str, *inputs: np.ndarray) -> np.ndarray:
        if self.options.get("estimator") not in RESUMABLE:
            return layer_cmi(*inputs, **self.options)
        state_file = self.state_file.with_suffix(f".{name}.state") if name else self.state_file
        work = {k: v for k, v in self.options.items() if k != "n_jobs"}
        key = joblib.hash([*inputs, work, records.common_hash()])
        begun = artifacts.load_state(state_file, "remove it and run the same command again") or {}
        start = (begun["done"], begun["total"].numpy()) if begun.get("key") == key else None
        saved, rows = time.monotonic(), len(inputs[0])
        with tqdm(total=rows, initial=start[0] if start else 0, unit="row", leave=False, disable=None) as progress:

            def on_rows(done: int, total: np.ndarray) -> None:
                nonlocal saved
                progress.update(done - progress.n)
                if done == rows or time.monotonic() - saved > SAVE_EVERY:
                    artifacts.save_state(state_file, {"key": key, "done": done, "total": torch.from_numpy(total)})
                    saved = time.monotonic()

            return layer_cmi(*inputs, start=start, on_rows=on_rows, **self.options)


def uncertainty(
    estimate: Estimator, children, parents, scores, split_half: bool, bootstrap: int | None, null: int | None
) -> tuple[dict, dict[str, np.ndarray]]:
    """How far scores can be trusted.

    Parameters
    ----------
    estimate : what made the scores, from (n, c) and (n, p) activations
    split_half, bootstrap, null : whether and how often to do what the functions below do

    Returns
    -------
    Figures by name, and arrays by kind of file: "SE" (H, G), "Null" (H, 3).
    """
    children, parents = np.asarray(children), np.asarray(parents)
    figures, arrays = {"samples": len(parents)}, {}
    if split_half:
        figures["split_half_rank_correlation"] = split_half_correlation(estimate, children, parents)
    if bootstrap:
        arrays["SE"] = standard_errors(estimate, children, parents, bootstrap)
        figures["mean_standard_error"] = float(arrays["SE"].mean())
    if null:
        arrays["Null"] = summary = permutation_null(estimate, children, parents, null)
        figures["null_mean"] = float(summary[:, 0].mean())
        figures["share_above_null_95_percent"] = float((scores > summary[:, 2:]).mean())
    return figures, arrays


def split_half_correlation(estimate: Estimator, children: np.ndarray, parents: np.ndarray) -> float:
    """Rank correlation of the scores from two disjoint halves of the rows: how far they can be trusted as a ranking."""
    half = len(children) // 2
    parts = {"first": slice(0, half), "second": slice(half, 2 * half)}
    first, second = (estimate(children[rows], parents[rows], name) for name, rows in parts.items())
    return float(spearmanr(first.ravel(), second.ravel()).statistic)


def standard_errors(estimate: Estimator, children: np.ndarray, parents: np.ndarray, count: int) -> np.ndarray:
    """Standard error (H, G) of every score: its standard deviation over random halves of the rows.

    The delete-half jackknife (Shao and Wu, Annals of Statistics 17, 1989). Rows are drawn without replacement, since a
    row and its copy are nearest neighbours and break estimates of density.
    """
    rng = np.random.default_rng([estimate.options["seed"], 2])
    halves = [rng.permutation(len(children))[: len(children) // 2] for _ in range(count)]
    scores = [estimate(children[rows], parents[rows], f"draw{b}") for b, rows in enumerate(halves)]
    return np.std(scores, axis=0, ddof=1)


def permutation_null(estimate: Estimator, children: np.ndarray, parents: np.ndarray, count: int) -> np.ndarray:
    """Mean, standard deviation and 95th percentile (H, 3) of each child group's scores when its rows are permuted.

    Permuting all children's rows together keeps everything but the dependence on the parents.
    """
    rng = np.random.default_rng([estimate.options["seed"], 3])
    orders = [rng.permutation(len(children)) for _ in range(count)]
    pooled = np.hstack([estimate(children[rows], parents, f"null{b}") for b, rows in enumerate(orders)])
    return np.stack([pooled.mean(1), pooled.std(1), np.quantile(pooled, 0.95, axis=1)], axis=1)


def load(paths: list[Path], expected: Blocks, remedy: str, checkpoint: dict) -> tuple[np.ndarray, Blocks, dict]:
    """Read scores (H, G) and groups of one layer pair and check them against what was asked for.

    Parameters
    ----------
    paths : of the scores, the parents' labels and the children's labels
    expected : a layer's blocks with the numbers of units and groups that the files must have
    remedy : what to run to make the files, for error messages
    checkpoint : what the scores must have been made of: its checksum by path

    Returns
    -------
    Scores, blocks and the record of the scores ({} of files from elsewhere).
    """
    known = records.found(paths[0])
    scores, parent_groups, child_groups = (artifacts.load_array(path, known, remedy) for path in paths)
    record = records.of(paths[0])
    made_of = record.get("inputs", {})
    if made_of and not set(made_of.values()) & set(checkpoint.values()):
        raise InputError(f"{paths[0]} was made of another checkpoint than {next(iter(checkpoint))}; {remedy}")
    sides = (parent_groups, expected.parent_groups), (child_groups, expected.child_groups)
    for path, (labels, wanted) in zip(paths[1:], sides, strict=True):
        count = wanted.max() + 1
        if labels.shape != wanted.shape or labels.dtype.kind not in "iu" or set(labels.tolist()) != set(range(count)):
            raise InputError(f"{path} does not put {len(wanted)} units into {count} groups; {remedy}")
    if scores.shape != expected.weights.shape or not np.isfinite(scores).all():
        raise InputError(f"{paths[0]} does not hold {expected.weights.shape} finite scores; {remedy}")
    return scores, replace(expected, child_groups=child_groups, parent_groups=parent_groups), record
