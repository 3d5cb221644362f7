"""ExSPIN and UPFT: which groups they make, and their losses by hand and by golden vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sparring import api, methods
from sparring.errors import InputError
from sparring.methods.upft import TEMPLATE, in_full
from sparring.plan import Stage
from sparring.types import Batch, LogProbs, Played, Rendered, Sample, Score

END = 2


def sample(name: str, index: int, tokens: Sequence[int], text: str = "s", finish: str = "stop") -> Sample:
    return Sample(name, "sha", index, 0, tuple(tokens), text, finish, (-1.0,) * len(tokens), "how", 1)  # type: ignore[arg-type]


# --- ExSPIN


def judged(*values: float | None, tokens: Sequence[Sequence[int]] = ()) -> Played:
    """One prompt with gold (9, END) and a sample per verdict."""
    answers = tokens or [(10 + i, END) for i in range(len(values))]
    samples = [sample("x", i, answer) for i, answer in enumerate(answers)]
    score = Score("x", tuple(s.id for s in samples), tuple(values))
    return Played(1, [Rendered("x", (7,), (9, END), "gold")], samples, (), [score], END)


def test_exspin_pairs_only_wrong_samples() -> None:
    """Eq. 11: D_t = {(x, y, y') : E(y') ≠ E(y)}."""
    paired = methods.make("exspin", {}).groups(judged(1.0, 0.0, None, 0.0, None))
    assert [g.completions for g in paired.groups] == [((9, END), (11, END)), ((9, END), (13, END))]
    assert all(g.targets == (1.0, 0.0) and g.weight == 1 and g.origin_round == 1 for g in paired.groups)
    assert paired.dropped == {"right": 1, "unjudged": 2}


def test_exspin_counts_equal_samples_and_what_spin_drops() -> None:
    equal = judged(0.0, 0.0, 0.0, 0.0, tokens=[(10, END), (10, END), (9, END), ()])
    paired = methods.make("exspin", {}).groups(equal)
    assert [g.weight for g in paired.groups] == [2.0] and paired.dropped == {"identical": 1, "empty": 1}
    once = methods.make("exspin", {"duplicates": "drop"}).groups(equal)
    assert [g.weight for g in once.groups] == [1.0] and once.dropped["duplicate"] == 1


def test_exspin_can_keep_the_gold_answer_of_right_samples() -> None:
    paired = methods.make("exspin", {"right": "gold"}).groups(judged(1.0, 0.0))
    assert [(g.completions[1], g.targets) for g in paired.groups] == [((11, END), (1, 0)), ((10, END), (1, 0.5))]
    assert paired.dropped == {}


def test_exspin_loss() -> None:
    """vectors.md §4b, common inputs III: SPIN's losses on a wrong sample; R = 0 leaves ℓ(λ r(y)) = ℓ(.1)."""
    log_probs = torch.tensor([[[-40.0], [-30.0]]] * 2, dtype=torch.float64)
    reference = torch.tensor([[[-41.0], [-28.0]]] * 2, dtype=torch.float64)
    policy = LogProbs(log_probs.requires_grad_())
    targets = torch.tensor([[1, 0], [1, 0.5]], dtype=torch.float64)
    mask = torch.ones(2, 2, 1, dtype=torch.bool)
    batch = Batch(mask.long(), mask, targets, torch.ones(2), {"reference": LogProbs(reference)})
    loss = methods.make("exspin", {"beta": 0.1}).loss(policy, batch)
    assert loss.tolist() == pytest.approx([0.5543552445, math.log1p(math.exp(-0.1))], abs=5e-11)
    for name, wrong, right in [
        ("hinge", 0.7, 0.9),
        ("exponential", 0.7408182207, math.exp(-0.1)),
        ("correlation", 0.7, 0.9),
    ]:
        got = methods.make("exspin", {"beta": 0.1, "loss": name}).loss(policy, batch)
        assert got.tolist() == pytest.approx([wrong, right], abs=5e-11)
    loss.sum().backward()
    slope = [-0.1 / (1 + math.exp(0.3)), -0.1 / (1 + math.exp(0.1))]
    assert log_probs.grad is not None
    assert log_probs.grad.flatten().tolist() == pytest.approx([slope[0], -slope[0], slope[1], 0.0])
    metrics = methods.make("exspin", {"beta": 0.1}).metrics(policy, batch)
    assert metrics["margin"].tolist() == pytest.approx([0.3, 0.3])


def test_exspin_settings() -> None:
    made = methods.make("exspin", {"verifier": "./mine.py:right"})
    assert made.verifier == "./mine.py:right" and methods.make("exspin", {}).verifier == "gsm8k"
    assert made.roles(2) == {"opponent": 2, "reference": 2, "start": 2}
    for hyper in [{"beta": 0.0}, {"loss": "l2"}, {"right": "keep"}, {"duplicates": "no"}]:
        with pytest.raises(InputError, match="method `exspin`"):
            methods.make("exspin", hyper)


# --- UPFT

FULL = next(f"id{i}" for i in range(1000) if in_full(f"id{i}", 0.1))
PREFIX = next(f"id{i}" for i in range(1000) if not in_full(f"id{i}", 0.1))


def sampled(*answers: Sequence[int], retold: tuple[int, ...] | None = (5, 7, 6)) -> Played:
    """Each answer once for an example with a whole trace, once for one with a prefix; no gold anywhere."""
    rows = [Rendered(name, (7,), (), "", retold=retold) for name in (FULL, PREFIX)]
    samples = [sample(name, i, answer) for name in (FULL, PREFIX) for i, answer in enumerate(answers)]
    return Played(1, rows, samples, end=END)


