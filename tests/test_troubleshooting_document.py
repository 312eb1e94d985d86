"""docs/troubleshooting.md quotes what this package says."""

from __future__ import annotations

import re

import pytest
from documented_commands import ROOT

SOURCE = "\n".join(path.read_text(encoding="utf-8") for folder in ("openrlhf_sd", "calib") for path in (ROOT / folder).rglob("*.py"))
DOCUMENT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SEEN = [row.split("|")[1] for row in DOCUMENT.splitlines() if row.startswith("|") and not row.startswith(("| seen", "|---"))]
QUOTES = [quote for seen in SEEN for quote in re.findall(r"`([^`]+)`", seen)]


@pytest.mark.parametrize("quote", QUOTES)
def test_what_is_quoted_is_said(quote):
    assert quote in SOURCE


def test_there_are_quotes():
    assert len(QUOTES) > 10
