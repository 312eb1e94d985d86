"""The README's five lines, saved as a script and run: a plain `vllm.LLM` that speculates."""

from __future__ import annotations

import subprocess
import sys

from documented_commands import documented_commands


def test_the_documented_script_runs(warm_policy, tmp_path):
    [example] = {command.text for command in documented_commands() if command.text.startswith("from vllm import LLM")}
    script = tmp_path / "example.py"
    # A share of the memory that other tests leave.
    script.write_text(f"model = {str(warm_policy)!r}\n" + example.replace("LLM(model, ", "LLM(model, gpu_memory_utilization=0.2, "))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1].strip(), "an answer"
