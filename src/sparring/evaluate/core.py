"""Held-out log-likelihood of gold answers, and verified accuracy of greedy and sampled ones.

Every player gets the same prompts and the same row keys, so two players differ by what they are and not by luck:
differences between players are paired, and their standard error is smaller than that of either figure. Every answer is
stored, so any two players can be compared later without answering again (`versus.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparring.evaluate.guards import flags, repeats
from sparring.evaluate.stats import Figure, maj_at_k, mean_se, pass_at_k, ratio_se, share
from sparring.judge.verify import VOTES, verdict
from sparring.progress import OnRows, silent
from sparring.types import Example, Player, Rendered, Verifier

if TYPE_CHECKING:
    import torch

    from sparring.config import EvaluateConfig, PlayConfig
    from sparring.play.hf import Answer
    from sparring.prompts import Renderer

AskAt = Callable[[Sequence[Sequence[int]], Sequence[int], float], "list[Answer]"]
"""An engine: one answer per prompt and key, at a temperature."""
Vote = Callable[[str], Hashable | None]
"""An answer's text to what it votes for in maj@k; None abstains."""
ROUND = -1
"""Namespace of evaluation's row keys: training rounds count from 0, so their randomness is never met again."""


@dataclass(frozen=True, slots=True)
class Item:
    """One evaluated answer: a row of the evaluation's table."""

    example_id: str
    kind: str
    """`gold` or `choice` (scored), `greedy` or `sampled` (played)."""
    index: int
    """0..n-1 among the sampled answers, or the choices, of this prompt."""
    text: str
    tokens: tuple[int, ...]
    finish: str
    right: bool | None
    """The verifier's word, of a choice whether it is the right one; None where nobody can say, and for gold."""
    logps: tuple[float, ...]
    """The player's temperature-1 log-prob of each token, in nats."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One player's figures, and the answers they were computed from."""

    summary: Figure
    """See `summarise`."""
    items: list[Item]


def accuracy(items: Iterable[Item]) -> Figure | None:
    """Share of right answers, clustered by prompt: figures over per-prompt shares; unjudged answers left out."""
    return share(_rights(items).values())


def _rights(items: Iterable[Item]) -> dict[str, float]:
    """Example id to the share of its judged answers that are right."""
    by_prompt: dict[str, list[bool]] = {}
    for item in items:
        if item.right is not None:
            by_prompt.setdefault(item.example_id, []).append(item.right)
    return {name: sum(rights) / len(rights) for name, rights in by_prompt.items()}


def values(items: Iterable[Item], key: str, vote: Vote | None = None) -> dict[str, float]:
    """Example id to the value of one figure on it: what the figure is the mean of, and what pairs two players.

    key: `gold_nll` (nats), `greedy`, `sampled`, `pass@K`, `maj@K`, `acc`, `acc_norm`; nothing for any other. Prompts
    with fewer than K judged answers have no pass@K and no maj@K. vote: see `maj_at_k`; None takes the stripped text.

    `acc` takes the choice of the largest log p(choice | prompt), `acc_norm` that of the largest per byte of its UTF-8
    text, the first of equal ones. Source: lm-evaluation-harness (`multiple_choice`).
    """
    if key == "gold_nll":
        return {i.example_id: -math.fsum(i.logps) for i in items if i.kind == "gold"}
    if key in ("greedy", "sampled"):
        return _rights(i for i in items if i.kind == key)
    by_prompt: dict[str, list[Item]] = {}
    wanted = "choice" if key in ("acc", "acc_norm") else "sampled"
    for item in items:
        if item.kind == wanted and item.right is not None:
            by_prompt.setdefault(item.example_id, []).append(item)
    if wanted == "choice":
        by_byte = key == "acc_norm"
        return {name: float(bool(_chosen(own, by_byte).right)) for name, own in by_prompt.items()}
    kind, at, number = key.partition("@")
    if not at or not number.isdigit() or kind not in ("pass", "maj"):
        return {}
    k = int(number)
    worth = _passes if kind == "pass" else (lambda own, k: _majority(own, k, vote or str.strip))
    return {name: worth(own, k) for name, own in by_prompt.items() if len(own) >= k}


