"""On shared disks, in job arrays, with files of others: nothing is lost, nothing is executed, one clear line."""

import copy
import json
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, record
from PIL import Image

import campaigns
from common import activations, artifacts, cli, masks, refit
from common.cmi import layer_cmi
from common.data import Split, load
from common.errors import InputError

TRAIN = campaigns.TRAIN
CPU = torch.device("cpu")


@pytest.fixture
def call(call_in):
    return partial(call_in, "mlp")


def test_killed_at_random_moments_every_stage_ends_with_the_same_bytes():
    command = [sys.executable, "tests/campaigns.py", "--kills", "3"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    for stage in "123":
        found = json.loads(done.stdout)[f"kills_of_stage_{stage}"]
        assert found["kills"] == 3
        assert found["finished"] >= 1
        assert found["other_bytes"] == found["not_whole"] == 0


def test_damage_of_every_kind_of_file_is_noticed():
    for kind, found in campaigns.flips(200).items():
        assert found["tried"] == found["refused"] == 200, kind


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_files_are_refused_and_nothing_is_executed(tmp_path):
    canary = tmp_path / "canary"
    for attempt, (path, read) in campaigns.hostile(tmp_path, canary).items():
        start = time.monotonic()
        with pytest.raises(InputError) as refusal:
            read(path)
        assert path.name in str(refusal.value), attempt
        assert "\n" not in str(refusal.value), attempt
        assert time.monotonic() - start < 5, attempt
    assert not canary.exists()


def test_a_torch_whose_reader_is_unsafe_reads_nothing(tmp_path, monkeypatch):
    content = artifacts.checkpoint_bytes({"state_dict": {"a": torch.zeros(1)}})
    (tmp_path / "a.pkl").write_bytes(content)
    assert artifacts.load_checkpoint(tmp_path / "a.pkl")
    monkeypatch.setattr("torch.__version__", type(torch.__version__)("2.9.1"))
    with pytest.raises(InputError, match=r"torch 2\.9\.1 may execute code.*install 2\.10 or newer"):
        artifacts.load_checkpoint(tmp_path / "a.pkl")


def test_fuzzed_files_and_flags_have_defined_ends():
    assert campaigns.fuzz_files(1000)["other_ends"] == 0
    assert campaigns.fuzz_flags(1000)["other_ends"] == 0


MISSING = object()
WHOLE = ["0", "-1", "1.5", "nan", "inf", "x", ""]
TABLE = {  # flags: what they must refuse
    "Epoch Batch_size Dims Expt_rerun Milestones Samples_per_class": WHOLE,
    "cores dims samples_per_class null parent_clusters children_clusters": WHOLE,
    "bootstrap": ["1", *WHOLE],
    "Device_ids Seed Workers Val_size key_id seed device_ids": WHOLE[1:],
    "upper_prune_limit upper_prune_per lower_prune_per Prune_per": ["-0.1", "1.01", "nan", "inf", "x", ""],
    "prune_per_step": ["0", "-0.1", "2", "nan", "x", ""],
    "Lr Gamma width": ["0", "-1", "nan", "inf", "x", ""],
    "Weight_decay": ["-1", "nan", "inf", "x", ""],
    "Dataset Opt Model Select Criterion model dataset estimator given precision device grouping": ["?", ""],
    "Save_dir Data_dir Weights Retrain Retrain_mask Labels_file Labels_children_file weights_dir data_dir": [""],
    "name_postfix": ["", "../x", "a/b", "a b", "\0"],
    "Nesterov Amp Resume Compile Prune_of_network Refit Even Skip_unreadable skip_unreadable split_half": ["=1"],
    "Classes classes parent_key children_key": [MISSING],
}
ILLEGAL = {name: values for names, values in TABLE.items() for name in names.split()}
CASES = [
    (stage, name, value)
    for name, flag in cli.FLAGS.items()
    for stage in map(int, flag["stages"])
    for value in [*ILLEGAL[name], *([MISSING] if "action" not in flag and flag.get("nargs") != "*" else [])]
]


def test_every_flag_of_every_stage_refuses_what_is_illegal(capsys):
    """Wrong type, out of range, empty, without its value, misspelt: one line that names the flag, exit code 2."""
    for stage, name, value in CASES + [(s, n[:-1], "1") for s, n, _ in CASES if n[:-1] not in cli.FLAGS]:
        argv = [f"--{name}"] if value is MISSING else [f"--{name}=1"] if value == "=1" else [f"--{name}", value]
        others = [] if stage != 2 or name == "key_id" else ["--key_id", "0"]
        with pytest.raises(SystemExit) as stop:
            cli.parse("doc", stage, [*others, *argv], Model="mlp", model="mlp")
        said = capsys.readouterr().err
        assert stop.value.code == 2, argv
        assert said.count("\n") == 1, said
        assert name in said, said
    assert len(CASES) > 250


def test_two_processes_do_not_write_one_file(tmp_path, call):
    """The second one refuses; what the first one has is not touched; afterwards the lock is gone."""
    flags = ["train_stage1.py", *TRAIN, "--Save_dir", tmp_path]
    best = tmp_path / "0" / "logits_best.pkl"
    with artifacts.alone(best):
        assert f"{best} is being written by another process" in call(*flags, code=2)
        assert not best.exists()
    call(*flags)
    with artifacts.alone(tmp_path / "0" / "I_parent_cmi_fc1.weight_fc2.weight.npy"):
        score = f"--dataset DIGITS --samples_per_class 20 --weights_dir {tmp_path}/0 --key_id".split()
        groups = "--parent_clusters 5 --children_clusters 5".split()
        assert "is being written by another process" in call("pruning_1b.py", *score, 0, *groups, code=2)
        call("pruning_1b.py", *score, 1, *groups)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("stage", ["1", "2"])
def test_ctrl_c_stops_within_two_seconds_and_the_same_command_goes_on(tmp_path, stage):
    folder = tmp_path / "base"
    train = [sys.executable, "train_stage1.py", *TRAIN, "--Save_dir", folder]
    score = "--dataset DIGITS --samples_per_class 110 --key_id 0 --cores 2 --precision double --null 50".split()
    commands = {
        "1": [*train, "--Epoch", "60"],
        "2": [sys.executable, "pruning_1b.py", *score, "--weights_dir", folder / "0"],
    }
    options = {"cwd": ROOT / "mlp", "env": ENVIRONMENT, "text": True}
    if stage == "2":
        subprocess.run(train, **options, check=True, capture_output=True)
    command = list(map(str, commands[stage]))
    with subprocess.Popen(command, **options, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("0/*.state")) and time.monotonic() < deadline:
            time.sleep(0.05)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        assert time.monotonic() - start < 2
    assert process.returncode == 130
    assert said.splitlines()[-1].endswith("interrupted; the same command goes on from what is written")
    assert list(folder.glob("0/*.state"))
    if stage == "1":
        assert artifacts.load_checkpoint(folder / "0" / "logits_best.pkl")
        assert record(folder / "0" / "logits_best.pkl")["status"] == "running"


@pytest.mark.parametrize("limit", [2_000, 1_000_000])
def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path, limit):
    """A limit on the size of files stands in for it: writing fails in the same call."""
    limited = f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    limited += "runpy.run_path('train_stage1.py', run_name='__main__')"
    command = [sys.executable, "-c", limited, *TRAIN, "--Save_dir", str(tmp_path)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT / "mlp")}
    done = subprocess.run(command, cwd=ROOT / "mlp", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr
    assert all(campaigns.whole(path) for path in tmp_path.rglob("*") if path.is_file())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_to(tmp_path, call):
    (tmp_path / "file").write_text("")
    assert "cannot be written to (Not a directory)" in call(
        "train_stage1.py", *TRAIN, "--Save_dir", tmp_path / "file", code=2
    )


def test_without_permission(tmp_path, call, monkeypatch):
    """Root may write anywhere, so the refusal is the system call's, made up."""

    def refuse(path, *_args, **_options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    message = call("train_stage1.py", *TRAIN, "--Save_dir", tmp_path / "out", code=2)
    assert f"{tmp_path / 'out' / '0'} cannot be written to (Permission denied); name another directory" in message


def test_want_of_memory_is_one_line(tmp_path, call, monkeypatch):
    def refuse(*_args, **_options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("common.runs.fit", refuse)
    message = call("train_stage1.py", *TRAIN, "--Save_dir", tmp_path, code=2)
    assert "not enough memory" in message
    assert "a smaller --Batch_size" in message


@pytest.fixture
def images(photographs, tmp_path):
    """A copy of the CIFAR-10 tree in which one training image is cut short."""
    for path in (photographs / "cifar10").rglob("*.jpg"):
        target = tmp_path / path.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    broken = tmp_path / "cifar10" / "train" / "flower" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    return tmp_path, broken


def test_an_unreadable_image_is_named_and_left_out_on_request(images, capsys):
    folder, broken = images
    with pytest.raises(InputError, match=rf"{broken} is no readable image.*--Skip_unreadable"):
        load("CIFAR10", folder, val_size=0, device=CPU)
    for _ in range(2):  # it is named every time
        data = load("CIFAR10", folder, val_size=0, device=CPU, skip=True)
        assert len(data.train) == 47
        assert len(data.test) == 20
        assert data.train.labels.bincount().tolist() == [24, 23]
        assert str(broken) in capsys.readouterr().err
    broken.write_bytes((broken.parent / "8.jpg").read_bytes())
    assert len(load("CIFAR10", folder, val_size=0, device=CPU).train) == 48


def test_unreadable_images_that_are_read_when_needed(photographs, tmp_path, capsys):
    for path in (photographs / "imagenet").rglob("*.jpg"):
        target = tmp_path / path.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for name in ("0.jpg", "3.jpg"):
        (tmp_path / "imagenet" / "train" / "china" / name).write_bytes(b"no image")
    data = load("ImageNet", tmp_path, val_size=0, device=CPU)
    with pytest.raises(InputError, match=r"0\.jpg is no readable image.*--Skip_unreadable"):
        list(data.train.batches(5))
    data = load("ImageNet", tmp_path, val_size=0, device=CPU, skip=True)
    for batches in (data.train.batches(5), data.train.training_batches(5, seed=0)):
        labels = torch.cat([batch[1] for batch in batches])
        assert labels.bincount().tolist() == [4, 6]
        assert capsys.readouterr().err.count("left out: ") == 2


@pytest.mark.parametrize("fault", ["a class folder is empty", "half downloaded", "a class in one split only"])
def test_incomplete_data(images, tmp_path, call_in, fault):
    folder, broken = images
    if fault == "a class folder is empty":
        for path in broken.parent.iterdir():
            path.unlink()
        expected = "flower"
    elif fault == "half downloaded":
        original = folder / "cifar-10-batches-py"
        original.mkdir()
        (original / "data_batch_1").write_bytes(b"half")
        expected = "no usable files in"
    else:
        for path in broken.parent.iterdir():
            path.unlink()
        broken.parent.rmdir()
        expected = "the class folder flower is in one of the two splits only"
    flags = ["--Data_dir", folder, "--Save_dir", tmp_path / "out", "--Epoch", "1"]
    lines = call_in("vgg16", "train_stage1.py", *flags, code=2).splitlines()
    assert expected in lines[-1]
    assert not (tmp_path / "out").exists()


class TestNumbers:
    """Networks and images that are degenerate have defined scores, masks and refits."""

    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return campaigns.model.MLP().eval()

    def test_constant_images_carry_no_information(self, network):
        split = Split(torch.full((40, 1, 28, 28), 7, dtype=torch.uint8), torch.arange(40) % 10)
        keys = ["fc1.weight", "fc2.weight"]
        shares = activations.relevance(network, keys, split)
        assert all((share >= 0).all() and np.isfinite(share).all() for share in shares.values())
        parents, children = activations.paired(network, keys, split)["fc2.weight"]
        blocks = masks.contiguous_blocks(network, "fc2.weight", 50, 30)
        for options in ({}, {"estimator": "gaussian", "given": "kept", "snr": shares["fc2.weight"]}):
            scores = layer_cmi(children, parents, blocks.child_groups, blocks.parent_groups, **options)
            assert (scores == 0).all()
        pruned = masks.select_evenly(scores, blocks.weights, 0.9)
        assert pruned.mean() == pytest.approx(0.9)

    @pytest.mark.parametrize("even", [False, True])
    def test_dead_layers_are_pruned_and_refitted(self, network, even):
        """fc1 returns nothing: fc2 is its bias, before and after."""
        with torch.no_grad():
            network.fc1.weight.zero_()
            network.fc1.bias.fill_(-1)
        split = Split(torch.randint(0, 255, (60, 1, 28, 28), dtype=torch.uint8), torch.arange(60) % 10)
        blocks = {"fc2.weight": masks.contiguous_blocks(network, "fc2.weight", 50, 30)}
        pruned = masks.choose("magnitude", network, blocks, 0.8, [0.9], even=even)
        held = masks.build(pruned, blocks, network)
        dense, wanted = copy.deepcopy(network), network(split.images / 255)
        masks.holder(network, held)()
        refit.refit(network, dense, held, split)
        assert all(p.isfinite().all() for p in network.parameters())
        torch.testing.assert_close(network(split.images / 255), wanted, rtol=1e-4, atol=1e-4)

    def test_weights_that_are_not_numbers_are_refused(self, network, tmp_path, call):
        with torch.no_grad():
            network.fc2.weight[3, 4] = float("nan")
        content = artifacts.checkpoint_bytes({"state_dict": network.state_dict(), "epoch": 1})
        artifacts.save({tmp_path / "logits_best.pkl": content}, {"stage": 1, "status": "complete"})
        message = call("pruning_1b.py", "--dataset", "DIGITS", "--weights_dir", tmp_path, "--key_id", 0, code=2)
        assert "logits_best.pkl: fc2.weight holds values that are not finite" in message

    def test_constant_channels_are_normalised_to_numbers(self, photographs, tmp_path):
        for part in ("train", "test"):
            for name in ("a", "b"):
                (tmp_path / "cifar10" / part / name).mkdir(parents=True)
                for k in range(3):
                    Image.new("RGB", (32, 32), (0, 200, 10 * k)).save(tmp_path / "cifar10" / part / name / f"{k}.png")
        images, _ = next(load("CIFAR10", tmp_path, val_size=0, device=CPU).train.batches())
        assert images.isfinite().all()
        assert images[:, :2].abs().max() < 1e-3
