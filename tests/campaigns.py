"""Campaigns against the scripts and their files: many kills, flipped bits, hostile files, senseless flags and more.

    python tests/campaigns.py [--kills N] [--flips N] [--own_networks N] ... [--record FILE]

N kills of each stage, N ways to damage each kind of file, N random trials of each kind in TRIALS. The tests run short
campaigns; `make soak` runs long ones and writes results/soak.json.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trials
from common import artifacts, cli, datasets, records
from common.errors import InputError
from random_networks import own_network
from trials import TRAIN, Code, artefacts, counted, finish, forked, model, parsed

TRIALS = {
    "files": trials.random_file,
    "command_lines": trials.command_line,
    "image_trees": trials.image_tree,
    "checkpoints": trials.foreign_checkpoint,
    "environments": trials.environment,
    "own_networks": own_network,
}

GROUPS = "--parent_clusters 50 --children_clusters 30".split()


def stages(folder: Path) -> dict[str, tuple[list, Path, list[str]]]:
    """By stage: script and flags, the folder it writes to and the files of which every byte is determined."""
    base = folder / "base" / "0"
    scores = [f"{kind}_cmi_fc1.weight_fc2.weight.npy" for kind in ("I_parent", "Labels", "Labels_children")]
    score = "--dataset DIGITS --samples_per_class 60 --key_id 0 --cores 1".split()
    prune = [*TRAIN, *GROUPS, "--Retrain", base / "logits_best.pkl", "--Prune_per", "0.9"]
    prune += ["--Samples_per_class", "60"]
    out = folder / "out"
    return {
        "1": (
            ["train_stage1.py", *TRAIN, "--Save_dir", folder / "base"],
            base,
            ["logits_best.pkl", "logits_final.pkl"],
        ),
        "2": (["pruning_1b.py", *score, *GROUPS, "--weights_dir", base], base, scores),
        "3": (["retrain_stage3.py", *prune, "--Save_dir", out], out / "0", ["logits_90.00.pkl"]),
    }


def kills(stage: str, count: int, seed: int = 0) -> dict:
    """Kill a stage at random moments and start it again, until `count` kills are done and the last run has finished.

    Returns
    -------
    Number of kills and of finished runs; how many of those had other bytes than an undisturbed run (must be 0), and how
    many files were seen that were not whole (must be 0).
    """
    rng, done = np.random.default_rng([seed, int(stage)]), {"kills": 0, "finished": 0, "other_bytes": 0, "not_whole": 0}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for before in range(1, int(stage)):
            assert finish(forked(*stages(scratch)[str(before)][0])) == 0
        start = time.monotonic()
        command, out, names = stages(scratch)[stage]
        kept = scratch / "kept"
        shutil.copytree(scratch / "base", kept) if stage != "1" else kept.mkdir()
        assert finish(forked(*command)) == 0
        seconds, wanted = time.monotonic() - start, {name: (out / name).read_bytes() for name in names}
        while done["kills"] < count:
            shutil.rmtree(scratch / "out", ignore_errors=True)
            shutil.rmtree(scratch / "base")
            shutil.copytree(kept, scratch / "base")
            code = None
            while code != 0:
                child = forked(*command)
                time.sleep(rng.uniform(0, 1.2 * seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL if done["kills"] < count else 0)
                code = finish(child)
                assert code in (0, -signal.SIGKILL), f"the restarted run ended with {code}"
                done["kills"] += code != 0
                done["not_whole"] += sum(not whole(path) for path in out.glob("[!.]*"))
            done["finished"] += 1
            done["other_bytes"] += any((out / name).read_bytes() != wanted[name] for name in names)
            left = [path.name for path in out.iterdir() if path.suffix in (".lock", ".state")]
            assert not left, left
    return done


def whole(path: Path) -> bool:
    """Whether a file is one that its reader takes."""
    try:
        if path.suffix == ".json":
            records.read(path)
        elif path.suffix == ".state":
            artifacts.load_state(path, "")
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".pkl":
            torch.load(path, weights_only=True)
        return True
    except (InputError, ValueError, EOFError, RuntimeError):
        return False


def damaged(content: bytes, other: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """One kind of damage: a flipped bit (mostly), the file cut, emptied, or swapped with another of its kind."""
    kind = rng.choice(["bit", "cut", "emptied", "swapped"], p=[0.91, 0.05, 0.02, 0.02])
    if kind == "bit":
        place = rng.integers(len(content))
        return kind, content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :]
    return kind, {"cut": content[: rng.integers(1, len(content))], "emptied": b"", "swapped": other}[kind]


def flips(count: int, seed: int = 0) -> dict:
    """Damage artefacts of every kind in `count` ways each.

    A record swapped with another one is whole and left out: it no longer fits the checksums of its files.

    Returns
    -------
    By kind how many were tried and how many of those were refused with the file's name (must be all).
    """
    rng, found = np.random.default_rng(seed), {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, (path, other, read) in artefacts(Path(scratch)).items():
            content, tried, refused = path.read_bytes(), 0, 0
            read(path)
            while tried < count:
                how, broken = damaged(content, other.read_bytes(), rng)
                if kind == "record" and how == "swapped":
                    continue
                path.write_bytes(broken)
                tried += 1
                try:
                    read(path)
                except InputError as error:
                    refused += path.name in str(error)
            path.write_bytes(content)
            found[kind] = {"tried": tried, "refused": refused}
    return found


def saved(value, **options) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def numpy_file(header: str, content: bytes = b"") -> bytes:
    """An .npy file with any header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def hostile(folder: Path, canary: Path) -> dict[str, tuple[Path, object]]:
    """Files that others might send, by what they try, and what reads them; none has a record."""

    def checkpoint(path: Path):
        return artifacts.load_checkpoint(path, foreign=True)

    def array(path: Path):
        return artifacts.load_array(path, folder / "none.json", "make it again")

    def state(path: Path):
        return artifacts.load_state(path, "remove it")

    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        source = zipfile.ZipFile(io.BytesIO(saved({"state_dict": {"a": torch.zeros(50_000_000)}})))
        for member in source.infolist():
            archive.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    code, header = Code(canary), "{'descr': %s, 'fortran_order': False, 'shape': %s}"
    objects = io.BytesIO()
    np.save(objects, np.array([code], dtype=object), allow_pickle=True)
    sealed = saved({"key": code})
    huge = saved({"state_dict": {"a": torch.zeros(1).expand(10**6, 10**6)}})
    return {
        "code in a checkpoint": (file("1.pkl", saved({"state_dict": code})), checkpoint),
        "code in an old checkpoint": (file("2.pkl", saved(code, _use_new_zipfile_serialization=False)), checkpoint),
        "code in a plain pickle": (file("3.pkl", pickle.dumps(code)), checkpoint),
        "code in an array": (file("4.npy", objects.getvalue()), array),
        "code in place of an array": (file("5.npy", pickle.dumps(code)), array),
        "code in a state": (file("6.state", hashlib.sha256(sealed).digest() + sealed), state),
        "code as a dtype": (file("7.npy", numpy_file(header % ("__import__('os').getcwd()", "(1,)"))), array),
        "a compressed checkpoint": (file("8.pkl", bomb.getvalue()), checkpoint),
        "a tensor larger than its memory": (file("9.pkl", huge), lambda p: artifacts.load_weights(model.MLP(), p)),
        "an array larger than its file": (file("10.npy", numpy_file(header % ("'<f8'", f"({10**15},)"))), array),
        "an array of negative size": (file("11.npy", numpy_file(header % ("'<f8'", "(-5,)"), bytes(40))), array),
        "a header without end": (file("12.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff"), array),
        "a record of a million brackets": (file("13.json", b"[" * 10**6), records.read),
        "a record that is no object": (file("14.json", b"[1]"), records.read),
        "an image of a billion pixels": (file("15.png", png(50_000, 50_000)), datasets.read_image),
        "an image that is none": (file("16.png", b"\x89PNG\r\n\x1a\n" + bytes(100)), datasets.read_image),
        "not a number among the weights": (file("17.pkl", saved({"a": torch.tensor([float("nan")])})), checkpoint),
    }  # fmt: skip


