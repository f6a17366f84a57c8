"""The three scripts as a user calls them: from inside the model's folder, by flags alone, on the digits."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import conftest
import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, editable, record

from common import artifacts, records
from common.cmi import ESTIMATORS
from rules import rule

STAGE1, STAGE2, STAGE3, STAGE4 = "train_stage1.py", "pruning_1b.py", "retrain_stage3.py", "export_stage4.py"
TRAIN = "--Dataset DIGITS --Val_size 200 --Epoch 3 --Batch_size 64".split()
GROUPS = "--parent_clusters 50 --children_clusters 30".split()
PLAIN = "--no-Even --no-Refit".split()  # the paper's rule
SCORE = ["--dataset", "DIGITS", "--samples_per_class", "40", *GROUPS]


def shell(script, *flags, code=0):
    return conftest.shell("mlp", script, *flags, code=code)


@pytest.fixture
def call(call_in):
    return partial(call_in, "mlp")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained and scored network, made by the commands."""
    folder = tmp_path_factory.mktemp("results") / "base"
    shell(STAGE1, *TRAIN, "--Save_dir", folder, "--Expt_rerun", 2)
    for key_id in (0, 1):
        shell(STAGE2, *SCORE, "--weights_dir", folder / "0", "--key_id", key_id, "--split_half", "--cores", 2)
    return folder


def prune(base, out, *flags):
    source = ["--Retrain", base / "0" / "logits_best.pkl", "--Save_dir", out]
    return [STAGE3, *TRAIN, *PLAIN, *source, *([] if "--parent_clusters" in flags else GROUPS), *flags]


def copies(source, target, names):
    """Copies of files and of their records."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        for path in (source / name, (source / name).with_suffix(".json")):
            if path.exists():
                (target / path.name).write_bytes(path.read_bytes())


def test_stage_1_writes_checkpoints_records_and_epochs(base):
    for rerun in (0, 1):
        checkpoint = torch.load(base / str(rerun) / "logits_best.pkl", weights_only=True)
        assert set(checkpoint["state_dict"]) == {
            f"{m}.{p}" for m in ("fc1", "fc2", "final") for p in ("weight", "bias")
        }
        known = record(base / str(rerun) / "logits_best.pkl")
        assert known["seed"] == rerun
        assert known["status"] == "complete"
        assert known["test"]["accuracy"] > 50
        assert [line["epoch"] for line in known["epochs"]] == [1, 2, 3]
        assert (base / str(rerun) / "logits_final.pkl").exists()
    text = (base / "0" / "logits_best.json").read_text()
    assert str(base.parent) not in text


def test_stage_2_writes_scores_labels_and_reliability(base):
    scores = np.load(base / "0" / "I_parent_cmi_fc1.weight_fc2.weight.npy")
    assert scores.shape == (30, 50)
    assert np.bincount(np.load(base / "0" / "Labels_cmi_fc1.weight_fc2.weight.npy")).tolist() == [10] * 50
    assert np.load(base / "0" / "Labels_children_cmi_fc1.weight_fc2.weight.npy").shape == (300,)
    known = record(base / "0" / "I_parent_cmi_fc1.weight_fc2.weight.npy")
    assert 0 < known["scores"]["split_half_rank_correlation"] <= 1
    assert np.load(base / "0" / "I_parent_cmi_fc2.weight_final.weight.npy").shape == (10, 50)  # classes stay single
    assert not list((base / "0").glob("*.state"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_stage_2_with_every_estimator_and_uncertainty(base, tmp_path, call, estimator):
    copies(base / "0", tmp_path, ["logits_best.pkl"])
    groups = ["--parent_clusters", "5", "--children_clusters", "4", "--samples_per_class", "20"]
    more = ["--estimator", estimator, "--name_postfix", estimator, "--bootstrap", "3", "--null", "2"]
    call(STAGE2, *SCORE, *groups, *more, "--weights_dir", tmp_path, "--key_id", "0")
    scores, errors, null = (
        np.load(tmp_path / f"{kind}_{estimator}_fc1.weight_fc2.weight.npy") for kind in ("I_parent", "SE", "Null")
    )
    assert scores.shape == errors.shape == (4, 5)
    assert (errors >= 0).all()
    assert null.shape == (4, 3)
    assert record(tmp_path / f"I_parent_{estimator}_fc1.weight_fc2.weight.npy")["scores"]["mean_standard_error"] > 0


def test_stage_3_by_the_grid(base, tmp_path, call):
    out = tmp_path / "pruned"
    grid = "--lower_prune_per 0.5 --upper_prune_per 0.9 --prune_per_step 0.2 --key_id 1".split()
    printed = call(*prune(base, out, *grid))
    path = out / "0" / "logits_70.00.pkl"
    checkpoint = torch.load(path, weights_only=True)
    weight, mask = checkpoint["state_dict"]["fc2.weight"], checkpoint["masks"]["fc2.weight"]
    assert (weight[~mask] == 0).all()
    assert (weight[mask] != 0).all()
    known = record(path)
    assert known["requested_percent"] == 70
    assert known["pruned_percent_masked_layers"] == pytest.approx(100 * (weight == 0).float().mean().item())
    assert known["pruned_percent_network"] == pytest.approx(70 * 150_000 / 545_000)
    assert known["test_before_retraining"] != known["test"]
    assert "asked: 70.00 %" in printed
    scores = np.load(base / "0" / "I_parent_cmi_fc1.weight_fc2.weight.npy")
    blocks = mask.numpy()[::10, ::10]
    assert scores[~blocks].max() <= scores[blocks].min()


def test_stage_3_with_two_pairs_and_limits(base, tmp_path, call):
    pairs = (
        "--parent_key fc1.weight fc2.weight --children_key fc2.weight final.weight --upper_prune_limit 0.9 0.3".split()
    )
    call(*prune(base, tmp_path, *pairs, "--Prune_per", "0.8", "--Expt_rerun", "2"))
    for rerun in "01":
        (path,) = (tmp_path / rerun).glob("*.pkl")
        by_layer = record(path)["pruned_percent_by_layer"]
        assert set(by_layer) == {"fc2.weight", "final.weight"}
        assert by_layer["final.weight"] <= 30
        assert record(path)["pruned_percent_masked_layers"] == pytest.approx(80, abs=0.1)


@pytest.mark.parametrize("criterion", ["cmi", "cmi-magnitude", "magnitude", "random"])
def test_even_and_refitted(base, tmp_path, call, criterion):
    """The kept blocks cover the groups, and least squares beats chance before any retraining."""
    call(*prune(base, tmp_path, "--Criterion", criterion, "--Prune_per", "0.96", "--Even", "--Refit",
                "--Samples_per_class", "40"))  # fmt: skip
    checkpoint = torch.load(tmp_path / "0" / "logits_96.00.pkl", weights_only=True)
    blocks = checkpoint["masks"]["fc2.weight"][::10, ::10]
    assert blocks.sum() == 60
    assert blocks.sum(1).tolist() == [2] * 30
    assert blocks.sum(0).max() <= 2
    assert (checkpoint["state_dict"]["fc2.weight"][~checkpoint["masks"]["fc2.weight"]] == 0).all()
    assert record(tmp_path / "0" / "logits_96.00.pkl")["test_before_retraining"]["accuracy"] > 30


def test_samples_are_recorded_where_they_count(base, tmp_path, call):
    """So that runs made before the flag existed are recognised."""
    flags = prune(base, tmp_path, "--Criterion", "magnitude", "--Prune_per", "0.9")
    call(*flags, "--Samples_per_class", "40")
    assert record(tmp_path / "0" / "logits_90.00.pkl")["arguments"]["Samples_per_class"] is None
    assert "is complete already" in call(*flags)


def test_scores_given_what_is_kept(base, tmp_path, call):
    copies(base / "0", tmp_path, ["logits_best.pkl"])
    call(STAGE2, *SCORE, "--weights_dir", tmp_path, "--key_id", 0, "--estimator", "gaussian", "--given", "kept")
    scores = np.load(tmp_path / "I_parent_cmi_fc1.weight_fc2.weight.npy")
    assert scores.shape == (30, 50)
    assert (scores >= 0).all()
    assert (np.sort(scores)[:, -5:] > 0).all()
    assert 0 < scores.sum() < 1  # nats: seen at the share of the output's variance that goes through each unit


def test_groups_of_correlated_units(base, tmp_path, call):
    """Stage 2 forms the groups, stage 3 prunes blocks of them."""
    copies(base / "0", tmp_path, ["logits_best.pkl"])
    call(
        STAGE2, *SCORE, "--weights_dir", tmp_path, "--key_id", 0, "--estimator", "gaussian", "--grouping", "correlation"
    )
    labels = np.load(tmp_path / "Labels_cmi_fc1.weight_fc2.weight.npy")
    assert np.bincount(labels).tolist() == [10] * 50
    assert (np.diff(labels) < 0).any()
    call(*prune(base, tmp_path / "out", "--Retrain_mask", tmp_path / "I_parent_cmi.npy", "--Prune_per", "0.9"))
    mask = torch.load(tmp_path / "out" / "0" / "logits_90.00.pkl", weights_only=True)["masks"]["fc2.weight"].numpy()
    assert all((mask[:, labels == g] == mask[:, labels == g][:, :1]).all() for g in range(50))


def test_shares_of_the_network(base, tmp_path, call):
    """All weights count, not the masked layer's alone."""
    call(*prune(base, tmp_path, "--Criterion", "magnitude", "--Prune_per", "0.2", "--Prune_of_network"))
    (path,) = (tmp_path / "0").glob("*.pkl")
    assert record(path)["pruned_percent_network"] == pytest.approx(20, abs=0.01)
    assert record(path)["requested_percent"] == pytest.approx(20 * 545_000 / 150_000)


