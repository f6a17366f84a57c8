"""Records of finished runs in one file per experiment."""

import json
import sys

import pytest

import collect
from common import files, records
from common.errors import InputError

EPOCHS = [{"epoch": 1, "train_loss": 0.1 + 0.2}, {"epoch": 2, "train_loss": 1e-07}]


def write(path, accuracy, status="complete", logged=None, **more):
    """A run's record, with a log of its epochs beside it if there are any."""
    record = {"stage": 3, "arguments": {"Lr": 0.1}, "status": status, "test": {"accuracy": accuracy}, **more}
    records.write(path, record)
    if logged:
        path.with_suffix(".jsonl").write_bytes(log(logged))


def log(epochs):
    return "".join(json.dumps(epoch) + "\n" for epoch in epochs).encode()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two finished runs and one at work, of one experiment."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    write(tmp_path / "fc2" / "kept" / "0" / "logits_90.00.json", 97.0, logged=EPOCHS)
    write(tmp_path / "fc2" / "kept-magnitude" / "0" / "logits_90.00.json", 98.0)
    write(tmp_path / "fc2" / "random" / "0" / "logits_90.00.json", 1.0, "running")
    return tmp_path


def test_lines_are_of_finished_runs_and_sorted(results):
    assert collect.collect(results / "fc2") == "fc2.jsonl: 2 runs (2 added, 0 replaced)"
    lines = [json.loads(line) for line in (results / "fc2.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [f"fc2/{x}/0/logits_90.00.json" for x in ("kept", "kept-magnitude")]
    assert list(lines[0]) == ["path", "stage", "arguments", "status", "test", "epochs", "sha256"]


def test_the_files_of_every_run_can_be_made_again_to_the_byte(results):
    write(results / "fc2" / "new" / "logits.json", 99.0, logged=EPOCHS[:1], epochs=EPOCHS)  # its own count
    collect.collect(results / "fc2")
    again = results / "again.json"
    for path, line in collect.read(results / "fc2.jsonl").items():
        epochs = line["epochs"] if path.startswith("fc2/new") else line.pop("epochs", None)
        records.write(again, {key: value for key, value in line.items() if key != "path"})
        assert again.read_bytes() == (results / path).read_bytes()
        assert epochs == (None if "magnitude" in path else EPOCHS)
    assert log(EPOCHS) == (results / "fc2" / "kept" / "0" / "logits_90.00.jsonl").read_bytes()


def test_runs_that_are_not_here_stay_and_others_are_added_or_replaced(results):
    collect.collect(results / "fc2")
    elsewhere = (results / "fc2.jsonl").read_bytes().splitlines()[1]
    (results / "fc2" / "kept-magnitude" / "0" / "logits_90.00.json").unlink()
    write(results / "fc2" / "kept" / "0" / "logits_90.00.json", 97.5)
    write(results / "fc2" / "random" / "0" / "logits_90.00.json", 90.0)
    assert collect.collect(results / "fc2").endswith(": 3 runs (1 added, 1 replaced)")
    lines = collect.read(results / "fc2.jsonl").values()
    assert [line["test"]["accuracy"] for line in lines] == [97.5, 98.0, 90.0]
    assert (results / "fc2.jsonl").read_bytes().splitlines()[1] == elsewhere


def test_runs_behind_links_count_once(results):
    """A folder of runs that was moved to another disk; a link to a run that is here; a link that leads back."""
    (results / "fc2" / "kept").rename(results / "moved")
    links = {"kept": results / "moved", "a": results / "fc2" / "kept-magnitude", "loop": results / "fc2"}
    for name, target in links.items():
        (results / "fc2" / name).symlink_to(target)
    assert collect.collect(results / "fc2") == "fc2.jsonl: 2 runs (2 added, 0 replaced)"
    paths = [f"fc2/{name}/0/logits_90.00.json" for name in ("kept", "kept-magnitude")]
    assert list(collect.read(results / "fc2.jsonl")) == paths


def test_collecting_again_changes_nothing(results):
    collect.collect(results / "fc2")
    before = (results / "fc2.jsonl").read_bytes()
    assert collect.collect(results / "fc2").endswith(": 2 runs (0 added, 0 replaced)")
    assert (results / "fc2.jsonl").read_bytes() == before
    (results / "fc2.jsonl").unlink()
    collect.collect(results / "fc2")
    assert (results / "fc2.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("fc2.jsonl", lambda b: b.replace(b"98.0", b"99.0"), "fc2.jsonl, line 2, is damaged: it is not as"),
        ("fc2.jsonl", lambda b: b[:-9], "fc2.jsonl, line 2, is damaged"),
        ("fc2.jsonl", lambda b: b.replace(b'"path"', b'"p\xffth"', 1), "fc2.jsonl, line 1, is damaged"),
        ("fc2.jsonl", lambda b: b"[]\n" + b, "fc2.jsonl, line 1, is damaged"),
        ("fc2.jsonl", lambda b: b + b, "fc2.jsonl, line 3: fc2/kept/0/logits_90.00.json stands there twice"),
        ("fc2/kept/0/logits_90.00.json", lambda b: b.replace(b"97.0", b"99.0"), "logits_90.00.json is damaged"),
        ("fc2/kept/0/logits_90.00.jsonl", lambda b: b[:-9], "logits_90.00.jsonl, line 2, is damaged"),
    ],
)
def test_damage_is_one_line_that_names_file_and_line(results, name, damage, told):
    collect.collect(results / "fc2")
    before = (results / "fc2.jsonl").read_bytes()
    (results / name).write_bytes(damage((results / name).read_bytes()))
    with pytest.raises(InputError) as error:
        collect.collect(results / "fc2")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert name == "fc2.jsonl" or (results / "fc2.jsonl").read_bytes() == before


def test_only_folders_of_runs_are_experiments(results, monkeypatch, capsys):
    write(results / "demo" / "cmi" / "logits.json", 97.0)
    (results / "figures").mkdir()
    monkeypatch.setattr(sys, "argv", ["collect"])
    collect.main()
    assert capsys.readouterr().out == "fc2.jsonl: 2 runs (2 added, 0 replaced)\n"
    assert [path.name for path in results.glob("*.jsonl")] == ["fc2.jsonl"]
    for name in ("fc3", "demo", "fc2/kept", "..", ""):
        with pytest.raises(InputError, match="no experiment"):
            collect.collect(results / name)


def test_what_was_collected_is_read_and_else_the_folder(results):
    assert [line["test"]["accuracy"] for line in collect.finished(results / "fc2")] == [97.0, 98.0]
    collect.collect(results / "fc2")
    (results / "fc2").rename(results / "demo")
    assert [line["test"]["accuracy"] for line in collect.finished(results / "fc2")] == [97.0, 98.0]
    assert [line["test"]["accuracy"] for line in collect.finished(results / "fc2" / "kept")] == [97.0]
    assert [line["test"]["accuracy"] for line in collect.finished(results / "demo")] == [97.0, 98.0]
    assert collect.finished(results / "not run yet") == []
