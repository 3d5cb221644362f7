"""The sampler against exact probabilities, transformers' own decoding, and itself under other batchings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from sparring import fused
from sparring.batching import filler
from sparring.config import PlayConfig
from sparring.errors import InputError, NonFiniteError
from sparring.logps import token_logps
from sparring.play import decode, slots
from sparring.play.halved import halved
from sparring.play.hf import Answer, Mixture, draw, invert, keep_likeliest, key, play, sample, settings_id, uniforms
from sparring.types import Player, Rendered

STORIES = Path(__file__).parents[1].parent / "shared" / "data" / "models" / "stories260K"
END, PAD, VOCABULARY = 2, 0, 23
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": PAD}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "num_key_value_heads": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {**SIZES, "num_key_value_heads": 1, "sliding_window": 5}),
    "gemma2": (
        "Gemma2",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen2": ("Qwen2", {**SIZES, **QWEN}),
    "gpt_neox": ("GPTNeoX", {**SIZES, "max_position_embeddings": 64}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "openai_gpt": ("OpenAIGPT", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "falcon_h1": (
        "FalconH1",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    # These two hand no cache out: the one keeps it inside, the other has a kind of its own
    "recurrent_gemma": (
        "RecurrentGemma",
        {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 64},
    ),
    "xlstm": ("xLSTM", {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}),
    "lfm2": ("Lfm2", {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
}
CLASSES = {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}
IN_SLOTS = {"llama", "mistral", "gemma2", "gpt2", "qwen2", "gpt_neox", "opt"}
RNG = random.Random(5)
PROMPTS = [[RNG.randrange(3, VOCABULARY) for _ in range(RNG.randint(1, 9))] for _ in range(33)]


def tiny(name: str) -> Any:
    family, sizes = CONFIGS[name]
    torch.manual_seed(11)
    config = getattr(transformers, f"{family}Config")(**SMALL, **sizes)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)  # fresh weights give nearly uniform answers, which would hide wrong masks
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


def answers(
    model: Any, prompts: list[list[int]] = PROMPTS, keys: list[int] | None = None, **change: Any
) -> list[Answer]:
    settings = {"temperature": 1.0, "max_new_tokens": 12, "stop_ids": (END,), "batch_size": 16}
    return sample(model, prompts, keys or list(range(len(prompts))), **(settings | change))


def teacher_forced(model: Any, prompt: list[int], tokens: tuple[int, ...]) -> Tensor:
    """Log-probs of one answer from one unpadded forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return chosen.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)


# Randomness ------------------------------------------------------------------------------------------------------


def test_uniforms_are_splitmix64() -> None:
    # Outputs of the reference C implementation for seed 1234567, as published with the generator's test vectors.
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = uniforms([1234567], 4)
    assert got.dtype == np.float64
    assert got[0].tolist() == [(w >> 11) / 2**53 for w in wanted]


def test_uniforms_are_uniform_and_unrelated_for_neighbouring_keys() -> None:
    table = uniforms(range(2000), 50)
    assert table.min() >= 0 and table.max() < 1
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 47 < chi_square < 171  # 99 degrees of freedom, 4 sigma around the mean and a little
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 4 / 100_000**0.5
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 4 / 98_000**0.5


def test_keys_are_stable_64_bit_and_differ_in_every_part() -> None:
    assert key(0, 0, "a", 0) == 6594856438497461877  # pinned: an old run must continue with the same answers
    parts = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, -1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    keys = {key(*p) for p in parts} | {key(0, 0, "a', 0, 1", 0), key(0, 11, "a", 0), key(1, 1, "a", 0)}
    assert len(keys) == 9
    assert all(0 <= k < 2**64 for k in keys)


# One draw --------------------------------------------------------------------------------------------------------

HAND = torch.tensor([0.125, 0.0, 0.5, 0.25, 0.125, 0.0])


def mass(weights: Tensor, points: int = 4096) -> list[float]:
    """How much of [0, 1) maps to each token, on an even grid: exact for weights that are multiples of 1/points."""
    u = torch.arange(points, dtype=torch.float64) / points
    drawn = invert(weights.expand(points, -1), u)
    return (torch.bincount(drawn, minlength=weights.shape[-1]) / points).tolist()


