"""The stages that measure a player: on held-out prompts, and on tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparring import players
from sparring.config import EvaluateConfig, PlayConfig, TaskConfig
from sparring.errors import InputError
from sparring.evaluate import Evaluation, Item, Win, share, tasks, win_rate
from sparring.evaluate.core import AskAt, figures, played, scored
from sparring.evaluate.guards import NAMED, Overlap, flags, overlap
from sparring.judge.score import identity, load_scorer
from sparring.judge.verify import load_verifier
from sparring.play.engines import Engine
from sparring.prompts import Rendering
from sparring.rundir import Counts
from sparring.rundir.store import Rows, write_json, write_shard
from sparring.rundir.view import RunView
from sparring.types import Example, Player, Rendered, Verifier
from sparring.workshop import Workshop, fitted

if TYPE_CHECKING:
    from sparring.play.hf import Answer

T = TypeVar("T")
PART = 64
"""Prompts of a shard."""


PLAYED, GOLD = "played", "gold"
"""Folders of a stage for what an engine answered, and for what is scored then."""


def evaluation(shop: Workshop, folder: Path, *, number: int) -> Counts:
    """A player's answers to held-out prompts, one row each, and their summary."""
    if not len(Rows(shop.run.path / "data" / "heldout", Example)):
        write_json(folder / "summary.json", {"n": 0})
        return {"n": 0}
    if shop.config.evaluate.engine_kind == "hf":
        answer_shards(shop, folder, number=number)
    else:
        played_shards(shop, folder, number=number)
        gold_shards(shop, folder, number=number)
    asked, rows = _asked(shop)
    summary = figures(rows, list(Rows(folder, Item)), _verifier(shop))
    told = _guard(shop, None).of([row.example_id for row in asked])
    return _summed(folder, told | {"trained_kept": shop.config.evaluate.trained == "keep"} | summary)


def answer_shards(shop: Workshop, folder: Path, *, number: int) -> None:
    """Those of the held-out answers, gold ones with them, that are this process's to make by the built-in engine."""
    from sparring.evaluate.core import answered

    settings, tested = shop.config.evaluate, shop.player(number)

    def part(examples: Sequence[Example], rows: Sequence[Rendered]) -> list[Item]:
        return answered(
            shop.model(tested),
            examples,
            rows,
            settings,
            shop.config.evaluation_play,
            shop.renderer,
            _verifier(shop),
            seed=shop.config.seed,
            compute=shop.compute,
            on_rows=shop.progress.did,
        )

    _parts(shop, folder, part, 2 + settings.samples)


def played_shards(shop: Workshop, folder: Path, *, number: int) -> None:
    """What the engine of the evaluation answers to held-out prompts."""
    play = shop.config.evaluation_play
    with Engine(shop, shop.config.evaluate.engine, folder) as engine:
        ask = _ask(engine, shop.player(number), play)

        def part(examples: Sequence[Example], rows: Sequence[Rendered]) -> list[Item]:
            settings, verifier = shop.config.evaluate, _verifier(shop)
            return played(ask, examples, rows, settings, shop.renderer, verifier, seed=shop.config.seed)

        _parts(shop, folder / PLAYED, part, 1 + shop.config.evaluate.samples)


def gold_shards(shop: Workshop, folder: Path, *, number: int) -> None:
    """Those of the gold answers to held-out prompts that are this process's to score."""
    tested, size = shop.player(number), shop.config.evaluation_play.batch_size

    def part(examples: Sequence[Example], rows: Sequence[Rendered]) -> list[Item]:
        return scored(shop.model(tested), rows, batch_size=size, compute=shop.compute, on_rows=shop.progress.did)

    _parts(shop, folder / GOLD, part, 1, before=1 + shop.config.evaluate.samples)


def _parts(
    shop: Workshop, folder: Path, make: Callable[[Sequence[Example], Sequence[Rendered]], list[Item]], each: int,
    before: int = 0,
) -> None:  # fmt: skip
    """Shards of the held-out prompts' rows, `each` for a prompt, which has `before` already elsewhere."""
    examples = {example.id: example for example in Rows(shop.run.path / "data" / "heldout", Example)}
    if not examples:
        return
    _, rows = _asked(shop)
    folder.mkdir(exist_ok=True)
    shop.progress.begin(len(rows) * (2 + shop.config.evaluate.samples), "answers")
    shop.progress.reached(len(rows) * before)

    def part(at: int) -> list[Item]:
        asked = rows[at : at + PART]
        return make([examples[row.example_id] for row in asked], asked) if asked else []

    starts = range(0, max(1, len(rows)), PART)
    done = [len(rows) * before + each * min(len(rows), at + PART) for at in starts]
    shop.write(folder, Item, [partial(part, at) for at in starts], lambda n: shop.progress.reached(done[n]))


