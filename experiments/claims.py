"""Try the quick claims of docs/claims.md: run every command, compare its figure, print pass or fail.

    python experiments/claims.py [NUMBER ...]      the rows of these numbers, from 1; none: all

Exit code 1 if a claim fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(
    r"^\| (?P<claim>.+?) \| `(?P<command>.+?)` \| (?P<expected>[^|]+) \| (?P<time>[^|]+) \|$", re.MULTILINE
)
FIGURE = re.compile(r"(?:`(?P<words>.+)` )?(?P<value>-?[\d.]+) ± (?P<tolerance>[\d.]+)")
NUMBER = r"-?\d+\.?\d*(?:e-?\d+)?"


def claims(page: str) -> list[dict[str, str]]:
    """The rows of the quick table: claim, command, what is expected, time."""
    quick = page.split("## Quick")[1].split("## Long")[0]
    return [row.groupdict() for row in ROW.finditer(quick)]


def judge(expected: str, code: int, output: str) -> tuple[bool, str]:
    """Whether a command that ended with this code and output shows what is expected, and what it shows."""
    figure = FIGURE.fullmatch(expected)
    if code or not figure:
        return not code and expected == "exit code 0", f"exit code {code}"
    after = output.rpartition(figure["words"])[2] if figure["words"] else output
    numbers = re.findall(NUMBER, after if figure["words"] is None or figure["words"] in output else "")
    if not numbers:
        return False, "no figure in the output"
    found = float(numbers[0 if figure["words"] else -1])
    return abs(found - float(figure["value"])) <= float(figure["tolerance"]) + 1e-12, f"{found:g}"


def main() -> None:
    rows = claims((ROOT / "docs" / "claims.md").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER")
    asked = parser.parse_args().numbers
    if unknown := set(asked) - set(range(1, len(rows) + 1)):
        parser.error(f"there is no claim {min(unknown)}; legal: 1 to {len(rows)}")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    failed, runs = 0, ROOT / "results" / "claims"
    shutil.rmtree(runs, ignore_errors=True)
    for number, row in enumerate(rows, 1):
        if asked and number not in asked:
            continue
        began = time.monotonic()
        shell = ["bash", "-c", row["command"]]
        done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        good, shown = judge(row["expected"], done.returncode, done.stdout)
        took = f"{time.monotonic() - began:.0f} s, said: {row['time']}"
        print(f"{'pass' if good else 'FAIL'}  {number}  {row['claim']}: {shown}, expected {row['expected']} ({took})")
        if not good:
            failed += 1
            print(done.stdout[-1000:] + done.stderr[-1000:])
    shutil.rmtree(runs, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