def test_shares_of_the_network_count_what_earlier_rounds_took_from_other_layers(base, tmp_path, call):
    call(*prune(base, tmp_path / "first", "--Criterion", "magnitude", "--Prune_per", "0.9", "--Epoch", "0"))
    first = tmp_path / "first" / "0" / "logits_90.00.pkl"  # 24.77 % of the network
    again = ["--Retrain", first, "--Criterion", "magnitude", "--children_key", "fc1.weight", "--Epoch", "0"]
    again = [*prune(base, tmp_path / "second", *again, "--Prune_of_network"), "--Prune_per"]
    asked = 100 * (0.5 - 0.9 * 150_000 / 545_000) * 545_000 / 392_000
    assert f"(asked: {asked:.2f} % of those of this round)" in call(*again, "0.5")
    (path,) = (tmp_path / "second" / "0").glob("*.pkl")
    assert record(path)["pruned_percent_network"] == pytest.approx(50, abs=0.06)
    assert "hold 71.93 %, gone from others are 24.77 %" in call(*again, "0.2", code=2)


def test_a_damaged_state_is_refused_and_can_be_left_aside(base, tmp_path, call):
    """The state of a finished run is gone; here is one of which a bit is wrong."""
    flags = prune(base, tmp_path, "--Criterion", "magnitude", "--Prune_per", "0.9")
    state = tmp_path / "0" / "logits_90.00.state"
    artifacts.save_state(state, {"lines": []})
    content = bytearray(state.read_bytes())
    content[100] ^= 1
    state.write_bytes(content)
    assert "logits_90.00.state is damaged; remove it, or start over with --no-Resume" in call(*flags, code=2)
    call(*flags, "--no-Resume")
    assert not state.exists()


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
@pytest.mark.parametrize("with_scores", [False, True])
def test_controls_prune_as_much(base, tmp_path, call, criterion, with_scores):
    scores = ["--Retrain_mask", base / "0" / "I_parent_cmi.npy"] if with_scores else []
    call(*prune(base, tmp_path, "--Criterion", criterion, "--Prune_per", "0.9", *scores))
    assert record(tmp_path / "0" / "logits_90.00.pkl")["pruned_percent_masked_layers"] == pytest.approx(90)