NATS = ("gold_nll", "gold_nll_token")
"""Figures that are no shares: in nats, lower is better."""


def is_share(key: str) -> bool:
    """Whether a figure, a task's (`task:NAME:FIGURE`) included, is a share, of which more is better, rather than in nats."""
    return key.rpartition(":")[2] not in NATS


def _chosen(choices: Sequence[Item], by_byte: bool) -> Item:
    return max(choices, key=lambda i: math.fsum(i.logps) / (len(i.text.encode()) if by_byte else 1))


def vote_of(verifier: Verifier | None) -> Vote | None:
    """What an answer votes for where this verifier judges: its attribute `vote`, or the built-in one's reading."""
    return None if verifier is None else getattr(verifier, "vote", None) or VOTES.get(verifier)


def _passes(own: Sequence[Item], k: int) -> float:
    return pass_at_k(len(own), sum(bool(i.right) for i in own), k)


def _majority(own: Sequence[Item], k: int, vote: Vote) -> float:
    """All right answers are one party, whatever they look like: each equals the gold answer."""
    wrong = Counter(vote(i.text) for i in own if not i.right)
    silent = wrong.pop(None, 0)
    return maj_at_k(sum(bool(i.right) for i in own), tuple(sorted(wrong.values())), silent, k)


def subset_sizes(samples: int) -> list[int]:
    """The k of pass@k and maj@k: the powers of two from 2 on, and the number of samples."""
    return [*(2**i for i in range(1, samples.bit_length()) if 2**i < samples), samples] if samples > 1 else []


def summarise(
    items: Sequence[Item], *, prompts: int, gold_cut: int, verified: bool, vote: Vote | None = None
) -> Figure:
    """An evaluation's figures.

    `gold_nll` is −log p(gold | prompt) in nats per answer, end token counted, and `gold_nll_token` the same per token
    over all of them; `gold_cut` counts the prompts left out of both because their gold answer was cut. `greedy` and
    `sampled` are verified accuracies, None without a verifier; `unjudged` counts those of the `answers` that it could
    not judge. `pass@K` and `maj@K` are there where several answers were sampled and verified.
    `answer_tokens` (mean length), `truncated`, `empty` and `repeated` (shares) describe the sampled answers, or the
    greedy ones where none was sampled; `flags` says what is wrong with them, in words.
    """
    kinds = {kind: [i for i in items if i.kind == kind] for kind in ("gold", "greedy", "sampled")}
    nlls = [-math.fsum(i.logps) for i in kinds["gold"]]
    played = kinds["sampled"] or kinds["greedy"]
    count = max(len(played), 1)
    summary = {
        "n": prompts,
        "gold_nll": mean_se(nlls),
        "gold_nll_token": ratio_se(nlls, [len(i.tokens) for i in kinds["gold"]]),
        "gold_cut": gold_cut,
        "greedy": accuracy(kinds["greedy"]),
        "sampled": accuracy(kinds["sampled"]),
        "answers": len(kinds["greedy"]) + len(kinds["sampled"]),
        "unjudged": sum(i.right is None for i in items if i.kind != "gold") if verified else None,
        "answer_tokens": sum(len(i.tokens) for i in played) / count,
        "truncated": sum(i.finish == "length" for i in played) / count,
        "empty": sum(not i.text.strip() for i in played) / count,
        "repeated": sum(repeats(i.tokens) for i in played) / count,
    }
    most = max((i.index + 1 for i in kinds["sampled"]), default=0)
    for key in (f"{kind}@{k}" for k in subset_sizes(most) for kind in ("pass", "maj")):
        if found := share(values(kinds["sampled"], key, vote).values()):
            summary[key] = found
    return summary | {"flags": flags(summary)}


