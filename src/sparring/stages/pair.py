"""Stages between play and training: groups, and the frozen roles' log-probs of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sparring import pair
from sparring.errors import SparringError
from sparring.pair.preference import MISMATCHED
from sparring.plan import RoundPlan, round_folder
from sparring.rundir import Counts
from sparring.rundir.store import Rows, Split, read_json, write_json, write_shards
from sparring.types import Frozen, Group, Official, Paired, Played, Player, Rendered, Sample, Score, sample_id
from sparring.workshop import Workshop

log = logging.getLogger("sparring")

PART = 2048
"""Prompts that are paired at a time, and groups of a shard."""
PROBED = 16
"""Groups on which the sampler's log-probs are checked."""
GAP = "sampler_gap.json"
MOST_GAP = 1e-3
"""The largest difference, in nats per token, that counts as rounding."""
WHY = {
    "unjudged": "the verifier can judge none of them: give another one",
    "tie": "all answers to a prompt win alike: raise play.samples or give another scorer",
    "all_wrong": "no answer is right: give the method gold answers too, or a stronger start",
    "no_pair": "the rows hold no rejected answers",
}
"""What to do about a round without groups, by what most of its samples were dropped for."""


def groups(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """What the method pairs of this round's samples, and the earlier rounds' own groups that it replays.

    A method that looks at one prompt at a time is given a few thousand, so that memory hardly grows with their number.
    """
    rendering = shop.rendered("train", r.settings.play.max_new_tokens, r.settings.limit, r.method.template)
    samples: Rows[Sample] = Rows(shop.run.path / r.folder / "samples", Sample)
    dropped: Counter[str] = Counter()
    lengths = _Lengths()

    def own() -> Iterator[Sequence[Group]]:
        for played in _parts(shop, r, rendering.rows, samples):
            made = r.method.groups(played) if r.method.official is None else _official(shop, played, r.method.official)
            dropped.update(made.dropped)
            lengths.add(made.groups)
            yield made.groups

    def replayed() -> Iterator[Sequence[Group]]:
        earlier = [e for e in reversed(shop.plan.rounds) if e.t < r.t and e.method.plays]
        for weight, before in zip(r.method.memory, earlier, strict=False):
            rows = Rows(shop.run.path / before.folder / "groups", Group)
            for at in range(0, len(rows), PART):
                yield pair.replayed([g for g in rows[at : at + PART] if g.origin_round == before.t], weight)

    # All are paired again for the counts; an older version's shards may be of another size
    for left in folder.glob("*.parquet"):
        left.unlink()
    whole = (part[at : at + PART] for part in chain(own(), replayed()) for at in range(0, len(part), PART))
    total = write_shards(folder, Group, (partial(list, part) for part in whole))
    if not total:
        most = max(dropped, key=lambda reason: dropped[reason], default="")
        raise SparringError(
            f"{r.folder}/groups: nothing to train on: of {len(samples)} samples all were dropped ({dict(dropped)}); "
            + WHY.get(most, "the opponent already gives the data's answers, or the data has none")
        )
    counts: dict[str, Any] = {"groups": lengths.groups, "replayed": total - lengths.groups}
    return counts | {"length_gap": lengths.gap, "dropped": dict(dropped), **rendering.counts}


def _parts(shop: Workshop, r: RoundPlan, rows: Rows[Rendered], samples: Rows[Sample]) -> Iterator[Played]:
    """What the method pairs, a few thousand prompts at a time where it does not compare prompts with each other."""
    folders = [shop.run.path / round_folder(number, shop.plan.first) for number in r.method.recall(r.t)]
    recalled = [Rows(folder / "samples", Sample) for folder in folders]
    judged: Rows[Score] = Rows(shop.run.path / r.folder / "scores", Score)
    size = PART if r.method.by_prompt and r.method.official is None else len(rows)
    part = {hash(name): i // size for i, name in enumerate(rows.column("example_id"))}
    now, scores, before = Split(samples, part), Split(judged, part), [Split(table, part) for table in recalled]
    for i, at in enumerate(range(0, len(rows), size)):
        earlier = [sample for table in before for sample in table.part(i)]
        yield Played(r.t, rows[at : at + size], now.part(i), earlier, scores.part(i), shop.renderer.end_id)


class _Lengths:
    """How many groups there are, and the tokens of their preferred completions and of the others.

    Within a group, or among those of one completion (KTO's, beside another prompt's answer) by their targets.
    """

    def __init__(self) -> None:
        self.groups = 0
        self._tokens, self._counts = [0, 0], [0, 0]

    def add(self, groups: Sequence[Group]) -> None:
        self.groups += len(groups)
        for group in groups:
            table = zip(group.completions, group.targets, group.sources, strict=True)
            own = [(completion, target) for completion, target, source in table if not source.startswith(MISMATCHED)]
            targets = {target for _, target in own}
            top = max(targets) if len(own) > 1 else 1.0
            if len(targets) > 1 or (targets in ({0.0}, {1.0}) and len(own) == 1):
                for completion, target in own:
                    self._tokens[target == top] += len(completion)
                    self._counts[target == top] += 1

    @property
    def gap(self) -> float:
        """Mean tokens of the preferred less those of the others: a gap that a loss can learn instead."""
        if not all(self._counts):
            return 0.0
        others, preferred = (tokens / count for tokens, count in zip(self._tokens, self._counts, strict=True))
        return round(preferred - others, 2)


def _official(shop: Workshop, played: Played, official: Official) -> Paired:
    """Pairs on the released code's tokens, which are made from texts."""
    from sparring.prompts.official import pairs

    return pairs(
        shop.tokenizer,
        shop.examples(row.example_id for row in played.rows),
        played.samples,
        played.t,
        max_length=official.max_length,
        max_prompt_length=official.max_prompt_length,
        template=shop.renderer.template,
    )


def frozen(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """Every frozen role's log-probs of every group, once: a folder per role, its rows in the order of the groups.

    A player's own samples were scored as it sampled them: where the built-in engine did so in full precision, and gives
    what `score` does on a few groups, its word is taken. `sampler_gap` counts the largest difference there, in nats per
    token.
    """
    frozen_shards(shop, folder, r=r)
    rows = sum(len(Rows(folder / role, Frozen)) for role in r.frozen)
    gaps = [read_json(folder / role / GAP) for role in r.frozen if (folder / role / GAP).exists()]
    return {"rows": rows} | ({"sampler_gap": float(f"{max(gaps):.3g}")} if gaps else {})


def frozen_shards(shop: Workshop, folder: Path, *, r: RoundPlan) -> None:
    """Those of the log-probs that are this process's to take, a chunk of groups each."""
    paired = Rows(shop.run.path / r.folder / "groups", Group)
    chunk = r.settings.play.chunk
    starts = range(0, len(paired), chunk)
    shop.progress.begin(len(r.frozen) * len(paired), "groups")

    def write(before: int, role: str) -> None:
        player = shop.resolve(r, role)
        (folder / role).mkdir(exist_ok=True)
        own = cache(partial(_believed, shop, r, role, player, paired, folder / role / GAP))
        work = [partial(_frozen, shop, r, role, player, own, paired, slice(at, at + chunk)) for at in starts]
        ends = [before + min(at + chunk, len(paired)) for at in starts]
        shop.write(folder / role, Frozen, work, lambda n: shop.progress.reached(ends[n]))

    for i, role in enumerate(r.frozen):
        write(i * len(paired), role)


def _believed(shop: Workshop, r: RoundPlan, role: str, player: Player, paired: Sequence[Group], file: Path) -> _Sampled:
    """The player's own log-probs of its samples, none where they are not what `score` gives; `file` gets the gap."""
    own = _Sampled(shop, r, player)
    gap = _gap(shop, r, player, paired, own)
    if gap is not None:
        with shop.claim(file)(0) as ours:
            if ours:
                write_json(file, gap)
    if gap is None or not gap <= MOST_GAP:
        if gap is not None:
            log.info("round %d: the sampler's log-probs differ by %.2g nats: %s is scored anew", r.t, gap, role)
        own.forget()
    return own


class _Sampled:
    """What a player gave the samples of this round that it played itself, found by their ids."""

    def __init__(self, shop: Workshop, r: RoundPlan, player: Player) -> None:
        import torch

        self._rows: Rows[Sample] | None = None
        self._at: dict[int, int] = {}
        """Hash of a sample's id to its row: the ids themselves would be most of the stage's memory."""
        # Rounding in 16 bits depends on the shape of a pass, and another engine has its own: margins would not begin at 0
        exact = shop.compute in (torch.float32, torch.float64) and r.settings.play.engine_kind == "hf"
        if r.turns and exact and r.method.official is None and r.method.template is None:
            self._rows = Rows(shop.run.path / r.folder / "samples", Sample)
            told = self._rows.columns("example_id", "player", "round", "index", "tokens")
            self._at = {
                hash(sample_id(name, sha, t, index)): i
                for i, (name, sha, t, index, tokens) in enumerate(told)
                if sha == player.sha and tokens
            }

    def forget(self) -> None:
        """Have every sample scored anew."""
        self._at = {}

    def holds(self, group: Group) -> bool:
        """Whether any of a group's completions is one of them."""
        return any(hash(source) in self._at for source in group.sources)

    def logps(self, groups: Iterable[Group]) -> dict[Told, tuple[float, ...]]:
        """The log-probs of those of the groups' completions that are whole samples of the player's own."""
        told = {one for g in groups for one in zip(g.sources, g.completions, strict=True) if hash(one[0]) in self._at}
        wanted = sorted({self._at[hash(source)] for source, _ in told})
        found = self._rows.take(wanted) if self._rows is not None else []
        return {(sample.id, sample.tokens): sample.logps for sample in found if (sample.id, sample.tokens) in told}


Told = tuple[str, tuple[int, ...]]
"""A completion's source and its tokens."""


def _frozen(
    shop: Workshop,
    r: RoundPlan,
    role: str,
    player: Player,
    believed: Callable[[], _Sampled] | None,
    paired: Sequence[Group],
    part: slice,
) -> list[Frozen]:
    """One shard: what the player gave its own samples, and the scores of all else."""
    from sparring.logps import score

    own = believed() if believed else None
    groups = paired[part]
    known = own.logps(groups) if own else {}
    told = [list(zip(g.sources, g.completions, strict=True)) for g in groups]
    asked = [
        (g.prompt, one[1])
        for g, completions in zip(groups, told, strict=True)
        for one in completions
        if one not in known
    ]
    # What is only probed is no progress
    share = len(groups) / max(1, len(asked)) if own else 0.0
    scored = score(
        shop.model(player),
        [prompt for prompt, _ in asked],
        [completion for _, completion in asked],
        batch_size=4 * r.settings.train.micro_batch,
        compute=shop.compute,
        hide=shop.hidden(r),
        on_rows=lambda rows, tokens: shop.progress.did(rows * share, tokens),
    )
    lines = iter(scored)
    return [
        Frozen(g.sha, role, player.sha, tuple(known[one] if one in known else next(lines) for one in completions))
        for g, completions in zip(groups, told, strict=True)
    ]


def _gap(shop: Workshop, r: RoundPlan, player: Player, paired: Sequence[Group], own: _Sampled) -> float | None:
    """The largest difference between the sampler's log-probs and `score`'s on a few groups, in nats per token.

    None where no group holds a sample of the player's own.
    """
    few = list(islice((g for g in paired if own.holds(g)), PROBED))
    known = own.logps(few)
    if not known:
        return None
    anew = _frozen(shop, r, "", player, None, few, slice(None))
    pairs = [
        (a, b)
        for g, row in zip(few, anew, strict=True)
        for one, line in zip(zip(g.sources, g.completions, strict=True), row.logps, strict=True)
        if one in known
        for a, b in zip(known[one], line, strict=True)
    ]
    return max(abs(a - b) for a, b in pairs)
