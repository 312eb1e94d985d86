"""docs/metrics.md explains every key of a row, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from openrlhf_sd.metrics import NUM_DRAFTS_KEY, POSITION_KEY, SpecDecodeCounts
from openrlhf_sd.rollout_record import RolloutRecord

DOCUMENT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()


def test_every_key_of_a_row_is_explained():
    counts = SpecDecodeCounts(1, 1, 1, [1], [1])
    row = RolloutRecord().row(rollout=0, engine=0, time_unix_s=0.0, weight_sync_s=0.0, counts=counts, report={})
    table = DOCUMENT[DOCUMENT.index("| key |") : DOCUMENT.index("## TensorBoard")]
    explained = [key for line in table.splitlines()[2:] if line for key in re.findall(r"`([^`]+)`", line.split("|")[1])]
    explained = [key for key in explained if not key.startswith("..._")]
    assert sorted(explained) == sorted(row)
    assert {f"{POSITION_KEY}0", f"{NUM_DRAFTS_KEY}0"} <= set(explained)