@pytest.mark.parametrize(("select", "images"), [("last", 1437), ("test", 1437), ("val", 1237)])
def test_what_chooses_the_epoch_is_recorded(tmp_path, call, select, images):
    call(STAGE1, *TRAIN, "--Select", select, "--Save_dir", tmp_path)
    known = record(tmp_path / "0" / "logits_best.pkl")
    assert known["epoch_chosen_by"] == select
    assert known["data"]["train"] == images


def test_finished_runs_are_not_repeated_and_not_overwritten(base, tmp_path, call):
    path = base / "0" / "logits_best.pkl"
    before = path.stat().st_mtime_ns
    assert "is complete already" in call(STAGE1, *TRAIN, "--Save_dir", base)
    call(STAGE2, *SCORE, "--weights_dir", base / "0", "--key_id", "0", "--split_half")
    assert path.stat().st_mtime_ns == before
    assert "--Lr 0.1 (now 0.2)" in call(STAGE1, *TRAIN, "--Save_dir", base, "--Lr", "0.2", code=2)
    assert path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_killed_stage_2_goes_on_to_the_same_bytes(base, tmp_path):
    """Killed after the first note of its progress; the scores are those of an undisturbed run."""
    for name in ("undisturbed", "killed"):
        copies(base / "0", tmp_path / name, ["logits_best.pkl"])
    flags = "--dataset DIGITS --samples_per_class 110 --key_id 0 --precision double --cores 1".split()
    shell(STAGE2, *flags, "--weights_dir", tmp_path / "undisturbed")
    eager = (
        "import common.scoring, runpy; common.scoring.SAVE_EVERY = 0; runpy.run_path('pruning_1b.py', None, '__main__')"
    )
    command = [sys.executable, "-c", eager, *flags, "--weights_dir", str(tmp_path / "killed")]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'mlp'}"}
    with subprocess.Popen(command, cwd=ROOT / "mlp", env=environment, stdout=subprocess.DEVNULL) as process:
        while not list((tmp_path / "killed").glob("*.state")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    name = "I_parent_cmi_fc1.weight_fc2.weight.npy"
    assert not (tmp_path / "killed" / name).exists()
    assert list((tmp_path / "killed").glob("*.state"))
    shell(STAGE2, *flags, "--weights_dir", tmp_path / "killed")
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not list((tmp_path / "killed").glob("*.state"))


def test_diverging_keeps_the_last_good_checkpoint_and_fails(tmp_path, call):
    steep = ["--Opt", "adam", "--Lr", "1e-3", "--Gamma", "1e40", "--Milestones", "1"]
    message = call(STAGE1, *TRAIN, *steep, "--Save_dir", tmp_path, code=1)
    assert "not finite after epoch 2" in message
    assert "of epoch 1, is kept" in message
    assert record(tmp_path / "0" / "logits_best.pkl")["status"] == "diverged"
    state = torch.load(tmp_path / "0" / "logits_best.pkl", weights_only=True)["state_dict"]
    assert all(v.isfinite().all() for v in state.values())


def test_a_pruned_network_is_scored_and_pruned_further(base, tmp_path, call):
    """What the first round removed has no weight, and stays removed by a rule that counts weights."""
    first, flags = tmp_path / "first", ("--Criterion", "cmi-magnitude")
    call(*prune(base, first, "--Prune_per", "0.5", *flags))
    call(STAGE2, *SCORE, "--weights_dir", first / "0", "--weights_file", "logits_50.00.pkl", "--key_id", "0")
    again = ["--Retrain", first / "0" / "logits_50.00.pkl"]
    call(*prune(base, tmp_path / "second", "--Prune_per", "0.9", *flags), *again)
    before, after = (
        torch.load(path, weights_only=True)["masks"]["fc2.weight"]
        for path in (first / "0" / "logits_50.00.pkl", tmp_path / "second" / "0" / "logits_90.00.pkl")
    )
    assert before.float().mean() == 0.5
    assert after.float().mean().item() == pytest.approx(0.1)
    assert not (after & ~before).any()


def test_dropout_is_the_model_s_unless_it_is_given(base, tmp_path, call):
    losses = {}
    for given in ((), ("--Dropout", "0.2"), ("--Dropout", "0")):
        out = tmp_path / "-".join(("runs", *given))
        call(*prune(base, out, "--Prune_per", "0.9", "--Epoch", "2", *given))
        losses[given[1:]] = [line["train_loss"] for line in record(out / "0" / "logits_90.00.pkl")["epochs"]]
    assert losses[()] == losses["0.2",]
    assert all(without < with_ for without, with_ in zip(losses["0",], losses[()], strict=True))


LEGAL = "--no-Even --no-Refit --Save_dir {out} --Retrain {base}/0/logits_best.pkl --Prune_per 0.9".split()
BAD = [
    (STAGE1, "--Dataset CIFAR9 --Save_dir {out}", "argument --Dataset: invalid choice: 'CIFAR9'.*MNIST.*DIGITS"),
    (STAGE1, "--Epoch 0", "argument --Epoch: 0 is not a whole number at least 1"),
    (STAGE1, "--Lr nan", "argument --Lr: nan is not a number above 0"),
    (STAGE1, "--Lr fast", "argument --Lr: 'fast' is not a number"),
    (STAGE1, "--Weight_decay -1", "argument --Weight_decay: -1 is not a number at least 0"),
    (STAGE1, "--Save_dir {out} --Dims 7 --Dataset DIGITS --Val_size 200", "--Dims 7: DIGITS has 10 classes"),
    (STAGE1, "--Save_dir {out} --Dataset DIGITS --Val_size 1437", "--Val_size 1437: legal: 0, or 10 to 1427"),
    (STAGE1, "--Save_dir {out} --Dataset DIGITS --Val_size 0", "--Val_size 0 leaves nothing to choose"),
    (STAGE1, "--Save_dir", "argument --Save_dir: expected one argument"),
    (STAGE1, "--Epochs 3", "unrecognized arguments: --Epochs 3"),
    (STAGE1, "--Model vgg16", "argument --Model: invalid choice: 'vgg16'"),
    (STAGE2, "--weights_dir {base}/0", "the following arguments are required: --key_id"),
    (STAGE2, "--weights_dir {base}/0 --key_id 3", "--key_id 3 is out of range; legal: 0: fc1.weight fc2.weight, 1"),
    (STAGE2, "--weights_dir {base}/0 --key_id -1", "argument --key_id: -1 is not a whole number at least 0"),
    (STAGE2, "--weights_dir {out} --key_id 0", "logits_best.pkl does not exist; run train_stage1.py first"),
    (STAGE2, "--weights_dir {base}/0 --key_id 0 --dataset MNIST --data_dir {out} --name_postfix x", "no usable files"),
    (STAGE2, "{score} --key_id 0 --parent_clusters 501", "--parent_clusters 501: fc2.weight has 500 "),
    (STAGE2, "{score} --key_id 0 --children_clusters 301", "--children_clusters 301: fc2.weight has 300"),
    (STAGE2, "{score} --key_id 0 --samples_per_class 900", "--samples_per_class 900: class"),
    (STAGE2, "{score} --key_id 0 --weights_file no.pkl", "no.pkl does not exist; run train_stage1.py first"),
    (STAGE2, "{score} --key_id 0 --weights_file ../y", "argument --weights_file: .../y. may hold"),
    (STAGE2, "{score} --key_id 0 --name_postfix ../y", "argument --name_postfix: .../y. may hold"),
    (STAGE2, "{score} --key_id 0 --estimator gaussian --width 1", "--width belongs to --estimator kde, not to"),
    (STAGE2, "{score} --key_id 0 --width wide", "argument --width: 'wide' is not a number.*, or auto"),
    (STAGE2, "{score} --key_id 0 --bootstrap 1", "argument --bootstrap: 1 is not a whole number at least 2"),
    (STAGE2, "{score} --key_id 0 --given kept", "--given belongs to --estimator gaussian, not to kde"),
    (STAGE2, "{score} --key_id 0 --estimator magic", "argument --estimator: invalid choice"),
    (STAGE3, "--Save_dir {out} --Retrain {base}/0/logits_best.pkl", "give either --key_id.*or --Prune_per"),
    (STAGE3, "{legal} --key_id 1", "give either --key_id.*or --Prune_per"),
    (STAGE3, "--Retrain {base}/0/logits_best.pkl --key_id 9", "--key_id 9 is out of range; legal: 0: 0.902"),
    (STAGE3, "--key_id 0 --lower_prune_per 0.9 --upper_prune_per 0.1", "--lower_prune_per 0.9 is above"),
    (STAGE3, "--key_id 0 --prune_per_step 1e-9", "argument --prune_per_step: 1e-9 is not a number at least 0.0001 and"),
    (STAGE3, "{legal} --upper_prune_limit 1.5", "argument --upper_prune_limit: 1.5 is not a number at least 0 and"),
    (STAGE3, "{legal} --upper_prune_limit 0.5", "90 % cannot be pruned: --upper_prune_limit allows at most 50.00 %"),
    (STAGE3, "{legal} --Prune_of_network", "90 % of the network: the masked layers hold 27.52 %"),
    (STAGE3, "{legal} --upper_prune_limit 0.5 0.6", "--upper_prune_limit has 2 values for 1 layer pairs"),
    (STAGE3, "{legal} --parent_key fc1.weight fc2.weight", "--parent_key has 2 values, --children_key 1"),
    (STAGE3, "{legal} --children_key fc9.weight", "fc9.weight is no layer pair; legal: 0: fc1.weight fc2.weight"),
    (STAGE3, "{legal} --parent_clusters 50 50", "--parent_clusters has 2 values for 1 layer pairs"),
    (STAGE3, "{legal} --Retrain_mask {base}/0/scores.npy", "must be I_parent_<postfix>.npy"),
    (STAGE3, "{legal} --Retrain_mask {base}/0/I_parent_new.npy", "does not exist; run pruning_1b.py --key_id 0"),
    (STAGE3, "{legal} --parent_clusters 40", "does not put 500 units into 40 groups; run pruning_1b.py"),
    (STAGE3, "{legal} --Refit --Samples_per_class 200", "--Samples_per_class 200: class . of the training split"),
    (STAGE3, "{legal} --Save_dir {base}", "--Save_dir base holds the checkpoint that is pruned"),
    (STAGE3, "{legal} --Val_size 100", "--Val_size 100: the checkpoint was trained with 200; use the same"),
    (STAGE3, "{legal} --Select last", "--Val_size 0: .* trained with 200; use the same, with --Select val"),
    (STAGE3, "{legal} --Retrain {base}/no.pkl", "no.pkl does not exist"),
]  # fmt: skip


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("script", "flags", "message"), BAD, ids=[f"{s[:7]} {f}" for s, f, _ in BAD])
def test_bad_input_is_one_line_and_code_2(base, tmp_path, call, script, flags, message):
    words = {
        "base": base,
        "out": tmp_path / "out",
        "score": f"--dataset DIGITS --weights_dir {base}/0 --name_postfix x",
    }
    words["legal"] = " ".join(TRAIN + GROUPS + LEGAL).format(**words)
    before = files_of(base)
    lines = call(script, *flags.format(**words).split(), code=2).splitlines()
    lines = [line for line in lines if not line.startswith("No CUDA GPU")]
    assert len(lines) == 1
    assert lines[0].startswith(f"{script}: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert files_of(base) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "pickled scores", "scores of another pair"])
def test_damaged_files_are_named(base, tmp_path, call, damage):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (base / "0").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    checkpoint, scores = copy / "logits_best.pkl", copy / "I_parent_cmi_fc1.weight_fc2.weight.npy"
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    elif damage == "pickled scores":
        np.save(scores, np.array([[{}]], dtype=object), allow_pickle=True)
        scores.with_suffix(".json").unlink()
    else:
        scores.write_bytes((copy / "I_parent_cmi_fc2.weight_final.weight.npy").read_bytes())
    flags = [
        STAGE3,
        *TRAIN,
        *PLAIN,
        *GROUPS,
        "--Retrain",
        checkpoint,
        "--Save_dir",
        tmp_path / "out",
        "--Prune_per",
        "0.9",
    ]
    message = call(*flags, code=2)
    assert (checkpoint if damage == "truncated" else scores).name in message
    assert "run " in message
    assert not (tmp_path / "out").exists()


def test_output_that_is_no_terminal_has_a_row_per_epoch_and_no_progress_bar(base, tmp_path):
    printed = shell(*prune(base, tmp_path, "--Prune_per", "0.95"))
    assert "\r" not in printed
    *_, titles, first, second, third, hint, result = printed.splitlines()
    assert titles.split()[:3] == ["epoch", "lr", "train_loss"]
    assert [row.split()[0] for row in (first, second, third)] == ["1", "2", "3"]
    assert re.search(r"pruned 95.00 % of the masked layers .* test accuracy .* in the end \(epoch \d by val\)", result)
    assert "export_stage4.py --Checkpoint" in hint


class TestIdentity:
    """What is not the same run is refused in one line, and nothing is overwritten or mixed."""

    @pytest.fixture
    def folder(self, tmp_path):
        """A copy of the scripts, to be edited."""
        return editable(tmp_path / "repository", "mlp")

    def edit(self, path, old, new):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    @pytest.mark.parametrize("file", ["model.py", STAGE1])
    def test_edited_code(self, folder, tmp_path, call_in, file):
        flags = [STAGE1, *TRAIN, "--Save_dir", tmp_path / "out"]
        call_in(folder, *flags)
        self.edit(folder / file, "\n\n\n", "\n\n# a comment\n\n\n")
        assert "is complete already" in call_in(folder, *flags)
        old, new = ("Dropout(0.2)", "Dropout(0.5)") if file == "model.py" else ("args.Label_smoothing", "0.1")
        self.edit(folder / file, old, new)
        before = files_of(tmp_path / "out")
        said = call_in(folder, *flags, code=2)
        assert f"is of a run with other code in {file}, which was edited since; name another --Save_dir" in said
        assert files_of(tmp_path / "out") == before

    def test_other_images_under_the_same_name(self, photographs, tmp_path, call_in):
        shutil.copytree(photographs / "cifar10", tmp_path / "b" / "cifar10", ignore=shutil.ignore_patterns("decoded.*"))
        (tmp_path / "b" / "cifar10" / "train" / "china" / "0.jpg").unlink()
        flags = "--Dims 2 --Epoch 1 --Batch_size 16 --Select last".split()
        flags = ["train_stage1.py", *flags, "--Save_dir", tmp_path / "out", "--Data_dir"]
        call_in("resnet56", *flags, photographs)
        assert "is of a run with other data: sha256" in call_in("resnet56", *flags, tmp_path / "b", code=2)

    def test_scores_of_another_checkpoint(self, base, tmp_path, call):
        flags = prune(base, tmp_path / "out", "--Prune_per", "0.9", "--Retrain", base / "1" / "logits_best.pkl")
        for path in (base / "0").glob("*_cmi_*.npy"):
            (tmp_path / path.name).symlink_to(path)
        for folder in (base / "0", tmp_path):  # also through links
            said = call(*flags, "--Retrain_mask", folder / "I_parent_cmi.npy", code=2)
            assert "I_parent_cmi_fc1.weight_fc2.weight.npy was made of another checkpoint than" in said
            assert "run pruning_1b.py --key_id 0" in said

    def test_a_link_to_the_folder_of_the_checkpoint(self, base, tmp_path, call):
        (tmp_path / "link").symlink_to(base)
        own = tmp_path / "own" / "0" / "mine.pkl"  # which would be replaced where the new file has its name
        own.parent.mkdir(parents=True)
        own.symlink_to(base / "0" / "logits_best.pkl")
        for folder, more in (("link", []), ("own", ["--Retrain", own])):
            said = call(*prune(base, tmp_path / folder, "--Prune_per", "0.9"), *more, code=2)
            assert f"--Save_dir {folder} holds the checkpoint that is pruned; name another directory" in said

    @pytest.mark.parametrize("stage", [STAGE1, STAGE2, STAGE3])
    def test_a_checkpoint_of_a_run_at_work(self, base, tmp_path, call, stage):
        copies(base / "0", tmp_path, ["logits_best.pkl"])
        known = records.read(tmp_path / "logits_best.json")
        records.write(tmp_path / "logits_best.json", {**known, "status": "running"})
        score = [STAGE2, *SCORE, "--weights_dir", tmp_path, "--key_id", "0"]
        retrain = [*prune(base, tmp_path / "out", "--Prune_per", "0.9"), "--Retrain", tmp_path / "logits_best.pkl"]
        given = [STAGE1, *TRAIN, "--Init", tmp_path / "logits_best.pkl", "--Save_dir", tmp_path / "out"]
        said = call(*{STAGE1: given, STAGE2: score, STAGE3: retrain}[stage], code=2)
        assert "logits_best.pkl is of a run that is not finished; run the command that makes it again" in said

    def test_scores_of_a_checkpoint_that_was_made_anew(self, base, tmp_path, call):
        """The scores lie there, the checkpoint is another one now."""
        scores = [f"{kind}_cmi_fc1.weight_fc2.weight.npy" for kind in ("I_parent", "Labels", "Labels_children")]
        copies(base / "1", tmp_path / "0", ["logits_best.pkl"])
        copies(base / "0", tmp_path / "0", scores)
        score = [STAGE2, *SCORE, "--split_half", "--weights_dir", tmp_path / "0", "--key_id", "0"]
        assert "logits_best.pkl; name another --name_postfix, or remove I_parent_cmi_fc1.weight_fc2.weight.*" in call(
            *score, code=2
        )


def test_a_label_smoothing_of_the_flag_is_that_of_an_edit(tmp_path, call_in):
    """One line of one script; the other network's folder is as it was."""
    folder = editable(tmp_path / "repository", "mlp")
    script = folder / STAGE1
    call_in("mlp", STAGE1, *TRAIN, "--Label_smoothing", "0.1", "--Save_dir", tmp_path / "flag")
    script.write_text(script.read_text().replace("label_smoothing=args.Label_smoothing", "label_smoothing=0.1"))
    call_in(folder, STAGE1, *TRAIN, "--Save_dir", tmp_path / "edit")
    call_in("mlp", STAGE1, *TRAIN, "--Save_dir", tmp_path / "plain")
    flag, edit, plain = (
        record(tmp_path / name / "0" / "logits_best.pkl")["epochs"] for name in ("flag", "edit", "plain")
    )
    assert [line["train_loss"] for line in flag] == [line["train_loss"] for line in edit]
    assert flag[0]["train_loss"] != plain[0]["train_loss"]


def test_a_further_figure_in_the_rows(base, tmp_path, call_in):
    """README's edit of one line: what the mask removes of every layer is printed in every row and recorded."""
    folder = editable(tmp_path / "repository", "mlp")
    script = folder / STAGE3
    old = "run.log(metrics, evaluate(network, images.selection))"
    assert old in script.read_text()
    script.write_text(script.read_text().replace(old, old[:-1] + ", **mask.pruned_by_layer())"))
    printed = call_in(folder, *prune(base, tmp_path / "out", "--Prune_per", "0.9"))
    assert "val_accuracy  fc2.weight  seconds" in printed
    assert [line["fc2.weight"] for line in record(tmp_path / "out" / "0" / "logits_90.00.pkl")["epochs"]] == [90.0] * 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"Opt": "sgd"', '"Opt": "adamw"', "model.py: TRAINING, Opt: 'adamw' is none of sgd, adam"),
        ('"Opt": "sgd"', '"Label_smothing": 0.1', "model.py: TRAINING holds Label_smothing, which is no flag"),
        ('"Lr": 0.1', '"Lr": -1', "model.py: TRAINING, Lr: -1 is not a number above 0"),
        ('"Epoch": 30', '"Epoch": "many"', "model.py: TRAINING, Epoch: 'many' is not a whole number"),
        ('"Even": True', '"Evn": True', "model.py: RETRAINING holds Evn"),
        ('"Lr": 0.1,', "", "model.py: TRAINING lacks Lr"),
        ('"samples_per_class": 650', "", "model.py: SCORING is {}; legal: a dict, not empty"),
        ('"Milestones": [10, 20]', '"Milestones": 10', "model.py: TRAINING, Milestones: 10; legal: a list"),
        ('"Nesterov": True', '"Nesterov": "no"', "model.py: TRAINING, Nesterov: 'no'; legal: True or False"),
        ("(784, 100)", "784", "model.py: GROUPS holds 784; legal: (number of parent groups, of child groups)"),
        ("(784, 100)", "(784, 0)", "model.py: GROUPS holds (784, 0); legal"),
        ("MAX_SPARSITY = {", "MAX_SPARSITY = {'fc1.weight': 1.5, ", "holds fc1.weight: 1.5; legal: shares from 0 to 1"),
        ("build = MLP", "build = None", "model.py: build is None; legal: a callable, not empty"),
        ("self, classes: int = 10", "self", "model.py: build: too many positional arguments; legal: a callable of the"),
        ("MAX_SPARSITY = {", "INNER = ['fc1.weight']\nMAX_SPARSITY = {", "INNER holds fc1.weight; legal: layers"),
        ("MAX_SPARSITY = {", "INNER = 'fc2.weight'\nMAX_SPARSITY = {", "INNER holds f; legal: layers of MAX"),
        ("build = MLP", "def build(classes):\n    MLP(classes)", "build returns a NoneType; legal: a new network"),
        ("build = MLP", "one = MLP()\nbuild = lambda classes: one", "build returns the same MLP; legal: a new"),
        ("GROUPS = {", "Groups = {", "model.py lacks GROUPS; docs/own_network.md has all that it holds"),
        ('("fc1.weight", "fc2.weight")', '("fc1", "fc2")', "model.py: GROUPS lacks fc2, of PAIRS"),
    ],
)
def test_senseless_values_in_model_py_are_one_line(tmp_path, call_in, old, new, message):
    folder = editable(tmp_path / "repository", "mlp")
    text = (folder / "model.py").read_text()
    assert text.count(old) == 1
    (folder / "model.py").write_text(text.replace(old, new))
    assert message in call_in(folder, STAGE1, *TRAIN, "--Save_dir", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["(2,)", "['2']", "[np.int64(2)]", "np.array([2]).tolist()"])