def test_inverse_cdf_gives_each_token_its_probability() -> None:
    assert mass(HAND) == HAND.tolist()
    assert mass(HAND * 8) == HAND.tolist()  # weights need not be normalised


@pytest.mark.parametrize(
    ("u", "token"),
    [(0.0, 0), (0.125 - 2**-53, 0), (0.125, 2), (0.625 - 2**-53, 2), (0.625, 3), (0.875, 4), (1 - 2**-53, 4), (1.0, 4)],
)
def test_edges_of_u_never_draw_a_token_of_probability_zero(u: float, token: int) -> None:
    assert invert(HAND[None], torch.tensor([u], dtype=torch.float64)).tolist() == [token]
    leading_zeros = torch.cat([torch.zeros(3), HAND])[None]
    assert invert(leading_zeros, torch.tensor([u], dtype=torch.float64)).tolist() == [token + 3]


def test_the_last_u_stays_inside_for_totals_that_round() -> None:
    weights = torch.rand(500, 40, generator=torch.Generator().manual_seed(1))
    weights[:, 30:] = 0
    for u in (1 - 2**-53, 1.0):
        assert invert(weights, torch.full((500,), u, dtype=torch.float64)).eq(29).all()


@pytest.mark.parametrize(
    ("top_k", "top_p", "wanted"),
    [
        (1, 1.0, [0, 0, 1, 0, 0, 0]),
        (2, 1.0, [0, 0, 2 / 3, 1 / 3, 0, 0]),
        (0, 0.5, [0, 0, 1, 0, 0, 0]),
        (0, 0.51, [0, 0, 2 / 3, 1 / 3, 0, 0]),
        (0, 0.75, [0, 0, 2 / 3, 1 / 3, 0, 0]),
        (0, 0.9, [0.125, 0, 0.5, 0.25, 0.125, 0]),
        (2, 0.66, [0, 0, 1, 0, 0, 0]),  # p is a share of what k left: .5 of .75
        (2, 0.67, [0, 0, 2 / 3, 1 / 3, 0, 0]),
        (99, 1.0, HAND.tolist()),
        (0, 1e-9, [0, 0, 1, 0, 0, 0]),
    ],
)
def test_top_k_and_top_p_on_a_hand_made_distribution(top_k: int, top_p: float, wanted: list[float]) -> None:
    kept = keep_likeliest(HAND[None], top_k, top_p)[0]
    assert (kept / kept.sum()).tolist() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ({"temperature": 1.0}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"temperature": 2.0}, [0.3694, 0.2612, 0.1847, 0.1847]),  # square roots over their sum
        ({"temperature": 0.5, "top_k": 2}, [0.8, 0.2, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1e-6}, [1, 0, 0, 0]),
    ],
)
def test_draw_tempers_and_filters_but_reports_the_players_own_log_prob(
    rule: dict[str, Any], wanted: list[float]
) -> None:
    own = torch.tensor([0.5, 0.25, 0.125, 0.125])
    points = 20_000
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    token, logp = draw((own.log() + 7).expand(points, -1), u, **rule)
    share = torch.bincount(token, minlength=4) / points
    assert share.tolist() == pytest.approx(wanted, abs=1.1 / points)
    assert torch.allclose(logp, own.log()[token], atol=2e-6, rtol=0)


# Whole answers ---------------------------------------------------------------------------------------------------


