"""The trainer: TRL's step, the published schedule, and an objective that no split changes."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparring import methods
from sparring.config import TrainConfig
from sparring.errors import NonFiniteError, SparringError
from sparring.gradient import Setting, gradient
from sparring.logps import score, token_logps
from sparring.train import batch_rows, last_step, lr_factor, make_optimizer, total_steps, train
from sparring.types import Batch, Frozen, Group, LogProbs

VOCAB = 31


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        **extra,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def pairs(n: int, seed: int = 0, weights: Sequence[float] | None = None) -> list[Group]:
    """Pairs of random tokens with unequal prompts and completions."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(low, high)))

    return [
        Group(
            f"e{i}",
            tokens(1, 9),
            (tokens(2, 12), tokens(2, 12)),
            (1.0, 0.0),
            weights[i] if weights else 1.0,
            ("gold", "s"),
            0,
        )
        for i in range(n)
    ]


def frozen_under(model: torch.nn.Module, groups: Sequence[Group]) -> dict[str, list[Frozen]]:
    lines = iter(
        score(
            model, [g.prompt for g in groups for _ in (0, 1)], [c for g in groups for c in g.completions], batch_size=3
        )
    )
    return {"reference": [Frozen(g.sha, "reference", "r", (next(lines), next(lines))) for g in groups]}


