"""Tables from records, and the benchmarks' synthetic data."""

import sys
from pathlib import Path

import numpy as np
import pytest

from common import artifacts, report

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import published
import synthetic


def run(criterion, share, accuracy, status="complete"):
    return {
        "stage": 3,
        "status": status,
        "requested_percent": share,
        "arguments": {"Criterion": criterion},
        "pruned_percent_masked_layers": share,
        "pruned_percent_network": share / 4,
        "memory_mib_masked_layers": 0.1,
        "test": {"accuracy": accuracy},
        "test_before_retraining": {"accuracy": 10.0},
    }


@pytest.fixture
def folder(tmp_path):
    records = [run("cmi", 90, 97), run("cmi", 90, 99), run("random", 90, 95), run("random", 90, 1, "running")]
    records[2]["test_after_1_epoch"] = {"accuracy": 20.0}  # older records do not have it
    for k, record in enumerate(records):
        artifacts.write_json(tmp_path / str(k) / "logits_90.00.json", record)
    dense = {"stage": 1, "status": "complete", "best": {}, "test": {"accuracy": 98.0}}
    artifacts.write_json(tmp_path / "dense.json", dense)
    return tmp_path


def test_table_has_mean_and_sample_deviation_of_finished_runs(folder):
    lines = report.table(folder).splitlines()
    assert "| **dense** | 0 | 0 |  |  | 98.00 |  | 1 |" in lines
    assert "| **cmi** | 90.00 | 22.50 | 10.00 ± 0.00 |  | 98.00 ± 1.41 | 0.100 | 2 |" in lines
    assert "| **random** | 90.00 | 22.50 | 10.00 | 20.00 | 95.00 | 0.100 | 1 |" in lines


def test_the_same_records_give_the_same_figure(folder):
    figures = [folder / name for name in ("a.png", "b.png")]
    for target in figures:
        report.figure(folder, target, "title")
    assert figures[0].read_bytes() == figures[1].read_bytes()


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end x -->\n<!-- y -->\nkept\n<!-- end y -->\n")
    report.fill(page, "x", "new\n")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- end x -->\n<!-- y -->\nkept\n<!-- end y -->\n"


@pytest.mark.parametrize("dims", [(1, 1, 1), (2, 3, 5)])
@pytest.mark.parametrize("information", [0, 0.5])
def test_synthetic_gaussians_have_the_information_asked_for(dims, information):
    """By the covariance of many samples."""
    parts = synthetic.gaussian_triple(dims, information, 200_000, seed=1)
    matrix = np.cov(np.hstack(parts).T)
    x, y, z = np.split(np.arange(sum(dims)), np.cumsum(dims)[:2])

    def log_det(*units):
        units = np.concatenate(units)
        return np.linalg.slogdet(matrix[np.ix_(units, units)])[1]

    assert (log_det(x, z) + log_det(y, z) - log_det(z) - log_det(x, y, z)) / 2 == pytest.approx(information, abs=0.01)
    assert (log_det(x) + log_det(y) - log_det(x, y)) / 2 > information + 0.05  # Z confounds


def test_the_published_routine_sees_dependence_where_there_is_none():
    """What its defects do: independent data score far above 0."""
    values = [published.score(*synthetic.independent_triple((2, 2, 5), 150, seed), seed=seed) for seed in range(3)]
    assert np.mean(values) > 0.2