def test_frequencies_are_the_models_probabilities(llama: Any) -> None:
    prompt, n = [5, 9, 4], 6000
    with torch.no_grad():
        first = llama(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).double()
        seconds = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        second = llama(input_ids=seconds).logits[:, -1].softmax(-1).double()
    keys = [key(3, 0, "x", i) for i in range(n)]
    got = answers(llama, [prompt] * n, keys, max_new_tokens=2, stop_ids=(), batch_size=1500)
    pairs = np.array([a.tokens for a in got])
    joint = (first[:, None] * second).flatten().numpy()
    counts = np.bincount(pairs[:, 0] * VOCABULARY + pairs[:, 1], minlength=VOCABULARY**2)
    large = joint * n >= 10
    expected = np.append(joint[large], joint[~large].sum()) * n
    observed = np.append(counts[large], counts[~large].sum())
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert freedom > 20
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_are_those_of_an_unpadded_forward_pass(name: str) -> None:
    # In float64: rounding alone, which fresh Mamba weights blow up to 3e-5 in float32, would hide a wrong mask
    # (transformers' own Gemma 2 gives NaN for padded rows in float64)
    model, apart = (tiny(name), 1e-5) if name == "gemma2" else (tiny(name).double(), 2e-6)
    got = answers(model, PROMPTS, batch_size=16)
    assert {a.finish for a in got} == {"stop", "length"}  # rows leave the batch at different times
    for prompt, answer in zip(PROMPTS, got, strict=True):
        wanted = teacher_forced(model, prompt, answer.tokens)
        assert answer.logps == pytest.approx(wanted.tolist(), abs=apart)
        ended = END in answer.tokens
        assert answer.finish == ("stop" if ended else "length")
        assert answer.tokens.index(END) == len(answer.tokens) - 1 if ended else len(answer.tokens) == 12


@pytest.mark.parametrize("name", CONFIGS)
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    model, prompts = tiny(name), PROMPTS[:17]
    base = answers(model, prompts, batch_size=16, max_new_tokens=8)
    tokens = [a.tokens for a in base]
    assert len(set(tokens)) > 13
    for batch_size in (1, 3):
        assert [a.tokens for a in answers(model, prompts, batch_size=batch_size, max_new_tokens=8)] == tokens
    shuffled = random.Random(1).sample(range(17), 17)
    again = answers(model, [prompts[i] for i in shuffled], shuffled, max_new_tokens=8)
    assert [a.tokens for a in again] == [tokens[i] for i in shuffled]
    assert answers(model, prompts, batch_size=16, max_new_tokens=8) == base  # running twice gives the same floats


# transformers' own generate crashes for this xLSTM, and RecurrentGemma's keeps its state from one call to the next
@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("xlstm", "recurrent_gemma")])
def test_greedy_is_transformers_generate(name: str) -> None:
    model = tiny(name)
    got = answers(model, PROMPTS[:4], temperature=0.0)
    for prompt, answer in zip(PROMPTS, got, strict=False):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert list(answer.tokens) == wanted[0, len(prompt) :].tolist()


def test_left_padding_changes_nothing(llama: Any) -> None:
    alone = answers(llama, [[7, 8]], [99])[0]
    beside_long = answers(llama, [[3] * 60, [7, 8]], [1, 99])[1]
    assert beside_long.tokens == alone.tokens
    assert beside_long.logps == pytest.approx(alone.logps, abs=1e-5)


def test_pad_and_stop_ids_inside_a_prompt_are_ordinary_tokens(llama: Any) -> None:
    prompt = [PAD, PAD, 5, END, 6, PAD]
    got = answers(llama, [prompt, [4] * 11], [4, 5])[0]
    assert got.logps == pytest.approx(teacher_forced(llama, prompt, got.tokens).tolist(), abs=1e-5)


def test_layers_that_share_a_number_are_not_decoded_in_slots(caplog: pytest.LogCaptureFixture) -> None:
    """Each would take the other's keys; fresh weights hardly mix tokens, so that log-probs do not tell."""
    caplog.set_level("INFO", "sparring")
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0
    assert not slots.decodes(model)
    assert "its layer 0 attends more than once in a pass" in caplog.text


def test_a_trial_is_in_full_precision_whatever_the_caller_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = slots.head
    with torch.autocast("cpu", torch.bfloat16):
        assert slots.decodes(tiny("llama"))
        # What would pass for rounding in 16 bits
        monkeypatch.setattr(slots, "head", lambda *given: whole(*given) + 0.1 * torch.arange(VOCABULARY).eq(3))
        assert not slots.decodes(tiny("llama"))


