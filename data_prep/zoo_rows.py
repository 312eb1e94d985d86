"""Questions and answers out of one SimpleRL-Zoo parquet file, each row checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from data_prep.source_files import first_line
from openrlhf_sd.config import SelfSpecError

QUESTION = ("extra_info", "question")
ANSWER = ("reward_model", "ground_truth")
"""Columns and their fields. The file's own `prompt` has the marks of Qwen's chat format baked in, so it is not used."""

NUM_ROWS_NAMED = 5


@dataclass(frozen=True)
class QuestionAnswer:
    """
    Args:
        row: number in the parquet file, from 0.
    """

    row: int
    question: str
    answer: str


def read_rows(path: Path, drop_empty_answers: bool) -> tuple[list[QuestionAnswer], int]:
    """(rows with a question and an answer, number of rows in the file).

    Raises:
        SelfSpecError: an incomplete file, a missing column, no rows, a row without a question, or one without an answer
            unless those are to be dropped.
    """
    table = _read_parquet(path)
    questions = _field(table, path, *QUESTION)
    answers = [_text(value) for value in _field(table, path, *ANSWER)]
    if not questions:
        raise SelfSpecError(f"{path}: has no rows; fetch it again")
    if unasked := [row for row, question in enumerate(questions) if not isinstance(question, str) or not question.strip()]:
        raise SelfSpecError(f"{path}: {_rows(unasked)} no {'.'.join(QUESTION)}; take them out of the file")
    unanswered = [row for row, answer in enumerate(answers) if not answer]
    if unanswered and not drop_empty_answers:
        raise SelfSpecError(f"{path}: {_rows(unanswered)} no answer in {'.'.join(ANSWER)}; leave them out with --drop_empty_answers")
    rows = [QuestionAnswer(row, question, answer) for row, (question, answer) in enumerate(zip(questions, answers)) if answer]
    if not rows:
        raise SelfSpecError(f"{path}: no row has an answer; fetch it again")
    return rows, len(questions)


def _read_parquet(path: Path) -> pyarrow.Table:
    # Not by `datasets`, which is made for whole data sets: it logs tracebacks of its own, fails on a file without rows, and keeps a cache.
    try:
        table = pyarrow.parquet.read_table(path)
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError) as error:
        size = path.stat().st_size
        raise SelfSpecError(f"{path}: not a complete parquet file, {size} bytes ({first_line(error)}); fetch it again") from error
    return table


def _field(table: pyarrow.Table, path: Path, column: str, field: str) -> list[Any]:
    """A field of a struct column, one value per row; None where the struct is null."""
    if column not in table.column_names:
        raise SelfSpecError(f"{path}: no column {column}; its columns are {', '.join(table.column_names)}")
    kind = table.schema.field(column).type
    names = [child.name for child in kind] if pyarrow.types.is_struct(kind) else []
    if field not in names:
        raise SelfSpecError(f"{path}: no field {column}.{field}; what {column} has is {', '.join(names) or f'of type {kind}'}")
    return pyarrow.compute.struct_field(table[column], field).to_pylist()


def _text(answer: object) -> str:
    return "" if answer is None else str(answer).strip()


def _rows(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:NUM_ROWS_NAMED])) + (", ..." if len(numbers) > NUM_ROWS_NAMED else "")
    return f"row {named} (from 0) has" if len(numbers) == 1 else f"{len(numbers)} rows, {named} (from 0), have"