def evaluate(
    model: Any, player: Player, examples: Sequence[Example], rows: Sequence[Rendered], settings: EvaluateConfig,
    play: PlayConfig, renderer: Renderer, verifier: Verifier | None, *, seed: int, compute: torch.dtype | None = None,
    on_rows: OnRows = silent,
) -> Evaluation:  # fmt: skip
    """Evaluate `player`, whose weights `model` holds, on the first `settings.limit` held-out rows.

    Lengths and batch size come from `play`; top-p and top-k are off. Raises InputError where the verifier fails.
    """
    rows = rows[: settings.limit]
    items = answered(
        model, examples, rows, settings, play, renderer, verifier, seed=seed, compute=compute, on_rows=on_rows
    )
    return Evaluation(figures(rows, items, verifier), items)


def figures(rows: Sequence[Rendered], items: Sequence[Item], verifier: Verifier | None) -> Figure:
    """The summary of these rows' answers."""
    cut = sum(not _whole(row) for row in rows)
    return summarise(items, prompts=len(rows), gold_cut=cut, verified=verifier is not None, vote=vote_of(verifier))


def _whole(row: Rendered) -> bool:
    return bool(row.gold) and "gold" not in row.cut


def answered(
    model: Any, examples: Sequence[Example], rows: Sequence[Rendered], settings: EvaluateConfig, play: PlayConfig,
    renderer: Renderer, verifier: Verifier | None, *, seed: int, compute: torch.dtype | None = None,
    on_rows: OnRows = silent,
) -> list[Item]:  # fmt: skip
    """Gold answers scored, then the greedy answers and the sampled ones, each in the order of the rows."""
    from sparring.play.hf import sample

    def ask(prompts: Sequence[Sequence[int]], keys: Sequence[int], temperature: float) -> list[Answer]:
        return sample(
            model,
            prompts,
            keys,
            temperature=temperature,
            max_new_tokens=play.max_new_tokens,
            stop_ids=renderer.stop_ids,
            batch_size=play.batch_size,
            compute=compute,
            on_rows=on_rows,
        )

    return [
        *scored(model, rows, batch_size=play.batch_size, compute=compute, on_rows=on_rows),
        *played(ask, examples, rows, settings, renderer, verifier, seed=seed),
    ]


def scored(
    model: Any, rows: Sequence[Rendered], *, batch_size: int, compute: torch.dtype | None = None,
    on_rows: OnRows = silent,
) -> list[Item]:  # fmt: skip
    """Gold answers that were not cut, with the model's log-probs of them."""
    from sparring.logps import score

    whole = [row for row in rows if _whole(row)]
    was_training = model.training
    model.eval()
    try:
        logps = score(
            model, [r.prompt for r in whole], [r.gold for r in whole], batch_size=batch_size, compute=compute,
            on_rows=on_rows,
        )  # fmt: skip
    finally:
        model.train(was_training)
    return [
        Item(r.example_id, "gold", 0, r.gold_text, r.gold, "stop", None, p) for r, p in zip(whole, logps, strict=True)
    ]


def played(
    ask: AskAt, examples: Sequence[Example], rows: Sequence[Rendered], settings: EvaluateConfig, renderer: Renderer,
    verifier: Verifier | None, *, seed: int,
) -> list[Item]:  # fmt: skip
    """An engine's greedy answers and its sampled ones, judged."""
    from sparring.play.hf import key

    by_id = {example.id: example for example in examples}
    items = []
    for kind, temperature, indices in (("greedy", 0.0, 1), ("sampled", settings.temperature, settings.samples)):
        wanted = [(row, index) for row in rows for index in range(indices)]
        keys = [key(seed, ROUND, row.example_id, index) for row, index in wanted]
        for (row, index), answer in zip(wanted, ask([row.prompt for row, _ in wanted], keys, temperature), strict=True):
            text = renderer.decode(answer.tokens)
            right = verdict(verifier, by_id[row.example_id], text)
            items.append(Item(row.example_id, kind, index, text, answer.tokens, answer.finish, right, answer.logps))
    return items
