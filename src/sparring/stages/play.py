"""Stages before pairing: the data, the players' answers, and what judges say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring import players
from sparring.errors import InputError
from sparring.judge.verify import load_verifier, verdict
from sparring.plan import RoundPlan
from sparring.play.engines import Engine, health
from sparring.rundir import Counts
from sparring.rundir.store import Rows, Split, read_json, write_json, write_shards
from sparring.types import Example, Official, Player, Rendered, Sample, Score, Turn
from sparring.workshop import DATE, Workshop

if TYPE_CHECKING:
    from torch import nn

    from sparring.play.graph import Graph
    from sparring.play.hf import Answer, Mixture
    from sparring.progress import OnRows


PART = 4096
"""Examples of a shard."""
GAP = "engine_gap.json"
OFF_POLICY = "off-policy"
"""Settings id of answers that came with the data."""


def data(shop: Workshop, folder: Path) -> Counts:
    """The data set, checked, split and shuffled, as examples."""
    from sparring.data import load

    loaded = load(shop.config.data, shop.config.seed)
    for name, examples in (("train", loaded.train), ("heldout", loaded.heldout)):
        (folder / name).mkdir(exist_ok=True)
        for left in (folder / name).glob("*.parquet"):
            left.unlink()
        cuts = range(0, max(1, len(examples)), PART)
        write_shards(folder / name, Example, (partial(list, examples[at : at + PART]) for at in cuts))
    # Templates may write the date. It is the data's, so that forks, which share their rounds, share their prompts too
    write_json(folder / DATE, datetime.now().isoformat())
    return {"train": len(loaded.train), "heldout": len(loaded.heldout), **loaded.counts}


def samples(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """Every turn's player answers its prompts; in the first round of self-play, answers that came with the data stand in."""
    total, engined = play_shards(shop, folder, r=r), r.settings.play.engine_kind != "hf"
    health = engine_gap(shop, folder, r=r) if engined else {}
    counts: Counter[str] = Counter(samples=total, truncated=0, tokens=0, off_policy=0)
    different: set[int] = set()  # of hashes: the answers themselves would be most of the stage's memory
    for sample in Rows(folder, Sample):
        counts["truncated"] += sample.finish == "length"
        counts["tokens"] += len(sample.tokens)
        counts["off_policy"] += sample.settings_id == OFF_POLICY
        different.add(hash((sample.example_id, sample.tokens)))
        if engined:
            counts["retokenised"] += sample.settings_id.endswith(("-text", "-inexact"))
            counts["without_logps"] += not sample.logps and sample.settings_id != OFF_POLICY
    return {**counts, "distinct": round(len(different) / max(total, 1), 4)} | health


def engine_gap(shop: Workshop, folder: Path, *, r: RoundPlan) -> dict[str, float]:
    """How far the log-probs of the engine that played are from ours, taken once."""
    if not (folder / GAP).exists():
        players = [shop.resolve(r, turn.role) for turn in r.turns]
        found = health(shop, players, _rows(shop, r), Rows(folder, Sample))
        if shop.first:
            write_json(folder / GAP, found)
        return found
    return dict(read_json(folder / GAP))


def play_shards(shop: Workshop, folder: Path, *, r: RoundPlan) -> int:
    """Those of the answers that are this process's to make, a chunk of prompts each; returns how many are there."""
    settings, rows = r.settings.play, _rows(shop, r)
    first = r is next(r for r in shop.plan.rounds if r.turns)
    split = [turn for turn in r.turns if turn.split]
    starts = range(0, len(rows), settings.chunk)
    engine = Engine(shop, settings.engine, folder) if settings.engine_kind != "hf" else None
    graphs = _Graphs(shop, r)
    before = 0
    jobs: list[Callable[[], list[Sample]]] = []
    sizes: list[int] = []
    for turn in r.turns:
        wanted = settings.samples if turn.samples is None else turn.samples
        part = (split.index(turn), len(split)) if turn.split else (0, 1)
        mixture = cache(partial(_mixture, shop, r, turn))
        for at in starts:
            # Every n-th row of the chunk, counted from the first row of all; read when its turn has come
            chosen = slice(at + (part[0] - at) % part[1], at + settings.chunk, part[1])
            given = first and turn is r.turns[0] and r.method.takes_given
            indices = range(before, before + wanted)
            jobs.append(partial(_answers, shop, r, turn, mixture, engine, graphs, rows, chosen, given, indices))
            sizes.append(len(range(*chosen.indices(len(rows)))) * wanted)
        before += 0 if turn.split else wanted
    shop.progress.begin(sum(sizes), "answers")
    ends = list(accumulate(sizes))
    with engine or nullcontext(), graphs:
        return write_shards(folder, Sample, jobs, lambda n: shop.progress.reached(ends[n]), shop.claim(folder))


