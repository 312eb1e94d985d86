"""The commands that README.md and docs/ show, with the marks beside them.

A command is a line of a code block, indented or `bash` (a continued line or a here-document is one command), a whole `python`
block, or a piece of inline code of more than one word that starts with a program's name.

What no test can run is marked **[GPUs]**, **[network]** or **[Slurm]**: inline code in its own paragraph or cell or the head of
its table, a block in the paragraph before it, a line of a block in its comment, there without asterisks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

PROGRAMS = ("python", "openrlhf-sd", "bash", "sbatch", "ray", "hf", ".")
MARK = re.compile(r"\[(GPUs|network|Slurm)\]")
NO_COMMANDS = ("text", "json")
ASSIGNMENT = re.compile(r'\w+=("[^"]*"|\S*)')
HERE_DOCUMENT = re.compile(r"<<'(\w+)'$")


@dataclass(frozen=True)
class Command:
    """`text` is what is to be typed, without its comment, on one line but for a here-document or a block of Python."""

    document: str
    text: str
    marks: frozenset[str]


def documented_commands() -> list[Command]:
    return [command for document in DOCUMENTS for command in commands_of(document.name, document.read_text(encoding="utf-8"))]


def commands_of(document: str, text: str) -> Iterator[Command]:
    before = table_head = frozenset[str]()  # marks of the paragraph before a block; of a table's head
    inside = ""  # the block element that inline text belongs to
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("paragraph_open", "heading_open", "th_open", "td_open"):
            inside = token.type.removesuffix("_open")
        elif token.type == "table_open":
            before = table_head = frozenset()
        elif token.type == "inline":
            marks = _marks(token.content)
            if inside == "th":
                table_head |= marks
            elif inside == "td":
                marks |= table_head
            else:
                before = marks
            for code in token.children or []:
                if code.type == "code_inline" and len(code.content.split()) > 1 and _starts_program(code.content):
                    yield Command(document, _one_line(code.content), marks)
        elif token.type in ("fence", "code_block"):
            for line, comment in _lines(token):
                yield Command(document, line, before | _marks(comment))


def _lines(block: Token) -> Iterator[tuple[str, str]]:
    """(command, its comment) of each command in a code block. Raises ValueError for what may or may not be one."""
    if block.info == "python":
        yield block.content, ""
        return
    if block.info in NO_COMMANDS:
        return
    if block.info not in ("", "bash"):
        raise ValueError(f"a code block of {block.info!r}: say in {__file__} whether it holds commands")
    lines = iter(block.content.replace("\\\n", " ").splitlines())
    for line in lines:
        code, _, comment = re.sub(r"(^|\s+)#\s", "\0", line, count=1).partition("\0")
        if not code.strip() or ASSIGNMENT.fullmatch(code):
            continue
        if not _starts_program(code):
            raise ValueError(f"{code.strip()!r} is no known command: add its program in {__file__}, or make its block one of `text`")
        if here := HERE_DOCUMENT.search(code):
            body = []
            while not body or body[-1] != here[1]:
                body.append(next(lines))
            yield "\n".join([_one_line(code), *body]), comment
        else:
            yield _one_line(code), comment


def _starts_program(code: str) -> bool:
    return code.split()[0] in PROGRAMS


def _one_line(code: str) -> str:
    return " ".join(code.split())


def _marks(text: str) -> frozenset[str]:
    return frozenset(MARK.findall(text))
