"""Rows wait while the disk refuses them."""

import subprocess
import sys

from openrlhf_sd.metrics import read_rows
from openrlhf_sd.row_writer import RowWriter


def test_rows_wait_for_a_full_disk_and_none_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    writer = RowWriter(path)
    first, second = writer.write({"rollout": 0}), writer.write({"rollout": 1})
    assert "RECORDS INCOMPLETE" in first and "No space left on device" in first and "1 rows wait" in first
    assert "2 rows wait" in second
    path.unlink()
    assert "complete again: 2 rows" in writer.write({"rollout": 2})
    assert writer.write({"rollout": 3}) is None
    assert read_rows(path) == ([{"rollout": number} for number in range(4)], 0)


def test_its_folder_is_made(tmp_path):
    assert RowWriter(tmp_path / "a" / "b.jsonl").write({"x": 1}) is None
    assert read_rows(tmp_path / "a" / "b.jsonl") == ([{"x": 1}], 0)


FILLING = """
import resource, signal, sys
from openrlhf_sd.row_writer import RowWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = RowWriter(sys.argv[1])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for room in (500, 500, most):  # the second row of 300 bytes and more is taken in part
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    print("waits" if writer.write({"text": "x" * 300}) else "written", file=sys.stderr)
"""


def test_a_row_of_which_the_disk_took_only_the_beginning_is_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", FILLING, str(path)]
    said = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr.split()
    assert said == ["written", "waits", "waits"], "the third write tells that the second row is complete again"
    assert read_rows(path) == ([{"text": "x" * 300}] * 3, 1)
