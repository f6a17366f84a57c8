"""Scores of one layer pair with progress, resuming and a measure of their reliability."""

import hashlib
import resource
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from common import artifacts
from common.cmi import RESUMABLE, layer_cmi
from common.errors import InputError
from common.masks import Blocks

SAVE_EVERY = 5.0  # seconds between two notes of how far the work has come


def score(
    children,
    parents,
    blocks: Blocks,
    files: list[Path],
    record: dict,
    *,
    split_half: bool = False,
    bootstrap: int = 0,
    null: int = 0,
    **options,
) -> None:
    """Score a layer pair and write scores, labels and record.

    Parameters
    ----------
    children, parents : (n, c) and (n, p) tensors, rows paired
    blocks : the groups
    files : paths of the scores, the parents' labels and the children's labels
    record : what is known of the run so far
    split_half : also measure the scores' reliability
    bootstrap : number of subsamples for a standard error of every score, written beside them; 0: none
    null : number of permutations for the distribution of each child group's scores without dependence; 0: none
    **options : of `layer_cmi`
    """
    start = time.perf_counter()
    partial = files[0].with_suffix(".state")
    inputs = (children.numpy(), parents.numpy(), blocks.child_groups, blocks.parent_groups, partial)
    scores = resumable(*inputs, **options)
    measured = {
        "shape": list(scores.shape),
        "samples": len(parents),
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "negative_share": float((scores < 0).mean()),
    }
    if split_half:
        measured["split_half_rank_correlation"] = halves(*inputs, **options)
    contents = dict(zip(files, (scores, blocks.parent_groups, blocks.child_groups), strict=True))
    if bootstrap:
        errors = standard_errors(*inputs, count=bootstrap, **options)
        contents[artifacts.beside(files[0], "SE")] = errors
        measured["mean_standard_error"] = float(errors.mean())
    if null:
        summary = permutation_null(*inputs, count=null, **options)
        contents[artifacts.beside(files[0], "Null")] = summary
        measured["null_mean"] = float(summary[:, 0].mean())
        measured["share_above_null_95_percent"] = float((scores > summary[:, 2:]).mean())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cost = {"wall_seconds": round(time.perf_counter() - start, 1), "peak_memory_mib": round(peak)}
    record = {**record, "status": "complete", "scores": measured, **cost}
    artifacts.save({path: artifacts.array_bytes(content) for path, content in contents.items()}, record)
    for leftover in partial.parent.glob(f"{partial.stem}*.state"):
        leftover.unlink()
    print(
        f"{files[0]}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in measured.items())
    )


def load(files: list[Path], expected: Blocks, remedy: str) -> tuple[np.ndarray, Blocks]:
    """Read scores (H, G) and groups of one layer pair and check them against the groups that were asked for.

    Parameters
    ----------
    files : paths of the scores, the parents' labels and the children's labels
    expected : a layer's blocks with the numbers of units and groups that the files must have
    remedy : what to run to make the files, for error messages
    """
    scores, parent_groups, child_groups = (
        artifacts.load_array(path, artifacts.record_of(files[0]), remedy) for path in files
    )
    for path, labels, wanted in (
        (files[1], parent_groups, expected.parent_groups),
        (files[2], child_groups, expected.child_groups),
    ):
        count = wanted.max() + 1
        if labels.shape != wanted.shape or labels.dtype.kind not in "iu" or set(labels.tolist()) != set(range(count)):
            raise InputError(f"{path} does not put {len(wanted)} units into {count} groups; {remedy}")
    if scores.shape != expected.weights.shape or not np.isfinite(scores).all():
        raise InputError(f"{files[0]} does not hold {expected.weights.shape} finite scores; {remedy}")
    return scores, Blocks(child_groups, parent_groups, expected.kernel)


def resumable(children, parents, child_groups, parent_groups, partial: Path, **options) -> np.ndarray:
    """`layer_cmi`, continued from `partial` if an interrupted run of the same work left it there.

    The file stays when the scores are done: they are then read off it at once. The caller removes it.
    """
    inputs = (children, parents, child_groups, parent_groups)
    if options.get("estimator") not in RESUMABLE:
        return layer_cmi(*inputs, **options)
    key = _fingerprint(*inputs, {k: v for k, v in options.items() if k != "n_jobs"})
    begun = artifacts.load_state(partial, key, "remove it and run the same command again")
    start = (begun["done"], begun["total"].numpy()) if begun else None
    saved = time.monotonic()
    with tqdm(total=len(children), initial=start[0] if start else 0, unit="row", disable=None) as progress:

        def on_rows(done: int, total: np.ndarray) -> None:
            nonlocal saved
            progress.update(done - progress.n)
            if done == len(children) or time.monotonic() - saved > SAVE_EVERY:
                artifacts.save_state(partial, {"key": key, "done": done, "total": torch.from_numpy(total)})
                saved = time.monotonic()

        return layer_cmi(*inputs, start=start, on_rows=on_rows, **options)


def halves(children, parents, child_groups, parent_groups, partial: Path, **options) -> float:
    """Rank correlation of the scores from two disjoint halves of the rows: how far they can be trusted as a ranking."""
    half = len(children) // 2
    first, second = (
        resumable(children[rows], parents[rows], child_groups, parent_groups, _part(partial, name), **options)
        for name, rows in (("first", slice(0, half)), ("second", slice(half, 2 * half)))
    )
    return float(spearmanr(first.ravel(), second.ravel()).statistic)


def standard_errors(*inputs, count: int, **options) -> np.ndarray:
    """Standard error (H, G) of every score: its standard deviation over random halves of the rows.

    The delete-half jackknife (Shao and Wu, Annals of Statistics 17, 1989). Rows are drawn without replacement, since a
    row and its copy are nearest neighbours and break estimates of density.
    """
    children, parents, *groups, partial = inputs
    rng, scores = np.random.default_rng([options["seed"], 2]), []
    for b in range(count):
        rows = rng.permutation(len(children))[: len(children) // 2]
        scores.append(resumable(children[rows], parents[rows], *groups, _part(partial, f"draw{b}"), **options))
    return np.std(scores, axis=0, ddof=1)


def permutation_null(*inputs, count: int, **options) -> np.ndarray:
    """Mean, standard deviation and 95th percentile (H, 3) of each child group's scores when its rows are permuted.

    Permuting all children's rows together keeps everything but the dependence on the parents.
    """
    children, parents, *groups, partial = inputs
    rng, scores = np.random.default_rng([options["seed"], 3]), []
    for b in range(count):
        rows = rng.permutation(len(children))
        scores.append(resumable(children[rows], parents, *groups, _part(partial, f"null{b}"), **options))
    pooled = np.hstack(scores)
    return np.stack([pooled.mean(1), pooled.std(1), np.quantile(pooled, 0.95, axis=1)], axis=1)


def _part(partial: Path, name: str) -> Path:
    return partial.with_suffix(f".{name}.state")


def _fingerprint(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()
