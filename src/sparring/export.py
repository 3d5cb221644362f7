"""What leaves a run: a player as a folder for the Hub, a round's pairs in TRL's preference format, its groups as Parquet.

Each is a new folder, whole or absent.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring import card, methods, players, preview
from sparring.errors import InputError
from sparring.formatting import visible
from sparring.pair.preference import MISMATCHED
from sparring.rundir.store import Rows, sync
from sparring.stages.train import selected
from sparring.types import Frozen, Group, Sample

if TYPE_CHECKING:
    import pyarrow as pa

    from sparring.prompts import Renderer
    from sparring.rundir.view import RoundView, RunView

_PROBED = 200
"""How many pairs are looked at to tell whether TRL would tokenise them as we did."""
_BATCH = 1000
Row = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    rows: int
    skipped: int = 0
    """Groups that are no pairs: of one completion, or all of the same target."""
    probed: int = 0
    same: int = 0
    """Of those that were probed, pairs whose texts TRL gives the token ids that were trained on."""


def hub(
    run: RunView,
    player: str,
    out: Path,
    *,
    merge: bool = False,
    license: str | None = None,
    base_model: str | None = None,
) -> int:
    """Write a player (a number or `best`) as a Hugging Face folder with a card for the Hub; returns its number.

    `license` and `base_model` (a Hub id) go into the card; the start player's own, where it has some, are the defaults.
    Raises InputError where `out` exists, or for a player that does not.
    """
    chosen = preview.chosen_players(run, [player])[0]
    number = chosen.round
    assert number is not None
    own = Path(chosen.path).expanduser() / card.FILE
    given = number == run.rounds[0].t and own.exists() and license is None and base_model is None
    adapter = players.is_adapter(chosen.path)
    made = card.model_card(run, number, license=license, base_model=base_model, merged=merge, adapter=adapter)
    players.export_player(chosen.path, out, run.config.model, merge=merge, card=None if given else made)
    return number


def trl(run: RunView, t: int | None, out: Path, *, standard: bool = False) -> Exported:
    """Write round t's pairs (None: the last round that has some) for TRL's DPOTrainer, as `train.parquet` and a README.

    A row is a `prompt`, a `chosen` and a `rejected` answer: messages, or with `standard` texts as the chat template
    renders them. Beside them the token ids that were trained on (`prompt_ids`, `chosen_ids`, `rejected_ids`), the
    reference's log-probs of those in nats, summed over an answer's tokens (`ref_chosen_logps`, `ref_rejected_logps`;
    absent for methods without a reference), `weight`, `example_id` and `origin_round`. A group of more than two makes a
    pair of its best completion and each one with a lower target. Raises InputError where `out` exists or there is no pair.
    """
    r = _round(run, t)
    groups, frozen = _trained_on(run, r)
    reference = frozen.get("reference")
    renderer, texts = preview.make_renderer(run), _texts(run, groups)
    ids = _trl_ids(run, renderer, standard)
    counts = {"skipped": 0, "probed": 0, "same": 0}

    def rows() -> Iterator[Row]:
        for g, group in enumerate(groups):
            pairs = list(_pairs(group))
            counts["skipped"] += not pairs
            messages = run.examples[group.example_id].messages
            told = texts(group, renderer)
            prompt: Any = renderer.text(messages) if standard else [_turn(m.role, m.content) for m in messages]
            for best, other in pairs:
                answers = [told[i] if standard else [_turn("assistant", told[i])] for i in (best, other)]
                row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "prompt_ids": list(group.prompt)}
                row |= {"chosen_ids": list(group.completions[best]), "rejected_ids": list(group.completions[other])}
                if reference is not None:
                    sums = [math.fsum(reference[g].logps[i]) for i in (best, other)]
                    row |= {"ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}
                if counts["probed"] < _PROBED:
                    counts["probed"] += 1
                    counts["same"] += ids(row) == tuple(row[f"{n}_ids"] for n in ("prompt", "chosen", "rejected"))
                yield row | {
                    "weight": group.weight, "example_id": group.example_id, "origin_round": group.origin_round,
                }  # fmt: skip

    with _made(out) as folder:
        count = _write(folder / "train.parquet", rows(), _trl_schema(standard, reference is not None))
        if not count:
            raise InputError(
                f"{run.path}: round {r.t} ({r.method}) has no pairs: its groups are single completions; "
                "use --format parquet"
            )
        (folder / card.FILE).write_text(_trl_card(run, r, reference is not None), encoding="utf-8")
    return Exported(count, **counts)


def parquet(run: RunView, t: int | None, out: Path) -> Exported:
    """Write round t's groups (None: the last round that has some) as `groups.parquet` and a README.

    A row is a group as the loss read it: `prompt` (messages), `completions` (texts), their token ids (`prompt_ids`,
    `completion_ids`), `targets`, `weight`, `sources`, `origin_round`, `masks`, `example_id`, `group` (content hash), and
    of every frozen role `logps_ROLE`: nats per token, aligned with `completion_ids`. Raises InputError where `out` exists.
    """
    r = _round(run, t)
    groups, frozen = _trained_on(run, r)
    renderer, texts = preview.make_renderer(run), _texts(run, groups)

    def rows() -> Iterator[Row]:
        for g, group in enumerate(groups):
            yield {
                "example_id": group.example_id,
                "group": group.sha,
                "prompt": [_turn(m.role, m.content) for m in run.examples[group.example_id].messages],
                "completions": texts(group, renderer),
                "prompt_ids": list(group.prompt),
                "completion_ids": [list(c) for c in group.completions],
                "targets": list(group.targets),
                "weight": group.weight,
                "sources": list(group.sources),
                "origin_round": group.origin_round,
                "masks": [list(mask) for mask in group.masks],
                **{f"logps_{role}": [list(line) for line in table[g].logps] for role, table in frozen.items()},
            }

    with _made(out) as folder:
        count = _write(folder / "groups.parquet", rows(), _group_schema(frozen))
        (folder / card.FILE).write_text(_group_card(run, r, list(frozen)), encoding="utf-8")
    return Exported(count)


def _round(run: RunView, t: int | None) -> RoundView:
    done = [r for r in run.rounds if r.stages["groups"] == "done"]
    if t is None and done:
        return done[-1]
    found = [r for r in run.rounds if r.t == t]
    if found and found[0] in done:
        return found[0]
    known = ", ".join(str(r.t) for r in done) or "none yet"
    raise InputError(f"{run.path}: round {t} has no groups; rounds that have: {known}; `sparring status` shows them")


def _trained_on(run: RunView, r: RoundView) -> tuple[Sequence[Group], Mapping[str, Sequence[Frozen]]]:
    """A round's groups as the loss reads them, and every frozen role's log-probs, aligned with them."""
    groups, frozen = r.rows("groups", Group), _frozen(r)
    settings = run.config.rounds[r.t - run.rounds[0].t]
    select = methods.make(settings.method, settings.hyper).select
    if select is None:
        return groups, frozen
    if not frozen:
        raise InputError(
            f"{r.path / 'frozen'}: is not done, and {r.method} chooses by it what is trained on; do that stage first"
        )
    return selected(groups, frozen, select)


def _frozen(r: RoundView) -> dict[str, Sequence[Frozen]]:
    """Every frozen role's log-probs, aligned with the groups."""
    if r.stages["frozen"] != "done":
        return {}
    folders = sorted(folder for folder in (r.path / "frozen").iterdir() if folder.is_dir())
    return {folder.name: Rows(folder, Frozen) for folder in folders}