def test_numbers_of_other_kinds_are_those_of_the_flags(tmp_path, call_in, value):
    """Recorded as such, so that the same command knows its run; of text no milestone was ever reached."""
    folder = editable(tmp_path / "repository", "mlp")
    text = (folder / "model.py").read_text()
    for old, new in {
        '"""\n\nfrom torch': '"""\n\nimport numpy as np\nfrom torch',
        "[10, 20]": value,
        '"Lr": 0.1': '"Lr": np.float32(0.1)',
        '"Batch_size": 256': '"Batch_size": np.int64(64)',
        "(250, 100)": "(np.int64(250), np.int32(100))",
        '"fc2.weight": 0.99': '"fc2.weight": np.float32(0.75)',
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "model.py").write_text(text)
    flags = [*TRAIN[:-2], "--Save_dir", tmp_path / "out"]
    call_in(folder, STAGE1, *flags)
    assert "is complete already" in call_in(folder, STAGE1, *flags)
    known = record(tmp_path / "out" / "0" / "logits_best.pkl")
    assert [line["lr"] for line in known["epochs"]] == pytest.approx([0.1, 0.1, 0.01])
    assert (known["arguments"]["Batch_size"], known["arguments"]["Milestones"]) == (64, [2])
    pruning = ["--Retrain", tmp_path / "out" / "0" / "logits_best.pkl", "--Save_dir", tmp_path / "pruned"]
    pruning += ["--Criterion", "magnitude", "--Prune_per", "0.7", "--Epoch", "0"]
    call_in(folder, STAGE3, *TRAIN[:-2], *PLAIN, *pruning)
    found = record(tmp_path / "pruned" / "0" / "logits_70.00.pkl")["arguments"]
    assert (found["parent_clusters"], found["children_clusters"], found["upper_prune_limit"]) == ([250], [100], [0.75])