def hostile_files() -> dict:
    """Let every hostile file be read.

    Returns
    -------
    How many were tried, how many of those refused within five seconds and in one line with the file's name (must be
    all), and how many executed what they hold (must be 0).
    """
    found = {"tried": 0, "refused": 0, "executed": 0}
    with tempfile.TemporaryDirectory() as scratch:
        canary = Path(scratch) / "canary"
        for attempt, (path, read) in hostile(Path(scratch), canary).items():
            found["tried"] += 1
            start = time.monotonic()
            try:
                read(path)
                print(attempt, "was read")
            except InputError as error:
                in_time = time.monotonic() - start < 5
                found["refused"] += in_time and path.name in str(error) and "\n" not in str(error)
            found["executed"] += canary.exists()
            canary.unlink(missing_ok=True)
    return found


def png(width: int, height: int) -> bytes:
    """The beginning of a picture of that size."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


MISSING = object()
WHOLE = ["0", "-1", "1.5", "nan", "inf", "x", ""]
TABLE = {  # flags: what they must refuse
    "Batch_size Dims Expt_rerun Milestones Samples_per_class": WHOLE,
    "cores dims samples_per_class positions null parent_clusters children_clusters Threads": WHOLE,
    "bootstrap": ["1", *WHOLE],
    "Epoch Device_ids Seed Workers Val_size key_id seed device_ids": WHOLE[1:],
    "upper_prune_limit upper_prune_per lower_prune_per Prune_per Warm_up Distillation": [
        "-0.1",
        "1.01",
        "nan",
        "inf",
        "x",
        "",
    ],
    "prune_per_step": ["0", "-0.1", "2", "nan", "x", ""],
    "Lr Gamma": ["0", "-1", "nan", "inf", "x", ""],
    "width": ["0", "-1", "nan", "inf", "Auto", "auto ", ""],
    "Weight_decay Seconds": ["-1", "nan", "inf", "x", ""],
    "Dropout Label_smoothing": ["-1", "1", "nan", "inf", "x", ""],
    "Dataset Opt Schedule Model Select Criterion Granularity Prune_of": ["?", ""],
    "model dataset estimator given sampling precision device grouping granularity": ["?", ""],
    "scheduler": ["", "a", "tcp://a", "a:1", "http://a:1"],
    "Save_dir Data_dir Weights Init Checkpoint Retrain weights_dir data_dir": [""],
    "Retrain_mask Labels_file Labels_children_file": [""],
    "name_postfix weights_file": ["", "../x", "a/b", "a b", "\0"],
    "Nesterov Amp Resume Compile Prune_of_network Refit Even Skip_unreadable skip_unreadable split_half": ["=1"],
    "Classes classes parent_key children_key": [MISSING],
}
ILLEGAL = {name: values for names, values in TABLE.items() for name in names.split()}


def illegal_flags() -> dict:
    """Every flag of every stage with every value that it must refuse, without its value, and misspelt.

    Returns
    -------
    How many were tried, and how many refused with exit code 2 and one line that names the flag (must be all).
    """
    cases = [
        (stage, name, value)
        for name, flag in cli.FLAGS.items()
        for stage in map(int, flag["stages"])
        for value in [*ILLEGAL[name], *([MISSING] if "action" not in flag and flag.get("nargs") != "*" else [])]
    ]
    misspelt = sorted({(stage, name[:-1], "1") for stage, name, _ in cases if name[:-1] not in cli.FLAGS})
    found = {"tried": 0, "refused": 0}
    for stage, name, value in cases + misspelt:
        argv = [f"--{name}"] if value is MISSING else [f"--{name}=1"] if value == "=1" else [f"--{name}", value]
        others = [] if stage != 2 or name == "key_id" else ["--key_id", "0"]
        code, said = parsed(stage, [*others, *argv])
        good = code == 2 and said.count("\n") == 1 and name in said
        found["tried"] += 1
        found["refused"] += good
        if not good:
            print(argv, code, said[:300])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kills", "flips", *TRIALS):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--record", type=Path, help="also write what was found here")
    args, start = parser.parse_args(), time.monotonic()
    found = {f"kills_of_stage_{stage}": kills(stage, args.kills) for stage in "123"} if args.kills else {}
    found |= {"damaged_files": flips(args.flips), "hostile_files": hostile_files(), "illegal_flags": illegal_flags()}
    found |= {f"random_{name}": counted(trial, range(getattr(args, name))) for name, trial in TRIALS.items()}
    found["seconds"] = round(time.monotonic() - start)
    print(json.dumps(found, indent=1))
    if args.record:
        records.write(args.record, {**found, **records.environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