def _pairs(group: Group) -> Iterator[tuple[int, int]]:
    """Places of the best completion and of each one with a lower target; another example's answers take no part."""
    own = [i for i, source in enumerate(group.sources) if not source.startswith(MISMATCHED)]
    best = max(own, key=lambda i: group.targets[i])
    yield from ((best, i) for i in own if group.targets[i] < group.targets[best])


def _texts(run: RunView, groups: Sequence[Group]) -> Callable[[Group, Renderer], list[str]]:
    """A group's completions as the texts that they are made of; one that was cut, as what is left of it."""
    rounds = {group.origin_round for group in groups}
    known: dict[str, str] = {}
    for r in run.rounds:
        if r.stages["samples"] == "done" and r.t <= max(rounds, default=0):
            known |= {sample.id: sample.text for sample in r.rows("samples", Sample)}

    def texts(group: Group, renderer: Renderer) -> list[str]:
        example = run.examples[group.example_id]
        given = {"gold": example.gold, "generated": example.generated}
        told = []
        for source, tokens in zip(group.sources, group.completions, strict=True):
            text = given.get(source, known.get(source))
            whole = bool(tokens) and tokens[-1] in renderer.stop_ids
            told.append(text if text is not None and whole else renderer.decode(tokens))
        return told

    return texts