def test_finished_rows_leave_a_padded_batch() -> None:
    model = tiny("mamba")
    assert not slots.decodes(model)
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: widths.append(len(inputs["input_ids"])), with_kwargs=True)
    got = answers(model, batch_size=33, max_new_tokens=40, stop_ids=tuple(range(1, 8)))
    lengths = [len(a.tokens) for a in got]
    alive, wanted = 33, [33]
    for position in range(1, max(lengths)):
        left = sum(n > position for n in lengths)
        alive = left if 2 * (alive - left) >= alive else alive
        wanted.append(alive)
    assert widths == wanted
    assert wanted[-1] < 33


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])  # states in layers of their own, and beside keys and values
def test_a_recurrent_state_is_not_compacted_apart_from_its_row(name: str) -> None:
    model = tiny(name)
    assert not slots.decodes(model)
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: widths.append(len(inputs["input_ids"])), with_kwargs=True)
    got = answers(model, batch_size=33, stop_ids=tuple(range(1, 12)))
    assert set(widths) == {33}
    for prompt, answer in zip(PROMPTS, got, strict=True):
        assert answer.logps == pytest.approx(teacher_forced(model, prompt, answer.tokens).tolist(), abs=1e-5)


def test_only_last_tokens_are_projected_and_those_of_one_prompt_once(llama: Any) -> None:
    shapes = []
    assert slots.decodes(llama)
    hook = llama.lm_head.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    answers(llama, [[5] * 30] * 4 + [[6] * 30], [1, 2, 3, 4, 5], max_new_tokens=2, stop_ids=())
    hook.remove()
    assert shapes == [(1, 2, VOCABULARY), (1, 5, VOCABULARY)]


# Slots -----------------------------------------------------------------------------------------------------------


def tokens_per_forward(decoder: Any) -> list[int]:
    """How many tokens each packed forward pass is given, from now on."""
    counts: list[int] = []

    def count(_: Any, __: Any, given: dict[str, Any]) -> None:
        if "layout" in given:
            counts.append(given["input_ids"].numel())

    decoder.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def in_padded_batches(monkeypatch: pytest.MonkeyPatch, model: Any, *arguments: Any, **change: Any) -> list[Answer]:
    with monkeypatch.context() as patch:
        patch.setattr(slots, "decodes", lambda _: False)
        return answers(model, *arguments, **change)


RAGGED = [[RNG.randrange(3, VOCABULARY) for _ in range(n)] for n in (30, 1, 1, 17, 2, 9, 24, 3, 5, 12, 1)]
MANY = [p for p in RAGGED for _ in range(3)]
LONG = {"max_new_tokens": 30, "stop_ids": (END, 7)}


