"""How the benchmarks summarise, print and write what they measured."""

import statistics
from pathlib import Path

import torch

from common import files, records

FOLDER = files.RESULTS / "benchmarks"
DIGITS = 6


def mean(values: list[float]) -> float:
    return round(statistics.fmean(values), DIGITS)


def std(values: list[float]) -> float | None:
    """Sample standard deviation; None of a single value."""
    return round(statistics.stdev(values), DIGITS) if len(values) > 1 else None


def table(rows: list[dict]) -> str:
    """Rows as aligned columns, named by the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def save(folder: Path, name: str, record: dict, device: torch.device | None = None) -> None:
    """Write a benchmark's record with its circumstances, print its tables and its other entries."""
    for key, value in record.items():
        print(
            f"\n{key}\n{table(value)}" if isinstance(value, list) and isinstance(value[0], dict) else f"{key}: {value}"
        )
    path = files.under_results(folder) / f"{name}.json"
    records.write(path, {**record, **records.environment(device or torch.device("cpu"))})
    print(f"\nrecord: {path}\n")


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
