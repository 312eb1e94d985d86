"""docs/modes.md is a table of every flag OpenRLHF has, and the tests it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from openrlhf_sd import flags

ROOT = Path(__file__).parents[1]
ROWS = [line for line in (ROOT / "docs" / "modes.md").read_text().splitlines() if line.startswith("| `--")]


def named_in(cell: str) -> list[str]:
    return re.findall(r"`(--[\w.]+)", cell)


def test_every_flag_of_openrlhf_is_in_the_table():
    known = set(flags.upstream_parser()._option_string_actions) - {"-h", "--help"}
    in_table = [flag for row in ROWS for flag in named_in(row.split("|")[1])]
    assert set(in_table) == known


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:60])
def test_a_row_says_what_holds_and_which_test_shows_it(row):
    _, _, status, meaning, shown_by, _ = [cell.strip() for cell in row.split("|")]
    assert status in ("works", "refused", "apart")
    if status != "apart":
        assert meaning and shown_by


@pytest.mark.parametrize("document", ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))])
def test_every_test_that_a_document_names_exists(document):
    for test in re.findall(r"`(tests/[\w/.]+\.py(?:::\w+)?)`", (ROOT / document).read_text()):
        file, _, function = test.partition("::")
        assert (ROOT / file).exists(), file
        if function:
            names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
            assert function in names, test
