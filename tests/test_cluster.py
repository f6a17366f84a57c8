"""Several machines: scores on a Dask cluster are the local run's bits, and training goes on where a host was lost."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, editable, record, shell
from dask.distributed import Client, LocalCluster
from threadpoolctl import threadpool_limits

from campaigns import TRAIN
from common import cluster
from common.cmi import kde, layer_cmi

SCORE = "pruning_1b.py --dataset DIGITS --samples_per_class 110 --key_id 0 --weights_dir".split()
LOST = "another process ended early"
VANISH = """        if epoch == 3 and "VANISHES" in os.environ:
            os.kill(os.getppid(), 9)
            os.kill(os.getpid(), 9)
"""  # a process of torchrun, and the agent that started it
INTERRUPTED = """
import os, runpy, signal, sys
sys.path[:0] = [os.getcwd(), os.path.dirname(os.getcwd())]
from common import artifacts, scoring
save, scoring.SAVE_EVERY = artifacts.save_state, 0
def save_and_interrupt(*state):
    save(*state)
    os.kill(os.getpid(), signal.SIGINT)
artifacts.save_state = save_and_interrupt
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # a script, and Ctrl-C as soon as there is a state


@pytest.fixture
def call(call_in):
    return partial(call_in, "mlp")


@pytest.fixture
def data(rng):
    """Children, parents and their groups; twice as wide as a task of BLAS that is done by several threads."""
    parents = rng.normal(size=(400, 160))
    children = np.maximum(parents @ rng.normal(size=(160, 40)), 0)
    return children, parents, np.arange(40) // 4, np.arange(160) // 5


@pytest.mark.parametrize("estimator", ["kde", "gaussian"])
def test_whoever_does_the_tasks_scores_are_the_same_bits(data, estimator, monkeypatch):
    options = {"estimator": estimator, **({"given": "kept"} if estimator == "gaussian" else {})}
    monkeypatch.setattr("common.cmi.backward.MEMORY", 1)  # so that there are several tasks
    done = []

    def elsewhere(function, tasks):
        done.extend(tasks)
        yield from map(function, tasks)

    assert (layer_cmi(*data, **options, n_jobs=elsewhere) == layer_cmi(*data, **options, n_jobs=2)).all()
    assert len(done) > 5


def test_scores_do_not_depend_on_the_threads_of_blas(data):
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(layer_cmi(*data, estimator="gaussian", given="kept"))
    assert (found[0] == found[1]).all()


def test_long_tasks_are_of_fewer_rows(data, monkeypatch):
    reached = []
    monkeypatch.setattr(kde, "TASK_OPERATIONS", 7 * 2 * 400 * 11 * 33)
    scores = layer_cmi(*data, on_rows=lambda done, _: reached.append(done))
    assert reached == [*range(7, 400, 7), 400]
    monkeypatch.undo()
    np.testing.assert_allclose(scores, layer_cmi(*data), atol=1e-12)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--scheduler tcp://127.0.0.1:1", "--scheduler tcp://127.0.0.1:1: Timed out trying to connect"),
        ("--scheduler a:1", "argument --scheduler: 'a:1' is not tcp://HOST:PORT"),
        ("--scheduler tcp://127.0.0.1:1 --device cuda", "--scheduler: its workers compute on CPUs"),
        ("--scheduler", "argument --scheduler: expected one argument"),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_one_line(tmp_path, call, monkeypatch, flags, said):
    monkeypatch.setattr(cluster, "PATIENCE", 0.5)
    (line,) = call(*SCORE, tmp_path, *flags.split(), code=2).splitlines()
    assert said in line


def test_without_dask_the_line_says_what_to_install(tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    (line,) = call(*SCORE, tmp_path, "--scheduler", "tcp://127.0.0.1:1", code=2).splitlines()
    assert "--scheduler: dask is not installed; pip install -r requirements-cluster.txt" in line


@pytest.fixture(scope="module")
def workers():
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as started:
        yield started
        cluster.connect.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["kde", "gaussian"])
def test_workers_give_the_local_bits_while_they_are_killed(workers, rng, monkeypatch, estimator):
    monkeypatch.setattr("common.cmi.backward.MEMORY", 1)
    monkeypatch.setattr(cluster, "SECONDS", 0.05)
    parents = rng.normal(size=(1600, 300))
    children = np.maximum(parents @ rng.normal(size=(300, 200)), 0)
    layer = children, parents, np.arange(200) // 2, np.arange(300) // 3
    options = {"estimator": estimator, **({"given": "kept"} if estimator == "gaussian" else {})}
    killed, finished = set(), threading.Event()

    def kill():
        while len(killed) < 3 and not finished.wait(0.5):
            pid = next(iter({worker.pid for worker in workers.workers.values()} - killed - {None}), None)
            if pid:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)

    run, killer = cluster.connect(workers.scheduler_address), threading.Thread(target=kill)

    def disturbed(function, tasks):
        killer.start()
        yield from run(function, tasks)

    scores = layer_cmi(*layer, **options, n_jobs=disturbed)
    finished.set()
    killer.join()
    assert killed
    assert (scores == layer_cmi(*layer, **options, n_jobs=2)).all()


