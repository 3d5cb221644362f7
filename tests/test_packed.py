"""The fast path of log-probs: the plain path's values and gradients, for every kind of attention, and who falls back."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sparring import batching, packed, spans, tree
from sparring.config import ModelConfig
from sparring.gradient import Setting, gradient
from sparring.logps import packed_token_logps, packs, packs_now, plain_token_logps, score, token_logps, use_plain
from sparring.methods import spin
from sparring.players import load_model
from sparring.types import Batch, Frozen, Group, LogProbs

BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LEARNED = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("Llama", BASE),
    "sliding window": ("Mistral", BASE | {"sliding_window": 8}),
    "window in some layers": (
        "Qwen2",
        BASE | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "norms of heads": ("Qwen3", BASE | {"head_dim": 12}),
    "soft caps": (
        "Gemma2",
        BASE | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    ),
    "two rotaries": ("Gemma3Text", BASE | {"head_dim": 8, "sliding_window": 8}),
    "learned positions": ("GPT2", LEARNED),
    "parallel blocks": ("GPTNeoX", {k: v for k, v in BASE.items() if k != "num_key_value_heads"}),
    "scaled logits": ("Cohere2", BASE | {"sliding_window": 8, "logit_scale": 0.3}),
    "tied": ("Granite", BASE | {"logits_scaling": 2.0, "attention_multiplier": 0.2, "tie_word_embeddings": True}),
    "experts": ("Mixtral", BASE | {"num_local_experts": 4}),
    "latent attention": (
        "DeepseekV3",
        BASE
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
        }
        | {"v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
}
PLAIN: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent": (
        "Mamba",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "its attention cannot be chosen",
    ),
    "linear attention beside it": (
        "MiniMax",
        BASE | {"head_dim": 8, "num_local_experts": 2},
        "it has layers of kind linear_attention",
    ),
    "biases by distance": (
        "Bloom",
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "its attention cannot be chosen",
    ),
    "convolutions": (
        "Lfm2",
        BASE | {"layer_types": ["conv", "full_attention", "conv"]},
        "it has layers of kind conv",
    ),
    "rotation by the longest row": (
        "Llama",
        BASE | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "its rotation of positions (dynamic) depends on the longest row",
    ),
    "sinks": (
        "GptOss",
        BASE | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 8},
        "its attention has dropout, sinks, biases or a mask of its own",
    ),
}
_IDS = torch.Generator().manual_seed(1)


def ids(n: int) -> list[int]:
    return torch.randint(3, 97, (n,), generator=_IDS).tolist()


PROMPTS = [*[ids(12)] * 3, *[ids(30)] * 2, ids(3), *[ids(1)] * 2]
COMPLETIONS = [ids(n) for n in (20, 1, 9, 25, 33, 14, 2, 40)]


def made(family: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def value_and_gradient(model: Any, path: Any, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    got = path(model, PROMPTS, COMPLETIONS)
    (got.sin() * torch.linspace(1, 2, got.numel(), dtype=got.dtype).view(got.shape)).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return got.detach(), torch.cat(grads)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("in_c", [False, True])
def test_the_fast_path_gives_the_plain_paths_values_and_gradients(
    name: str, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative 1e-5 in float32, for prompts of 1 to 30 tokens and groups of up to three; attention in C or by torch."""
    model = made(*FAST[name])
    calls: list[int] = []
    attend = spans.attend
    monkeypatch.setattr(spans, "attend", lambda *given: (calls.append(1), attend(*given))[1])
    if not in_c:
        monkeypatch.setattr(spans, "kernel", lambda *_: None)
    assert packs(model)
    plain, plain_grad = value_and_gradient(model, plain_token_logps)
    fast, fast_grad = value_and_gradient(model, packed_token_logps)
    assert fast.shape == plain.shape == (8, 40)
    assert bool(calls) == (in_c and name not in ("soft caps", "latent attention"))
    assert ((fast - plain).abs() / (1 + plain.abs())).max() < 1e-5
    assert (fast_grad - plain_grad).norm() < 1e-5 * plain_grad.norm()


