"""Tables from records, names of rules, and the benchmarks' synthetic data."""

import hashlib
import sys

import numpy as np
import pytest
from scipy.stats import ttest_rel

import collect
import figures
import published
import report
import rules
import synthetic
import tables
from common import artifacts, files
from common import records as record_files

KINDS = ("I_parent", "Labels", "Labels_children")  # of the files of stage 2


def run(criterion, share, accuracy, status="complete", **more):
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
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    records = [run("cmi", 90, 97), run("cmi", 90, 99), run("random", 90, 95), run("random", 90, 1, "running")]
    records[2]["test_after_1_epoch"] = {"accuracy": 20.0}  # older records do not have it
    for k, record in enumerate(records):
        record_files.write(tmp_path / str(k) / "logits_90.00.json", record)
    dense = {"stage": 1, "status": "complete", "best": {}, "test": {"accuracy": 98.0}}
    record_files.write(tmp_path / "dense.json", dense)
    return tmp_path


@pytest.fixture
def records(folder):
    return collect.finished(folder)


def test_table_has_mean_and_sample_deviation_of_finished_runs(records):
    lines = report.table(records).splitlines()
    assert "| **dense** | 0 | 0 |  |  | 98.00 |  | 1 |" in lines
    assert "| **CMI** | 90.00 | 22.50 | 10.00 ± 0.00 |  | 98.00 ± 1.41 | 0.100 | 2 |" in lines
    assert "| **random** | 90.00 | 22.50 | 10.00 | 20.00 | 95.00 | 0.100 | 1 |" in lines


def test_shares_are_the_masks_where_older_records_count_other_zeros():
    """Records of refits from before shares came from the mask; no other committed record differs from its mask."""
    record = run("magnitude", 90, 95, pruned_percent_masked_layers=90.09, pruned_percent_network=22.5225)
    record["path"] = "net/magnitude/0/logits_90.00.json"
    assert "| **magnitude** | 90.00 | 22.50 |" in report.table([record])
    for file in sorted(files.RESULTS.glob("*.jsonl")):
        for path, record in collect.read(file).items():
            if record["stage"] == 3:
                more = record["pruned_percent_masked_layers"] - report.pruned_percent(record, "masked_layers")
                assert abs(more) < 0.0051 or (0 < more < 0.09 and record["arguments"]["Refit"]), path


def test_published_figures_stand_above(records):
    points = [{"name": "MINT", "pruned_percent": 90, "accuracy": 96.5, "memory_mib": 0.5}]
    lines = report.table(records, {"pruned_of": "network", "points": points}).splitlines()
    assert lines[0].startswith("|  | sparsity, masked layers (%) | sparsity, network (%) | accuracy before")
    assert lines[2] == "| paper: MINT |  | 90.00 |  |  | 96.50 | 0.500 |  |"
    assert lines[3].startswith("| **dense** |")


def test_overview_has_a_line_per_rule_and_a_column_per_share(records):
    assert report.overview([*records, run("random", 95, 90)]).splitlines() == [
        "| rule | 90 % pruned | 95 % pruned |",
        "| --- | --- | --- |",
        "| dense | 98.00 |  |",
        "| CMI | 10.0 → ? → 98.00 ± 1.41 |  |",
        "| random | 10.0 → 20.0 → 95.00 | 10.0 → ? → 90.00 |",
    ]


