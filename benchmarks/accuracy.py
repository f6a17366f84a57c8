"""How far every estimator is from the truth: Gaussian data with the CMI in closed form.

    python benchmarks/accuracy.py [--seeds N] [--samples N ...] [--dims DX,DY,DZ ...] [--cores N]

Bias and standard deviation over seeds against dimension, information and number of samples. Geometric mutual
information is not in nats: its bias is given only where the truth is 0. Two checks more, in which the truth is 0 and
which the published routine takes too: independent data, and a common cause that explains all. Writes
results/benchmarks/accuracy.json.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import published
import synthetic
from common.cmi import ESTIMATORS, cmi
from output import DIGITS, FOLDER, mean, save, std

INFORMATION = (0.0, 0.2, 1.0)
METHODS = {"kde": {}, "kde, auto": {"estimator": "kde", "width": "auto"}}  # options by name
METHODS |= {name: {"estimator": name} for name in ESTIMATORS}
CHECKS = {
    "independent (2, 2, 5)": lambda n, seed: synthetic.independent_triple((2, 2, 5), n, seed),
    "X <- Z -> Y (1, 1, 1)": synthetic.chain,
}


def calibrate(dims: tuple, information: float, n: int, seeds: int, cores: int) -> list[dict]:
    """One row per estimator; the KDE also with widths that it chooses."""
    triples = [synthetic.gaussian_triple(dims, information, n, seed) for seed in range(seeds)]
    rows = []
    for name, options in METHODS.items():
        values = [cmi(*t, **options, seed=seed, n_jobs=cores) for seed, t in enumerate(triples)]
        in_nats = not name.startswith("gmi")
        bias = round(mean(values) - information, DIGITS) if in_nats or information == 0 else None
        row = {"dims": dims, "n": n, "truth": information, "estimator": name}
        rows.append({**row, "mean": mean(values), "std": std(values), "bias": bias})
    return rows


def check(name: str, n: int, seeds: int, cores: int) -> list[dict]:
    """One row per estimator and one for the published routine, on data of CMI 0."""
    triples = [CHECKS[name](n, seed) for seed in range(seeds)]
    values = {
        name: [cmi(*t, **options, seed=seed, n_jobs=cores) for seed, t in enumerate(triples)]
        for name, options in METHODS.items()
    }
    values["published routine"] = [published.score(*t, seed=seed) for seed, t in enumerate(triples)]
    return [{"data": name, "n": n, "estimator": e, "mean": mean(v), "std": std(v)} for e, v in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 2500])
    parser.add_argument(
        "--dims",
        type=lambda text: tuple(map(int, text.split(","))),
        nargs="+",
        default=[(1, 1, 1), (2, 2, 5), (5, 5, 20), (30, 50, 450)],
    )
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the record")
    args = parser.parse_args()
    sizes = [(dims, information, n) for dims in args.dims for information in INFORMATION for n in args.samples]
    record = {
        "seeds": args.seeds,
        "calibration": [row for size in sizes for row in calibrate(*size, args.seeds, args.cores)],
        "truth_is_0": [row for name in CHECKS for row in check(name, max(args.samples), args.seeds, args.cores)],
    }
    save(args.out, "accuracy", record)


if __name__ == "__main__":
    main()