def test_a_script_that_augments_wants_it_of_model_py(tmp_path, call_in):
    """As where a convolutional folder's scripts are copied beside the MLP's model.py."""
    folder = editable(tmp_path / "repository", "mlp")
    script = folder / STAGE1
    script.write_text(script.read_text().replace("run.seed_of(epoch))", "run.seed_of(epoch), model.augment)"))
    said = call_in(folder, STAGE1, *TRAIN, "--Save_dir", tmp_path / "out", code=2)
    assert "model.py lacks augment; docs/own_network.md has all that it holds" in said
    assert not (tmp_path / "out").exists()


def test_an_edit_of_retraining_leaves_finished_training_alone(tmp_path, call_in):
    """Its values are flags' defaults, which are compared as arguments where they are used."""
    folder = editable(tmp_path / "repository", "mlp")
    flags = [STAGE1, *TRAIN, "--Save_dir", tmp_path / "out"]
    call_in(folder, *flags)
    text = (folder / "model.py").read_text()
    (folder / "model.py").write_text(text.replace('"prune_per_step": 0.01', '"prune_per_step": 0.02'))
    assert "is complete already: test accuracy" in call_in(folder, *flags)
    (folder / "model.py").write_text(text.replace('"prune_per_step": 0.01', ""))
    assert "is complete already: test accuracy" in call_in(folder, *flags)
    assert "--key_id: model.py's RETRAINING has no grid" in call_in(folder, STAGE3, "--key_id", 0, code=2)
    (folder / "model.py").write_text(text.replace('"Lr": 0.1', '"Lr": 0.2'))
    assert "--Lr 0.1 (now 0.2)" in call_in(folder, *flags, code=2)