def test_a_folder_of_runs_has_its_own_table_and_figure(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    report.main()
    assert (folder / "table.md").read_text() in capsys.readouterr().out
    figures.main()
    assert "<svg" in (folder / "figure.svg").read_text()
    assert (folder / "figure.png").is_file()


def test_the_same_records_give_the_same_figure(records, tmp_path):
    targets = [tmp_path / name for name in "ab"]
    for target in targets:
        figures.accuracy_figure(records, target, "title", figures.ENDS)
    for suffix in (".svg", ".png"):
        assert len({target.with_suffix(suffix).read_bytes() for target in targets}) == 1


def test_bands_are_means_and_deviations_against_what_is_kept(records):
    """Two runs of 97 and 99 % at 90 % pruned: mean 98 and deviation sqrt(2) at 10 % kept."""
    axis = figures.plt.figure().subplots()
    figures.curve(
        axis,
        [[run for run in records if run.get("arguments", {}).get("Criterion") == "cmi"]],
        "CMI",
        "test",
        "masked_layers",
    )
    assert axis.lines[0].get_xydata().tolist() == [[10.0, 98.0]]
    assert np.ptp(axis.collections[0].get_paths()[0].vertices[:, 1]) == pytest.approx(2 * 2**0.5)


def test_short_names_have_one_colour_each():
    name = "CMI, gaussian given kept, positions, single units, refit"
    assert (figures.short(name), figures.treatment(name)) == ("CMI, given kept, positions", "refit")
    assert figures.treatment("magnitude") == "one threshold, not refitted"
    assert figures.colour("magnitude, correlated groups, balanced, refit") == figures.COLOURS["magnitude"]
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end x -->\n<!-- y -->\nkept\n<!-- end y -->\n")
    report.fill(page, "x", "new\n")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- end x -->\n<!-- y -->\nkept\n<!-- end y -->\n"


def test_differences_are_paired_by_seed():
    """Against scipy's paired test and by hand: differences 1, 2, 3 have mean 2 and standard error 1 / sqrt(3)."""
    ours, theirs = {0: 97.0, 1: 94.0, 2: 91.0, 3: 50.0}, {0: 96.0, 1: 92.0, 2: 88.0, 9: 99.0}
    records = [run("cmi", 90, accuracy, seed=seed) for seed, accuracy in ours.items()]
    records += [run("random", 90, accuracy, seed=seed) for seed, accuracy in theirs.items()]
    line = report.differences(records, "CMI").splitlines()[2]
    p = f"p = {ttest_rel([97, 94, 91], [96, 92, 88]).pvalue:.3f}"
    equal, ahead = "+0.00 ± 0.00, no difference shown", f"+2.00 ± 0.58 ({p}), no difference shown"
    assert line == f"| random | 90 | {equal} |  | {ahead} | 3 |"


def test_several_samplings_of_a_network_are_no_further_networks():
    """Of network 0 the mean of 1 and 3, so 2 and 4: mean 3, standard error 1, n = 2."""
    records = []
    for seed, (network, ahead) in enumerate([(0, 1.0), (0, 3.0), (1, 4.0)]):
        for criterion, accuracy in (("cmi", 90.0 + ahead), ("random", 90.0)):
            records.append(run(criterion, 90, accuracy, seed=seed))
            records[-1]["arguments"] |= {"Retrain": f"{network}.pkl"}
    line = report.differences(records, "CMI").splitlines()[2]
    assert line.endswith(" | +3.00 ± 1.00 (p = 0.205), no difference shown | 2 |")


@pytest.mark.parametrize(
    ("gains", "told"),
    [
        ([1.0, 2.0, 3.0], "(p = 0.074), no difference shown"),  # Student's t: 2 sqrt(3), two degrees of freedom
        ([9.0, 10.0, 11.0], "(p = 0.003)"),
        ([99.0, 100.0, 101.0, 100.0], "(p < 0.001)"),
        ([4.76, 5.76, 6.76], "(p = 0.0099)"),
        ([4.7, 5.7, 6.7], "(p = 0.0101), no difference shown"),
        ([1.0, 1.0], "+1.00 ± 0.00, no difference shown"),
    ],
)
def test_a_difference_is_shown_below_p_of_001_only(gains, told):
    pairs = [(run("cmi", 90, gain), run("random", 90, 0.0)) for gain in gains]
    assert report.difference(pairs, "test").endswith(told)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ("1" * 54 + "0" * 46, "1" * 50 + "0" * 4 + "1" * 2 + "0" * 44, "+2.00 ± 2.44 (p = 0.688), no difference shown"),
        ("1" * 20 + "0" * 80, "0" * 100, "+20.00 ± 4.00 (p < 0.001)"),
        ("01", "01", "+0.00 ± 0.00, no difference shown"),
    ],
)
def test_a_single_pair_is_compared_image_by_image(ours, theirs, told):
    """By hand: 4 - 2 images of 100, and their p 2 P(B(6, 1/2) >= 4) = 44 / 64; sqrt(6 - 2² / 100)."""
    pair = tuple(run("cmi", 90, 0.0, test={"accuracy": 0.0, "right": right}) for right in (ours, theirs))
    assert report.difference([pair], "test") == told


def test_where_a_moment_was_not_always_recorded_n_is_named():
    pairs = [(run("cmi", 90, 90.0 + k), run("random", 90, 80.0)) for k in range(3)]
    for run_ in pairs[0]:
        del run_["test"]
    assert report.difference(pairs, "test").startswith("+11.50 ± 0.50 (n = 2, p = ")
    assert report.difference(pairs[:2], "test") == ""


