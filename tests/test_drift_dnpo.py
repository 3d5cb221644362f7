"""DRIFT's masks and L_OAL, and DNPO's noisy reference: hand values, brute force, and every stopped gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

import sparring
from helpers import recipe
from sparring import methods
from sparring.errors import InputError
from sparring.gradient import collate
from sparring.methods.dnpo import noisy_reference
from sparring.methods.drift import left_over, uncovered
from sparring.rundir.view import RunView
from sparring.types import Batch, Finish, Frozen, Group, LogProbs, Played, Rendered, Sample, Score

LOG2 = math.log(2)

# --- the longest common subsequence


def length_by_table(one: Sequence[int], two: Sequence[int]) -> int:
    """The textbook table."""
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(two):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize(
    ("one", "two", "first", "second"),
    [
        ("abcde", "xbydz", "10101", "10101"),
        ("ab", "ba", "01", "10"),  # of a and b, the earlier one of `one`
        ("aa", "a", "01", "0"),
        ("a", "aa", "0", "01"),
        ("the cat sat", "the dog sat", "00001110000", "00001110000"),
        ("abc", "abc", "000", "000"),
        ("abc", "xyz", "111", "111"),
        ("", "ab", "", "11"),
        ("ab", "", "11", ""),
    ],
)
def test_left_over_by_hand(one: str, two: str, first: str, second: str) -> None:
    masks = left_over([ord(c) for c in one], [ord(c) for c in two])
    assert masks == (tuple(map(float, first)), tuple(map(float, second)))


def test_what_is_masked_is_a_longest_common_subsequence() -> None:
    """Oracle: the textbook table, on 600 random pairs of up to 70 tokens (beyond one machine word)."""
    random = Random(0)
    for _ in range(600):
        size, letters = random.choice([(6, 2), (12, 3), (70, 5)])
        one, two = ([random.randrange(letters) for _ in range(random.randint(0, size))] for _ in range(2))
        first, second = left_over(one, two)
        shared = [token for token, kept in zip(one, first, strict=True) if not kept]
        assert shared == [token for token, kept in zip(two, second, strict=True) if not kept]
        assert len(shared) == length_by_table(one, two)


def test_long_answers_take_milliseconds() -> None:
    random = Random(1)
    one, two = ([random.randrange(50) for _ in range(256)] for _ in range(2))
    started = time.process_time()
    for _ in range(20):
        left_over(one, two)
    assert (time.process_time() - started) / 20 < 0.01


# --- DRIFT


def row(name: str, gold: tuple[int, ...]) -> Rendered:
    return Rendered(name, (1, 3), gold, f"gold {name}")


def sample(name: str, index: int, tokens: tuple[int, ...], finish: Finish = "stop") -> Sample:
    return Sample(name, "p" * 16, index, 0, tokens, f"text {index}", finish, (0.0,) * len(tokens), "s")


def test_drift_groups_carry_masks_of_both_answers() -> None:
    played = Played(1, [row("a", (5, 6, 7, 2))], [sample("a", 0, (5, 9, 7, 2)), sample("a", 1, (5, 6, 7, 2))])
    made = methods.make("drift", {}).groups(played)
    assert [g.masks for g in made.groups] == [((0.0, 1.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0))]
    assert made.dropped == {"identical": 1}
    assert methods.make("drift", {"duplicates": "drop"}).groups(
        Played(1, [row("a", (5, 2))], [sample("a", 0, (9, 2)), sample("a", 1, (9, 2))])
    ).dropped == {"duplicate": 1}


def drift_case(logits: Tensor) -> tuple[LogProbs, Batch]:
    """Gold (0, 1, 1, 3), sample (2, 1, 3): left over are gold's 0 and second 1, and the sample's 2."""
    completions = ((0, 1, 1, 3), (2, 1, 3))
    masks = left_over(*completions)
    assert masks == ((1.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
    group = Group("a", (1,), completions, (1.0, 0.0), 1.0, ("gold", "s"), 0, masks)
    frozen = {"reference": [Frozen(group.sha, "reference", "p", ((-1.0, -50.0, -2.0, -60.0), (-3.0, -70.0, -80.0)))]}
    batch = collate([group], frozen, torch.device("cpu"), torch.float64)
    logps = logits.log_softmax(-1).gather(-1, batch.tokens_BGT[..., None]).squeeze(-1).masked_fill(~batch.mask_BGT, 0)
    return LogProbs(logps, batch.token_weight_BGT, logits), batch


def some_logits(seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 2, 4, 5, generator=generator, dtype=torch.float64)
    logits[0, 1, 3] = 9.0 * torch.tensor([1.0, 1, 1, 1, 0])  # padding: must not be seen
    return logits.requires_grad_()


def by_hand(logits: Tensor, beta: float, oal: float) -> float:
    """The loss from its formula, in plain Python."""
    table = logits.detach().log_softmax(-1)[0].tolist()
    gold = (table[0][0][0] + 1.0) + (table[0][2][1] + 2.0)
    other = table[1][0][2] + 3.0
    cover = sum(max(table[1][j][v] for j in range(3)) for v in (0, 1, 3))
    return math.log1p(math.exp(-beta * (gold - other))) - oal * cover


@pytest.mark.parametrize(("beta", "oal"), [(0.1, 0.01), (0.5, 0.0), (0.3, 0.7)])
def test_drift_loss_by_hand(beta: float, oal: float) -> None:
    logits = some_logits()
    policy, batch = drift_case(logits)
    made = methods.make("drift", {"beta": beta, "oal": oal})
    loss_B = made.loss(policy, batch)
    assert loss_B.shape == (1,) and loss_B.item() == pytest.approx(by_hand(logits, beta, oal), rel=1e-12)
    assert made.needs == (("policy_logits",) if oal else ())
    figures = made.metrics(policy, batch)
    assert figures["margin"].item() == pytest.approx(-math.log(math.expm1(by_hand(logits, beta, 0.0))))


def test_uncovered_by_hand_and_its_slope() -> None:
    """Uniform over 4 but for one place: log 4 for words at their best elsewhere; the slope is at the best place."""
    logits = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    logits[0, 1, 1, 1] = math.log(5)  # word 1 has probability 5/8 at the second place of y'
    logits.requires_grad_()
    policy, batch = drift_case(logits)
    value_B = uncovered(policy, batch)
    assert value_B.item() == pytest.approx(2 * math.log(4) + math.log(8 / 5))
    (slope,) = torch.autograd.grad(value_B.sum(), logits)
    assert not slope[0, 0].any() and not slope[0, 1, 3].any()
    assert slope[0, 1, 1].tolist() == pytest.approx([1 / 8, 5 / 8 - 1, 1 / 8, 1 / 8])
    assert slope[0, 1].sum(0)[1].item() == pytest.approx(5 / 8 - 1 + 2 * 0.25)


def test_the_padding_of_a_short_gold_answer_is_no_word() -> None:
    """Gold (1, 3) beside a sample of three tokens, uniform over 5: two words, though the padding's id 0 is a third."""
    group = Group("a", (1,), ((1, 3), (2, 1, 3)), (1.0, 0.0), 1.0, ("gold", "s"), 0)
    batch = collate([group], {}, torch.device("cpu"), torch.float64)
    policy = LogProbs(torch.zeros(1, 2, 3), batch.token_weight_BGT, torch.zeros(1, 2, 3, 5, dtype=torch.float64))
    assert uncovered(policy, batch).item() == pytest.approx(2 * math.log(5))