def test_in_float64_both_paths_agree_to_1e_12() -> None:
    """GPT-2, whose code keeps float64: others take norms and angles in float32."""
    model = made(*FAST["learned positions"]).to(torch.float64)
    plain, fast = (value_and_gradient(model, path) for path in (plain_token_logps, packed_token_logps))
    for a, b in zip(fast, plain, strict=True):
        assert a.dtype == torch.float64 and (a - b).norm() < 1e-12 * b.norm()


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_that_cannot_take_packed_rows_falls_back_with_one_line(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    family, sizes, why = PLAIN[name]
    model = made(family, sizes)
    with caplog.at_level(logging.INFO, "sparring"):
        got = [token_logps(model, PROMPTS, COMPLETIONS) for _ in range(2)]
    assert not packs(model)
    lines = [r.message for r in caplog.records if r.name == "sparring"]
    assert len(lines) == 1 and lines[0].startswith(f"{type(model).__name__}: plain log-probs") and why in lines[0]
    torch.testing.assert_close(got[0], plain_token_logps(model, PROMPTS, COMPLETIONS), rtol=0, atol=0)


def test_a_model_that_mixes_neighbours_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """Each token is given a share of the one before it, which in a packed row may be another completion's."""
    model = made(*FAST["grouped heads"])
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: out + 0.1 * out.roll(1, 1))
    with caplog.at_level(logging.INFO, "sparring"):
        assert not packs(model)
    assert "it would give log-probs that differ by" in caplog.messages[-1]


def test_a_prompt_is_computed_once_and_no_padding_is() -> None:
    model = made(*FAST["grouped heads"])
    assert packs(model)
    shapes: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    model.lm_head.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[:2])))
    token_logps(model, PROMPTS, COMPLETIONS)
    tokens = sum(map(len, COMPLETIONS))
    assert (12 + 30 + 3 + 1 + tokens - len(COMPLETIONS), tokens) == (182, 144)
    assert shapes == [(1, 184), (1, 144)], "filled up to multiples of 8"


def test_few_sizes_occur_and_a_sixteenth_is_added_at_most() -> None:
    sizes = {n + batching.filler(n) for n in range(1025, 4097)}
    assert sizes == {*range(1024 + 64, 2049, 64), *range(2048 + 128, 4097, 128)}
    assert [batching.filler(n) for n in (0, 1, 30, 33, 64, 65, 1024, 1025)] == [0, 0, 0, 1, 0, 3, 0, 63]
    assert all(16 * batching.filler(n) <= n for n in range(10_000))


def test_what_fills_a_row_up_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(*FAST["grouped heads"])
    filled = value_and_gradient(model, packed_token_logps)
    for module in (tree, batching):
        monkeypatch.setattr(module, "filler", lambda count: 0)
    for a, b in zip(filled, value_and_gradient(model, packed_token_logps), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_configuration_is_what_it_was() -> None:
    model = made(*FAST["grouped heads"])
    assert packs(model) and model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="at least one token"):
        token_logps(model, [[]], [[3]])
    assert model.config._attn_implementation == "sdpa"


def test_empty_completions_have_no_log_probs_among_others() -> None:
    model = made(*FAST["grouped heads"])
    fast = packed_token_logps(model, [[5, 6], [5, 6], [7]], [[], [8, 9], []])
    torch.testing.assert_close(fast, plain_token_logps(model, [[5, 6], [5, 6], [7]], [[], [8, 9], []]))
    assert packed_token_logps(model, [[5]], [[]]).tolist() == [[0.0]]


