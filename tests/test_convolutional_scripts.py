"""The three scripts of the convolutional networks, from the shell, on real photographs cut to size.

With CIFAR-10 or ImageNet in data/ (image folders) they also run on a few classes of these.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONVOLUTIONAL, ENVIRONMENT, ROOT, editable, model_of, record, shell

from common import parallel
from common.activations import collect_activations, output_sensitivity
from common.cmi import layer_cmi
from common.data import load, sample_per_class

SMALL = {"cifar10": "--Dims 2 --Batch_size 16", "imagenet": "--Dims 2 --Batch_size 4 --Workers 2"}
TREE = {"vgg16": "cifar10", "resnet56": "cifar10", "resnet50": "imagenet"}
PAIRS = {  # of each network two that stage 3 prunes: key_ids
    "vgg16": (3, 12),
    "resnet56": (19, 36),  # children that read a shortcut sum
    "resnet50": (3, 51),  # a convolution on a shortcut
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "resnet56" else pytest.mark.slow) for n in CONVOLUTIONAL]
)
def test_three_stages(photographs, tmp_path, name):
    model, data = model_of(name), ["--Data_dir", photographs]
    train = [*data, *SMALL[TREE[name]].split(), "--Epoch", 1, "--Lr", 0.01, "--Val_size", 4]
    shell(name, "train_stage1.py", *train, "--Save_dir", tmp_path / "base")
    base = tmp_path / "base" / "0"
    assert record(base / "logits_best.pkl")["status"] == "complete"

    groups = ["--parent_clusters", 8, "--children_clusters", 8]
    chosen = [model.PAIRS[k] for k in PAIRS[name]]
    score = ["--data_dir", photographs, "--dims", 2, "--weights_dir", base, "--samples_per_class", 4, *groups]
    for key_id, (parent, child) in zip(PAIRS[name], chosen, strict=True):
        shell(name, "pruning_1b.py", *score, "--key_id", key_id)
        assert np.load(base / f"I_parent_cmi_{parent}_{child}.npy").shape == (8, 8)

    children = ["--children_key", *(child for _, child in chosen)]
    prune = [*groups, "--Retrain", base / "logits_best.pkl", "--Save_dir", tmp_path / "pruned", "--Prune_per", 0.5]
    prune += ["--Samples_per_class", 4]
    printed = shell(name, "retrain_stage3.py", *train, *prune, *children, "--upper_prune_limit", 0.6)
    assert "asked: 50.00 %" in printed
    (path,) = (tmp_path / "pruned" / "0").glob("*.pkl")
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["masks"]) == {child for _, child in chosen}
    for key, mask in checkpoint["masks"].items():
        assert (checkpoint["state_dict"][key][~mask] == 0).all()
        assert record(path)["pruned_percent_by_layer"][key] <= 60
    assert record(path)["pruned_percent_masked_layers"] == pytest.approx(50, abs=1.6)
    assert {"test_masked", "test_recalibrated", "test_before_retraining", "test_after_1_epoch"} < set(record(path))


def test_positions_and_criteria_from_the_shell(photographs, tmp_path, call_in):
    """Scores at positions are those of the windows that the layer read; Taylor blocks prune; three figures are kept."""
    data = ["--Data_dir", photographs, *SMALL["cifar10"].split(), "--Select", "last"]
    call_in("resnet56", "train_stage1.py", *data, "--Epoch", 1, "--Save_dir", tmp_path / "base")
    base, model = tmp_path / "base" / "0", model_of("resnet56")
    parent, child = model.PAIRS[19]
    score = ["--data_dir", photographs, "--dims", 2, "--weights_dir", base, "--key_id", 19, "--samples_per_class", 10]
    rule = ["--estimator", "gaussian", "--given", "kept", "--sampling", "positions", "--positions", 3]
    printed = call_in("resnet56", "pruning_1b.py", *score, *rule)
    assert "samples 60" in printed

    network = model.build(2)
    images = load("CIFAR10", photographs, val_size=0, device=torch.device("cpu"))
    network.load_state_dict(torch.load(base / "logits_best.pkl", weights_only=True)["state_dict"])
    network = parallel.place(network, images.device)
    sample = images.train[sample_per_class(images.train.labels, 10, 0)]
    parents, children = collect_activations(network, [child], sample, positions=3)[child]
    assert parents.shape == (60, 9 * network.get_parameter(child).shape[1])
    snr = output_sensitivity(network, [child], sample, positions=True)[child]
    groups = np.arange(children.shape[1]), np.arange(parents.shape[1]) // 9
    expected = layer_cmi(children, parents, *groups, estimator="gaussian", given="kept", snr=snr)
    assert np.load(base / f"I_parent_cmi_{parent}_{child}.npy") == pytest.approx(expected, rel=1e-4, abs=1e-9)

    prune = [*data, "--Epoch", 0, "--children_key", child, "--Retrain", base / "logits_best.pkl", "--Prune_per", 0.5]
    for criterion, refit in (("cmi", "--Refit"), ("taylor", "--no-Refit")):
        flags = [refit, "--Samples_per_class", 10, "--Criterion", criterion, "--Save_dir", tmp_path / criterion]
        assert "% recalibrated" in call_in("resnet56", "retrain_stage3.py", *prune, *flags)
        (path,) = (tmp_path / criterion / "0").glob("*.json")
        figures = record(path)
        assert figures["test"] == figures["test_before_retraining"]
        assert (figures["test_masked"] == figures["test_before_retraining"]) == (criterion == "taylor")


@pytest.mark.slow
def test_all_pairs_in_one_pass_are_the_same_as_one_by_one(photographs, tmp_path, call_in):
    """And finished pairs are not scored again."""
    train = [*SMALL["cifar10"].split(), "--Data_dir", photographs, "--Epoch", 1, "--Select", "last"]
    shell("resnet56", "train_stage1.py", *train, "--Save_dir", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    score = ["--data_dir", photographs, "--dims", 2, "--samples_per_class", 10, "--estimator", "gaussian"]
    for key_id in (0, 18, 54):
        call_in("resnet56", "pruning_1b.py", *score, "--weights_dir", tmp_path / "a" / "0", "--key_id", key_id)
    shell("resnet56", "pruning_1b.py", *score, "--weights_dir", tmp_path / "b" / "0", "--key_id", "all")
    assert len(list((tmp_path / "b" / "0").glob("I_parent_*.npy"))) == 55
    for path in (tmp_path / "a" / "0").glob("*parent_cmi*"):
        other = tmp_path / "b" / "0" / path.name
        if path.suffix == ".npy":
            assert path.read_bytes() == other.read_bytes()
        else:
            assert record(path)["arguments"]["key_id"] == record(other)["arguments"]["key_id"]
    printed = call_in("resnet56", "pruning_1b.py", *score, "--weights_dir", tmp_path / "a" / "0", "--key_id", "all")
    assert printed.count("is complete already") == 3


def test_given_weights_are_evaluated_and_written(photographs, tmp_path, call_in):
    """A plain state_dict, as torchvision publishes them; labels and outputs are those of the whole data set."""
    torch.manual_seed(0)
    torch.save(model_of("resnet50").build(2).state_dict(), tmp_path / "weights.pth")
    flags = ["--Data_dir", photographs, "--Dims", 2, "--Val_size", 4, "--Weights", tmp_path / "weights.pth"]
    printed = call_in("resnet50", "train_stage1.py", *flags, "--Classes", "flower", "--Save_dir", tmp_path / "out")
    assert "top-5 100.00 %" in printed
    path = tmp_path / "out" / "0" / "logits_best.pkl"
    assert record(path)["data"]["classes"] == ["flower"]
    assert torch.load(path, weights_only=True)["classes"] == ["flower"]
    assert not path.with_name("logits_final.pkl").exists()


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("vgg16", "--Weights torchvision", "torchvision has no weights of vgg16; name a file"),
        ("resnet56", "--Classes cat", "--Classes cat: no such class; legal: china, flower"),
        ("resnet56", "--Dims 10", "--Dims 10: CIFAR10 has 2 classes"),
        ("resnet56", "--Dataset ImageNet --Data_dir nowhere", "must hold one folder of images per class"),
        ("vgg16", "--Weights none.pkl", "none.pkl does not exist"),
        (
            "vgg16",
            "--Dropout 0.1 --Data_dir nowhere",
            "--Dropout 0.1: this network has no dropout layers; leave it out",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(photographs, tmp_path, call_in, name, flags, message):
    out = ["--Data_dir", photographs, "--Dims", 2, "--Val_size", 4, "--Save_dir", tmp_path / "out"]
    lines = call_in(name, "train_stage1.py", *out, *flags.split(), code=2).splitlines()
    assert message in lines[-1]
    assert len([line for line in lines if "error" in line]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(photographs, tmp_path):
    """Bit for bit, with batch norm, momentum, augmentation, a schedule and masks, after SIGKILL between epochs."""
    train = [*SMALL["cifar10"].split(), "--Data_dir", photographs, "--Epoch", 4, "--Milestones", 1, 3]
    base = [*train, "--Select", "last"]
    stage3 = [*base, "--Criterion", "magnitude", "--Prune_per", 0.4, "--Retrain", tmp_path / "whole/0/logits_best.pkl"]
    for script, flags in (("train_stage1.py", base), ("retrain_stage3.py", stage3)):
        out = ("whole", "killed") if script == "train_stage1.py" else ("whole3", "killed3")
        shell("resnet56", script, *flags, "--Save_dir", tmp_path / out[0])
        command = [sys.executable, script, *map(str, flags), "--Save_dir", str(tmp_path / out[1])]
        process = subprocess.Popen(command, cwd=ROOT / "resnet56", stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        while not list((tmp_path / out[1]).rglob("*.state")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list((tmp_path / out[1]).rglob("*.state"))
        shell("resnet56", script, *flags, "--Save_dir", tmp_path / out[1])
        assert not list((tmp_path / out[1]).rglob("*.state"))
        for path in (tmp_path / out[0]).rglob("*.pkl"):
            other = tmp_path / out[1] / path.relative_to(tmp_path / out[0])
            assert path.read_bytes() == other.read_bytes()


def torchrun(folder, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """All three stages' figures and weights agree to rounding, for a network without randomness of its own."""
    net = editable(tmp_path / "repository", "mlp")
    (net / "model.py").write_text((net / "model.py").read_text().replace("Dropout(0.2)", "Dropout(0.0)"))
    train = "--Dataset DIGITS --Val_size 200 --Epoch 3 --Batch_size 64 --Milestones 2 --Lr 0.02".split()
    plain = "--Criterion magnitude --Prune_per 0.8 --no-Even --no-Refit".split()
    prune = [*train, *plain, "--Retrain", tmp_path / "1/0/logits_best.pkl"]
    shell(net, "train_stage1.py", *train, "--Save_dir", tmp_path / "1")
    shell(net, "retrain_stage3.py", *prune, "--Save_dir", tmp_path / "3")
    torchrun(net, "train_stage1.py", *train, "--Save_dir", tmp_path / "2")
    torchrun(net, "retrain_stage3.py", *prune, "--Save_dir", tmp_path / "4")
    for one, two, file in (("1", "2", "logits_final.pkl"), ("3", "4", "logits_80.00.pkl")):
        paths = [tmp_path / folder / "0" / file for folder in (one, two)]
        first, second = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
        assert record(paths[1])["processes"] == 2
        for key, value in first.items():
            torch.testing.assert_close(value, second[key], rtol=1e-3, atol=1e-5)
        assert record(paths[0])["test"]["loss"] == pytest.approx(record(paths[1])["test"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_with_batch_norm(photographs, tmp_path):
    """Between CPUs every process norms its own part; the saved network is whole and its figures are of all images."""
    train = [*SMALL["cifar10"].split(), "--Data_dir", photographs, "--Epoch", 1, "--Select", "last"]
    torchrun(ROOT / "vgg16", "train_stage1.py", *train, "--Save_dir", tmp_path)
    path = tmp_path / "0" / "logits_best.pkl"
    assert not any(key.startswith("module.") for key in torch.load(path, weights_only=True)["state_dict"])
    assert record(path)["data"]["train"] == 48


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "imagenet-sample"])
def test_real_data(tmp_path, name):
    """A few classes, where the data are there."""
    data = Path(os.environ.get("MINT_DATA", ROOT / "data"))
    if not (data / name).is_dir():
        pytest.skip(f"no {name} in {data}; MINT_DATA names another folder")
    flags = {
        "cifar10": ["--Data_dir", data, "--Classes", "frog", "ship", "--Select", "last", "--Batch_size", 128],
        "imagenet-sample": ["--Data_dir", data / name, "--Classes", "n01440764", "n01443537", "--Batch_size", 2],
    }[name]
    folder = "resnet56" if name == "cifar10" else "resnet50"
    shell(folder, "train_stage1.py", *flags, "--Select", "last", "--Epoch", 1, "--Save_dir", tmp_path)
    assert record(tmp_path / "0" / "logits_best.pkl")["status"] == "complete"