def _rows(shop: Workshop, r: RoundPlan) -> Sequence[Rendered]:
    """The prompts that a round plays."""
    rows = shop.rendered("train", r.settings.play.max_new_tokens, r.settings.limit, r.method.template).rows
    if r.method.official is None:
        return rows
    return _official(shop, rows, r.method.official, r.settings.play.max_new_tokens)


def _answers(
    shop: Workshop,
    r: RoundPlan,
    turn: Turn,
    mixture: Callable[[], Mixture | None],
    engine: Engine | None,
    graphs: _Graphs,
    rows: Sequence[Rendered],
    chosen: slice,
    first: bool,
    indices: range,
) -> list[Sample]:
    """One turn's answers to a chunk of prompts; with `first`, those that came with the data are taken as they are."""
    from sparring.play.hf import play

    player, settings = shop.resolve(r, turn.role), r.settings.play
    part = rows[chosen]
    given = [row for row in part if first and row.generated is not None]
    asked = [row for row in part if not (first and row.generated is not None)]
    most = r.method.answer_tokens or (lambda example_id: None)
    graph = graphs.of(turn, player, asked, indices, len(rows)) if asked and engine is None else None
    lengths = [min(settings.max_new_tokens, most(row.example_id) or settings.max_new_tokens) for row in asked]
    played: list[Sample] = []
    for length in sorted(set(lengths)):
        own = [row for row, limit in zip(asked, lengths, strict=True) if limit == length]
        how = settings.model_copy(update={"max_new_tokens": length})
        named: dict[str, Any] = {"seed": shop.config.seed, "round": r.t, "role": turn.role, "indices": indices}
        if engine is not None:
            played += engine.play(own, player, how, **named)
            continue
        played += play(
            shop.model(player),
            own,
            player,
            how,
            shop.renderer,
            **named,
            mixture=mixture(),
            compute=shop.compute,
            on_rows=shop.progress.did,
            graph=graph,
        )
    # Beside an engine no model of ours is loaded for what the frozen stage scores anyway
    model = shop.model(player) if given and engine is None else None
    return played + _given(shop, model, given, r.t, settings.batch_size)


class _Graphs:
    """Compiled decoders of those who play, one at a time, where they are wanted or were found to pay for the stage."""

    def __init__(self, shop: Workshop, r: RoundPlan) -> None:
        self._shop, self._r = shop, r
        self._stack = ExitStack()
        self._held: tuple[Turn, Graph | None] | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._leave()

    def of(self, turn: Turn, player: Player, asked: Sequence[Rendered], indices: range, prompts: int) -> Graph | None:
        """The decoder of a turn's player; the first rows that it is asked for are those of a trial.

        prompts: those of the stage. Raises InputError where it is to be compiled and cannot be.
        """
        if self._held is None or self._held[0] is not turn:
            self._leave()
            alone = self._shop.rank is None or self._shop.rank.size == 1
            wanted = self._shop.config.model.compile != "never" and alone and turn.mixed_with is None
            self._held = turn, self._begin(turn, player, asked, indices, prompts) if wanted else None
        return self._held[1]

    def _leave(self) -> None:
        """Before another player is loaded: a graph keeps its own in memory."""
        self._held = None
        self._stack.close()

    def _begin(
        self, turn: Turn, player: Player, asked: Sequence[Rendered], indices: range, prompts: int
    ) -> Graph | None:
        from sparring import compiled
        from sparring.play import graph as graphs
        from sparring.play.hf import sample

        shop, settings, name = self._shop, self._r.settings.play, f"{self._r.folder}/play/{turn.role}"
        always, file = shop.config.model.compile == "always", shop.run.path / compiled.FILE
        record = read_json(file) if file.exists() else {}
        sharing = sum(other.split for other in self._r.turns) if turn.split else 1
        answers, size = prompts * len(indices) // sharing, settings.batch_size
        short = answers * settings.max_new_tokens < graphs.LEAST_STEPS * size
        short = short or min(size, len(asked) * len(indices)) < 2  # a single row is played plainly
        if not always and (short if name not in record else not record[name]["pays"]):
            return None
        model = shop.model(player)
        if not graphs.fits(model):
            return None
        batch = [row.prompt for row in asked for _ in indices][:size]

        def play(graph: Graph | None, length: int, on_rows: OnRows) -> list[Answer]:
            return sample(
                model, batch, range(len(batch)), temperature=settings.temperature, top_p=settings.top_p,
                top_k=settings.top_k, max_new_tokens=length, stop_ids=shop.renderer.stop_ids, batch_size=size,
                compute=shop.compute, graph=graph, on_rows=on_rows,
            )  # fmt: skip

        def make(stack: ExitStack) -> Graph | compiled.Failed:
            return graphs.begin(stack, model, shop.compute)

        if not always and name not in record:
            paying, found = graphs.settled(self._stack, play, make, answers, settings.max_new_tokens)
            write_json(file, record | {name: found})
            return paying
        made = make(self._stack)
        if not isinstance(made, compiled.Failed):
            return made
        if not always:
            write_json(file, record | {name: record[name] | {"pays": False, "problem": made.problem}})
        elif not issubclass(made.kind, graphs.Misfit):
            raise InputError(
                f"model.compile: always, but the decoder cannot be compiled ({made.problem}); say auto or never"
            )
        return None


