"""Layout of scoring batches: what the model is fed, that padding never matters, and how much is projected at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sparring import batching
from sparring.logps import batches, gather, plain_token_logps, score, token_logps, token_outputs, use_plain

PROMPTS = [list(range(3, 21)), [21, 22], [23]]
COMPLETIONS = [[23, 24], list(range(25, 41)), [3, 4, 5]]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # The first two do not look at the attention mask
    "rwkv": ("Rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 32}),
    "xlstm": ("xLSTM", {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}),
    "gpt2": ("GPT2", {"n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "opt": (
        "OPT",
        {
            "max_position_embeddings": 20,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "word_embed_proj_dim": 16,
        },
    ),
    "llama": (
        "Llama",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
}


def tiny(name: str, vocabulary: int = 50) -> Any:
    family, sizes = FAMILIES[name]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, **tokens, **sizes)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "gpt2" else f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)  # fresh weights give nearly uniform answers, which would hide wrong padding
    return model


def fed(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the plain path calls the model with."""
    seen: dict[str, Any] = {}
    hook = model.register_forward_pre_hook(lambda _, __, inputs: seen.update(inputs), with_kwargs=True)
    with torch.no_grad():
        plain_token_logps(model, prompts, completions)
    hook.remove()
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in seen.items()}


@pytest.mark.parametrize(("compute", "most"), [(None, 2048), (torch.bfloat16, 4096)])
def test_passes_on_a_cpu_are_of_a_few_thousand_tokens(
    compute: torch.dtype | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = tiny("llama"), list[int]()
    monkeypatch.setattr(
        "sparring.logps.token_logps",
        lambda model, prompts, completions, **_: (
            sizes.append(sum(map(len, (*prompts, *completions)))),
            torch.zeros(len(prompts), 500),
        )[1],
    )
    score(model, [[n % 50] for n in range(30)], [[5] * 499] * 30, batch_size=64, compute=compute)
    assert (max(sizes), sum(sizes)) == (most // 500 * 500, 15_000)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_scores_among_others_as_it_does_alone(name: str) -> None:
    """GPT-2 and OPT have 20 positions: a batch must not be longer than its longest row, 20 here."""
    model = tiny(name)
    lines = score(model, PROMPTS, COMPLETIONS, batch_size=3)
    for line, prompt, completion in zip(lines, PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            table = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].log_softmax(-1)
        wanted = [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]
        assert list(line) == pytest.approx(wanted, abs=2e-5)


def test_padding_comes_last_and_the_shortest_prompt_bounds_the_logits() -> None:
    assert fed(tiny("llama"), [[5, 6, 7], [8]], [[9], [10, 11]]) == {
        "input_ids": [[5, 6, 7, 9], [8, 10, 11, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "use_cache": False,
        "logits_to_keep": 4,
    }


def test_prompts_of_equal_length_cost_logits_for_completions_only() -> None:
    given = fed(tiny("llama"), [[5, 6, 7], [7, 6, 5]], [[9], [10, 11, 12]])
    assert given["input_ids"] == [[5, 6, 7, 9, 0, 0], [7, 6, 5, 10, 11, 12]]
    assert given["logits_to_keep"] == 4


def test_empty_completions_have_no_log_probs() -> None:
    model = tiny("llama")
    assert token_logps(model, [[5, 6], [7]], [[], []]).tolist() == [[0.0], [0.0]]
    assert token_logps(model, [[5, 6, 7, 8], [7]], [[], [9]])[0].tolist() == [0.0]
    assert score(model, [[5, 6]], [[]], batch_size=4) == [()]
    assert score(model, [], [], batch_size=4) == []


def test_a_batch_is_bounded_by_rows_and_by_tokens() -> None:
    tokens, rows = [5, 6, 8, 9, 9, 9, 40], [1, 1, 1, 1, 2, 1, 1]
    assert batches(tokens, rows, 3, 10**9) == [range(0, 3), range(3, 5), range(5, 7)]
    # Items count as the longest of their batch: 2 × 6, then 2 × 9 and 2 × 9
    assert batches(tokens, rows, 9, 18) == [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]
    assert batches([1, 1, 1, 9], [1] * 4, 9, 12) == [range(0, 3), range(3, 4)]
    assert batches([9, 1, 1, 1], [1] * 4, 9, 27) == [range(0, 3), range(3, 4)]
    assert batches(tokens, rows, 1, 10**9) == [range(i, i + 1) for i in range(7)]
    assert batches([], [], 3, 10) == []


def test_the_plain_path_counts_logits_with_the_models_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MOST_LOGITS", 50 * 28)
    model = tiny("llama")
    use_plain(model)
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    prompts = [[5] * 8 + [i] for i in range(5)]
    lines = score(model, prompts, [[7] * 5] * 5, batch_size=64)
    assert shapes == [(2, 6, 50), (2, 6, 50), (1, 6, 50)]
    assert [len(line) for line in lines] == [5] * 5
    monkeypatch.undo()
    score(model, prompts, [[7] * 5] * 5, batch_size=64)
    assert shapes[3:] == [(5, 6, 50)]


# --- logits and hidden states


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_each_row_alone(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        out = token_outputs(model, PROMPTS, COMPLETIONS, hidden=True)
        assert out.hidden is not None
        head = model.get_output_embeddings()
        assert out.logits.shape == (3, 16, 50) and out.hidden.shape == (3, 16, head.in_features)
        torch.testing.assert_close(out.logps, plain_token_logps(model, PROMPTS, COMPLETIONS), rtol=0, atol=0)
        if name != "xlstm":  # caps what its head gives
            torch.testing.assert_close(head(out.hidden)[0, :2], out.logits[0, :2])
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            alone = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
            torch.testing.assert_close(
                out.logits[row, : len(completion)], alone[len(prompt) - 1 : -1], atol=1e-4, rtol=1e-4
            )
            for values in (out.logps, out.logits, out.hidden):
                assert not values[row, len(completion) :].any()


def test_gradients_flow_to_log_probs_logits_and_hidden_states() -> None:
    model = tiny("llama")

    def slope(name: str, row: int) -> float:
        model.zero_grad()
        getattr(token_outputs(model, [[5, 6, 7], [8]], [[9], [10, 11]], hidden=True), name)[row].sum().backward()
        return float(model.model.embed_tokens.weight.grad[[5, 8][row]].abs().sum())

    for name in ("logps", "logits", "hidden"):
        assert slope(name, 0) > 0 and slope(name, 1) > 0
    plain = plain_token_logps(model, [[5, 6, 7], [8]], [[9], [10, 11]])
    model.zero_grad()
    plain.sum().backward()
    once = model.lm_head.weight.grad.clone()
    model.zero_grad()
    token_outputs(model, [[5, 6, 7], [8]], [[9], [10, 11]]).logps.sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, once, rtol=0, atol=0)


def test_outputs_leave_no_hook_and_are_as_wide_as_float32() -> None:
    model = tiny("llama").to(torch.bfloat16)
    out = token_outputs(model, [[5]], [[9]], hidden=True)
    assert out.logits.dtype == out.logps.dtype == torch.float32
    assert not model.lm_head._forward_pre_hooks
    assert token_outputs(model, [[5]], [[9]]).hidden is None
    assert token_outputs(tiny("llama").double(), [[5]], [[9]]).logits.dtype == torch.float64


def test_a_model_without_a_head_has_no_hidden_states_to_read() -> None:
    model = tiny("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="LlamaForCausalLM: no output head was used"):
        token_outputs(model, [[5]], [[9]], hidden=True)


# --- hidden tokens


V12_PROMPT = [100, 101, 2, 13]
V12_ANSWERS = [[102, 103, 104, 2, 13, 2], [105, 2, 13, 2]]


def test_hidden_tokens_have_the_masks_of_v12() -> None:
    """vectors.md §9, V12: both masks; the generated row's padding is 0 as well."""
    seen: dict[str, Any] = {}
    model = tiny("llama", vocabulary=110)
    model.register_forward_pre_hook(lambda _, __, inputs: seen.update(inputs), with_kwargs=True)
    with torch.no_grad():
        plain_token_logps(model, [V12_PROMPT] * 2, V12_ANSWERS, hide=2)
    assert seen["attention_mask"].tolist() == [[1, 1, 0, 1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0, 1, 1, 0, 0]]
    assert seen["input_ids"].tolist() == [
        [100, 101, 2, 13, 102, 103, 104, 2, 13, 2],
        [100, 101, 2, 13, 105, 2, 13, 2, 0, 0],
    ]
    with torch.no_grad():
        plain_token_logps(model, [V12_PROMPT] * 2, V12_ANSWERS)
    assert seen["attention_mask"].tolist() == [[1] * 10, [1] * 8 + [0] * 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_tokens_are_scored_and_not_attended_to(attention: str) -> None:
    model = tiny("llama", vocabulary=110)
    model.set_attn_implementation(attention)
    prompts = [V12_PROMPT, [2, *V12_PROMPT]]
    lines = score(model, prompts, V12_ANSWERS, batch_size=2, hide=2)
    for line, prompt, answer in zip(lines, prompts, V12_ANSWERS, strict=True):
        row = [*prompt, *answer]
        mask = torch.tensor([[int(token != 2) for token in row[:-1]] + [1]])
        with torch.no_grad():
            table = model(input_ids=torch.tensor([row]), attention_mask=mask, use_cache=False).logits[0].log_softmax(-1)
        assert list(line) == pytest.approx(
            [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)], abs=2e-5
        )
    open_lines = score(model, prompts, V12_ANSWERS, batch_size=2)
    assert abs(sum(lines[0]) - sum(open_lines[0])) > 1e-3
    with torch.no_grad():
        both = token_outputs(model, prompts, V12_ANSWERS, hide=2).logps
    assert both[0].tolist() == pytest.approx(list(lines[0]), abs=2e-5)


# --- sharpened log-probs


def test_sharpened_log_probs_by_hand() -> None:
    """Logits (2, 1, 0), token 0: log p = −log(1 + e^{−s} + e^{−2s})."""
    logits, token, real = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]), torch.tensor([True])
    for sharpen, wanted in ((1.0, -0.4076059644), (2.0, -0.1429316284), (0.5, -0.6802696706)):
        assert gather(logits, token, real, sharpen).item() == pytest.approx(wanted, abs=1e-6)


def test_sharpened_scores_are_those_of_scaled_logits() -> None:
    model = tiny("llama")
    sharp = score(model, PROMPTS, COMPLETIONS, batch_size=2, sharpen=2.0)
    model.lm_head.weight.data.mul_(2)
    doubled = score(model, PROMPTS, COMPLETIONS, batch_size=2)
    for line, other in zip(sharp, doubled, strict=True):
        assert list(line) == pytest.approx(list(other), abs=1e-5)
    with pytest.raises(ValueError, match="above 0; not 0"):
        token_logps(model, PROMPTS, COMPLETIONS, sharpen=0.0)
