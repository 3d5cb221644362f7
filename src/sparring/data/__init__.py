"""A data set to examples: read, deduplicate, hold out, shuffle. What is chosen depends on contents and seed alone."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparring.data.files import BadRow, show
from sparring.data.formats import check_columns, content_id, parse, prompt_identity
from sparring.data.sources import Source, digest, find, rows
from sparring.errors import InputError
from sparring.nearest import nearest
from sparring.types import Example

if TYPE_CHECKING:
    from sparring.config import DataConfig


@dataclass(frozen=True)
class Loaded:
    """The examples of a run, both lists in seeded order."""

    train: list[Example]
    heldout: list[Example]
    counts: dict[str, int]
    """`rows`, `bad`, `duplicates` of the training source (those held out by seed included), the same with `heldout_`
    for a held-out source; `train`, `heldout` examples; `heldout_same_prompt`: further examples of held-out prompts, which
    are left out; `generated` training examples that came with an answer; `overlap` prompts that stand on both sides."""


def load(config: DataConfig, seed: int) -> Loaded:
    """Read the data of a run.

    Rows with the same prompt and gold answer are kept once, the first of them: their id keys the samples. A held-out
    prompt has one example: a player answers it one way, whatever the number of gold answers, so more would be counted as
    independent and are not. Raises InputError, one line, naming file and line of a bad row (`on_bad_row: fail`), the columns found where no
    format fits, and a split that leaves nothing to train on.
    """
    check_columns(config)
    source, heldout_source = _sources(config)
    train, counts = _read(source, config, config.columns.values())
    heldout: list[Example] = []
    heldout_counts = {"rows": 0, "bad": 0, "duplicates": 0}
    if heldout_source is not None:
        heldout, heldout_counts = _read(heldout_source, config, ())
    elif config.heldout_size:
        train, heldout = split(train, config.heldout_size, seed)
    kept = {prompt_id(example): example for example in sorted(heldout, key=lambda e: _rank("gold", seed, e.id))}
    train = shuffled(train, seed)[: config.limit]
    counts |= {f"heldout_{name}": count for name, count in heldout_counts.items()}
    counts |= {
        "train": len(train),
        "heldout": len(kept),
        "heldout_same_prompt": len(heldout) - len(kept),
        "generated": sum(example.generated is not None for example in train),
        "overlap": len({prompt_id(e) for e in train} & {prompt_id(e) for e in heldout}) if heldout_source else 0,
    }
    return Loaded(train, shuffled(list(kept.values()), seed), counts)


def fingerprint(config: DataConfig) -> dict[str, str]:
    """Identify the data: `train NAME` or `heldout NAME` of each file that is read to the sha256 of its contents.

    NAME is the path within the folder given, or the file's own name: the same wherever the data lie. A split on the
    Hub, `owner/name:split`, has its fingerprint instead. Raises InputError where the data cannot be found.
    """
    source, heldout = _sources(config, strict=False)
    parts = {"train": digest(source), "heldout": digest(heldout) if heldout else {}}
    return {f"{part} {name}": sha for part, files in parts.items() for name, sha in files.items()}


def locate(config: DataConfig) -> None:
    """Raises InputError where the data cannot be found, or not told which they are."""
    _sources(config)


def prompt_id(example: Example) -> str:
    """Content hash of the prompt alone."""
    return content_id(prompt_identity(example.messages))


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """Seeded order that does not depend on the order given: adding rows does not reorder the others."""
    return sorted(examples, key=lambda example: _rank("order", seed, example.id))


def split(examples: Sequence[Example], size: int | float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out the examples of `size` prompts (a float: of that share of them, at least one) by seed, into (train, heldout).

    Raises InputError where nothing would be left to train on.
    """
    if isinstance(size, float) and size >= 1:
        raise InputError(f"data.heldout_size: {size} is not a share below 1; write {size:.0f} for a number of prompts")
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[prompt_id(example)].append(example)
    wanted = size if isinstance(size, int) else max(1, round(size * len(groups))) if size else 0
    if wanted >= len(groups):
        raise InputError(
            f"data.heldout_size: holding out {wanted} of {len(groups)} prompts leaves none to train on; lower it, 0 holds "
            "out none"
        )
    chosen = set(sorted(groups, key=lambda prompt: _rank("heldout", seed, prompt))[:wanted])
    train = [example for prompt, group in groups.items() if prompt not in chosen for example in group]
    return train, [example for prompt, group in groups.items() if prompt in chosen for example in group]


def _rank(purpose: str, seed: int, identity: str) -> bytes:
    # Without the purpose, the held-out choice would be the front of the training order.
    return hashlib.sha256(f"{purpose}:{seed}:{identity}".encode()).digest()


def _sources(config: DataConfig, *, strict: bool = True) -> tuple[Source, Source | None]:
    source = find(config.path, config.split, config.name, strict=strict)
    if config.heldout is None and config.heldout_split is None:
        return source, None
    path = config.path if config.heldout is None else config.heldout
    if not path:
        raise InputError("data.heldout: empty; name a file, or leave it out to hold out by seed")
    name = config.name if path == config.path or config.name == "." else None
    heldout = find(path, config.heldout_split, name, strict=strict)
    trained = {file.resolve() for file in source.files}
    if heldout == source or any(file.resolve() in trained for file in heldout.files):
        raise InputError(f"{path}: held out and trained on at once; name another file in data.heldout or another split")
    return source, heldout


def _read(source: Source, config: DataConfig, mapped: Collection[str]) -> tuple[list[Example], dict[str, int]]:
    """All examples of a source, once each; `mapped` are columns that some row must have."""
    examples: dict[str, Example] = {}
    counts = Counter(rows=0, bad=0, duplicates=0)
    unseen, seen = set(mapped), set[str]()
    first = ""
    for where, row in rows(source):
        counts["rows"] += 1
        try:
            example = parse(row, where, config)
        except BadRow as problem:
            if config.on_bad_row == "fail":
                raise InputError(f"{where}: {problem}; mend it, or set data.on_bad_row=skip") from None
            counts["bad"] += 1
            first = first or f"{where}: {problem}"
            continue
        if unseen and not isinstance(row, BadRow):
            seen.update(row)
            unseen -= seen
        counts["duplicates"] += example.id in examples
        examples.setdefault(example.id, example)
    if not counts["rows"]:
        raise InputError(f"{source.name}: no rows in it; it needs at least one")
    if not examples:
        raise InputError(f"{source.name}: every row is bad ({counts['bad']}); the first, {first}")
    if unseen:
        theirs = sorted(unseen)[0]
        ours = next(key for key, value in config.columns.items() if value == theirs)
        near = show(nearest(theirs, sorted(seen)))
        raise InputError(f"data.columns.{ours}: no row of {source.name} has {show(theirs)}; the nearest is {near}")
    return list(examples.values()), dict(counts)