def test_drift_without_common_tokens_is_spin() -> None:
    logits = some_logits()
    policy, batch = drift_case(logits)
    ones = batch.mask_BGT.double()
    plain = LogProbs(policy.token_BGT, ones, logits)
    whole = Batch(
        batch.tokens_BGT, batch.mask_BGT, batch.targets_BG, batch.weight_B,
        {"reference": LogProbs(batch.frozen["reference"].token_BGT, ones)},
    )  # fmt: skip
    drift, spin = methods.make("drift", {"oal": 0.0}), methods.make("spin", {})
    assert drift.loss(plain, whole).item() == spin.loss(plain, whole).item()
    assert drift.loss(policy, batch).item() != spin.loss(plain, whole).item()


def test_drift_starts_at_log_2() -> None:
    """vectors.md §7: the learner is the reference, masked or not."""
    _, batch = drift_case(some_logits())
    same = LogProbs(batch.frozen["reference"].token_BGT, batch.token_weight_BGT)
    assert methods.make("drift", {"oal": 0.0}).loss(same, batch).item() == pytest.approx(LOG2, rel=1e-12)


# --- DNPO


def dnpo_case(
    *, flip: bool = False, keys: tuple[int, ...] = (21, 22), pad: int = 0, size_B: int = 2
) -> tuple[nn.Linear, Tensor, LogProbs, Batch]:
    """W and the learner's log-probs (leaves); two pairs of 2 and 3, 3 and 1 tokens, vocabulary 4, hidden size 3."""
    generator = torch.Generator().manual_seed(5)
    lengths = [[2, 3], [3, 1]]
    mask = torch.tensor([[[i < n for i in range(3 + pad)] for n in pair] for pair in lengths])[:size_B]

    def some(*shape: int) -> Tensor:
        whole = torch.randn(2, 2, 3, *shape, generator=generator, dtype=torch.float64)[:size_B]
        return nn.functional.pad(whole, (*[0, 0] * len(shape), 0, pad))

    logits, hidden = some(4), some(3)
    tokens = torch.where(mask, torch.arange(3 + pad) % 4, 0)
    if flip:
        tokens, mask, logits, hidden = (values.flip(1) for values in (tokens, mask, logits, hidden))
    extras = nn.Linear(3, 4, bias=False).double()
    with torch.no_grad():
        extras.weight.copy_(torch.randn(4, 3, generator=generator, dtype=torch.float64) / 2)
    leaf = -some()[..., : 3 + pad].abs()
    leaf = (leaf.flip(1) if flip else leaf).masked_fill(~mask, 0).requires_grad_()
    held = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).masked_fill(~mask, 0)
    weight = mask.double()
    targets = torch.tensor([[0.0, 1.0] if flip else [1.0, 0.0]] * size_B)
    frozen = {"reference": LogProbs(held, weight, logits * mask[..., None], hidden * mask[..., None])}
    batch = Batch(tokens, mask, targets, torch.ones(size_B), frozen, keys[:size_B], extras, weight)
    return extras, leaf, LogProbs(leaf, weight), batch


