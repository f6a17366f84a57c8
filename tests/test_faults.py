"""On shared disks, in job arrays, with files of others: nothing is lost, nothing is executed, one clear line."""

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, model_of, record
from PIL import Image

import campaigns
from common import activations, artifacts, files, masks, records, refit
from common.cmi import layer_cmi
from common.data import Split, load
from common.errors import InputError

TRAIN = campaigns.TRAIN
CPU = torch.device("cpu")


@pytest.fixture
def call(call_in):
    return partial(call_in, "mlp")


@pytest.mark.slow
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
def test_hostile_files_are_refused_and_nothing_is_executed():
    found = campaigns.hostile_files()
    assert found["tried"] == found["refused"] > 15
    assert found["executed"] == 0


def test_a_torch_whose_reader_is_unsafe_reads_nothing(tmp_path, monkeypatch):
    content = artifacts.checkpoint_bytes({"state_dict": {"a": torch.zeros(1)}})
    (tmp_path / "a.pkl").write_bytes(content)
    assert artifacts.load_checkpoint(tmp_path / "a.pkl")
    monkeypatch.setattr("torch.__version__", type(torch.__version__)("2.9.1"))
    with pytest.raises(InputError, match=r"torch 2\.9\.1 may execute code.*install 2\.10 or newer"):
        artifacts.load_checkpoint(tmp_path / "a.pkl")


SLOW = {"marks": pytest.mark.slow}
COUNTS = {"files": 1000, "command_lines": 1000, "checkpoints": 150, "own_networks": 10, "image_trees": 40}


@pytest.mark.parametrize(
    ("kind", "count"),
    [*COUNTS.items(), pytest.param("environments", 14, **SLOW), pytest.param("own_networks", 40, **SLOW)],
)
def test_random_trials_come_out_right_or_are_refused(kind, count):
    found = campaigns.counted(campaigns.TRIALS[kind], range(count))
    assert found["other_ends"] == 0
    assert found["right"] > 0


def test_every_flag_of_every_stage_refuses_what_is_illegal():
    """Wrong type, out of range, empty, without its value, misspelt: one line that names the flag, exit code 2."""
    found = campaigns.illegal_flags()
    assert found["tried"] == found["refused"] > 400


