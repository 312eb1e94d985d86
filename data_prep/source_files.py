"""Where SimpleRL-Zoo's parquet files are: in a local folder, or on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openrlhf_sd.config import SelfSpecError

HUB_ID = "hkust-nlp/SimpleRL-Zoo-Data"

LEVEL_FOLDERS = {
    "easy": "simplelr_qwen_gsm8k_level1",
    "medium": "simplelr_qwen_level1to4",
    "hard": "simplelr_qwen_level3to5",
}
"""Folders of `HUB_ID`: GSM8K with MATH level 1, MATH levels 1 to 4, MATH levels 3 to 5; about 8,000 training rows each, says
arXiv 2503.18892."""

SPLITS = ("train", "test")


@dataclass(frozen=True)
class SourceFiles:
    """
    Args:
        paths: split -> parquet file.
        revision: commit of the hub's repository; None for a local folder.
    """

    paths: dict[str, Path]
    revision: str | None


def is_hub_id(name: str) -> bool:
    """`owner/name` that is no folder here, and does not look like one that is missing."""
    return not Path(name).expanduser().exists() and not name.startswith(("/", ".", "~")) and name.count("/") == 1


def find_source(source: str, level: str) -> SourceFiles:
    """The train and test file of a level.

    Args:
        source: a hub id, a copy of the whole data set, or the level's own folder in one.

    Raises:
        SelfSpecError: a wrong folder, a missing file, or a hub that cannot be reached.
    """
    if is_hub_id(source):
        return _from_hub(source, LEVEL_FOLDERS[level])
    folder = _level_folder(Path(source).expanduser(), level)
    paths = {split: folder / f"{split}.parquet" for split in SPLITS}
    for path in paths.values():
        if not path.is_file():
            raise SelfSpecError(f"--source: no file {path}; the download is not complete, fetch it again")
    return SourceFiles(paths, None)


def _level_folder(source: Path, level: str) -> Path:
    wanted = LEVEL_FOLDERS[level]
    if not source.is_dir():
        raise SelfSpecError(f"--source: no folder {source}; give a copy of {HUB_ID}, or a hub id as owner/name")
    if (source / wanted).is_dir():
        return source / wanted
    name = source.resolve().name
    if name == wanted:
        return source
    for other, folder in LEVEL_FOLDERS.items():
        if name == folder:
            raise SelfSpecError(f"--source: {source} is the {other} level; give --level {other}, or the folder {wanted}")
    found = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
    raise SelfSpecError(f"--source: {source} has no folder {wanted}, which --level {level} needs; it holds {found}")


def _from_hub(repo_id: str, folder: str) -> SourceFiles:
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError

    paths = {}
    for split in SPLITS:
        file = f"{folder}/{split}.parquet"
        try:
            paths[split] = Path(hf_hub_download(repo_id, file, repo_type="dataset"))
        except RepositoryNotFoundError as error:
            raise SelfSpecError(f"--source: the hub has no data set {repo_id} that you may read; check the name or log in") from error
        except RemoteEntryNotFoundError as error:
            raise SelfSpecError(f"--source: {repo_id} has no file {file}; give a copy of {HUB_ID}") from error
        except (httpx.HTTPError, OSError) as error:
            offline = isinstance(error, LocalEntryNotFoundError)
            cause = "no network to the hub, and no copy in its cache" if offline else first_line(error)
            mend = "fetch it elsewhere and give --source DIR"
            raise SelfSpecError(f"--source: cannot fetch {file} of {repo_id} ({cause}); {mend}") from error
    snapshot = paths["train"].parents[1]  # .../snapshots/COMMIT/FOLDER/train.parquet
    return SourceFiles(paths, snapshot.name)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".")
