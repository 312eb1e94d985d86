"""Every command in README.md and docs/ names programs and flags that exist, and every link a file that does.

That the commands work is for other tests: those of docs/reproduce.md are dry-run line by line in tests/test_experiments.py.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from openrlhf_sd import flags, report, watch

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(python -m|openrlhf-sd|bash|sbatch|python examples)\b")
FLAG = re.compile(r"--[a-z][\w.-]*")


def commands(document: Path) -> list[str]:
    """Lines of code blocks, fenced or indented, that start a program; continued lines joined, comments cut."""
    found = []
    fenced = False
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and COMMAND.match(line.strip()):
            found.append(line.strip().split("  # ")[0].split("     #")[0].strip())
    return found


ALL_COMMANDS = [(document.name, command) for document in DOCUMENTS for command in commands(document)]


def help_of(module: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_there_are_commands_to_check():
    assert len(ALL_COMMANDS) > 30
    assert any(command.startswith("openrlhf-sd watch") for _, command in ALL_COMMANDS)


@pytest.mark.parametrize(("document", "command"), ALL_COMMANDS)
def test_programs_and_flags_of_a_documented_command_exist(document, command, capsys):
    words = [word for word in command.split() if not re.match(r"[A-Z_]+=", word)]
    named = FLAG.findall(command)
    if words[0] == "openrlhf-sd":
        if len(words) > 1 and words[1] in ("compare", "watch"):
            known = {"compare": report, "watch": watch}[words[1]]._parser()._option_string_actions
        else:
            known = {*flags.upstream_parser()._option_string_actions, *flags.our_flags(), flags.EXPLAIN_FLAG, flags.GPU_FLAG}
        assert set(named) <= set(known)
    elif words[:2] == ["python", "-m"] and words[2] != "pytest":
        shown = help_of(words[2], capsys)
        for flag in named:
            assert flag in shown, f"{flag} is not in the help of {words[2]}"
    else:
        script = next(word for word in words if word.endswith((".sh", ".py", "/run")))
        assert (ROOT / script.removeprefix("$PWD/")).is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_point_to_files_that_exist(document):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target
