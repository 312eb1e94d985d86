"""Rows wait while the disk refuses them."""

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
