"""Scores of one layer pair with progress, resuming and a measure of their reliability."""

import hashlib
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from common import artifacts
from common.cmi import layer_cmi
from common.errors import InputError
from common.masks import Blocks

SAVE_EVERY = 5.0  # seconds between two notes of how far the work has come


def score(children, parents, blocks: Blocks, files: list[Path], record: dict, *, split_half: bool, **options) -> None:
    """Score a layer pair and write scores, labels and record.

    Parameters
    ----------
    children, parents : (n, c) and (n, p) tensors, rows paired
    blocks : the groups
    files : paths of the scores, the parents' labels and the children's labels
    record : what is known of the run so far
    split_half : also measure the scores' reliability
    **options : of `layer_cmi`
    """
    start = time.perf_counter()
    partial = files[0].with_suffix(".npz")
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
    record = {**record, "status": "complete", "scores": measured, "wall_seconds": round(time.perf_counter() - start, 1)}
    contents = (scores, blocks.parent_groups, blocks.child_groups)
    artifacts.save(
        {path: artifacts.array_bytes(content) for path, content in zip(files, contents, strict=True)}, record
    )
    for leftover in partial.parent.glob(f"{partial.stem}*.npz"):
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
    key = _fingerprint(
        children, parents, child_groups, parent_groups, {k: v for k, v in options.items() if k != "n_jobs"}
    )
    start = artifacts.load_partial(partial, key)
    saved = time.monotonic()
    with tqdm(total=len(children), initial=start[0] if start else 0, unit="row", disable=None) as progress:

        def on_rows(done: int, total: np.ndarray) -> None:
            nonlocal saved
            progress.update(done - progress.n)
            if done == len(children) or time.monotonic() - saved > SAVE_EVERY:
                artifacts.save_partial(partial, key, done, total)
                saved = time.monotonic()

        return layer_cmi(children, parents, child_groups, parent_groups, start=start, on_rows=on_rows, **options)


def halves(children, parents, child_groups, parent_groups, partial: Path, **options) -> float:
    """Rank correlation of the scores from two disjoint halves of the rows: how far they can be trusted as a ranking."""
    half = len(children) // 2
    scores = [
        resumable(
            children[rows], parents[rows], child_groups, parent_groups, partial.with_suffix(f".{name}.npz"), **options
        )
        for name, rows in (("first", slice(0, half)), ("second", slice(half, 2 * half)))
    ]
    return float(spearmanr(scores[0].ravel(), scores[1].ravel()).statistic)


def _fingerprint(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()
