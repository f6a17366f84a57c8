"""What readers change in a network's folder, each by an edit of a line there: it takes effect, and nowhere else."""

import numpy as np
import pytest
import torch
from conftest import editable, record, shell

TRAIN = "--Dims 2 --Batch_size 16 --Epoch 1 --Select last --Lr 0.01".split()
PRUNE = "--Criterion magnitude --Prune_per 0.5 --no-Refit --Epoch 0 --upper_prune_limit 1".split()
LOG = "run.log(metrics, evaluate(network, images.selection))"
SCHEDULE = (
    "make_schedule(optimizer, args.Schedule, args.Epoch, steps, args.Milestones, args.Gamma, args.Warm_up)",
    "torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 99)",
)
RANKS = "ranks = rank(args.Criterion, network, plan.blocks, scores, seed)"
MODEL, STAGE1, STAGE3 = "model.py", "train_stage1.py", "retrain_stage3.py"


def epochs(out):
    return record(out / "0" / "logits_best.pkl")["epochs"]


def masks(out):
    (path,) = (out / "0").glob("*.pkl")
    return torch.load(path, weights_only=True)["masks"]


EDITS = {  # what: ([(file, old, new)], the stage that shows it, whether its output is as the edit says)
    "loss": (
        [(STAGE1, "label_smoothing=args.Label_smoothing", "label_smoothing=0.5")],
        STAGE1,
        lambda plain, edited: epochs(edited)[0]["train_loss"] != epochs(plain)[0]["train_loss"],
    ),
    "printed figure": (
        [(STAGE1, LOG, LOG[:-1] + ", norm=network.conv1.weight.norm().item())")],
        STAGE1,
        lambda plain, edited: epochs(edited)[0]["norm"] > 0 and "norm" not in epochs(plain)[0],
    ),
    "schedule": (
        [(STAGE1, *SCHEDULE), (STAGE1, "import sys\n", "import sys\n\nimport torch\n")],
        STAGE1,
        lambda plain, edited: (epochs(edited)[0]["lr"], epochs(plain)[0]["lr"]) == (0.005, 0.01),
    ),
    "augmentation": (
        [(MODEL, "augment = crop_and_flip(padding=4)", "augment = None")],
        STAGE1,
        lambda plain, edited: epochs(edited)[0]["train_loss"] != epochs(plain)[0]["train_loss"],
    ),
    "data set": (
        [
            (MODEL, '"Dataset": "CIFAR10"', '"Dataset": "DIGITS"'),
            (MODEL, "channels, convolutions = 3, 0", "channels, convolutions = 1, 0"),
            (MODEL, '512, 512, 512, "pool"]', "512, 512, 512]"),
        ],
        STAGE1,
        lambda plain, edited: record(edited / "0" / "logits_best.pkl")["data"]["name"] == "DIGITS",
    ),
    "pruning rule": (
        [(STAGE3, RANKS, RANKS + "\n    ranks = {key: -of_layer for key, of_layer in ranks.items()}")],
        STAGE3,
        lambda plain, edited: all(not (masks(edited)[k] & kept).any() for k, kept in masks(plain).items()),
    ),
    "layer pairs": (
        [(MODEL, 'for k in range(9, 14)},\n    "linear1.weight": 0.8,\n', "for k in range(9, 12)},\n")],
        STAGE3,
        lambda plain, edited: set(masks(edited)) == {f"conv{k}.weight" for k in range(5, 12)} < set(masks(plain)),
    ),
    "groups": (
        [(MODEL, "GROUPS = {child: (64, 64)", "GROUPS = {child: (8, 4)")],
        STAGE3,
        lambda plain, edited: all(len(np.unique(m.flatten(1), axis=0)) <= 4 for m in masks(edited).values()),
    ),
}
QUICK = ("printed figure", "pruning rule")


@pytest.fixture(scope="module")
def plain(photographs, tmp_path_factory):
    """Stages 1 and 3 without an edit."""
    out = tmp_path_factory.mktemp("plain")
    data = ["--Data_dir", photographs]
    shell("vgg16", STAGE1, *TRAIN, *data, "--Save_dir", out / STAGE1)
    network = ["--Retrain", out / STAGE1 / "0" / "logits_best.pkl"]
    shell("vgg16", STAGE3, *TRAIN, *data, *PRUNE, *network, "--Save_dir", out / STAGE3)
    return out


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what in QUICK else pytest.mark.slow) for what in EDITS]
)
def test_an_edit_takes_effect(plain, photographs, tmp_path, what):
    edits, stage, shows = EDITS[what]
    folder = editable(tmp_path / "repository", "vgg16")
    for file, old, new in edits:
        text = (folder / file).read_text()
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new))
    flags = [*TRAIN, "--Data_dir", photographs, "--Save_dir", tmp_path / "out"]
    if stage == STAGE3:
        flags += [*PRUNE, "--Retrain", plain / STAGE1 / "0" / "logits_best.pkl"]
    flags += ["--Dims", 10] if what == "data set" else []
    shell(folder, stage, *flags)
    assert shows(plain / stage, tmp_path / "out")