def test_two_processes_do_not_write_one_file(tmp_path, call):
    """The second one refuses; what the first one has is not touched; afterwards the lock is gone."""
    flags = ["train_stage1.py", *TRAIN, "--Save_dir", tmp_path]
    best = tmp_path / "0" / "logits_best.pkl"
    with files.file_lock(best):
        assert f"{best} is being written by another process" in call(*flags, code=2)
        assert not best.exists()
    call(*flags)
    with files.file_lock(tmp_path / "0" / "I_parent_cmi_fc1.weight_fc2.weight.npy"):
        score = f"--dataset DIGITS --samples_per_class 20 --weights_dir {tmp_path}/0 --key_id".split()
        groups = "--parent_clusters 5 --children_clusters 5".split()
        assert "is being written by another process" in call("pruning_1b.py", *score, 0, *groups, code=2)
        call("pruning_1b.py", *score, 1, *groups)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_ctrl_c_stops_at_once_and_the_same_command_goes_on(tmp_path, stage):
    folder, out = tmp_path / "base" / "0", tmp_path / ("out" if stage == "3" else "base") / "0"
    train = ["train_stage1.py", *TRAIN, "--Save_dir", folder.parent]
    score = "--dataset DIGITS --samples_per_class 110 --key_id 0 --cores 2 --precision double --null 50".split()
    prune = ["--Criterion", "random", "--Prune_per", "0.9", "--no-Refit", "--Retrain", folder / "logits_best.pkl"]
    commands = {
        "1": [*train, "--Epoch", "60"],
        "2": ["pruning_1b.py", *score, "--weights_dir", folder],
        "3": ["retrain_stage3.py", *TRAIN, "--Epoch", "60", *prune, "--Save_dir", out.parent],
    }
    options = {"cwd": ROOT / "mlp", "env": ENVIRONMENT, "text": True}
    # What a shell starts in the background ignores Ctrl-C, and so would all that these tests start.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    if stage != "1":
        subprocess.run([sys.executable, *map(str, train)], **options, check=True, capture_output=True)
    command = [sys.executable, *map(str, commands[stage])]
    with subprocess.Popen(command, **options, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while not list(out.glob("*.state")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 130
    assert said.splitlines()[-1].endswith("interrupted; the same command goes on from what is written")
    assert list(out.glob("*.state"))
    if stage != "2":
        (best,) = out.glob("logits_[b9]*.pkl")
        assert artifacts.load_checkpoint(best)
        assert record(best)["status"] == "running"


@pytest.mark.slow
@pytest.mark.parametrize(("when", "code"), [("atexit.register(interrupt)", 0), ("interrupt()", 130)])
def test_an_interrupt_too_late_or_twice_prints_no_traceback(when, code):
    script = f"""
import atexit, os, signal
from functools import partial
from common import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt = partial(os.kill, os.getpid(), signal.SIGINT)
def main():
    {when}
say, cli._say = cli._say, lambda *said: (interrupt(), say(*said))
cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code == 130), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("disk", "reason"), [("size=1m", "No space left on device"), ("ro", "Read-only file system")])
def test_a_disk_that_takes_nothing_more_is_one_line(tmp_path, disk, reason):
    """A small disk in memory, seen by this command alone."""
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o {disk} none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no user mount a disk in memory; the next test stands in for it")
    train = " ".join([sys.executable, "train_stage1.py", *TRAIN, "--Save_dir", str(tmp_path / "out")])
    command = [*inside, f"{mount} && {train}; code=$?; find {tmp_path} -name '*.tmp' >&2; exit $code"]
    done = subprocess.run(command, cwd=ROOT / "mlp", env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert reason in done.stderr


@pytest.mark.slow
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

    monkeypatch.setattr("common.training.train_epoch", refuse)
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
    with pytest.raises(InputError, match=rf"{broken} is no readable image.*`skip_unreadable`"):
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
    with pytest.raises(InputError, match=r"0\.jpg is no readable image.*`skip_unreadable`"):
        list(data.train.batches(5))
    data = load("ImageNet", tmp_path, val_size=0, device=CPU, skip=True)
    for batches in (data.train.batches(5), data.train.shuffled(5, 0, model_of("resnet50").augment())):
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
        expected = "the class folder flower is not in"
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
        shares = activations.output_sensitivity(network, keys, split)
        assert all((share >= 0).all() and np.isfinite(share).all() for share in shares.values())
        parents, children = activations.collect_activations(network, keys, split)["fc2.weight"]
        blocks = masks.contiguous_blocks(network, "fc2.weight", 50, 30)
        for options in ({}, {"estimator": "gaussian", "given": "kept", "snr": shares["fc2.weight"]}):
            scores = layer_cmi(children, parents, blocks.child_groups, blocks.parent_groups, **options)
            assert (scores == 0).all()
        kept = masks.select_balanced(scores, blocks.weights, 0.9)
        assert kept.mean() == pytest.approx(0.1)

    @pytest.mark.parametrize("balanced", [False, True])
    def test_dead_layers_are_pruned_and_refitted(self, network, balanced):
        """fc1 returns nothing: fc2 is its bias, before and after."""
        with torch.no_grad():
            network.fc1.weight.zero_()
            network.fc1.bias.fill_(-1)
        split = Split(torch.randint(0, 255, (60, 1, 28, 28), dtype=torch.uint8), torch.arange(60) % 10)
        blocks = {"fc2.weight": masks.contiguous_blocks(network, "fc2.weight", 50, 30)}
        ranks = masks.rank("magnitude", network, blocks, None)
        kept = masks.select_blocks(ranks, blocks, 0.8, [0.9], balanced=balanced)
        mask = masks.Mask.of_blocks(kept, blocks, network)
        dense, wanted = copy.deepcopy(network), network(split.images / 255)
        mask.apply(network)
        refit.refit(network, dense, mask, split)
        assert all(p.isfinite().all() for p in network.parameters())
        torch.testing.assert_close(network(split.images / 255), wanted, rtol=1e-4, atol=1e-4)

    def test_weights_that_are_not_numbers_are_refused(self, network, tmp_path, call):
        with torch.no_grad():
            network.fc2.weight[3, 4] = float("nan")
        content = artifacts.checkpoint_bytes({"state_dict": network.state_dict(), "epoch": 1})
        records.save({tmp_path / "logits_best.pkl": content}, {"stage": 1, "status": "complete"})
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
