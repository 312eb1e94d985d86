"""A CSV file as text, lines and checked cells. Every error is one SelfSpecError that names the file and the line."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Collection, Iterator
from pathlib import Path

from openrlhf_sd.config import SelfSpecError

Cells = dict[str, str]
"""Cells of a line by column."""


def read_text(path: str | Path) -> tuple[str, str]:
    """The text, and the SHA-256 of the bytes."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise SelfSpecError(f"{path}: cannot be read ({error.strerror}); name a sweep CSV") from error
    except UnicodeDecodeError as error:
        raise SelfSpecError(f"{path}: is not a text file; name a sweep CSV") from error


def read_header(text: str, path: str | Path) -> list[str]:
    """Cells of the first line."""
    header = next(csv.reader(io.StringIO(text)), [])
    if not header:
        raise SelfSpecError(f"{path}: is empty; name a sweep CSV, or make one with `python -m calib.sweep`")
    return header


def check_header(header: list[str], columns: Collection[str], path: str | Path) -> None:
    """Each of `columns` once, and no other, in any order."""
    unknown = [column for column in header if column not in columns]
    missing = [column for column in columns if column not in header]
    known = f"the columns are {','.join(columns)}"
    if unknown:
        raise SelfSpecError(f"{path}, line 1: unknown column {', '.join(map(repr, unknown))}; {known}")
    if missing:
        raise SelfSpecError(f"{path}, line 1: no column {', '.join(map(repr, missing))}; {known}")
    if len(set(header)) < len(header):
        raise SelfSpecError(f"{path}, line 1: a column is given twice; {known}")


def read_lines(text: str, path: str | Path) -> Iterator[tuple[str, Cells]]:
    """(where, cells by column) of each data line; `where` opens an error message."""
    reader = csv.reader(io.StringIO(text))
    header = next(reader)
    num_rows = 0
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        if not cells:  # a blank line
            continue
        if len(cells) != len(header):
            raise SelfSpecError(f"{where}: {len(cells)} cells where the header has {len(header)}; mend or delete the line")
        num_rows += 1
        yield where, {column: cell.strip() for column, cell in zip(header, cells, strict=True)}
    if num_rows == 0:
        raise SelfSpecError(f"{path}: has a header and no rows; measure first with `python -m calib.sweep`")


def text_of(row: Cells, column: str, where: str) -> str:
    if not row[column]:
        raise SelfSpecError(f"{where}: {column} is empty; fill it in")
    return row[column]


def integer(row: Cells, column: str, where: str, least: int) -> int:
    try:
        value = int(row[column])
    except ValueError:
        value = least - 1
    if value < least:
        raise SelfSpecError(f"{where}: {column} is {row[column]!r}; give a whole number, {least} or more")
    return value


def positive_number(row: Cells, column: str, where: str) -> float:
    value = number(row, column, where)
    if value == 0:
        raise SelfSpecError(f"{where}: {column} is {row[column]!r}; give a number above 0")
    return value


def number(row: Cells, column: str, where: str) -> float:
    """Finite, 0 or more."""
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise SelfSpecError(f"{where}: {column} is {row[column]!r}; give a number, 0 or more")
    return value