def test_the_dense_network_retrained_alike_is_a_control_at_every_share():
    records = [run("cmi", share, 97.0, seed=0) for share in (50, 90)] + [run("magnitude", 0, 98.0, seed=0)]
    lines = report.differences(records, "CMI").splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| dense, retrained", "50"], ["| dense, retrained", "90"]]


def test_a_combination_is_compared_with_cmi_alone_and_controls_only():
    records = [run(criterion, 90, 97.0, seed=0) for criterion in ("cmi", "cmi-magnitude", "magnitude")]
    records += [{**record, "scores": {"estimator": "gaussian", "given": "kept"}} for record in records]
    lines = report.differences(records, "CMI x magnitude, gaussian given kept").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| CMI, gaussian given kept", "| magnitude"]


def test_scores_given_what_is_kept_are_compared_with_the_papers():
    records = [run("cmi", 90, 97.0, seed=0), run("random", 90, 97.0, seed=0)]
    scores = {"estimator": "gaussian", "given": "kept", "sampling": "positions"}
    records.append({**run("cmi", 90, 97.0, seed=0), "scores": scores})
    records.append({**run("cmi", 90, 97.0, seed=0), "scores": {**scores, "sampling": "means"}})
    lines = report.differences(records, "CMI, gaussian given kept, positions").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| CMI", "| CMI, gaussian given kept", "| random"]


def test_a_balanced_and_refitted_rule_is_compared_with_the_plain_one():
    records = [run(criterion, 90, 97.0, seed=0) for criterion in ("cmi", "random") for _ in range(2)]
    for record in records[1::2]:
        record["arguments"] |= {"Even": True, "Refit": True}
    lines = report.differences(records, "CMI, balanced, refit").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| CMI", "| random", "| random, balanced, refit"]


def test_experiment_2_stands_beside_the_paper():
    """CMI leads by 1 and by 3 points: 2 ± 1 on average, and Student's t of 2 with one degree of freedom."""
    asked, records = {"parent_clusters": [5], "samples_per_class": 250}, []
    for criterion, seed, accuracy in [("cmi", 0, 98), ("cmi", 1, 99), ("random", 0, 97), ("random", 1, 96)]:
        record = run(criterion, 86.27, accuracy, seed=seed, scores=asked)
        record["pruned_percent_masked_layers"] = 88
        record["arguments"]["parent_clusters"] = [5]
        records.append(record)
    for correlation in (0.5, 0.6):
        records.append({"stage": 2, "arguments": asked, "scores": {"split_half_rank_correlation": correlation}})
    point = {"groups": 5, "samples_per_class": 250, "pruned_percent": 86.27, "accuracy": 98.55}
    cells = report.groups_table(records, [point]).splitlines()[2].strip("| ").split(" | ")
    assert cells[:5] == ["5", "250", "86.27", "98.55", "88.00"]
    assert cells[5:8] == ["10.0 → ? → 98.50 ± 0.71", "10.0 → ? → 96.50 ± 0.71", ""]
    assert cells[8:] == ["+2.00 ± 1.00 (p = 0.295), no difference shown", "", "0.55 ± 0.07", "2"]


def test_held_out_images_choose_and_the_test_set_does_not():
    """The recipe that is better on the test set is worse on the held-out images, and is not chosen."""
    records = []
    for dropout, val, test in [(None, 96.0, 99.0), (None, 97.0, 99.0), (0.0, 98.0, 90.0), (0.0, 98.0, 91.0)]:
        records.append(run("cmi", 97.5, test, best={"val_accuracy": val}))
        records[-1]["arguments"] |= {"Epoch": 30, "Weight_decay": 0.1, "Dropout": dropout}
    assert report.validated_table(records).splitlines()[2:] == [
        "| **CMI** | **97.50** | **30** | **0.1** | **0** | **0** | 98.00 ± 0.00 | 90.50 ± 0.71 | 2 |",
        "| CMI | 97.50 | 30 | 0.1 | as dense | 0 | 96.50 ± 0.71 | 99.00 ± 0.00 | 2 |",
    ]
    records.append(run("cmi", 90.0, 99.5, best={"val_accuracy": 99.0}))  # a smaller share, an earlier round
    records[-1]["arguments"] |= {"Epoch": 30, "Weight_decay": 0.1, "Dropout": 0.0, "Distillation": 0.9}
    rows = report.validated_table(records).splitlines()[2:]
    assert rows[0] == "| CMI | 90.00 | 30 | 0.1 | 0 | 0.9 | 99.00 | 99.50 | 1 |"
    assert rows[1].startswith("| **CMI** | **97.50** |")


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Collected records of scores: of 4 x 2 correlated groups, and of as many groups as units."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    for k, (name, grouping, labels) in enumerate([("some", "correlation", [0, 0, 1, 1]), ("one", None, [0, 1, 2, 3])]):
        arguments = {"model": "mlp", "estimator": "gaussian", "given": "kept", "grouping": grouping}
        arguments |= {"name_postfix": name}
        contents = (np.array(values) for values in ([k], labels, [0, 1]))
        sums = (hashlib.sha256(artifacts.array_bytes(content)).hexdigest() for content in contents)
        sealed = {f"{kind}_{name}_fc1.weight_fc2.weight.npy": s for kind, s in zip(KINDS, sums, strict=True)}
        record = {"stage": 2, "status": "complete", "arguments": arguments, "files": sealed}
        record["scores"] = {"shape": [2, max(labels) + 1]}
        record_files.write(tmp_path / "any" / f"{k}.json", record)
    collect.collect(tmp_path / "any")
    rules.scored.cache_clear()
    yield [hashlib.sha256(artifacts.array_bytes(np.array([k]))).hexdigest() for k in range(2)]
    rules.scored.cache_clear()