def _mixture(shop: Workshop, r: RoundPlan, turn: Turn) -> Mixture | None:
    """The second model of a turn, which stays in memory while it lasts."""
    from sparring.play.hf import Mixture

    if turn.mixed_with is None:
        return None
    return Mixture(shop.beside(shop.resolve(r, turn.mixed_with)), turn.share)


def _official(shop: Workshop, rows: Sequence[Rendered], official: Official, most: int) -> list[Rendered]:
    """The rows with the prompt that the released generators play.

    Raises InputError where pairs, or a question with an answer of `most` tokens, would not fit the model.
    """
    from sparring.prompts.official import first_round, play_ids

    model = players.model_config(shop.player(shop.plan.first).path, shop.config.model)
    context = players.context_length(model, shop.tokenizer)
    if official.max_length > context:
        raise InputError(f"max_length: {official.max_length} is more than the model's context of {context}; lower it")
    examples = {e.id: e for e in shop.examples(row.example_id for row in rows)}

    def question(row: Rendered) -> tuple[int, ...]:
        text = first_round(examples[row.example_id])[0][1].content
        return tuple(play_ids(shop.tokenizer, text, bos=official.bos))

    made = [replace(row, prompt=question(row)) for row in rows]
    longest = max(made, key=lambda row: len(row.prompt), default=None)
    if longest is not None and len(longest.prompt) + most > context:
        raise InputError(
            f"{examples[longest.example_id].source or longest.example_id}: its question of {len(longest.prompt)} tokens "
            f"and an answer of {most} are more than the model's context of {context}, and the released code cuts no "
            "question; lower play.max_new_tokens or leave such questions out of the data"
        )
    return made


def _given(shop: Workshop, model: nn.Module | None, rows: Sequence[Rendered], t: int, batch_size: int) -> list[Sample]:
    """Answers by an unknown player that came with the data, scored by this round's opponent where that is given."""
    from sparring.logps import score

    answers = [row.generated or () for row in rows]
    logps: list[tuple[float, ...]] = [()] * len(rows)
    if model is not None:
        logps = score(
            model,
            [r.prompt for r in rows],
            answers,
            batch_size=batch_size,
            compute=shop.compute,
            on_rows=shop.progress.did,
        )
    return [
        Sample(
            example_id=row.example_id,
            player="unknown",
            index=0,
            seed=shop.config.seed,
            tokens=tokens,
            text=row.generated_text or "",
            finish="length" if "generated" in row.cut else "stop",
            logps=line,
            settings_id=OFF_POLICY,
            round=t,
        )
        for row, tokens, line in zip(rows, answers, logps, strict=True)
    ]


def scores(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """What the method's verifier and scorer say of every prompt's samples."""
    from sparring.judge.score import load_scorer

    played, chunk = Rows(shop.run.path / r.folder / "samples", Sample), r.settings.play.chunk
    prompts = list(dict.fromkeys(played.column("example_id")))
    part = {hash(name): i // chunk for i, name in enumerate(prompts)}
    answers = Split(played, part)
    examples = Split(Rows(shop.run.path / "data" / "train", Example), part, name="id", others=None)
    verifier = load_verifier(r.method.verifier) if r.method.verifier else None
    scorer = load_scorer(r.method.scorer) if r.method.scorer else None

    def judge(example: Example, answers: Sequence[Sample]) -> Score:
        texts = [sample.text for sample in answers]
        values: list[float | None] = []
        if verifier is not None:
            verdicts = [verdict(verifier, example, text) for text in texts]
            values = [None if right is None else float(right) for right in verdicts]
        wins = scorer(example, texts) if scorer is not None else []
        return Score(example.id, tuple(s.id for s in answers), tuple(values), tuple(tuple(row) for row in wins))

    def rows(at: int) -> list[Score]:
        by_prompt: dict[str, list[Sample]] = {}
        for sample in answers.part(at // chunk):
            by_prompt.setdefault(sample.example_id, []).append(sample)
        known = {example.id: example for example in examples.part(at // chunk)}
        found = []
        for name in prompts[at : at + chunk]:
            found.append(judge(known[name], by_prompt[name]))
            shop.progress.did(1)
        return found

    starts = range(0, len(prompts), chunk)
    shop.progress.begin(len(prompts), "prompts")
    work = [partial(rows, at) for at in starts]
    total = write_shards(folder, Score, work, lambda n: shop.progress.reached(min(len(prompts), (n + 1) * chunk)))
    values = Counter(value for row in Rows(folder, Score) for value in row.values)
    verdicts = {"right": values[1.0], "wrong": values[0.0], "unjudged": values[None]}
    return {"prompts": total} | (verdicts if verifier is not None else {})
