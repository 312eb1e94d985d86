"""A folder of prompt files with a manifest. It appears whole or not at all, and is never changed afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None for a folder that is new or empty.

    Raises:
        SelfSpecError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        is_ours = isinstance(manifest["inputs"], dict) and isinstance(manifest["sha256"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise SelfSpecError(f"--out: {folder} holds something else (no {MANIFEST} of this program); give a new or empty folder")
    return manifest


def verify(folder: Path, manifest: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Raises SelfSpecError unless the folder was made from these inputs and is as it was written."""
    changed = [name for name in inputs if manifest["inputs"].get(name) != inputs[name]]
    if changed:
        name = changed[0]
        raise SelfSpecError(
            f"--out: {folder} was prepared with {name} {manifest['inputs'].get(name)}, and now it is {inputs[name]}; "
            f"give another --out, or remove {folder} first"
        )
    for name, digest in manifest["sha256"].items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            state = "has changed since it was written" if path.is_file() else "is gone"
            raise SelfSpecError(f"--out: {path} {state}; remove {folder} and run again")


def write(folder: Path, files: dict[str, str], manifest: dict[str, Any]) -> None:
    """Write texts and manifest beside the folder, then rename.

    Args:
        files: name -> text.
        manifest: gets their checksums under `sha256`.

    Raises:
        SelfSpecError: the place cannot be written to, or the folder has appeared meanwhile.
    """
    folder = folder.resolve()
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        for name, text in files.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        digests = {name: sha256(unfinished / name) for name in files}
        text = json.dumps({**manifest, "sha256": digests}, indent=2, ensure_ascii=False)
        (unfinished / MANIFEST).write_text(text + "\n", encoding="utf-8")
        unfinished.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise SelfSpecError(f"--out: {folder} was filled by another program meanwhile; run again to check it") from error
        raise SelfSpecError(f"--out: cannot write {folder} ({error.strerror}); give another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
