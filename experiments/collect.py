"""From the records of many runs to one file per experiment.

    python experiments/collect.py [EXPERIMENT ...]       by default every folder of results/ that holds runs

Finished runs below results/<experiment>/ go to results/<experiment>.jsonl, one line a run: "path", where its record
lies below results/; the record; its "epochs"; the SHA-256 of all that. Lines of runs that are not here stay.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
from common import cli, files, records
from common.errors import InputError, reason

APART = ("benchmarks", "demo", "figures")  # folders of results/ that are no experiments


def finished(folder: Path) -> list[dict]:
    """The records of the finished runs below a folder, in the order of their paths.

    They are read from results/<experiment>.jsonl where the folder belongs to an experiment that has been collected, and
    from the folder itself where not.
    """
    folder, results = folder.resolve(), files.RESULTS.resolve()
    below = folder.relative_to(results).parts if folder.is_relative_to(results) else ()
    file = results / f"{below[0]}.jsonl" if below else None
    if file is None or not file.is_file():
        return list(_here(folder).values())
    return [line for path, line in read(file).items() if Path(path).parts[: len(below)] == below]


def read(file: Path) -> dict[str, dict]:
    """The lines that `collect` wrote, to the byte, by path."""
    lines = {}
    for number, written in enumerate(file.read_bytes().splitlines(), 1):
        line = _parsed(file, number, written)
        line.pop("sha256", None)
        if _sealed(line) != written:
            raise InputError(f"{file}, line {number}, is damaged: it is not as it was written; take it from git again")
        if line["path"] in lines:
            raise InputError(f"{file}, line {number}: {line['path']} stands there twice; remove one of the two lines")
        lines[line["path"]] = line
    return lines


def collect(folder: Path) -> str:
    """Bring an experiment's file up to date with the finished runs in its folder; what was done, in one line.

    Raises
    ------
    InputError
        If there is no such experiment, or a line or a record is damaged; then nothing is written.
    """
    file = folder.parent / f"{folder.name}.jsonl"
    if folder.parent != files.RESULTS or folder.name in (*APART, "..") or not (folder.is_dir() or file.is_file()):
        raise InputError(f"{folder} is no experiment; name folders of results/ that hold runs, or none for all")
    before, here = read(file) if file.is_file() else {}, _here(folder)
    lines = dict(sorted({**before, **here}.items(), key=lambda item: Path(item[0]).parts))
    added, replaced = len(lines) - len(before), sum(before.get(path, line) != line for path, line in here.items())
    if added or replaced:
        files.write_bytes(file, b"".join(_sealed(line) + b"\n" for line in lines.values()))
    return f"{files.display_path(file)}: {len(lines)} runs ({added} added, {replaced} replaced)"


def _here(folder: Path) -> dict[str, dict]:
    """The lines of the finished runs in a folder by path, in order."""
    lines = {}
    for path in _records(folder):
        record = records.read(path)
        if "stage" in record and record.get("status") == "complete":
            name, log = path.relative_to(folder.parent).as_posix(), path.with_suffix(".jsonl")
            lines[name] = {"path": name, **record}
            if "epochs" not in record and log.is_file():  # as runs once kept them
                written = enumerate(log.read_bytes().splitlines(), 1)
                lines[name]["epochs"] = [_parsed(log, number, epoch) for number, epoch in written]
    return lines


def _records(folder: Path) -> list[Path]:
    """The JSON files below a folder, and below links in it that lead away from it, each once."""
    top, once = files.real(folder), {}
    below = {path: files.real(path) for path in sorted(folder.rglob("*")) if path.is_dir()}
    away = [path for path, real in below.items() if not (real.is_relative_to(top) or top.is_relative_to(real))]
    for path in (path for each in (folder, *away) for path in sorted(each.rglob("*.json"))):
        once.setdefault(files.real(path), path)
    return sorted(once.values())


def _parsed(file: Path, number: int, written: bytes) -> dict:
    try:
        return dict(json.loads(written))
    except (ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{file}, line {number}, is damaged ({reason(error)})") from error


def _sealed(line: dict) -> bytes:
    seal = hashlib.sha256(json.dumps(line).encode()).hexdigest()
    return json.dumps({**line, "sha256": seal}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="a folder of results/; none: all of them")
    every = (path.name for path in sorted(files.RESULTS.iterdir()) if _records(path))
    for name in parser.parse_args().experiments or [name for name in every if name not in APART]:
        print(collect(files.RESULTS / name))


if __name__ == "__main__":
    cli.run(main)
