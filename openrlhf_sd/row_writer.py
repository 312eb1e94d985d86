"""Rows of a run's records, kept while the disk does not take them: a full disk must cost neither the training nor a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openrlhf_sd.metrics import append_row


class RowWriter:
    """Args:
    path: of the file; its folder is made when needed.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._waiting: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> str | None:
        """Append the row and all that wait before it.

        Returns:
            None, or a line to print: that rows wait, and why, or that they no longer do.
        """
        num_waited = len(self._waiting)
        self._waiting.append(row)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while self._waiting:
                append_row(self._path, self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            return (
                f"openrlhf-sd: RECORDS INCOMPLETE: cannot write {self._path} ({error.strerror}); training goes on, {len(self._waiting)} "
                "rows wait in memory for the disk and are lost if the run ends before it recovers"
            )
        return f"openrlhf-sd: {self._path} is complete again: {num_waited} rows that waited are written" if num_waited else None