class Memory:
    """`States` in memory."""

    def __init__(self) -> None:
        self.state: tuple[int, dict[str, torch.Tensor]] | None = None
        self.rows: list[dict[str, float]] = []
        self.kept: list[int] = []

    def load(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        return self.state

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        self.state = step, {k: v.clone() for k, v in tensors.items()}

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def keep_batch(self, step: int, groups: Sequence[Group]) -> str:
        self.kept.append(step)
        return "kept.json"


def run(
    model: torch.nn.Module,
    groups: Sequence[Group],
    frozen: dict[str, list[Frozen]],
    states: Memory,
    beta: float = 0.1,
    **settings: object,
) -> None:
    method = methods.make("spin", {"beta": beta})
    train(model, groups, frozen, method, TrainConfig(**settings), states, seed=1)  # type: ignore[arg-type]


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


# --- log-probs -------------------------------------------------------------------------------------------------------


def oracle(model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """One row, no padding, every logit."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    table = torch.log_softmax(logits.double(), -1)
    first = len(prompt) - 1
    return torch.stack([table[first + i, token] for i, token in enumerate(completion)])


def test_token_logps_equal_one_unpadded_row_at_a_time() -> None:
    model, groups = llama(), pairs(6)
    prompts, completions = [g.prompt for g in groups], [g.completions[0] for g in groups]
    got = token_logps(model, prompts, completions)
    for row, prompt, completion in zip(got, prompts, completions, strict=True):
        expected = oracle(model, prompt, completion)
        assert row[: len(completion)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        assert row[len(completion) :].tolist() == [0.0] * (len(row) - len(completion))
    lines = score(model, prompts, completions, batch_size=4)
    for line, row, completion in zip(lines, got, completions, strict=True):
        assert list(line) == pytest.approx(row[: len(completion)].tolist(), abs=1e-5)


def test_gradient_of_token_logps_equals_the_oracles() -> None:
    groups = pairs(5)
    one, two = llama(dtype=torch.float64), llama(dtype=torch.float64)
    token_logps(one, [g.prompt for g in groups], [g.completions[0] for g in groups]).sum().backward()
    torch.stack([oracle(two, g.prompt, g.completions[0]).sum() for g in groups]).sum().backward()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_a_pad_id_that_is_a_real_token_changes_nothing() -> None:
    model = llama()
    alone = token_logps(model, [(5, 6)], [(0, 0, 4)])[0]
    beside = token_logps(model, [(5, 6), (4,) * 9], [(0, 0, 4), (8,) * 7])[0]
    assert beside[:3].tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    assert all(value < 0 for value in alone.tolist())


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        token_logps(llama(), [()], [(1,)])


# --- one step --------------------------------------------------------------------------------------------------------


def test_loss_is_log_2_at_the_first_step() -> None:
    model, groups = llama(), pairs(32)
    states = Memory()
    run(model, groups, frozen_under(model, groups), states, batch_size=32, max_steps=1, micro_batch=8)
    assert states.rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert states.rows[0]["margin"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_one_step_equals_trl(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient norm of TRL's DPOTrainer (sigmoid) on the same pairs, policy and reference."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from helpers import character_tokenizer

    groups = pairs(6, seed=3)
    policy, reference = llama(0), llama(7)
    method = methods.make("spin", {"beta": 0.1})
    got = gradient(policy, groups, frozen_under(reference, groups), method, micro_batch=2)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None]))

    rows = [
        {"prompt_ids": list(g.prompt), "chosen_ids": list(g.completions[0]), "rejected_ids": list(g.completions[1])}
        for g in groups
    ]
    args = DPOConfig(
        output_dir=str(tmp_path), beta=0.1, per_device_train_batch_size=6, max_steps=1, learning_rate=1e-3, max_length=None,
        bf16=False, gradient_checkpointing=False, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        max_grad_norm=1e9, lr_scheduler_type="constant",
    )  # fmt: skip
    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", lambda self, dataset, *a, **k: dataset)
    seen: dict[str, float] = {}

    class Keep(TrainerCallback):
        def on_log(
            self, args: object, state: object, control: object, logs: dict[str, float] | None = None, **_: object
        ) -> None:
            seen.update({k: v for k, v in (logs or {}).items() if k in ("loss", "grad_norm")})

    trainer = DPOTrainer(
        model=llama(0), ref_model=llama(7), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=character_tokenizer(), callbacks=[Keep()],
    )  # fmt: skip
    trainer.train()
    assert got.loss == pytest.approx(seen["loss"], rel=1e-5)
    assert norm == pytest.approx(seen["grad_norm"], rel=1e-5)


# --- invariance ------------------------------------------------------------------------------------------------------

WEIGHTS = [1.0, 2.5, 0.5, 3.0, 1.0, 0.25, 1.5, 2.0, 1.0, 4.0, 0.5, 1.0, 2.0, 1.0, 0.75, 1.0]


def weight_change(micro_batch: int, dtype: torch.dtype, skew: float = 1.0) -> torch.Tensor:
    """The change of all weights over three steps; `skew` scales one pair's weight, as a 1 % fault would."""
    groups = pairs(16, weights=[w * (skew if i == 3 else 1.0) for i, w in enumerate(WEIGHTS)])
    model, reference = llama(0, dtype), llama(7, dtype)
    before = flat(model)
    run(
        model, groups, frozen_under(reference, groups), Memory(), beta=0.5, micro_batch=micro_batch, batch_size=8,
        lr=1e-3, epochs=2, warmup=0.0, max_steps=3,
    )  # fmt: skip
    return flat(model) - before


def test_micro_batches_do_not_change_the_step_in_float64() -> None:
    whole = weight_change(8, torch.float64)
    for micro_batch in (4, 2, 1, 3):
        assert (weight_change(micro_batch, torch.float64) - whole).norm() <= 1e-9 * whole.norm()
    # The bar has teeth: a 1 % fault in one pair's weight is 1e5 times above it.
    assert (weight_change(8, torch.float64, skew=1.01) - whole).norm() > 1e-4 * whole.norm()


def test_micro_batches_do_not_change_loss_and_gradient_in_float32() -> None:
    groups = pairs(8, weights=WEIGHTS[:8])
    frozen = frozen_under(llama(7), groups)
    method = methods.make("spin", {"beta": 0.5})
    figures = []
    for micro_batch in (8, 4, 2, 1):
        model = llama()
        got = gradient(model, groups, frozen, method, micro_batch=micro_batch)
        figures.append((got, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (first, gradient_), rest = figures[0], figures[1:]
    by_hand = [method_loss(groups[i], frozen["reference"][i]) for i in range(8)]
    expected = sum(w * x for w, x in zip(WEIGHTS[:8], by_hand, strict=True)) / sum(WEIGHTS[:8])
    assert first.loss == pytest.approx(expected, rel=1e-5)
    for got, other in rest:
        assert got.loss == pytest.approx(first.loss, rel=1e-5)
        assert got.tokens == first.tokens
        assert {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in first.metrics.items()} == got.metrics
        assert (other - gradient_).norm() <= 1e-5 * gradient_.norm()


def method_loss(group: Group, frozen: Frozen) -> float:
    """log(1 + exp(−0.5 · margin)) of one pair, row by row."""
    model = llama()
    gold, sample = (oracle(model, group.prompt, c).sum().item() for c in group.completions)
    z = (gold - sum(frozen.logps[0])) - (sample - sum(frozen.logps[1]))
    return math.log1p(math.exp(-0.5 * z))


def test_a_weight_of_two_is_the_pair_twice() -> None:
    groups = pairs(4)
    doubled = [*groups[1:], groups[0], groups[0]]
    weighed = pairs(4, weights=[2.0, 1.0, 1.0, 1.0])
    method = methods.make("spin", {"beta": 0.5})
    found = []
    for some in (doubled, weighed):
        model = llama(0, torch.float64)
        got = gradient(model, some, frozen_under(llama(7, torch.float64), some), method, micro_batch=3)
        found.append((got.loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-14)


def test_gradient_checkpointing_changes_nothing() -> None:
    groups = pairs(8)
    frozen = frozen_under(llama(7), groups)
    changes = []
    for checkpointing in (False, True):
        model = llama(attention_dropout=0.5)
        before = flat(model)
        run(
            model,
            groups,
            frozen,
            Memory(),
            batch_size=8,
            max_steps=2,
            lr=1e-3,
            warmup=0.0,
            gradient_checkpointing=checkpointing,
        )
        changes.append(flat(model) - before)
    assert changes[0].norm() > 0
    assert torch.allclose(changes[0], changes[1], rtol=1e-4, atol=1e-7)


def test_bf16_compute_keeps_float32_masters() -> None:
    groups = pairs(8)
    reference = frozen_under(llama(7), groups)
    method = methods.make("spin", {"beta": 0.5})
    model = llama()
    exact = gradient(llama(), groups, reference, method, micro_batch=8)
    rough = gradient(model, groups, reference, method, micro_batch=8, setting=Setting(torch.bfloat16))
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("part", ["loss", "metric `margin`"])
def test_a_method_that_gives_another_shape_is_told(part: str) -> None:
    """[B, 1] would broadcast against the weights [B] to [B, B] and train on nonsense without a word."""
    groups = pairs(4)
    method = methods.make("spin", {})

    def column(policy: LogProbs, batch: Batch) -> torch.Tensor:
        return method.loss(policy, batch)[:, None]

    loss = column if part == "loss" else method.loss
    metrics = method.metrics if part == "loss" else (lambda policy, batch: {"margin": column(policy, batch)})
    with pytest.raises(
        SparringError, match=re.escape(f"{part} has shape [4, 1]; one number per group, [4], is wanted")
    ):
        gradient(
            llama(), groups, frozen_under(llama(), groups), replace(method, loss=loss, metrics=metrics), micro_batch=4
        )


# --- schedule and optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "rows", "total", "warmup", "after_epoch_2"),
    [
        (6, 49_792, 4_668, 467, 3.7039e-7),
        (3, 49_792, 2_334, 234, 1.8524e-7),
        (2, 49_792, 1_556, 156, 0.0),
        (6, 99_584, 9_336, 934, 3.7039e-7),
    ],
)
def test_v17_linear_schedule(epochs: int, rows: int, total: int, warmup: int, after_epoch_2: float) -> None:
    settings = TrainConfig(epochs=epochs, lr=5e-7, warmup=0.1, schedule="linear", batch_size=64)
    assert total_steps(rows, settings) == total
    assert settings.lr * lr_factor(2 * total // epochs, total, settings) == pytest.approx(after_epoch_2, abs=5e-12)
    assert lr_factor(warmup, total, settings) == 1.0
    assert lr_factor(warmup - 1, total, settings) == pytest.approx((warmup - 1) / warmup)
    assert lr_factor(0, total, settings) == 0.0


def test_an_early_last_epoch_leaves_the_schedule_alone() -> None:
    """The released SPIN stops after 2 of 6 epochs, at 3.7039e-7 of a peak of 5e-7 (vectors V17)."""
    settings = TrainConfig(epochs=6, stop_epoch=2, lr=5e-7, warmup=0.1, schedule="linear", batch_size=64)
    assert (total_steps(49_792, settings), last_step(49_792, settings)) == (4_668, 1_556)
    assert settings.lr * lr_factor(1_556, 4_668, settings) == pytest.approx(3.7039e-7, abs=5e-12)
    assert last_step(100, TrainConfig(epochs=2, stop_epoch=5, batch_size=64)) == 4
    assert last_step(100, TrainConfig(epochs=6, stop_epoch=2, max_steps=3, batch_size=64)) == 3
    groups = pairs(8)
    frozen = frozen_under(llama(7), groups)
    states = Memory()
    run(llama(), groups, frozen, states, epochs=3, stop_epoch=2, batch_size=4, lr=1e-3, warmup=0.0)
    assert [row["lr"] for row in states.rows] == pytest.approx([1e-3 * (6 - s) / 6 for s in range(4)])


def test_a_round_of_one_step_moves() -> None:
    assert lr_factor(0, 1, TrainConfig(warmup=0.1)) == 1.0
    assert [lr_factor(s, 2, TrainConfig(warmup=5.0)) for s in (0, 1)] == [0.0, 1.0]


def test_cosine_constant_floor_and_counted_warmup() -> None:
    cosine = TrainConfig(schedule="cosine", warmup=0.0, floor=0.1)
    assert [lr_factor(s, 100, cosine) for s in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])
    counted = TrainConfig(schedule="constant", warmup=4.0)
    assert [lr_factor(s, 100, counted) for s in (0, 1, 4, 99)] == [0.0, 0.25, 1.0, 1.0]
    linear = TrainConfig(schedule="linear", warmup=0.0, floor=0.5)
    assert lr_factor(50, 100, linear) == pytest.approx(0.75)


def test_v17_rmsprop_first_step() -> None:
    model = torch.nn.Linear(2, 1, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model.parameters(), TrainConfig(optimizer="rmsprop", lr=5e-7))
    model.weight.grad = torch.tensor([[3.0, -0.02]], dtype=torch.float64)
    optimizer.step()
    moved = (model.weight.detach() - before)[0].tolist()
    assert moved == pytest.approx([-4.999999833333e-6, 4.999975000125e-6], rel=1e-6)


def test_adamw_decays_matrices_only() -> None:
    model = torch.nn.Linear(2, 2).double()
    optimizer = make_optimizer(model.parameters(), TrainConfig(optimizer="adamw", lr=0.1, weight_decay=0.5))
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, weight * 0.95)
    assert torch.equal(model.bias, bias)


def test_every_epoch_takes_every_group_once_in_its_own_order() -> None:
    epochs = [[i for step in range(3) for i in batch_rows(3 * epoch + step, 10, 4, seed=5)] for epoch in (0, 1)]
    assert [sorted(rows) for rows in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert batch_rows(0, 10, 4, seed=5) == epochs[0][:4]
    assert batch_rows(0, 10, 4, seed=6) != epochs[0][:4]


def test_clipping_bounds_the_step() -> None:
    groups = pairs(4)
    frozen = frozen_under(llama(7), groups)
    found = []
    for clip in (0.0, 1e-3):
        model = llama(0, torch.float64)
        before = flat(model)
        states = Memory()
        # RMSprop divides a gradient by its own size, but for an epsilon far above it: then steps follow gradients.
        run(model, groups, frozen, states, max_steps=1, lr=1.0, eps=1e3, warmup=0.0, clip=clip, batch_size=4)
        found.append((float((flat(model) - before).norm()), states.rows[0]["grad_norm"]))
    (free, norm), (clipped, logged) = found
    assert logged == pytest.approx(norm)  # the log tells the norm before clipping
    assert clipped / free == pytest.approx(1e-3 / norm, rel=1e-2)


# --- resume and faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_resumed_training_ends_with_the_same_bits(device: str, optimizer: str) -> None:
    """On a GPU, where sums of gradients have no order, with nearly the same numbers; a state is read to the CPU."""
    groups = pairs(12)
    frozen = frozen_under(llama(7), groups)
    settings = {"optimizer": optimizer, "batch_size": 5, "epochs": 3, "lr": 1e-3, "save_every": 4, "micro_batch": 2}
    whole, states = llama().to(device), Memory()
    run(whole, groups, frozen, states, **settings)
    assert states.state is not None and states.state[0] == 8  # 9 steps; the last one needs no state
    again, resumed = llama().to(device), Memory()
    resumed.state = 8, {name: tensor.cpu() for name, tensor in states.state[1].items()}
    run(again, groups, frozen, resumed, **settings)
    assert [row["step"] for row in resumed.rows] == [9]
    torch.testing.assert_close(flat(again), flat(whole), rtol=0, atol=0 if device == "cpu" else 1e-5)


def test_a_non_finite_loss_is_not_stepped_on() -> None:
    groups = pairs(8)
    frozen = frozen_under(llama(), groups)
    bad = Frozen(
        groups[5].sha, "reference", "r", ((math.nan,) * len(groups[5].completions[0]), frozen["reference"][5].logps[1])
    )
    frozen["reference"][5] = bad
    model, states = llama(), Memory()
    before = flat(model)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan .* not taken, its batch is kept in kept\.json"):
        run(model, groups, frozen, states, batch_size=8)
    assert torch.equal(flat(model), before)
    assert states.kept == [0]
    assert states.rows == []


def test_adamw_takes_one_pass_on_a_cpu_but_not_for_shards_beside_whole_tensors() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 2))]
    made = [make_optimizer(parameters, TrainConfig(optimizer="adamw"), foreach) for foreach in (None, False)]
    assert [own.defaults["fused"] for own in made] == [True, None]