def test_other_code_of_a_checkpoint_is_said_by_its_files(tmp_path, call_in):
    folder = editable(tmp_path / "repository", "mlp")
    model = folder / "model.py"
    (folder / "parts.py").write_text("RATE = 0.2\n")
    model.write_text(model.read_text().replace("        super()", "        from parts import RATE\n\n        super()"))
    call_in(folder, STAGE1, *TRAIN, "--Save_dir", tmp_path / "out")
    (folder / "parts.py").write_text("RATE = 0.3\n")
    said = call_in(folder, STAGE2, *SCORE, "--weights_dir", tmp_path / "out" / "0", "--key_id", "1")
    assert "logits_best.pkl was made with other code in parts.py; its weights are taken as they are" in said


def test_differences_are_said_as_they_are(base, tmp_path, call):
    copies(base / "0", tmp_path / "0", ["logits_best.pkl"])
    said = call(STAGE1, *TRAIN, "--Seed", "1", "--Weight_decay", "0", "--Save_dir", tmp_path, code=2)
    assert "--Seed 0 (now 1)" in said
    assert "--Weight_decay 0.0001 (now 0.0)" in said


def test_schedules_by_flags(tmp_path, call):
    for name, more in (("cosine", ()), ("one-cycle", ("--Warm_up", "0.4"))):
        call(STAGE1, *TRAIN, "--Schedule", name, *more, "--Save_dir", tmp_path / name)
    assert "--Warm_up belongs to --Schedule one-cycle" in call(STAGE1, *TRAIN, "--Warm_up", "0.4", code=2)
    rates = {
        n: [e["lr"] for e in record(tmp_path / n / "0" / "logits_best.pkl")["epochs"]] for n in ("cosine", "one-cycle")
    }
    assert rates["cosine"] == pytest.approx([0.1, 0.075, 0.025])
    assert rates["one-cycle"][0] == pytest.approx(0.004)