def noisy_by_hand(batch: Batch, extras: nn.Linear, b: int, g: int) -> tuple[Tensor, Tensor]:
    """ref~ and the mean scale of one completion, with the group's own draws."""
    held = batch.frozen["reference"]
    assert held.logits_BGTV is not None and held.hidden_BGTH is not None
    n = int(batch.mask_BGT[b, g].sum())
    eps = torch.randn(n, 4, generator=torch.Generator().manual_seed(batch.keys[b]))
    scale = torch.exp(held.hidden_BGTH[b, g, :n] @ extras.weight.T)
    table = (held.logits_BGTV[b, g, :n] + eps * scale).log_softmax(-1)
    return sum(table[t, int(batch.tokens_BGT[b, g, t])] for t in range(n)), scale.mean()  # type: ignore[return-value]


@pytest.mark.parametrize("flip", [False, True])
def test_noisy_reference_by_hand(flip: bool) -> None:
    extras, _, _, batch = dnpo_case(flip=flip)
    noisy_B, scale_B = noisy_reference(batch)
    for b in range(2):
        noisy, scale = noisy_by_hand(batch, extras, b, 0 if flip else 1)
        assert noisy_B[b].item() == pytest.approx(noisy.item(), rel=1e-12)
        assert scale_B[b].item() == pytest.approx(scale.item(), rel=1e-12)


def test_noise_belongs_to_the_key_and_not_to_the_padding_or_the_neighbours() -> None:
    whole = noisy_reference(dnpo_case()[3])
    for other in (noisy_reference(dnpo_case(pad=2)[3]), noisy_reference(dnpo_case(size_B=1)[3])):
        for one, two in zip(whole, other, strict=True):
            torch.testing.assert_close(one[: len(two)], two, rtol=1e-12, atol=0)
    assert (noisy_reference(dnpo_case(keys=(1, 2))[3])[0] != whole[0]).all()


