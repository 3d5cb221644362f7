"""Where rows come from: a file, a folder of files, a `datasets` folder or the Hub, read one row at a time."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparring.data.files import BATCH, SUFFIXES, Row, file_rows, table_rows
from sparring.errors import InputError

_LOCAL_SUFFIXES = (*SUFFIXES, ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Source:
    """A data set that was found, before any row is read."""

    kind: Literal["files", "saved", "hub"]
    name: str
    """The path as given (for one split of a saved DatasetDict: its folder), or the Hub id."""
    files: tuple[Path, ...] = ()
    """The files that hold the rows; none for the Hub."""
    split: str | None = None
    config: str | None = None
    """Configuration name on the Hub."""


def find(spec: str, split: str | None, config: str | None = None, *, strict: bool = True) -> Source:
    """Tell what a path or Hub id is, without reading rows.

    `split` None takes what has one split only; of a folder, `config` is the folder in it, `.` all of it. Whatever looks
    like a path is never looked up on the Hub. Raises InputError for a missing file, an unknown suffix, a folder without
    data and an unknown split; where `strict` also for an unknown `config` and for a split that lies in several folders,
    which data that were read before, and are as they were, need not heed.
    """
    if not spec:
        raise InputError("data.path: missing: name a JSONL, JSON, Parquet or CSV file, a `datasets` folder or a Hub id")
    path = Path(os.path.expanduser(spec))
    if not os.path.exists(path):
        if _is_hub_id(spec):
            return Source("hub", spec, split=split or "train", config=config)
        raise InputError(f"{spec}: no such file; {_nearby(path)}")
    own = _configuration(path, config, strict=strict) if config else path
    if own.is_dir():
        found = _find_in_folder(own, split, strict=strict and config != ".")
        # Its files are named by where they lie in what was given
        return replace(found, name=str(path)) if found.kind == "files" else found
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{spec}: unknown suffix `{path.suffix}`; known are {' '.join(SUFFIXES)}")
    if split not in (None, "train"):
        raise InputError(f"{spec}: one file has no split `{split}`; name that split's own file instead")
    return Source("files", spec, (path,))


def rows(source: Source) -> Iterator[Row]:
    """Read a source row by row; a JSONL, CSV or Parquet file is never held as a whole.

    A broken row comes out as `BadRow`. Raises InputError where no later row can be trusted.
    """
    if source.kind == "files":
        for path in source.files:
            yield from file_rows(path)
        return
    data = _open(source)
    name = source.name if source.kind == "saved" else f"{source.name}:{source.split}"
    # The Arrow format hands over stored values: images and audio are not decoded, which would need more libraries.
    yield from table_rows(name, data.with_format("arrow").iter(BATCH))


def digest(source: Source) -> dict[str, str]:
    """Identify the contents: name of each file within the source to its sha256; for the Hub, the split's fingerprint."""
    if source.kind == "hub":
        return {f"{source.name}:{source.split}": str(_open(source)._fingerprint)}
    found = {}
    folder = Path(os.path.expanduser(source.name))
    for path in source.files:
        # Not the bare name: two files of a folder may share it, and a change of one would pass unseen.
        name = path.name if path == folder else path.relative_to(folder).as_posix()
        try:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    return found


def _open(source: Source) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if source.kind == "saved":
            return datasets.load_from_disk(source.name)
        return datasets.load_dataset(source.name, source.config, split=source.split)
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        what = "this `datasets` folder" if source.kind == "saved" else "no such local file; as a Hub data set it"
        raise InputError(f"{source.name}: {what} cannot be loaded: {reason}") from None


def _is_hub_id(spec: str) -> bool:
    first = spec.split("/")[0]
    return (
        _HUB_ID.fullmatch(spec) is not None
        and Path(spec).suffix.lower() not in _LOCAL_SUFFIXES
        and not os.path.exists(first)  # also `.` and `..`
    )


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"nor is there a folder `{path.parent}`; a Hub id is written owner/name"
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
    return f"the nearest is `{path.parent / near[0]}`" if near else "check the path; a Hub id is written owner/name"


def _configuration(path: Path, name: str, *, strict: bool) -> Path:
    """The folder of a configuration, as a clone of a Hub data set has it."""
    saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if (path / name).is_dir() and (path / name).is_relative_to(path) and not saved:
        return path / name
    if not strict:
        return path
    known = sorted(p.name for p in path.glob("[!.]*/") if p.is_dir() and not saved)
    it_has = f"it has {', '.join(known)}; " if known else ""
    raise InputError(f"data.name: {path} has no folder `{name}`; {it_has}set data.name=null to read it as it is")


def _find_in_folder(folder: Path, split: str | None, *, strict: bool) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json_object(folder / "dataset_dict.json").get("splits") or []
        split = splits[0] if split is None and len(splits) == 1 else split
        if split not in splits:
            known = ", ".join(splits)
            raise InputError(f"{folder}: no split `{split}`; it has {known}; set data.split or data.heldout_split")
        return _saved(folder / str(split))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        if split not in (None, "train"):
            raise InputError(f"{folder}: no split `{split}` in one saved data set; name that split's own folder")
        return _saved(folder)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in ("dataset_info.json", "dataset_infos.json")
    )
    if not files:
        raise InputError(f"{folder}: a folder without data; it needs files that end in {' '.join(SUFFIXES)}")
    chosen = files if split is None else _of_split(folder, files, split, strict=strict)
    return Source("files", str(folder), tuple(chosen))


def _saved(folder: Path) -> Source:
    shards = _read_json_object(folder / "state.json").get("_data_files") or []
    return Source("saved", str(folder), tuple(folder / str(shard["filename"]) for shard in shards))


def _of_split(folder: Path, files: list[Path], split: str, *, strict: bool) -> list[Path]:
    """Files or folders named for the split; else those with the word in their name; else all, if no name has any.

    So `train-00000-of-00002.parquet` counts as exact, and `train_sft.jsonl` is taken where no file is just `train`.
    """
    names = {path: [*path.relative_to(folder).parts[:-1], path.stem] for path in files}
    exact = re.compile(re.escape(split) + r"([-_.]?\d.*)?")
    above = _above(names, lambda part: exact.fullmatch(part) is not None)
    above = above or _above(names, lambda part: split.lower() in _words(part))
    if strict and len(several := sorted(set(above.values()))) > 1:
        raise InputError(
            f"{folder}: split `{split}` lies in {' and '.join(several)}; choose one by data.name or by its own "
            "path, or all by data.name=."
        )
    chosen = list(above)
    known = sorted({word for parts in names.values() for part in parts for word in _words(part)} & {*_SPLIT_WORDS})
    if chosen or (split == "train" and not known):
        return chosen or files
    raise InputError(
        f"{folder}: no file of split `{split}`; "
        f"{'it has ' + ', '.join(known) if known else 'no file is named after a split'}; name the file itself"
    )


def _above(names: dict[Path, list[str]], named: Callable[[str], bool]) -> dict[Path, str]:
    """The files whose path has a part that is named so, and the folder in which the first such part lies.

    Where that differs, each is a configuration: the same rows in another form, as GSM8K's `main` and `socratic`.
    """
    places = {path: [named(part) for part in parts] for path, parts in names.items()}
    return {path: "/".join(names[path][: at.index(True)]) or "." for path, at in places.items() if any(at)}


def _words(part: str) -> set[str]:
    return set(re.split(r"[^a-z]+", part.lower()))


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable `datasets` folder: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a readable `datasets` folder: not an object")
    return tree