@pytest.mark.parametrize(("name", "in_c"), [*((n, True) for n in CONFIGS), ("llama", False), ("mistral", False)])
def test_slots_and_padded_batches_give_the_same_answers(name: str, in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = tiny(name), list[int]()

    def kernel(*sizes: Any) -> Any:
        made = decode.kernel(*sizes) if in_c else None

        def counted(*given: Any) -> Tensor:
            assert made is not None
            steps.append(len(given[0]))
            return made(*given)

        return counted if made else None

    monkeypatch.setattr(slots, "kernel", kernel)
    assert slots.decodes(model) == (name in IN_SLOTS)
    if name not in IN_SLOTS:
        return
    wanted = in_padded_batches(monkeypatch, model, MANY, batch_size=33, **LONG)
    assert min(len(a.tokens) for a in wanted) < 4 and {a.finish for a in wanted} == {"stop", "length"}
    rescored = token_logps(model, MANY, [a.tokens for a in wanted])
    for size in (1, 3, 7, 64):
        got = answers(model, MANY, batch_size=size, **LONG)
        assert [a.tokens for a in got] == [a.tokens for a in wanted]
        assert [a.finish for a in got] == [a.finish for a in wanted]
        for a, b, row in zip(got, wanted, rescored.tolist(), strict=True):
            assert a.logps == pytest.approx(b.logps, abs=1e-5)
            assert a.logps == pytest.approx(row[: len(a.tokens)], abs=1e-5)
    assert bool(steps) == (in_c and name != "gemma2")  # whose scores are capped


def test_copies_of_prompts_as_many_tokens_as_fill_the_row_go_to_their_own_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """33 tokens are filled up by one, and the copy of `[5]` has one as well."""
    model, prompts = tiny("llama"), [[3 + i % 10 for i in range(32)], [5], [5]]
    assert filler(33) == 1
    wanted = in_padded_batches(monkeypatch, model, prompts, **LONG)
    got = answers(model, prompts, **LONG)
    assert [a.tokens for a in got] == [a.tokens for a in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-5)


def test_a_mixture_is_decoded_in_slots_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny("qwen2"), tiny("llama")
    change: dict[str, Any] = {"batch_size": 7, "mixture": Mixture(other, 0.4), **LONG}
    assert slots.decodes(other)
    counts = tokens_per_forward(other.model)
    wanted = in_padded_batches(monkeypatch, model, MANY, **change)
    assert counts == []
    got = answers(model, MANY, **change)
    assert [a.tokens for a in got] == [a.tokens for a in wanted]
    read = 30 + 24 + 17
    assert counts[:2] == [read + filler(read), 7]  # each prompt once, then the seven rows that begin
    for a, b in zip(got, wanted, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-5)
    assert [a.tokens for a in answers(model, MANY, batch_size=7, **LONG)] != [a.tokens for a in wanted]


def test_slots_are_filled_again_and_dropped_when_nothing_waits(llama: Any) -> None:
    stops = tuple(range(1, 8))
    answers(llama, [[4]], [1])
    counts = tokens_per_forward(llama.model)
    got = answers(llama, [[5]] * 200, batch_size=16, max_new_tokens=40, stop_ids=stops)
    decoded = sum(len(a.tokens) - 1 for a in got)  # what is not predicted from a prompt alone
    steps = [n for n in counts if n > 1]
    assert max(counts) == 16
    assert steps == sorted(steps, reverse=True)  # narrower only when nothing waits
    assert 1 < steps[-1] < 8
    # One in eight slots is free at most, and those of rows that end when they are only two or so
    assert decoded <= sum(counts) < 1.3 * decoded + 100


def test_the_store_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    assert slots.decodes(model)
    made: list[Any] = []
    seen: set[tuple[int, ...]] = set()
    layer = slots._Store.layer

    def watched(store: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        pair = layer(store, *arguments)
        made.append(store)
        seen.update((x.data_ptr(), *x.shape) for x in pair)
        return pair

    monkeypatch.setattr(slots._Store, "layer", watched)
    answers(model, MANY, batch_size=5, **LONG)
    assert len({id(store) for store in made}) == 1
    assert len(seen) == 4  # keys and values of two layers
    assert {shape for _, *shape in map(list, seen) for shape in [tuple(shape)]} == {
        (5, 2, 64, 8)
    }  # 30 + 30 and a little


def misplaced(self: Any, layer: int, states: Any, rule: Any) -> Tensor:
    return states.query  # what a layer of a kind unknown to us might come to


def refused(self: Any, layer: int, states: Any, rule: Any) -> Tensor:
    raise TypeError("its steps are of another kind")


@pytest.mark.parametrize(("attend", "why"), [(misplaced, "differ by"), (refused, "of another kind")])
def test_a_model_that_slots_cannot_take_is_told_once(
    attend: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = answers(tiny("llama"))
    model = tiny("llama")
    monkeypatch.setattr(slots._Step, "attend", attend)
    with caplog.at_level("INFO", "sparring"):
        got = answers(model)
        assert answers(model) == got
    (told,) = [r.message for r in caplog.records if "whole batches" in r.message]
    assert told.startswith("LlamaForCausalLM: ") and why in told
    assert [a.tokens for a in got] == [a.tokens for a in wanted]


@pytest.mark.parametrize("size", [5, 127, 128, 129, 1000])
def test_blocks_give_the_token_that_one_sum_over_the_vocabulary_gives(size: int) -> None:
    make = torch.Generator().manual_seed(size)
    weights = torch.randn(3000, size, generator=make).mul(4).exp() * (torch.rand(3000, size, generator=make) < 0.5)
    weights[:, size // 2] += 1e-3
    u = torch.rand(3000, dtype=torch.float64, generator=make)
    cdf = weights.double().cumsum(-1)
    wanted = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    got = invert(weights, u)
    assert (got != wanted).sum() <= 1
    assert weights.gather(-1, got[:, None]).min() > 0


def test_frozen_weights_are_cast_once_and_stay_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a model's own layers; those of fused.py are tried in test_fused.py."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        shapes: list[tuple[int, ...]] = []  # noqa: RUF012

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
                self.shapes.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(fused, "layers", lambda _: [])
    model = tiny("llama").requires_grad_(False)
    assert slots.decodes(model)
    with Casts() as casts:
        answers(model, compute=torch.bfloat16, stop_ids=())
    assert casts.shapes.count((VOCABULARY, 32)) == 1
    assert casts.shapes.count((48, 32)) == 4  # gate and up, of two layers
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("compute", "mkldnn"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_halved_layers_multiply_as_autocast_does(
    llama: Any, compute: torch.dtype, mkldnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of 16 bits with sums of 32 on both sides: apart by the order of sums, and gone again after an error."""
    if not mkldnn:  # as torch is for a Mac
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    ids = torch.tensor([RAGGED[0]])
    with torch.no_grad(), torch.autocast("cpu", compute):
        wanted = llama(input_ids=ids).logits
        with pytest.raises(KeyError), halved([llama], compute):
            got = llama(input_ids=ids).logits
            raise KeyError
        assert torch.equal(llama(input_ids=ids).logits, wanted)
    step = torch.finfo(compute).eps * float(wanted.abs().max())
    assert got.dtype == compute and float((got - wanted).float().abs().max()) <= 4 * step
    assert not any("forward" in m.__dict__ for m in llama.modules())


# Ends and limits -------------------------------------------------------------------------------------------------


def test_several_end_tokens_and_none(llama: Any) -> None:
    got = answers(llama, stop_ids=(END, 7, 9))
    assert {a.tokens[-1] for a in got if a.finish == "stop"} == {END, 7, 9}
    assert all(not {END, 7, 9} & set(a.tokens[:-1]) for a in got)
    endless = answers(llama, stop_ids=())
    assert {(len(a.tokens), a.finish) for a in endless} == {(12, "length")}
    for short, long in zip(got, endless, strict=True):
        assert long.tokens[: len(short.tokens)] == short.tokens


def test_a_shorter_limit_is_a_prefix(llama: Any) -> None:
    long, short = answers(llama, max_new_tokens=12), answers(llama, max_new_tokens=5)
    assert [a.tokens for a in short] == [a.tokens[:5] for a in long]


def test_half_precision_compute_reports_float32_log_probs(llama: Any) -> None:
    full, half = answers(llama, max_new_tokens=1), answers(llama, max_new_tokens=1, compute=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = llama(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    wanted = logits.float().log_softmax(-1)[half[0].tokens[0]]
    assert half[0].logps == pytest.approx((wanted.item(),), abs=0.05)
    same = [(f.logps[0], h.logps[0]) for f, h in zip(full, half, strict=True) if f.tokens == h.tokens]
    assert len(same) > 20
    assert all(abs(f - h) < 0.3 for f, h in same) and any(f != h for f, h in same)


def test_training_mode_is_restored_and_dropout_is_off() -> None:
    model = tiny("gpt2")  # its configuration has dropout 0.1
    wanted = answers(model)
    model.train()
    assert answers(model) == wanted
    assert model.training


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_gets_positions_too() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("gpt2")
    config = peft.LoraConfig(
        target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config).eval()
    assert slots.decodes(adapted)
    columns = tokens_per_forward(model.transformer)
    got = answers(adapted, PROMPTS, stop_ids=(), batch_size=33)
    read = sum(map(len, PROMPTS))
    assert columns == [read + filler(read)] + [33] * 11  # nothing is read twice
    for prompt, answer in zip(PROMPTS, got, strict=True):
        wanted = teacher_forced(adapted, prompt, answer.tokens)
        assert answer.logps == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_broken_player_and_bad_rows_are_told(llama: Any) -> None:
    broken = tiny("llama")
    broken.lm_head.weight.data[4] = float("nan")
    with pytest.raises(NonFiniteError, match="the player's logits are not finite"):
        answers(broken)
    with pytest.raises(InputError, match=r"^prompt 1: it has no tokens"):
        answers(llama, [[4], []])
    with pytest.raises(ValueError, match="1 keys for 2 prompts"):
        answers(llama, [[4], [5]], [1])
    assert answers(llama, [], []) == []


@pytest.mark.skipif(not STORIES.exists(), reason="the real model is not here")
def test_greedy_stories_are_those_of_the_c_program() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    cases = json.loads((STORIES / "llama2c_reference.json").read_text())["cases"]
    assert len(cases) >= 2
    prompts = [case["prompt_ids"] for case in cases]
    # run.c counts steps from the first token, which it does not print: 256 steps are 257 tokens.
    length = 257 - min(map(len, prompts))
    got = answers(model, prompts, temperature=0.0, max_new_tokens=length, stop_ids=(1, 2), batch_size=8)
    for case, answer in zip(cases, got, strict=True):
        whole = [*case["prompt_ids"], *answer.tokens][:257]
        text = tokenizer.decode(whole, skip_special_tokens=True)
        assert text.strip() == case["greedy_text_256_steps"].strip()


# Play ------------------------------------------------------------------------------------------------------------


class Letters:
    """A renderer as far as playing needs one."""

    stop_ids = (END,)

    def decode(self, tokens: Any) -> str:
        return "".join(chr(97 + t) for t in tokens if t != END)


def rows(n: int) -> list[Rendered]:
    return [Rendered(f"id{i}", tuple(PROMPTS[i]), (5, END), "f") for i in range(n)]


def test_play_gives_every_row_its_samples(llama: Any) -> None:
    settings = PlayConfig(samples=3, max_new_tokens=12, batch_size=7)
    renderer: Any = Letters()
    got = play(llama, rows(5), Player("p", 1, "f" * 64), settings, renderer, seed=4, round=1)
    assert [s.id for s in got] == [f"id{i}/{'f' * 12}/1.{k}" for i in range(5) for k in range(3)]
    assert {(s.seed, s.player) for s in got} == {(4, "f" * 64)}
    keys = [key(4, 1, f"id{i}", k) for i in range(5) for k in range(3)]
    plain = answers(llama, [PROMPTS[i] for i in range(5) for _ in range(3)], keys)
    assert [s.tokens for s in got] == [a.tokens for a in plain]
    assert [s.text for s in got] == [Letters().decode(a.tokens) for a in plain]
    assert len({s.tokens for s in got}) > 10
    # One row alone, as after a resume, gives what it gave among the others; another round or seed gives something else.
    assert [s.tokens for s in play(llama, rows(5)[3:4], Player("p", 1, "f"), settings, renderer, seed=4, round=1)] == [
        s.tokens for s in got[9:12]
    ]
    for seed, number in ((5, 1), (4, 2)):
        other = play(llama, rows(5), Player("p", 1, "f"), settings, renderer, seed=seed, round=number)
        assert sum(a.tokens == b.tokens for a, b in zip(got, other, strict=True)) < 4


def test_settings_id_names_what_changes_tokens_and_nothing_else() -> None:
    base = settings_id(PlayConfig())
    assert base == settings_id(PlayConfig(batch_size=3, samples=9, chunk=2)) == settings_id(PlayConfig(temperature=1))
    changed: list[dict[str, Any]] = [{"temperature": 2}, {"top_p": 0.9}, {"top_k": 5}, {"max_new_tokens": 7}]
    assert len({settings_id(PlayConfig(**c)) for c in changed} | {base}) == 5