@pytest.mark.slow
def test_when_all_workers_are_gone_one_line_says_so_and_new_ones_go_on(data, monkeypatch, capsys):
    monkeypatch.setattr(kde, "TASK_OPERATIONS", 7 * 2 * 400 * 11 * 33)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as workers:
        with Client(workers.scheduler_address) as client:
            client.wait_for_workers(1)
        run = cluster.connect(workers.scheduler_address)
        monkeypatch.setattr(cluster, "PATIENCE", 0.2)

        def deserted(function, tasks):
            workers.scale(0)
            while workers.scheduler.workers:
                time.sleep(0.01)
            waiting = threading.Thread(target=come_back)
            waiting.start()
            yield from run(function, tasks)
            waiting.join()

        def come_back():
            while "no workers left" not in said[0]:
                said[0] += capsys.readouterr().err
            workers.scale(1)

        said = [""]
        scores = layer_cmi(*data, n_jobs=deserted)
        said[0] += capsys.readouterr().err
        cluster.connect.cache_clear()
    assert said[0] == f"{workers.scheduler_address} has no workers left; waiting for new ones\n"
    assert (scores == layer_cmi(*data, n_jobs=2)).all()


@pytest.mark.slow
def test_ctrl_c_on_a_cluster_and_on_from_there_without_it(workers, tmp_path):
    shell("mlp", "train_stage1.py", *TRAIN, "--Epoch", 1, "--Save_dir", tmp_path)
    score = [*SCORE, tmp_path / "0", "--precision", "double"]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, score), "--scheduler", workers.scheduler_address]
    options = {"cwd": ROOT / "mlp", "env": ENVIRONMENT, "text": True, "capture_output": True, "check": False}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    done = subprocess.run(command, **options)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "pruning_1b.py: error: interrupted; the same command goes on from what is written\n"
    assert list((tmp_path / "0").glob("*.state"))
    shell("mlp", *score)
    shell("mlp", *score, "--name_postfix", "there", "--scheduler", workers.scheduler_address)
    here, there = (tmp_path / "0" / f"I_parent_{name}_fc1.weight_fc2.weight.npy" for name in ("cmi", "there"))
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.slow
def test_workers_of_other_versions_or_without_this_code_are_one_line(workers, tmp_path, call, monkeypatch):
    score = [*SCORE, tmp_path, "--scheduler", workers.scheduler_address]
    cluster.connect.cache_clear()
    ours = cluster._versions()
    with monkeypatch.context() as other:
        other.setattr(cluster, "_versions", lambda: {**ours, "numpy": "1.0"})
        (line,) = call(*score, code=2).splitlines()
    assert f"a worker has numpy {np.__version__}, not 1.0; start it" in line
    bare = {**ENVIRONMENT, "PYTHONPATH": ""}
    start = [sys.executable, "-m", "distributed.cli.dask_worker", workers.scheduler_address]
    stranger = subprocess.Popen([*start, "--no-nanny", "--name", "stranger"], cwd=tmp_path, env=bare)
    try:
        with Client(workers.scheduler_address) as client:  # others may still be on their way back from the dead
            while "stranger" not in {worker["name"] for worker in client.scheduler_info(-1)["workers"].values()}:
                assert stranger.poll() is None
                time.sleep(0.1)
        (line,) = call(*score, code=2).splitlines()
    finally:
        stranger.kill()
    assert "No module named 'common'" in line


def agents(folder, *command, **second):
    """Two of torchrun's agents, as on two hosts, with a process each, and what else the second's environment holds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    meet = f"--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint {where} --local_addr 127.0.0.1".split()
    command = [sys.executable, "-m", "torch.distributed.run", *meet, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, cwd=folder, env={**ENVIRONMENT, **more}, **pipes) for more in ({}, second)]


@pytest.mark.slow
def test_a_host_that_vanishes_stops_training_and_both_go_on_to_what_one_process_finds(tmp_path):
    """For a network without randomness and batch norm of its own, up to rounding."""
    net = editable(tmp_path / "repository", "mlp")
    (net / "model.py").write_text((net / "model.py").read_text().replace("Dropout(0.2)", "Dropout(0.0)"))
    script = net / "train_stage1.py"
    before, loop, rest = script.read_text().partition(", schedule):  # from where a killed run was\n")
    script.write_text(before.replace("import sys", "import os\nimport sys") + loop + VANISH + rest)
    train = "train_stage1.py --Dataset DIGITS --Val_size 200 --Epoch 8 --Batch_size 64 --Milestones 6 --Lr 0.02".split()
    shell(net, *train, "--Save_dir", tmp_path / "one")
    hosts = agents(net, *train, "--Save_dir", tmp_path / "two", VANISHES="1")
    said = hosts[0].communicate(timeout=120)[0]
    assert hosts[0].returncode == 1
    assert said.count("train_stage1.py: error: ") == said.count(LOST) == 1, said
    hosts[1].communicate()
    said = "".join(host.communicate(timeout=300)[0] for host in agents(net, *train, "--Save_dir", tmp_path / "two"))
    assert "goes on after epoch" in said, said
    paths = [tmp_path / folder / "0" / "logits_final.pkl" for folder in ("one", "two")]
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert record(paths[1])["processes"] == 2
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-3, atol=1e-5)
    assert record(paths[0])["test"]["loss"] == pytest.approx(record(paths[1])["test"]["loss"], rel=1e-3)
