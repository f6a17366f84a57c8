"""Files: written whole or not at all, checked when read, nothing executed."""

import pickle
import subprocess
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from campaigns import Code
from common import artifacts, files, records
from common.errors import InputError


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "logits_best.pkl"
    content = artifacts.checkpoint_bytes({"state_dict": nn.Linear(3, 2).state_dict(), "epoch": 7})
    records.save({path: content}, {"status": "complete"})
    return path


def test_checkpoint_round_trip(checkpoint):
    network = nn.Linear(3, 2)
    assert artifacts.load_weights(network, checkpoint)["epoch"] == 7
    torch.manual_seed(0)
    assert torch.equal(network.weight, nn.Linear(3, 2).weight)
    assert not list(checkpoint.parent.glob("*.tmp"))


def test_equal_states_give_equal_bytes(checkpoint):
    assert artifacts.checkpoint_bytes(artifacts.load_checkpoint(checkpoint)) == checkpoint.read_bytes()


@pytest.mark.parametrize("position", range(0, 2000, 97))
def test_a_flipped_bit_is_detected(checkpoint, position):
    content = bytearray(checkpoint.read_bytes())
    content[position % len(content)] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(InputError, match=r"logits_best\.pkl is damaged"):
        artifacts.load_checkpoint(checkpoint)


def test_a_finished_run_whose_files_are_lost_or_damaged_is_not_complete(tmp_path, capsys):
    """Who reads them says what to run; that must make them again, or say what to remove."""
    scores, labels = tmp_path / "scores.npy", tmp_path / "labels.npy"
    records.save({scores: b"1", labels: b"2"}, {"status": "complete"})
    assert records.is_complete(scores, {}, "remove them")
    assert "is complete already" in capsys.readouterr().out
    labels.write_bytes(b"3")
    with pytest.raises(InputError, match=r"labels.npy is damaged: its checksum is not that of scores.json; remove the"):
        records.is_complete(scores, {}, "remove them")
    labels.unlink()
    assert not records.is_complete(scores, {}, "remove them")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("length", [0, 1, 500])
def test_a_truncated_checkpoint_is_refused_also_without_record(checkpoint, length):
    checkpoint.write_bytes(checkpoint.read_bytes()[:length])
    records.record_path(checkpoint).unlink()
    with pytest.raises(InputError, match="is not a checkpoint"):
        artifacts.load_checkpoint(checkpoint)


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    path, canary = tmp_path / "evil.pkl", tmp_path / "canary"
    torch.save({"state_dict": Code(canary)}, path)
    with pytest.raises(InputError, match="is not a checkpoint of tensors and plain values"):
        artifacts.load_checkpoint(path)
    path.write_bytes(pickle.dumps(Code(canary), protocol=2))
    with pytest.raises(InputError, match="is not a checkpoint of tensors and plain values"):
        artifacts.load_checkpoint(path)
    assert not canary.exists()


def test_what_is_no_plain_value_is_named(tmp_path):
    torch.save({"state_dict": {}, "best": np.float32(93)}, tmp_path / "x.pkl")
    with pytest.raises(InputError, match=r"plain values \(it holds a numpy\.[\w.]+\.scalar\)"):
        artifacts.load_checkpoint(tmp_path / "x.pkl")


def test_a_folder_in_place_of_a_checkpoint_is_said_to_be_no_file(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path.name} is no file; run train_stage1.py first"):
        artifacts.load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [{}, [1], {"state_dict": {"a": 1}}])
def test_a_checkpoint_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pkl")
    with pytest.raises(InputError, match="has no 'state_dict' of tensors"):
        artifacts.load_checkpoint(tmp_path / "x.pkl")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "a.b."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net"])
def test_checkpoints_of_other_programs_load(tmp_path, prefix, wrapper):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = {prefix + k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "x.pth")
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    artifacts.load_weights(other, tmp_path / "x.pth", foreign=True)
    assert torch.equal(other[0].weight, network[0].weight)


def test_names_that_are_a_network_s_own_are_no_prefix(tmp_path):
    network = nn.Sequential(OrderedDict(module=nn.Linear(3, 2)))
    torch.save({"model": "a name", "net": network.state_dict()}, tmp_path / "x.pth")
    other = nn.Sequential(OrderedDict(module=nn.Linear(3, 2)))
    artifacts.load_weights(other, tmp_path / "x.pth", foreign=True)
    assert torch.equal(other.module.weight, network.module.weight)


