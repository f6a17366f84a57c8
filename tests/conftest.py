import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CONVOLUTIONAL = ("vgg16", "resnet56", "resnet50")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def rng():
    return np.random.default_rng(20200318)


def model_of(folder):
    """The module model.py of a network's folder."""
    spec = importlib.util.spec_from_file_location(f"{folder}_model", ROOT / folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Real images of two classes, parts of scikit-learn's two photographs, as CIFAR-10 and as ImageNet trees."""
    from sklearn.datasets import load_sample_image

    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    trees = {"cifar10": (32, {"train": 24, "test": 10}), "imagenet": (240, {"train": 6, "val": 4})}
    for tree, (side, counts) in trees.items():
        for split, count in counts.items():
            for name in ("china", "flower"):
                folder = root / tree / split / name
                folder.mkdir(parents=True)
                photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
                for k in range(count):
                    left, top = rng.integers(0, 640 - 240), rng.integers(0, 427 - 240)
                    part = photograph.crop((left, top, left + 240, top + 240)).resize((side, side))
                    part.save(folder / f"{k}.jpg", quality=90)
    return root


def shell(folder, script, *flags, code=0):
    """Run a script of a network's folder in a process of its own and return what it printed."""
    command = [sys.executable, script, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def editable(repository, name):
    """A copy of a network's folder, beside the common/ of this repository."""
    repository.mkdir()
    (repository / "common").symlink_to(ROOT / "common")
    shutil.copytree(ROOT / name, repository / name, ignore=shutil.ignore_patterns("__pycache__"))
    return repository / name


def record(path):
    """The record beside a file."""
    return json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def call_in(monkeypatch, capsys):
    """As `shell`, but in this process: the same, without the seconds it takes to import torch."""

    def run(folder, script, *flags, code=0):
        monkeypatch.chdir(ROOT / folder)
        monkeypatch.syspath_prepend(str(ROOT / folder))
        monkeypatch.delitem(sys.modules, "model", raising=False)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        exit_code, interrupt = 0, signal.getsignal(signal.SIGINT)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            exit_code = stop.code or 0
        finally:
            signal.signal(signal.SIGINT, interrupt)  # a script that ends ignores it
        output = "".join(capsys.readouterr())
        assert exit_code == code, output
        return output

    return run