def test_upft_groups() -> None:
    """§13.3: whole answers under the question, first tokens under the template, weighted by tokens."""
    made = methods.make("upft", {"prefix_tokens": 3})
    paired = made.groups(sampled((11, 12, 13, 14, END), (11, END)))
    assert [(g.prompt, g.completions[0], g.weight) for g in paired.groups] == [
        ((7,), (11, 12, 13, 14, END), 5.0),
        ((7,), (11, END), 2.0),
        ((5, 7, 6), (11, 12, 13), 3.0),
        ((5, 7, 6), (11, END), 2.0),
    ]
    assert all(len(g.completions) == 1 and g.origin_round == 1 for g in paired.groups) and paired.dropped == {}
    alike = methods.make("upft", {"prefix_tokens": 3, "weigh": "answer"}).groups(sampled((11, 12, 13, 14, END)))
    assert [g.weight for g in alike.groups] == [1.0, 1.0]


def test_upfts_released_code_ends_every_prefix() -> None:
    """t tokens and the end token, once; whole answers stay as they were sampled."""
    made = methods.make("upft", {"prefix_tokens": 3, "end_token": True})
    groups = made.groups(sampled((11, 12, 13, 14), (11, 12, END), (11, 12, END, 13))).groups
    assert [g.completions[0] for g in groups[:3]] == [(11, 12, 13, 14), (11, 12, END), (11, 12, END, 13)]
    assert [g.completions[0] for g in groups[3:]] == [(11, 12, 13, END), (11, 12, END), (11, 12, END)]
    assert groups[3].weight == 4.0


def test_upft_counts_what_it_leaves_out() -> None:
    paired = methods.make("upft", {}).groups(sampled((), (11,), retold=None))
    assert [g.prompt for g in paired.groups] == [(7,)] and paired.dropped == {"empty": 2, "no_template": 1}


def test_upft_shares() -> None:
    """The hash takes 10 % of the examples within three standard errors, and the more the larger the share."""
    names = [f"example {i}" for i in range(4000)]
    taken = {name for name in names if in_full(name, 0.1)}
    assert abs(len(taken) / 4000 - 0.1) < 3 * math.sqrt(0.09 / 4000)
    assert taken <= {name for name in names if in_full(name, 0.3)}
    assert not any(in_full(name, 0.0) for name in names) and all(in_full(name, 1.0) for name in names)
    # Fixed for good: another hash would pair a resumed run's rounds differently
    assert [i for i in range(12) if in_full(f"id{i}", 0.3)] == [0, 2, 4, 6, 7]


def test_upft_plays_no_longer_than_it_needs() -> None:
    made = methods.make("upft", {"prefix_tokens": 16})
    assert made.answer_tokens is not None
    assert made.answer_tokens(PREFIX) == 16 and made.answer_tokens(FULL) is None


def test_upft_is_sft_on_its_own_samples() -> None:
    made = methods.make("upft", {})
    assert made.frozen == () and not made.guarded and [turn.role for turn in made.plays] == ["opponent"]
    assert made.roles(2) == {"opponent": 2, "start": 2}
    assert made.template == TEMPLATE and TEMPLATE.startswith("{question} Please provide the initial step")
    assert made.pairing is not None and made.pairing["prefix_tokens"] == 8
    policy = LogProbs(torch.tensor([[[-1.0, -2.0, -3.0]], [[-4.0, 0.0, 0.0]]], requires_grad=True))
    mask = torch.tensor([[[True, True, True]], [[True, False, False]]])
    batch = Batch(mask.long(), mask, torch.ones(2, 1), torch.tensor([3.0, 1.0]), {})
    loss_B = made.loss(policy, batch)
    assert ((batch.weight_B * loss_B).sum() / batch.weight_B.sum()).item() == 2.5  # (1 + 2 + 3 + 4)/4
    logp_B = made.metrics(policy, batch)["logp_sample"]
    assert logp_B.tolist() == [-6.0, -4.0] and not logp_B.requires_grad


@pytest.mark.parametrize(
    ("long_prompt", "long_answer", "same"),
    [("drop", "cut", False), ("keep_end", "cut", True), ("fail", "cut", True), ("fail", "drop", False)],
)
def test_the_template_is_the_samples_where_it_says_which_rows_are_played(
    long_prompt: str, long_answer: str, same: bool, tiny_recipe: dict[str, Any]
) -> None:
    def samples(template: str) -> Stage:
        rounds = [{"method": "upft", "template": template}]
        tree = tiny_recipe | {
            "rounds": rounds,
            "data": tiny_recipe["data"] | {"long_prompt": long_prompt, "long_answer": long_answer},
        }
        return api.prepare(tree).plan.rounds[0].stage("samples")

    short, long = samples("{question} First step:"), samples("{question} Please, what is the first step?")
    assert (short.key == long.key) is same
    assert ("template" in short.settings) is not same  # runs made before keep their keys


@pytest.mark.parametrize("hyper", [{"prefix_tokens": 0}, {"full_share": 1.5}, {"template": "hello"}, {"weigh": "none"}])
def test_upft_refuses(hyper: dict[str, object]) -> None:
    with pytest.raises(InputError, match="method `upft`"):
        methods.make("upft", hyper)
