"""Whatever the shell, the cluster and the terminal are: the same result, or one line that says what is wrong."""

import errno
import itertools
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, record

from campaigns import GROUPS, TRAIN
from common import cli, files, parallel
from common.cmi import inputs
from common.cmi.inputs import out_of_memory
from common.errors import InputError

ONE_EPOCH = ["train_stage1.py", *TRAIN, "--Epoch", "1"]
SETTINGS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def call(call_in):
    return partial(call_in, "mlp")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    run(*ONE_EPOCH, "--Save_dir", folder)
    run("pruning_1b.py", *SCORE, "--weights_dir", folder / "0")
    return folder / "0"


SCORE = ["--dataset", "DIGITS", "--samples_per_class", "20", "--key_id", "0", *GROUPS]


def run(*command, code=0, cwd=ROOT / "mlp", python=(), **environment):
    done = subprocess.run(
        [sys.executable, *python, *map(str, command)],
        cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr.decode(errors="replace")
    return done.stdout + done.stderr


@pytest.mark.parametrize("present", [c for n in range(5) for c in itertools.combinations(SETTINGS, n)])
def test_a_cluster_that_sets_some_variables_is_no_torchrun(monkeypatch, present):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name in present:
        monkeypatch.setenv(name, SETTINGS[name])
    with parallel.processes():
        assert (parallel.rank(), parallel.size(), parallel.local_gpu(3)) == (0, 1, 3)


@pytest.mark.parametrize("name", SETTINGS)
def test_senseless_variables_are_one_line(tmp_path, call, monkeypatch, name):
    for key, value in {**SETTINGS, "RANK": "0", "LOCAL_RANK": "0", name: "x"}.items():
        monkeypatch.setenv(key, value)
    if name == "MASTER_ADDR":
        monkeypatch.setattr("torch.distributed.init_process_group", _no_host)
    said = call(*ONE_EPOCH, "--Save_dir", tmp_path / "out", code=2)
    assert "the processes cannot be joined" in said
    assert len([line for line in said.splitlines() if "error" in line]) == 1


@pytest.mark.parametrize(
    "changed", [{"RANK": "1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "9" * 20}, {"MASTER_PORT": "9" * 20}]
)
def test_numbers_that_no_torchrun_gives_are_one_line(monkeypatch, changed):
    """A process that is none of the group would wait for ever."""
    for key, value in {**SETTINGS, "RANK": "0", "WORLD_SIZE": "1", **changed}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match="the processes cannot be joined") as error, parallel.processes():
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changed", [{"LOCAL_RANK": "9" * 20}, {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}])
def test_a_process_that_cannot_be_says_what_is_wrong(tmp_path, call, monkeypatch, changed):
    """It took itself for one of several, of which the first speaks: exit code 2 without a word."""
    for name, value in {**SETTINGS, "RANK": "0", "MASTER_PORT": "x", **changed}.items():
        monkeypatch.setenv(name, value)
    said = call(*ONE_EPOCH, "--Save_dir", tmp_path, code=2)
    assert "the processes cannot be joined" in said


def _no_host(**_):
    raise torch.distributed.DistNetworkError("no such host")


@pytest.mark.parametrize(
    ("rank", "local_rank", "said"), [(0, 0, 1), (2, 2, 0), (3, 0, 1)], ids=["first", "third", "first of a second host"]
)
def test_more_processes_than_gpus_are_one_line_a_host(tmp_path, call, monkeypatch, rank, local_rank, said):
    """All of them see it: torchrun kills those that wait for one that has failed before they can speak."""
    for key, value in {
        **SETTINGS,
        "WORLD_SIZE": 6,
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": 3,
    }.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    shown = call(*ONE_EPOCH, "--Save_dir", tmp_path, code=2)
    assert shown.count("there are 2; start as many (torchrun --nproc_per_node 2)") == said


@pytest.mark.slow
@pytest.mark.parametrize("python", [(), ("-P",), ("-m",)])
def test_scripts_find_their_modules(tmp_path, python):
    """Also where the script's folder is not on the path, and as a module."""
    script = "mlp.train_stage1" if python == ("-m",) else ROOT / "mlp" / "train_stage1.py"
    run(script, *ONE_EPOCH[1:], "--Save_dir", tmp_path, cwd=ROOT if python == ("-m",) else tmp_path, python=python)
    assert record(tmp_path / "0" / "logits_best.pkl")["code"].keys() == {"model.py", "train_stage1.py"}


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_only(tmp_path):
    out = tmp_path / "fôlder"
    said = run(*ONE_EPOCH, "--Save_dir", out, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert b"f\\xf4lder" in said or b"f\\udcc3\\udcb4lder" in said


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(tmp_path, closed):
    command = [sys.executable, *map(str, ONE_EPOCH), "--Save_dir", str(tmp_path)]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *command],
        cwd=ROOT / "mlp",
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0" / "logits_final.json").is_file()


@pytest.mark.slow
def test_an_error_is_said_by_one_of_several_processes(tmp_path):
    """Also where it is not process 0 that meets it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from common import cli, parallel\nfrom common.errors import InputError\n"
        "if sys.argv[1] == 'gpus':\n    import torch\n    torch.cuda.device_count = lambda: 1\n"
        "def main():\n"
        "    if parallel.rank() == 1 or sys.argv[1] == 'all':\n        raise InputError('what is wrong')\n"
        "    parallel.barrier()\n"
        "cli.run(main)\n"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for who in ("one", "all"):
        said = run(script, who, code=1, python=torchrun).decode()
        assert said.count("script.py: error: what is wrong") == 1, said
    said = run(script, "gpus", code=1, python=torchrun).decode()
    assert said.count("script.py: error: more processes than GPUs: there are 1;") == 1, said


def test_stage_2_under_torchrun_is_refused(base, call, monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    assert "stage 2 is one process that uses all cores (--cores)" in call("pruning_1b.py", *SCORE, code=2)


def test_a_compiler_that_is_not_there_is_one_line(tmp_path, call, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(*_args, **_options):
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch.compile", fail)
    said = call(*ONE_EPOCH, "--Compile", "--Save_dir", tmp_path / "out", code=2)
    assert "--Compile: torch.compile fails here" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(InputError, match=r"is on a file system without locks \(flock\)"),
        files.file_lock(tmp_path / "new" / "x.pkl"),
    ):
        pass


def test_a_lock_of_another_user_is_named(tmp_path, monkeypatch):
    """A process of theirs that was killed left it, in a folder that many may write to."""
    monkeypatch.setattr("filelock.FileLock.acquire", lambda _: (_ for _ in ()).throw(PermissionError(13, "no")))
    refused = pytest.raises(InputError, match=rf"^{tmp_path}/\.x\.pkl\.lock cannot be written to \(no\)")
    with refused, files.file_lock(tmp_path / "x.pkl"):
        pass


@pytest.mark.parametrize(
    ("end", "said", "code"), [(None, "No space left on device", 2), (KeyboardInterrupt, "interrupted", 130)]
)
def test_what_cannot_be_printed_is_one_line(monkeypatch, capsys, end, said, code):
    """A log on a full disk, or a pipe that ended: Python would complain once more, with exit code 120."""

    def main():
        print("x")
        if end:
            raise end

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("os._exit", sys.exit)
    with Path("/dev/full").open("w") as full:  # closing it writes what is left, as Python's way out does
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err.count(f"error: {said}; the same command goes on") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--Device_ids 0 1", "--Device_ids 0 1: one GPU a process; for several use torchrun"),
        ("--Batch_size 10000000000000000000", "argument --Batch_size: 10000000000000000000 is not a whole number"),
        ("--Seed 18446744073709551616", "argument --Seed"),
        ("--Workers 100000", "argument --Workers: 100000 is not a whole number at least 0 and at most 1024"),
    ],
)
def test_more_bad_input_is_one_line(tmp_path, call, flags, message):
    lines = call(*ONE_EPOCH, "--Save_dir", tmp_path / "out", *flags.split(), code=2).splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "out").exists()


def test_no_more_processes_read_images_than_there_are_processors(base, call, monkeypatch):
    """`--cores` is what stage 2 reads image files with, too."""

    def refuse(*_, workers, **__):
        raise InputError(f"{workers} processes")

    monkeypatch.setattr(cli, "load", refuse)
    said = call("pruning_1b.py", *SCORE, "--weights_dir", base, "--cores", 2**31 - 1, code=2)
    assert f"error: {cli.CORES} processes" in said


@pytest.mark.parametrize("value", ["abc", "", "1.5", "0", "-3", "1"])
def test_a_number_of_processors_that_is_none_counts_as_none(monkeypatch, value):
    """The scripts ended in joblib's traceback when they were imported, --help too."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", value)
    assert 1 <= inputs.processors() <= len(os.sched_getaffinity(0))
    assert list(inputs.in_parallel(abs, [-1, 2], n_jobs=-1)) == [1, 2]


def test_a_class_that_is_named_twice_counts_once(tmp_path, call):
    call(*ONE_EPOCH, "--Classes", "3", "5", "3", "--Val_size", "20", "--Save_dir", tmp_path)
    assert record(tmp_path / "0" / "logits_best.pkl")["data"]["classes"] == ["3", "5"]


def test_few_rows_are_one_line(tmp_path, base, call):
    for name in ("logits_best.pkl", "logits_best.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    few = ["--samples_per_class", "1", "--classes", "3", "5", "--weights_dir", tmp_path]
    said = call("pruning_1b.py", *SCORE, *few, code=2)
    assert "--classes 3 5: the checkpoint was trained with all; use the same" in said
    checkpoint = torch.load(tmp_path / "logits_best.pkl", weights_only=True)
    torch.save({**checkpoint, "classes": ["3", "5"]}, tmp_path / "logits_best.pkl")
    (tmp_path / "logits_best.json").unlink()
    said = call("pruning_1b.py", *SCORE, *few, code=2)
    assert "2 rows; at least 3 are needed; try more --samples_per_class" in said


def test_scores_may_be_named_by_their_file(base, tmp_path, call):
    prune = ["retrain_stage3.py", *TRAIN, *GROUPS, "--no-Refit", "--Epoch", "0", "--Prune_per", "0.5"]
    prune += ["--Retrain", base / "logits_best.pkl"]
    for name, suffix in (("family", ""), ("file", "_fc1.weight_fc2.weight")):
        labels = ["--Labels_file", base / f"Labels_cmi{suffix}.npy"]
        scores = ["--Retrain_mask", base / f"I_parent_cmi{suffix}.npy"]
        call(*prune, *labels, *scores, "--Save_dir", tmp_path / name)
    first, second = (tmp_path / name / "0" / "logits_50.00.pkl" for name in ("family", "file"))
    assert first.read_bytes() == second.read_bytes()


def test_shares_that_coincide_say_so(base, tmp_path, call):
    """With 2 x 2 groups 30 and 40 % are both one block and two."""
    prune = ["retrain_stage3.py", *TRAIN, "--Criterion", "random", "--no-Refit", "--Epoch", "0"]
    prune += ["--Retrain", base / "logits_best.pkl", "--Save_dir", tmp_path]
    prune += ["--parent_clusters", "2", "--children_clusters", "2", "--Prune_per"]
    call(*prune, "0.3")
    said = call(*prune, "0.4", code=2)
    assert re.search(
        r"--Prune_per 0.3 \(now 0.4\); .*, or remove logits_50.00.\* \(coarse groups give several shares", said
    )


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "DataLoader worker (pid 7) is killed by signal: Bus error. Workers may be out of shared memory.",
    ],
)
def test_want_of_memory_is_recognised(message):
    assert out_of_memory(RuntimeError(message))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