@pytest.mark.parametrize("flip", [False, True])
def test_dnpo_gradients_and_every_stopped_one(flip: bool) -> None:
    """spin_family.md §8. Learner: −β σ(−β z) on the chosen tokens, opposite on the rejected, z over the noisy
    reference, and nothing from the noise's term. W: β σ(−β z) ∇ref~ + ∇ mean scale, nothing from the learner's term.
    """
    beta = 0.4
    extras, leaf, policy, batch = dnpo_case(flip=flip)
    made = methods.make("dnpo", {"beta": beta})
    loss_B = made.loss(policy, batch)
    on_leaf, on_weight = torch.autograd.grad(loss_B.sum(), [leaf, extras.weight])
    chosen, rejected = (1, 0) if flip else (0, 1)
    wanted = torch.zeros_like(extras.weight)
    for b in range(2):
        noisy, scale = noisy_by_hand(batch, extras, b, rejected)
        assert loss_B[b].item() == pytest.approx(scale.item(), rel=1e-9)  # the two others cancel in the value
        sums, held = policy.sum_BG[b], batch.frozen["reference"].sum_BG[b]
        z = (sums[chosen] - sums[rejected]) - (held[chosen] - noisy)
        pull = beta * torch.sigmoid(-beta * z).item()
        for g, sign in ((chosen, -1), (rejected, 1)):
            assert on_leaf[b, g][batch.mask_BGT[b, g]].tolist() == pytest.approx(
                [sign * pull] * int(batch.mask_BGT[b, g].sum()), rel=1e-9
            )
        slopes = [torch.autograd.grad(part, extras.weight, retain_graph=True)[0] for part in (noisy, scale)]
        wanted += pull * slopes[0] + slopes[1]
    torch.testing.assert_close(on_weight, wanted, rtol=1e-9, atol=1e-12)


def test_dnpo_without_noise_has_spins_gradient() -> None:
    """W h → −∞: the scale is 0 and the reference is plain."""
    extras, leaf, policy, batch = dnpo_case()
    held = batch.frozen["reference"]
    with torch.no_grad():
        extras.weight.fill_(-400.0)
        assert held.hidden_BGTH is not None
        held.hidden_BGTH.abs_()
    made = methods.make("dnpo", {})
    (noiseless,) = torch.autograd.grad(made.loss(policy, batch).sum(), leaf)
    (plain,) = torch.autograd.grad(methods.make("spin", {}).loss(policy, batch).sum(), leaf)
    torch.testing.assert_close(noiseless, plain, rtol=1e-12, atol=0)


def test_dnpo_labels() -> None:
    """A right sample is chosen over gold; wrong, unjudged, or without a verifier gold stays chosen."""
    samples = [sample("a", i, (6 + i, 2)) for i in range(3)]
    played = Played(0, [row("a", (5, 2))], samples, scores=[Score("a", tuple(s.id for s in samples), (1.0, 0.0, None))])
    made = methods.make("dnpo", {})
    paired = made.groups(played)
    assert [g.targets for g in paired.groups] == [(0.0, 1.0), (1.0, 0.0), (1.0, 0.0)]
    assert [g.completions[1] for g in paired.groups] == [(6, 2), (7, 2), (8, 2)]
    assert made.verifier == "gsm8k" and made.needs == ("frozen_logits",) and made.frozen == ("reference",)
    alone = methods.make("dnpo", {"verifier": None})
    assert alone.verifier is None
    assert {g.targets for g in alone.groups(Played(0, played.rows, samples)).groups} == {(1.0, 0.0)}
    _, _, policy, batch = dnpo_case(flip=True)
    assert made.metrics(policy, batch)["own_chosen"].tolist() == [1.0, 1.0]


def test_dnpo_brings_a_module_without_bias() -> None:
    make = methods.make("dnpo", {}).extras
    assert make is not None
    module = make(6, 11)
    assert module.weight.shape == (11, 6) and module.bias is None


@pytest.mark.parametrize(
    ("name", "hyper", "words"),
    [
        ("drift", {"oal": -0.1}, "oal is a weight"),
        ("drift", {"beta": 0.0}, "beta must be above 0"),
        ("drift", {"loss": "square"}, "loss `square` is unknown"),
        ("dnpo", {"beta": 0.0}, "beta must be above 0"),
    ],
)
def test_refusals(name: str, hyper: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        methods.make(name, hyper)
    assert "\n" not in str(caught.value)


# --- the loop


def test_one_round_of_each_method_that_needs_logits(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Logits, masks, hidden states and a module of the method's own, from recipe to the next player."""
    hyper: dict[str, dict[str, object]] = {"drift": {}, "dnpo": {}, "cringe": {}, "pairwise_cringe": {}}
    rounds = [{"method": name, **more} for name, more in hyper.items()]
    sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds))
    view = RunView(tmp_path / "run")
    assert [r.method for r in view.rounds] == list(hyper) and len({p.sha for p in view.players.values()}) == 5
    assert all(group.masks for group in view.rounds[0].rows("groups", Group))
    for r in view.rounds:
        assert all(math.isfinite(line["loss"]) for line in r.log) and r.log[0]["grad_norm"] > 0