@pytest.mark.parametrize(
    ("criterion", "which", "parents", "layers", "name"),
    [
        ("cmi", 0, 2, 1, "CMI, gaussian given kept, correlated groups"),
        ("cmi-magnitude", 1, 4, 1, "CMI x magnitude, gaussian given kept, single units"),
        ("random", 0, 2, 1, "random, correlated groups"),
        ("magnitude", 0, 2, 2, "magnitude, shares of CMI, gaussian given kept, correlated groups"),
        ("magnitude", None, 4, 1, "magnitude, single units"),
        ("magnitude", None, 2, 1, "magnitude"),
    ],
)
def test_a_rule_is_named_by_the_records_of_the_run_and_of_its_scores(scored, criterion, which, parents, layers, name):
    record = run(criterion, 90, 97.0, inputs={} if which is None else {"scores": scored[which]})
    record["arguments"] |= {"Model": "mlp", "Retrain_mask": None if which is None else "I_parent_any.npy"}
    flags = {"parent_key": "fc1.weight", "children_key": "fc2.weight", "parent_clusters": parents}
    record["arguments"] |= {flag: [value] * layers for flag, value in {**flags, "children_clusters": 2}.items()}
    assert rules.rule(record) == name
    record["arguments"] |= {"Even": True, "Refit": True}
    assert rules.rule(record) == f"{name}, balanced, refit"
    assert rules.unchanged(f"{name}, balanced, refit") == name
    for checkpoint, more in (("logits_best.pkl", ""), ("logits_90.00.pkl", ", in rounds")):
        record["arguments"]["Retrain"] = f"anywhere/0/{checkpoint}"
        assert rules.rule(record) == f"{name}, balanced, refit{more}"


def test_what_a_run_itself_records_of_its_scores_comes_first(scored):
    own = {"estimator": "knn", "given": None, "grouping": "index"}
    assert rules.rule(run("cmi", 90, 97.0, inputs={"scores": scored[0]}, scores=own)) == "CMI, knn"
    unknown = run("cmi", 90, 97.0)
    unknown["arguments"]["Retrain_mask"] = "elsewhere/I_parent_kept.npy"
    assert rules.rule(unknown) == "CMI, scores kept"


def test_what_campaigns_found_is_counted():
    record = {f"kills_of_stage_{s}": {"kills": 9, "finished": 4, "other_bytes": 1, "not_whole": 0} for s in "123"}
    record |= {
        "damaged_files": {"record": {"tried": 1000, "refused": 999}},
        "hostile_files": {"tried": 17, "refused": 16, "executed": 1},
        "illegal_flags": {"tried": 5, "refused": 5},
        "random_files": {"tried": 10, "right": 2, "refused": 7, "other_ends": 1},
        "random_own_networks": {"tried": 1000, "right": 1000, "refused": 0, "other_ends": 0},
    }
    lines = tables.campaigns_table(record).splitlines()
    assert lines[2].startswith("| kill of stage 1 | 9 | 3 of 4 runs")
    assert lines[5:] == [
        "| damage to a file: record | 1,000 | 999 refused |",
        "| hostile file | 17 | 16 refused; 1 executed what they hold |",
        "| illegal flag or value | 5 | 5 refused in one line, exit code 2 |",
        "| random file | 10 | 2 right, 7 refused, 1 otherwise |",
        "| random own network | 1,000 | 1,000 right, 0 refused, 0 otherwise |",
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