def _trl_ids(
    run: RunView, renderer: Renderer, standard: bool
) -> Callable[[Row], tuple[list[int], list[int], list[int]]]:
    """Token ids of prompt, chosen and rejected as TRL 1.16's DPOTrainer makes them from a row's texts."""
    tokenizer: Any = copy.copy(preview.load_tokenizer(run.config))
    tokenizer.chat_template = renderer.template

    def encode(turns: Any, generation: bool = False) -> list[int]:
        if standard:
            return list(tokenizer(turns)["input_ids"])
        made = tokenizer.apply_chat_template(turns, add_generation_prompt=generation, tokenize=True, return_dict=True)
        return list(made["input_ids"])

    def ended(answer: Any) -> Any:
        eos = tokenizer.eos_token
        return answer + eos if standard and not answer.endswith(eos) else answer

    def ids(row: Row) -> tuple[list[int], list[int], list[int]]:
        prompt = encode(row["prompt"], generation=True)
        both = [encode(row["prompt"] + ended(row[name])) for name in ("chosen", "rejected")]
        size = min(_common(prompt, whole) for whole in both)
        return prompt[:size], both[0][size:], both[1][size:]

    return ids


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _messages() -> pa.DataType:
    import pyarrow as pa

    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _trl_schema(standard: bool, reference: bool) -> pa.Schema:
    import pyarrow as pa

    text, ids = pa.string() if standard else _messages(), pa.list_(pa.int32())
    columns = [(name, text) for name in ("prompt", "chosen", "rejected")]
    columns += [(f"{name}_ids", ids) for name in ("prompt", "chosen", "rejected")]
    columns += [(f"ref_{name}_logps", pa.float64()) for name in ("chosen", "rejected") if reference]
    return pa.schema([*columns, ("weight", pa.float64()), ("example_id", pa.string()), ("origin_round", pa.int64())])


def _group_schema(roles: Iterable[str]) -> pa.Schema:
    import pyarrow as pa

    columns = [("example_id", pa.string()), ("group", pa.string()), ("prompt", _messages())]
    columns += [("completions", pa.list_(pa.string())), ("prompt_ids", pa.list_(pa.int32()))]
    columns += [("completion_ids", pa.list_(pa.list_(pa.int32()))), ("targets", pa.list_(pa.float64()))]
    columns += [("weight", pa.float64()), ("sources", pa.list_(pa.string())), ("origin_round", pa.int64())]
    columns += [("masks", pa.list_(pa.list_(pa.float32())))]
    return pa.schema(columns + [(f"logps_{role}", pa.list_(pa.list_(pa.float32()))) for role in roles])


def _write(file: Path, rows: Iterator[Row], schema: pa.Schema) -> int:
    """Write rows as they come; returns how many there were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while part := list(islice(rows, _BATCH)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
            count += len(part)
    return count


@contextlib.contextmanager
def _made(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and vanishes when it does not."""
    if out.exists():
        raise InputError(f"{out}: exists already; give a new folder")
    making = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        for file in making.iterdir():
            sync(file)
        making.rename(out)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _trl_card(run: RunView, r: RoundView, reference: bool) -> str:
    given = (
        f"`ref_chosen_logps` and `ref_rejected_logps` are the log-probs of {_who(r, 'reference')}, summed over an answer's "
        "tokens, in nats.\n\n"
        "TRL makes token ids from the texts, and reference log-probs with the model, unless it is told not to:\n\n"
        "```python\n"
        "from datasets import load_dataset\n"
        "from trl import DPOConfig, DPOTrainer\n\n\n"
        "class Trainer(DPOTrainer):\n"
        '    """Takes token ids and reference log-probs as they are in the data set."""\n\n'
        "    def _prepare_dataset(self, dataset, *arguments, **options):\n"
        "        return dataset\n\n"
        "    def _precompute_ref_logps(self, dataset, *arguments, **options):\n"
        "        return dataset\n\n\n"
        'data = load_dataset("PATH", split="train")\n'
        'arguments = DPOConfig("out", precompute_ref_log_probs=True)\n'
        'trainer = Trainer(model="MODEL", args=arguments, train_dataset=data)\n'
        "```\n"
    )
    alone = "The method has no reference, so there are no reference log-probs.\n"
    return (
        f"---\ntags: [sparring, preference, {r.method}]\ntask_categories: [text-generation]\n---\n\n"
        f"# Pairs of round {r.t} of {visible(run.name)}\n\n"
        f"The pairs that round {r.t} of a `sparring` run trained on (method `{r.method}`), in TRL's preference format. "
        "`chosen` is the completion with the highest target of its group. `prompt_ids`, `chosen_ids` and `rejected_ids` are "
        "the token ids that were played and trained on.\n\n" + (given if reference else alone)
    )


def _group_card(run: RunView, r: RoundView, roles: Sequence[str]) -> str:
    told = "".join(f"- `logps_{role}`: log-probs of {_who(r, role)}, in nats, per token.\n" for role in roles)
    return (
        f"---\ntags: [sparring, {r.method}]\ntask_categories: [text-generation]\n---\n\n"
        f"# Groups of round {r.t} of {visible(run.name)}\n\n"
        f"What round {r.t} of a `sparring` run trained on (method `{r.method}`): the completions of one prompt that the loss "
        "compared, with one target each; `sources` says where each is from, `weight` its group's share in the objective.\n\n"
        + told
    )


def _who(r: RoundView, role: str) -> str:
    player = r.roles.get(role)
    if player is None:
        return f"the {role}"
    name = f"player {player.round}" if player.round is not None else f"`{Path(player.path).name}`"
    return f"{name} (content hash `{player.sha[:16]}`)"