def test_training_starts_from_given_weights(base, tmp_path, call):
    """--Init: with almost no training, the accuracy is that of the weights; --Weights: exactly."""
    wanted = record(base / "0" / "logits_best.pkl")["test"]
    given = base / "0" / "logits_best.pkl"
    call(STAGE1, *TRAIN, "--Weights", given, "--Save_dir", tmp_path / "weights")
    assert record(tmp_path / "weights" / "0" / "logits_best.pkl")["test"] == wanted
    call(STAGE1, *TRAIN, "--Init", given, "--Lr", "1e-9", "--Save_dir", tmp_path / "init")
    assert record(tmp_path / "init" / "0" / "logits_best.pkl")["test"]["loss"] == pytest.approx(
        wanted["loss"], rel=1e-3
    )
    assert "give one" in call(STAGE1, *TRAIN, "--Init", given, "--Weights", given, code=2)


@pytest.mark.parametrize("flag", ["--Weights", "--Init"])
def test_stage_1_does_not_let_pruned_weights_grow_back(base, tmp_path, call, flag):
    """Its checkpoint has no mask, by which a second round would know them. A mask that keeps all is no matter."""
    for share in ("0.9", "0"):
        call(*prune(base, tmp_path, "--Prune_per", share, "--Epoch", "0"))
    said = call(STAGE1, *TRAIN, flag, tmp_path / "0" / "logits_90.00.pkl", "--Save_dir", tmp_path / "out", code=2)
    assert "logits_90.00.pkl is of a pruned network, whose mask stage 1 drops; stage 3 keeps it: --Retrain" in said
    assert not list((tmp_path / "out").rglob("*.pkl"))
    call(STAGE1, *TRAIN, flag, tmp_path / "0" / "logits_0.00.pkl", "--Save_dir", tmp_path / "out")