def _ask(engine: Engine, player: Player, play: PlayConfig) -> AskAt:
    """An engine as evaluations ask it."""

    def ask(prompts: Sequence[Sequence[int]], keys: Sequence[int], temperature: float) -> list[Answer]:
        how = {"temperature": temperature, "top_p": 1.0, "top_k": 0}
        return engine.sample(player, prompts, keys, play.model_copy(update=how))

    return ask


def untrained(shop: Workshop, rows: Sequence[Rendered]) -> Sequence[Rendered]:
    """Held-out rows but for those whose prompts are trained on, unless `evaluate.trained` keeps these."""
    if shop.config.evaluate.trained == "keep" or not (trained := _guard(shop, None).trained):
        return rows
    return [row for row in rows if row.example_id not in trained]


def _asked(shop: Workshop) -> tuple[list[Rendered], list[Rendered]]:
    """The held-out rows of the evaluation, and those of them that a player is measured by.

    Raises InputError where all are left out, because their prompts are trained on.
    """
    settings = shop.config.evaluate
    rows = list(shop.rendered("heldout", shop.config.evaluation_play.max_new_tokens, settings.limit).rows)
    left = list(untrained(shop, rows))
    if rows and not left:
        raise InputError(
            f"evaluate.trained: the prompts of all {len(rows)} held-out examples are trained on, so none is left to measure "
            "players by; give others in data.heldout, or set evaluate.trained=keep"
        )
    return rows, left


def _verifier(shop: Workshop) -> Verifier | None:
    name = shop.config.evaluate.verifier
    return load_verifier(name) if name else None


def task(shop: Workshop, folder: Path, *, number: int, task: TaskConfig) -> Counts:
    """What a player makes of a task: its answers or its choices' log-probs, one row each, and their summary."""
    if shop.config.evaluate.engine_kind != "hf":
        task_played(shop, folder, number=number, task=task)
    return task_scored(shop, folder, number=number, task=task)


def task_played(shop: Workshop, folder: Path, *, number: int, task: TaskConfig) -> None:
    """What the engine of the evaluation answers to a task, if that asks for answers."""
    file = folder / PLAYED / "00000.parquet"
    if file.exists() or tasks.is_suite(task) or (given := _given(shop, task)).kind == "choice":
        return
    file.parent.mkdir(exist_ok=True)
    rows, settings, play = _generation(shop, number, task, given)
    shop.progress.begin(len(rows.rows) * (2 + task.samples), "answers")
    with Engine(shop, shop.config.evaluate.engine, folder) as engine:
        ask, verifier = _ask(engine, shop.player(number), play), load_verifier(tasks.verifier_of(task, shop.config))
        items = played(ask, given.examples, rows.rows, settings, shop.renderer, verifier, seed=shop.config.seed)
        write_shard(file, Item, items)


def task_scored(shop: Workshop, folder: Path, *, number: int, task: TaskConfig) -> Counts:
    """A task whose answers are there where another engine gives them, and which the built-in one does whole."""
    from sparring.evaluate import evaluate

    if tasks.is_suite(task):
        return _suite(shop, folder, number, task)
    given, tested, config = _given(shop, task), shop.player(number), shop.config
    how: dict[str, Any] = {"task": task.label, "kind": given.kind, "file": given.file}
    shared: dict[str, Any] = {"compute": shop.compute, "on_rows": shop.progress.did}
    if given.kind == "choice":
        shop.progress.begin(sum(len(example.meta[tasks.CHOICES]) for example in given.examples), "choices")
        context = players.context_length(players.model_config(tested.path, config.model), shop.tokenizer)
        size = config.evaluation_play.batch_size
        model = shop.model(tested)
        result = tasks.choose(model, given.examples, shop.renderer, context=context, batch_size=size, **shared)
        return _write(shop, folder, result, how | given.told)
    rendering, settings, play = _generation(shop, number, task, given)
    rows, judge = rendering.rows, tasks.verifier_of(task, config)
    how |= {"verifier": judge, "temperature": settings.temperature, "max_new_tokens": play.max_new_tokens}
    how |= {"fitting": rendering.counts}
    verifier = load_verifier(judge)
    shop.progress.begin(len(rows) * (2 + task.samples), "answers")
    if config.evaluate.engine_kind == "hf":
        result = evaluate(
            shop.model(tested),
            tested,
            given.examples,
            rows,
            settings,
            play,
            shop.renderer,
            verifier,
            seed=config.seed,
            **shared,
        )
    else:
        shop.progress.reached(len(rows) * (1 + task.samples))
        gold = scored(shop.model(tested), rows, batch_size=play.batch_size, **shared)
        result = Evaluation(figures(rows, [*gold, *Rows(folder / PLAYED, Item)], verifier), gold)
    return _write(shop, folder, result, how | given.told)


@dataclass(frozen=True)
class _Given:
    """What a task asks, without what is trained on."""

    kind: str
    file: str
    examples: Sequence[Example]
    told: dict[str, Any]
    """Of what was left out."""


