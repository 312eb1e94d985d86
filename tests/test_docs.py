"""Every command in README.md and docs/ names programs and flags that exist, and every link a file that does.

That the commands work is tests/test_documented_commands.py's.
"""

from __future__ import annotations

import importlib
import re

import pytest
from documented_commands import DOCUMENTS, ROOT, documented_commands

from openrlhf_sd import flags, report, watch

FLAG = re.compile(r"--[a-z][\w.-]*")
OUR_PACKAGES = ("calib", "data_prep", "openrlhf_sd")


def help_of(module: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def is_ours(command: str) -> bool:
    words = command.split()
    if words[:2] == ["python", "-m"]:
        return words[2].split(".")[0] in OUR_PACKAGES
    return words[0] == "openrlhf-sd" or any(word.endswith(".sh") for word in words)


@pytest.mark.parametrize("command", sorted({command.text for command in documented_commands() if is_ours(command.text)}))
def test_programs_and_flags_of_a_documented_command_exist(command, capsys):
    words = command.split()
    named = FLAG.findall(command)
    if words[0] == "openrlhf-sd":
        if words[1] in ("compare", "watch"):
            known = {"compare": report, "watch": watch}[words[1]]._parser()._option_string_actions
        else:
            known = {*flags.upstream_parser()._option_string_actions, *flags.our_flags(), flags.EXPLAIN_FLAG, flags.GPU_FLAG}
        assert set(named) <= set(known)
    elif words[0] == "python":
        shown = help_of(words[2], capsys)
        for flag in named:
            assert flag in shown, f"{flag} is not in the help of {words[2]}"
    else:
        script = next(word for word in words if word.endswith(".sh"))
        assert (ROOT / script.removeprefix("$PWD/")).is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_point_to_files_that_exist(document):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target