def test_no_epochs_leave_the_pruned_network_as_it_is(base, tmp_path, call):
    printed = call(*prune(base, tmp_path, "--Prune_per", "0.5", "--Epoch", "0"))
    known = record(tmp_path / "0" / "logits_50.00.pkl")
    assert known["test"] == known["test_before_retraining"]
    assert known["epochs"] == []
    assert "(epoch 0 by val)" in printed


def test_help_is_in_groups_and_says_every_default_once(call):
    for script, second in (
        (STAGE1, "recipe:"),
        (STAGE2, "layers, groups and scores:"),
        (STAGE3, "recipe:"),
        (STAGE4, "data:"),
    ):
        said = call(script, "--help")
        assert said.index("everyday:") < said.index(second)
        assert said.count("(default: ") >= 8
        assert not re.search(r"\(default: [^)]*\)\s+\(default", said)
        assert str(ROOT) not in said


def best(network, tmp_path, **settings):
    """Run experiments/best.sh; the record of the pruned network."""
    own = {"PYTHON": sys.executable, "FOLDER": str(tmp_path), **settings}
    shell = ["sh", str(conftest.ROOT / "experiments" / "best.sh"), network]
    done = subprocess.run(shell, env={**conftest.ENVIRONMENT, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "pruned" / "0").glob("*.pkl")
    return conftest.record(path)


NETWORKS = {"best": "mlp", "channels": "vgg16", "cifar10": "vgg16", "rules": "vgg16", "rounds": "resnet56"}


def experiment(repository, name, *words, code=0):
    """What a script of experiments/, copied to a folder, tells a Python that does nothing but write down its words."""
    python = repository.parent / "python"
    python.write_text("#!/bin/sh\nprintf '[%s]' \"$@\" && echo\n")
    python.chmod(0o755)
    for folder in ("experiments", "mlp", "vgg16", "resnet56", "resnet50", "results"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    for script in (ROOT / "experiments").glob("*.sh"):
        shutil.copy(script, repository / "experiments")
    environment = {**ENVIRONMENT, "PYTHON": str(python), "NETWORKS": "1"}
    command = [repository / "experiments" / f"{name}.sh", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(("name", "network"), [*NETWORKS.items(), ("mnist", "fc2"), ("robustness", None)])
def test_experiments_in_a_folder_with_a_space_and_brackets(tmp_path, name, network):
    said = experiment(tmp_path / "my files (2)", name, *([network] if network else []))
    lines = said.splitlines()
    assert lines
    assert all(re.search(r"\[--[Dd]ata_dir\]\[/[^]]*/my files \(2\)/[^]]*data\]", line) for line in lines), said


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("network", [(), ("lenet",), ("common",), ("",)])
def test_experiments_name_the_networks_that_they_know(tmp_path, name, network):
    """cifar10.sh took mlp for one, and trained it without milestones."""
    said = experiment(tmp_path / "repository", name, *network, code=2)
    assert re.fullmatch(rf"{name}.sh: '{''.join(network)}': legal: .*{NETWORKS[name]}.*\n", said)


@pytest.mark.slow
def test_the_reference_way_to_the_best_result(tmp_path):
    """On digits and for an epoch: the rule and the share are those of the table that it quotes."""
    groups, short = " ".join(GROUPS), {"TRAIN_FLAGS": "--Dataset DIGITS --Epoch 1", "RETRAIN_EPOCHS": "1"}
    short["SCORE_FLAGS"] = f"--dataset DIGITS --samples_per_class 40 {groups}"
    short["PRUNE_FLAGS"] = f"--Dataset DIGITS --Samples_per_class 40 {groups}"
    found = best("mlp", tmp_path, **short)
    assert rule(found) == "CMI, gaussian given kept, correlated groups, balanced, refit"
    assert found["pruned_percent_masked_layers"] == pytest.approx(96.2, abs=0.07)


@pytest.mark.slow
def test_the_reference_way_of_a_convolutional_network(tmp_path, photographs):
    """With a dense network of its own, on two classes of a few images."""
    few = {"DATA_DIR": str(photographs), "DENSE": "", "PRUNE_FLAGS": "--Dims 2 --Samples_per_class 10"}
    few |= {"TRAIN_FLAGS": "--Dims 2 --Batch_size 16 --Epoch 1", "SCORE_FLAGS": "--dims 2 --samples_per_class 20"}
    found = best("resnet56", tmp_path, **few)
    assert rule(found) == "CMI, gaussian given kept, positions, single units, refit"
    assert found["pruned_percent_masked_layers"] == pytest.approx(50, abs=0.1)


def test_a_rule_that_draws_is_repeatable(base, tmp_path, call, monkeypatch):
    """By torch's generator, whatever has drawn before; also where the first of two runs is there already."""

    def drawn(_criterion, _network, blocks, *_):
        return {k: torch.rand(b.weights.shape) for k, b in blocks.items()}

    monkeypatch.setattr("common.masks.rank", drawn)
    flags = ["--Criterion", "magnitude", "--Prune_per", "0.8", "--no-Refit", "--Epoch", "0"]
    call(*prune(base, tmp_path / "at_once", *flags, "--Expt_rerun", "2"))
    call(*prune(base, tmp_path / "one_by_one", *flags))
    torch.rand(5)
    call(*prune(base, tmp_path / "one_by_one", *flags, "--Expt_rerun", "2"))
    at_once, one_by_one = (sorted((tmp_path / name).rglob("*.pkl")) for name in ("at_once", "one_by_one"))
    assert [path.read_bytes() for path in at_once] == [path.read_bytes() for path in one_by_one]
    first, second = (torch.load(path, weights_only=True)["masks"]["fc2.weight"] for path in at_once)
    assert not torch.equal(first, second)
