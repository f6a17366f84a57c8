"""How well every estimator tells the parents that matter from the rest, on synthetic layers.

    python benchmarks/ranking.py [--seeds N] [--samples N ...] [--kinds KIND ...] [--cores N]

10 x 10 groups of 50 parent and 30 child units, 3 true parents per child group. Area under the ROC curve over all pairs
of a layer, mean and standard deviation over layers; mean scores of the pairs without and with a dependence. For narrow
layers, of a few single parent units and 10 single child units, the KDE with the widths of `kde.widths`, with the
likeliest ones, and with --width auto, which passes from these to those. Writes results/benchmarks/ranking.json.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import synthetic
from common.cmi import ESTIMATORS, kde, layer_cmi
from output import DIGITS, FOLDER, mean, save, std


def rank(kind: str, n: int, seeds: int, cores: int) -> list[dict]:
    """One row per estimator."""
    layers = [synthetic.layer(kind, n, seed) for seed in range(seeds)]
    rows = []
    for name in ESTIMATORS:
        scored = [
            (layer_cmi(*data, estimator=name, seed=seed, n_jobs=cores), truth)
            for seed, (*data, truth) in enumerate(layers)
        ]
        auc = [roc_auc_score(truth.ravel(), scores.ravel()) for scores, truth in scored]
        null = [scores[~truth].mean() for scores, truth in scored]
        row = {"layer": kind, "n": n, "estimator": name, "auc": mean(auc), "auc_std": std(auc)}
        row |= {"null_score": mean(null), "null_standard_error": standard_error(null)}
        rows.append(row | {"true_score": mean([scores[truth].mean() for scores, truth in scored])})
    return rows


def narrow(units: int, n: int, seeds: int, cores: int) -> dict:
    """How well the KDE ranks so many parents, of which a quarter matters: mean AUC over layers of all kinds."""
    shape = {"groups": units, "parent_units": 1, "child_units": 1, "true_parents": units // 4}
    layers = [synthetic.layer(kind, n, seed, **shape) for kind in synthetic.RESPONSES for seed in range(seeds)]
    row, passage = {"units": units, "n": n, "layers": len(layers)}, kde.MANY
    for name, width, many in (("rule", kde.WIDTH, passage), ("likeliest", "auto", np.inf), ("auto", "auto", passage)):
        kde.MANY = many
        scored = [(truth, layer_cmi(*data, width=width, n_jobs=cores)) for *data, truth in layers]
        row[name] = mean([roc_auc_score(truth.ravel(), scores.ravel()) for truth, scores in scored])
    return row


def standard_error(layer_means: list[float]) -> float | None:
    """Of the mean over layers: pairs of one layer share their data and are no independent repetitions."""
    deviation = std(layer_means)
    return None if deviation is None else round(deviation / len(layer_means) ** 0.5, DIGITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 2500])
    parser.add_argument("--kinds", nargs="+", choices=synthetic.RESPONSES, default=list(synthetic.RESPONSES))
    parser.add_argument("--units", type=int, nargs="+", default=[4, 6, 8, 10], help="of narrow layers")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the record")
    args = parser.parse_args()
    sizes = [(kind, n) for kind in args.kinds for n in args.samples]
    record = {
        "seeds": args.seeds,
        "ranking": [row for size in sizes for row in rank(*size, args.seeds, args.cores)],
        "narrow": [narrow(units, min(args.samples), args.seeds, args.cores) for units in args.units],
    }
    save(args.out, "ranking", record)


if __name__ == "__main__":
    main()