def _given(shop: Workshop, task: TaskConfig) -> _Given:
    """Raises InputError where nothing is left of a task."""
    path = Path(task.path).expanduser()
    given, guard = tasks.read(path), _guard(shop, path)
    examples = given.examples[: task.limit]
    told = guard.of(example.id for example in examples)
    left = tuple(example for example in examples if example.id not in guard.trained)
    if not left:
        raise InputError(f"{path}: the prompts of all its {told['trained']} items are trained on; give it others")
    return _Given(given.kind, str(path), left, told)


def _generation(
    shop: Workshop, number: int, task: TaskConfig, given: _Given
) -> tuple[Rendering, EvaluateConfig, PlayConfig]:
    """A task's rows, how often each is asked, and how it is answered."""
    config = shop.config
    play = config.evaluation_play.model_copy(update={"max_new_tokens": tasks.longest_answer(task, config)})
    # A long gold answer only takes its item out of log p(gold): what is asked does not depend on it
    data = config.data.model_copy(update={"long_answer": "cut"})
    fitting = config.model_copy(update={"data": data})
    model = players.model_config(shop.player(number).path, config.model)
    rendering = fitted(given.examples, fitting, model, shop.tokenizer, shop.renderer, play.max_new_tokens)
    update = {"limit": len(rendering.rows), "samples": task.samples}
    return rendering, config.evaluate.model_copy(update=update), play


def _suite(shop: Workshop, folder: Path, number: int, task: TaskConfig) -> Counts:
    """A named suite by another program's tasks; its own rows say what was asked, so overlap is not told."""
    from sparring.evaluate.harness import SuiteItem, run_suite

    result = run_suite(
        shop.model(shop.player(number)),
        shop.tokenizer,
        task.path,
        data_dir=task.data_dir,
        limit=task.limit,
        stop_ids=shop.renderer.stop_ids,
        compute=shop.compute,
        seed=shop.config.seed,
        progress=shop.progress,
    )
    return _save(folder, SuiteItem, result.items, {"task": task.label, "kind": "suite"} | tasks.suite_figures(result))


def wins(shop: Workshop, folder: Path, *, number: int) -> Counts:
    """How often the scorer prefers a player's greedy answers to player 0's, by the answers that both evaluations stored."""
    view, name = RunView(shop.run.path), shop.config.evaluate.scorer
    assert name is not None
    mine = [item for item in view.items(number) if item.kind == "greedy"]
    shop.progress.begin(len(mine), "prompts")
    rates = win_rate(load_scorer(name), view.heldout, mine, view.items(0), on_rows=shop.progress.did)
    rows = [Win(example_id, rate) for example_id, rate in rates.items()]
    told = {"task": "win_rate", "kind": "wins", "n": len(rows), "scorer": name, "scorer_identity": identity(name)}
    told |= {"start": view.players[0].sha, "max_new_tokens": shop.config.evaluation_play.max_new_tokens}
    return _save(folder, Win, rows, told | {"win_rate": share(rates.values())})


@dataclass(frozen=True)
class Guard:
    """What is known of an evaluation's items from the training data."""

    trained: frozenset[str]
    """Ids of the items whose prompt is trained on: they are left out."""
    overlap: Overlap

    def of(self, ids: Iterable[str]) -> dict[str, Any]:
        """For the summary, of these items."""
        given = list(ids)
        trained = [name for name in given if name in self.trained]
        rest = [name for name in given if name not in self.trained]
        return {"trained": len(trained), "trained_ids": trained[:NAMED], "overlap": self.overlap.among(rest)}


def _guard(shop: Workshop, file: Path | None) -> Guard:
    return _compared(shop.run.path, shop.plan.data.key, file, file and file.stat().st_mtime_ns)


@lru_cache(maxsize=8)  # the data do not change from player to player
def _compared(run: Path, key: str, file: Path | None, version: int | None) -> Guard:
    """`file`: a task's items; None: the held-out examples. `key` and `version` only tell one cached result from another."""
    from sparring.data import prompt_id

    items = list(Rows(run / "data" / "heldout", Example) if file is None else tasks.read(file).examples)
    train = Rows(run / "data" / "train", Example)
    prompts = {item.id: prompt_id(item) for item in items}
    # Of the few that are asked, not of the many that are trained on
    met = set(prompts.values()).intersection(map(prompt_id, train))
    trained = frozenset(name for name, prompt in prompts.items() if prompt in met)
    return Guard(trained, overlap(train, items))


def _write(shop: Workshop, folder: Path, result: Evaluation, told: Mapping[str, Any]) -> Counts:
    return _save(folder, Item, result.items, {**told, **result.summary}) if shop.first else {}


def _save(folder: Path, row_type: type[T], rows: Sequence[T], summary: dict[str, Any]) -> Counts:
    write_shard(folder / "00000.parquet", row_type, rows)
    return _summed(folder, summary)


def _summed(folder: Path, summary: dict[str, Any]) -> Counts:
    summary["flags"] = flags(summary)
    write_json(folder / "summary.json", summary)
    means = {k: v["mean"] for k, v in summary.items() if isinstance(v, dict) and v.get("mean") is not None}
    return means or {"n": summary["n"]}
