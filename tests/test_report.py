"""Tables from records, and the benchmarks' synthetic data."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

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


def test_overview_has_a_line_per_rule_and_a_column_per_share(folder):
    artifacts.write_json(folder / "more" / "logits_95.00.json", run("random", 95, 90))
    assert report.overview(folder).splitlines() == [
        "| rule | 90 % pruned | 95 % pruned |",
        "|---|---|---|",
        "| dense | 98.00 | |",
        "| cmi | 10.0 → ? → 98.00 ± 1.41 |  |",
        "| random | 10.0 → 20.0 → 95.00 | 10.0 → ? → 90.00 |",
    ]


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


def test_differences_are_paired_by_seed(tmp_path):
    """Against scipy's paired test and by hand: differences 1, 2, 3 have mean 2 and standard error 1 / sqrt(3)."""
    ours, theirs = {0: 97.0, 1: 94.0, 2: 91.0, 3: 50.0}, {0: 96.0, 1: 92.0, 2: 88.0, 9: 99.0}
    for criterion, accuracies in (("cmi", ours), ("random", theirs)):
        for seed, accuracy in accuracies.items():
            record = {**run(criterion, 90, accuracy), "seed": seed}
            artifacts.write_json(tmp_path / criterion / str(seed) / "logits_90.00.json", record)
    line = report.differences(tmp_path, "cmi").splitlines()[2]
    p = f"{ttest_rel([97, 94, 91], [96, 92, 88]).pvalue:.3f}"[1:]
    assert line == f"| random | 90 | +0.00 ± 0.00 |  | +2.00 ± 0.58 (p = {p}) | 3 |"


def test_a_combination_is_compared_with_cmi_alone_and_controls_only(tmp_path):
    for criterion in ("cmi", "cmi-magnitude", "magnitude"):
        for scores in ("single", "kept"):
            record = {**run(criterion, 90, 97.0), "seed": 0}
            record["arguments"]["Retrain_mask"] = f"dense/0/I_parent_{scores}.npy"
            artifacts.write_json(tmp_path / f"{criterion}_{scores}" / "logits_90.00.json", record)
    lines = report.differences(tmp_path, "cmi-magnitude (single)").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| cmi (single)", "| magnitude (kept)", "| magnitude (single)"]


def test_a_spread_and_refitted_rule_is_compared_with_the_plain_one(tmp_path):
    for criterion in ("cmi", "random"):
        for changes in ({}, {"Even": True, "Refit": True}):
            record = {**run(criterion, 90, 97.0), "seed": 0}
            record["arguments"] |= changes
            artifacts.write_json(tmp_path / f"{criterion}_{len(changes)}" / "logits_90.00.json", record)
    lines = report.differences(tmp_path, "cmi, even, refit").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| cmi", "| random", "| random, even, refit"]


def test_experiment_2_stands_beside_the_paper(tmp_path):
    """CMI leads by 1 and by 3 points: 2 ± 1 on average, and Student's t of 2 with one degree of freedom."""
    for k, (criterion, seed, accuracy) in enumerate(
        [("cmi", 0, 98), ("cmi", 1, 99), ("random", 0, 97), ("random", 1, 96)]
    ):
        record = {**run(criterion, 86.27, accuracy), "seed": seed, "pruned_percent_masked_layers": 88}
        record["arguments"]["Retrain_mask"] = f"dense/{seed}/I_parent_5_250.npy"
        artifacts.write_json(tmp_path / str(k) / "logits.json", record)
    for seed, correlation in enumerate([0.5, 0.6]):
        scores = {"split_half_rank_correlation": correlation}
        record = {"stage": 2, "status": "complete", "arguments": {"name_postfix": "5_250"}, "scores": scores}
        artifacts.write_json(tmp_path / "dense" / str(seed) / "I_parent_5_250.json", record)
    point = {"groups": 5, "samples_per_class": 250, "pruned_percent": 86.27, "accuracy": 98.55}
    cells = report.groups_table(tmp_path, [point]).splitlines()[2].strip("| ").split(" | ")
    assert cells[:5] == ["5", "250", "86.27", "98.55", "88.00"]
    assert cells[5:8] == ["10.0 → ? → 98.50 ± 0.71", "10.0 → ? → 96.50 ± 0.71", ""]
    assert cells[8:] == ["+2.00 ± 1.00 (p = .295)", "", "0.55 ± 0.07", "2"]


def test_held_out_images_choose_and_the_test_set_does_not(tmp_path):
    """The recipe that is better on the test set is worse on the held-out images, and is not chosen."""
    for k, (dropout, val, test) in enumerate(
        [(None, 96.0, 99.0), (None, 97.0, 99.0), (0.0, 98.0, 90.0), (0.0, 98.0, 91.0)]
    ):
        record = {**run("cmi", 97.5, test), "best": {"val_accuracy": val}}
        record["arguments"] |= {"Epoch": 30, "Weight_decay": 0.1, "Dropout": dropout}
        artifacts.write_json(tmp_path / str(k) / "logits.json", record)
    assert report.validated_table(tmp_path).splitlines()[2:] == [
        "| **cmi** | **30** | **0.1** | **0** | 97.50 | 98.00 ± 0.00 | 90.50 ± 0.71 | 2 |",
        "| cmi | 30 | 0.1 | as dense | 97.50 | 96.50 ± 0.71 | 99.00 ± 0.00 | 2 |",
    ]


def test_what_campaigns_found_is_counted():
    record = {f"kills_of_stage_{s}": {"kills": 9, "finished": 4, "other_bytes": 1, "not_whole": 0} for s in "123"}
    record |= {
        "damaged_files": {"record": {"tried": 1000, "refused": 999}},
        "hostile_files": {"tried": 17, "refused": 16, "executed": 1},
        "illegal_flags": {"tried": 5, "refused": 5},
        "fuzzed_files": {"tried": 10, "read": 2, "other_ends": 1},
        "fuzzed_command_lines": {"tried": 10, "taken": 1, "other_ends": 0},
    }
    lines = report.campaigns_table(record).splitlines()
    assert lines[2].startswith("| kill of stage 1 | 9 | 3 of 4 runs")
    assert lines[5:] == [
        "| damage to a file: record | 1,000 | 999 refused |",
        "| hostile file | 17 | 16 refused; 1 executed what they hold |",
        "| illegal flag or value | 5 | 5 refused in one line, exit code 2 |",
        "| random file | 10 | 7 refused, 2 read, 1 otherwise |",
        "| random command line | 10 | 9 refused, 1 taken, 0 otherwise |",
    ]


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