def test_sharpened_log_probs_are_those_of_colder_decoding() -> None:
    model = made(*FAST["soft caps"])
    with torch.no_grad():
        fast, plain = (f(model, PROMPTS, COMPLETIONS, sharpen=2.5) for f in (packed_token_logps, plain_token_logps))
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    assert (fast - packed_token_logps(model, PROMPTS, COMPLETIONS)).abs().max() > 0.1


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("block", "kept"), [(16, 2**26), (48, 0)])
def test_tiles_of_long_rows_give_the_plain_paths_values_and_gradients(
    name: str, block: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are long from one token on; attention weights are kept, or made again; no completion is seen by another."""
    monkeypatch.setattr(spans, "kernel", lambda *_: None)
    monkeypatch.setattr("sparring.tree.SHORT", 0)
    monkeypatch.setattr("sparring.tree.MOST_SCORES", kept)
    monkeypatch.setattr("sparring.batching.BLOCK", block)
    monkeypatch.setattr("sparring.batching._WASTE", 20)
    model = made(*FAST[name])
    fast, plain = (value_and_gradient(model, f) for f in (packed_token_logps, plain_token_logps))
    for a, b in zip(fast, plain, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_logits_that_do_not_fit_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(*FAST["soft caps"])
    whole = value_and_gradient(model, packed_token_logps)
    monkeypatch.setattr(batching, "MOST_LOGITS", 97 * 100)
    monkeypatch.setattr(packed, "_PIECE", 97 * 10)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))
    parts = value_and_gradient(model, packed_token_logps)
    tokens = sum(map(len, COMPLETIONS))
    assert rows == [*[10] * 14, 4, *[4], *[10] * 14] and tokens == 144, rows
    for a, b in zip(parts, whole, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_bfloat16_is_as_near_to_float32_as_the_plain_path() -> None:
    """Per-token log-probs of about 6 nats: both paths stay within 0.05, and neither is twice as far as the other."""
    model = made("Llama", BASE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(0.5)
    with torch.no_grad():
        exact = plain_token_logps(model, PROMPTS, COMPLETIONS)
        apart = [
            float((f(model, PROMPTS, COMPLETIONS, compute=torch.bfloat16) - exact).abs().mean())
            for f in (packed_token_logps, plain_token_logps)
        ]
    assert max(apart) < 0.05 and max(apart) < 2 * min(apart), apart


def test_a_player_can_be_told_to_take_the_plain_path(tmp_path: Any) -> None:
    model = made(*FAST["grouped heads"])
    model.save_pretrained(tmp_path)
    assert packs(load_model(str(tmp_path), ModelConfig(path=str(tmp_path))))
    assert not packs(load_model(str(tmp_path), ModelConfig(path=str(tmp_path), logps="plain")))


def test_copies_and_adapters_keep_to_the_plain_path() -> None:
    from peft import LoraConfig, get_peft_model

    model = made(*FAST["grouped heads"])
    assert packs(model)
    use_plain(model)
    assert not packs(model) and not packs(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        adapted: Any = get_peft_model(made(*FAST["grouped heads"]), LoraConfig(target_modules=["q_proj"]))
    assert packs(adapted)
    use_plain(adapted)
    assert not packs(adapted) and not packs(adapted.get_base_model())


def test_what_others_put_around_the_decoder_stays_there() -> None:
    model = made(*FAST["grouped heads"])
    calls: list[int] = []
    forward = model.model.forward
    model.model.forward = lambda *given, **named: (calls.append(1), forward(*given, **named))[1]
    assert packs(model)
    calls.clear()
    token_logps(model, [[5]], [[6]])
    assert calls == [1]


def test_dropout_is_not_left_out_in_silence() -> None:
    model = made("GPT2", LEARNED | {"attn_pdrop": 0.5}).train()
    with pytest.raises(TypeError, match="dropout"):
        packed_token_logps(model, PROMPTS, COMPLETIONS)


def test_a_model_that_drops_numbers_takes_the_plain_path_while_it_does() -> None:
    model = made("GPT2", LEARNED | {"attn_pdrop": 0.5})
    assert packs(model) and packs_now(model)
    model.train()
    assert packs(model) and not packs_now(model)
    rows = score(model, PROMPTS, COMPLETIONS, batch_size=64)
    assert [len(row) for row in rows] == [len(own) for own in COMPLETIONS]
    assert rows != score(model, PROMPTS, COMPLETIONS, batch_size=64)
    assert packs_now(model.eval())


def test_frozen_scores_of_a_checkpointed_learner_take_the_fast_path() -> None:
    """Without gradients nothing is computed again; with them, and outside `packed`, layers would be."""
    model = made(*FAST["grouped heads"])
    assert packs(model)
    model.train()
    rows: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0]))
    score(model, PROMPTS, COMPLETIONS, batch_size=64)
    token_logps(model, PROMPTS, COMPLETIONS)
    assert rows == [1, 8]


def test_many_completions_of_one_prompt_are_scored_in_batches() -> None:
    model = made(*FAST["grouped heads"])
    assert packs(model)
    shapes: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[1]))
    lines = score(model, [[5, 6]] * 7, [[i, 9, 9] for i in range(7)], batch_size=3)
    assert sorted(shapes) == [2 + 2, 2 + 3 * 2, 2 + 3 * 2]
    plain = plain_token_logps(model, [[5, 6]] * 7, [[i, 9, 9] for i in range(7)]).tolist()
    assert [list(line) for line in lines] == [pytest.approx(row, abs=1e-5) for row in plain]


def test_scores_keep_a_prompts_completions_together() -> None:
    model = made(*FAST["grouped heads"])
    fast = score(model, PROMPTS, COMPLETIONS, batch_size=3)
    use_plain(model)
    plain = score(model, PROMPTS, COMPLETIONS, batch_size=3)
    for a, b, completion in zip(fast, plain, COMPLETIONS, strict=True):
        assert len(a) == len(completion) and a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_micro_batches_hold_so_many_tokens_and_do_not_change_the_gradient() -> None:
    """SPIN's loss in float64: five groups of 20 to 60 tokens at 1, 60 and 10,000 tokens per forward pass."""
    model = made(*FAST["learned positions"]).to(torch.float64)
    method = spin.method()
    groups = [
        Group(
            str(i),
            tuple(ids(5 + i)),
            (tuple(ids(7 + 4 * i)), tuple(ids(8 + 5 * i))),
            (1.0, 0.0),
            1.0 + i,
            ("gold", "s"),
            0,
        )
        for i in range(5)
    ]
    frozen = {
        "reference": [Frozen(g.sha, "reference", "x", tuple((-1.0,) * len(c) for c in g.completions)) for g in groups]
    }
    passes: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda _, given: passes.append(given[0].shape[1]))
    found = {}
    for tokens in (1, 60, 10_000):
        assert packs(model)
        passes.clear()
        model.zero_grad()
        got = gradient(model, groups, frozen, method, micro_batch=64, micro_tokens=tokens, setting=Setting())
        assert got.tokens == sum(2 * (5 + i) + (7 + 4 * i) + (8 + 5 * i) for i in range(5))
        found[tokens] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert len(passes) == {1: 5, 60: 4, 10_000: 1}[tokens], passes
    for tokens in (1, 60):
        assert (found[tokens] - found[10_000]).norm() < 1e-12 * found[10_000].norm()