@pytest.mark.parametrize(
    "kind",
    [
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: t.to_sparse(),
        lambda t: t.to_sparse_csr(),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: t.to("meta"),
        lambda t: torch.complex(t, t),
        lambda t: t.double() * 1e300,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_one_line(tmp_path, kind):
    torch.save({"state_dict": {"weight": kind(torch.eye(40))}}, tmp_path / "x.pth")
    with pytest.raises(InputError) as error:
        artifacts.load_checkpoint(tmp_path / "x.pth", foreign=True)
    assert "x.pth" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dictionary_that_holds_itself_is_one_line(tmp_path):
    state = {"weight\n": torch.ones(1)}
    torch.save({**state, "net": state}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"there weight\\n is \(1,\), here absent") as error:
        artifacts.load_weights(nn.ReLU(), tmp_path / "x.pth", foreign=True)
    assert "\n" not in str(error.value)
    state["net"] = state
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match="has no 'state_dict' of tensors"):
        artifacts.load_checkpoint(tmp_path / "x.pth", foreign=True)


@pytest.mark.parametrize("status", ["running", "diverged"])
def test_a_checkpoint_of_an_unfinished_run_is_refused_where_a_finished_one_is_meant(checkpoint, status):
    known = records.read(records.record_path(checkpoint))
    records.write(records.record_path(checkpoint), {**known, "status": status})
    assert artifacts.load_checkpoint(checkpoint)
    with pytest.raises(InputError, match=r"logits_best.pkl is of a run that .*; run the command that makes it again"):
        artifacts.load_weights(nn.Linear(3, 2), checkpoint)


def test_what_a_link_leads_to_is_checked(checkpoint, tmp_path):
    """The record lies beside the file, which has another name than the link; a link to itself is no file."""
    link, known = tmp_path / "mine" / "dense.pkl", records.read(records.record_path(checkpoint))
    link.parent.mkdir()
    link.symlink_to(checkpoint)
    network = nn.Linear(3, 2)
    assert artifacts.load_weights(network, link).keys() == artifacts.load_checkpoint(checkpoint).keys()
    records.write(records.record_path(checkpoint), {**known, "status": "running"})
    with pytest.raises(InputError, match=r"dense.pkl is of a run that is not finished"):
        artifacts.load_weights(network, link)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"dense.pkl is damaged: its checksum is not that of logits_best.json"):
        artifacts.load_checkpoint(link)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(InputError, match=r"dense.pkl does not exist"):
        artifacts.load_weights(network, link)


def test_weights_of_another_network_name_the_layer(checkpoint):
    with pytest.raises(InputError, match=r"weight is \(2, 3\), here \(2, 4\)"):
        artifacts.load_weights(nn.Linear(4, 2), checkpoint)


def test_pickled_arrays_are_not_executed(tmp_path):
    path, canary = tmp_path / "x.npy", tmp_path / "canary"
    np.save(path, np.array([Code(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"x\.npy is not a plain \.npy array"):
        artifacts.load_array(path, tmp_path / "x.json", "make it again")
    path.write_bytes(pickle.dumps(Code(canary)))
    with pytest.raises(InputError, match=r"x\.npy is not a plain \.npy array"):
        artifacts.load_array(path, tmp_path / "x.json", "make it again")
    assert not canary.exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    files.write_bytes(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match=f"disk full: '{path}'"):  # the system names no file
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_run_is_known_and_another_is_not_overwritten(checkpoint):
    identity = {"arguments": {"Lr": 0.1}, "inputs": {"a.pkl": "00"}}
    records.write(records.record_path(checkpoint), {**identity, "status": "complete"})
    assert records.is_complete(checkpoint, identity, "remove it")
    with pytest.raises(InputError, match=r"`Lr` 0\.1 \(now 0\.2\); remove it"):
        records.is_complete(checkpoint, {**identity, "arguments": {"Lr": 0.2}}, "remove it")
    with pytest.raises(InputError, match=r"another a\.pkl"):
        records.is_complete(checkpoint, {**identity, "inputs": {"a.pkl": "11"}}, "remove it")
    records.write(records.record_path(checkpoint), {**identity, "status": "running"})
    assert not records.is_complete(checkpoint, identity, "remove it")


def test_a_record_without_its_file_is_no_finished_run(checkpoint):
    """As in a fresh clone, where records are committed and checkpoints are not."""
    records.write(records.record_path(checkpoint), {"arguments": {"Lr": 0.1}, "status": "complete"})
    checkpoint.unlink()
    assert not records.is_complete(checkpoint, {"arguments": {"Lr": 0.1}}, "remove it")
    with pytest.raises(InputError, match="`Lr`"):
        records.is_complete(checkpoint, {"arguments": {"Lr": 0.2}}, "remove it")


def test_records_show_no_path_outside_the_repository(tmp_path):
    assert files.display_path(tmp_path / "secret" / "x.pkl") == "x.pkl"
    assert files.display_path(files.RESULTS / "a" / "x.pkl") == "results/a/x.pkl"
    assert files.under_results("a/b") == files.RESULTS / "a" / "b"


def test_the_commit_is_not_that_of_a_repository_around_it(tmp_path, monkeypatch):
    """As of an archive that was unpacked within somebody's own repository."""
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a"]
    for command in ("init -q", "commit -q --allow-empty -m x"):
        subprocess.run([*git, *command.split()], check=True)
    (tmp_path / "unpacked").mkdir()
    for root, known in ((tmp_path, True), (tmp_path / "unpacked", False)):
        monkeypatch.setattr(records, "ROOT", root)
        assert (records._commit.__wrapped__() != "unknown") == known


def test_a_state_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "x.state"
    artifacts.save_state(path, {"done": 64})
    assert artifacts.load_state(path, "remove it") == {"done": 64}
