"""What a player is on the test split at a temperature: accuracy, diversity, and how likely the gold answers are."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from tasks import verify

from sparring import logps, players, preview
from sparring.config import DataConfig
from sparring.data import load
from sparring.play.hf import key, sample
from sparring.prompts import render
from sparring.rundir.view import RunView

PROMPTS, SAMPLES = 500, 4


def measure(view: RunView, folder: Path, number: int, temperature: float = 1.0) -> dict[str, float]:
    """Figures of a player sampled at `temperature` (0: greedy).

    `accuracy` (share right), `entropy` (nats per answer: −log q(answer) of its own samples under the law they were drawn
    from), `distinct` (share of distinct answers among a prompt's samples), `pass` (a prompt's samples hold a right one),
    and `gold_nll` (nats per answer, at temperature 1).
    """
    data = DataConfig(path=str(folder / "test.jsonl"), heldout_size=0)
    examples = load(data, view.config.seed).train[:PROMPTS]
    renderer = preview.make_renderer(view)
    rows = render(examples, renderer, data, context=64, max_new_tokens=view.config.play.max_new_tokens).rows
    model: Any = players.load_model(view.players[number].path, view.config.model)
    count = SAMPLES if temperature else 1
    wanted = [(row, i) for row in rows for i in range(count)]
    answers = sample(
        model, [row.prompt for row, _ in wanted], [key(view.config.seed, -1, row.example_id, i) for row, i in wanted],
        temperature=temperature, max_new_tokens=view.config.play.max_new_tokens, stop_ids=renderer.stop_ids, batch_size=1000,
    )  # fmt: skip
    texts = [renderer.decode(a.tokens) for a in answers]
    right = [
        bool(verify(example, text))
        for example, text in zip((e for e in examples for _ in range(count)), texts, strict=True)
    ]
    drawn = logps.score(
        model,
        [row.prompt for row, _ in wanted],
        [a.tokens for a in answers],
        batch_size=500,
        sharpen=1 / (temperature or 1.0),
    )
    gold = logps.score(model, [row.prompt for row in rows], [row.gold for row in rows], batch_size=500)
    groups = [slice(at, at + count) for at in range(0, len(wanted), count)]
    return {
        "accuracy": fmean(right),
        "entropy": -fmean(map(math.fsum, drawn)) if temperature else 0.0,
        "distinct": fmean(len(set(texts[g])) / count for g in groups),
        "pass": fmean(any(right[g]) for g in groups),
        "gold_nll": -fmean(map(math.fsum, gold)),
    }