@dataclass(frozen=True)
class EveryToken:
    """Minus the mean log-prob of a group's completions, each by its length."""

    coupled: bool = False
    needs: tuple[str, ...] = ()

    @staticmethod
    def loss(policy: LogProbs, batch: Batch) -> Tensor:
        there = batch.mask_BGT.any(-1)
        return -(policy.mean_BG * batch.targets_BG).sum(-1) / there.sum(-1)

    @staticmethod
    def metrics(policy: LogProbs, batch: Batch) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("coupled", [False, True])
def test_groups_of_different_sizes_share_a_pass(coupled: bool) -> None:
    """Groups of three, one and two completions, together and alone, in float64."""
    model = made(*FAST["learned positions"]).to(torch.float64)
    groups = [
        Group(str(n), tuple(ids(6 + n)), tuple(tuple(ids(4 + 3 * i + n)) for i in range(n)), tuple(1.0 + i for i in range(n)), 1.0, ("s",) * n, 0)
        for n in (3, 1, 2)
    ]  # fmt: skip
    found = []
    for most in (64, 1):
        model.zero_grad()
        gradient(model, groups, {}, EveryToken(coupled), micro_batch=most)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[0].norm() > 0.1
    assert (found[0] - found[1]).norm() < 1e-12 * found[0].norm()
