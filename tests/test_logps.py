"""Layout of scoring batches: what the model is fed, that padding never matters, and how much is projected at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sparring.logps import _batches, score, token_logps

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
    """What `token_logps` calls the model with."""
    seen: dict[str, Any] = {}
    hook = model.register_forward_pre_hook(lambda _, __, inputs: seen.update(inputs), with_kwargs=True)
    with torch.no_grad():
        token_logps(model, prompts, completions)
    hook.remove()
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in seen.items()}


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


def test_a_batch_is_bounded_by_rows_and_by_logits() -> None:
    sizes = [(2, 5), (4, 6), (1, 8), (5, 9), (5, 9), (5, 9), (1, 40)]
    assert list(_batches(sizes, 3, 10**9)) == [(0, 3), (3, 6), (6, 7)]
    # rows × (longest row − shortest prompt + 1): two of the first are 2 × 5; the third alone has 8, the last 40
    assert list(_batches(sizes, 3, 10)) == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]
    assert list(_batches([], 3, 10)) == []


def test_logits_are_counted_with_the_models_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparring.logps._MOST_LOGITS", 50 * 12)
    model = tiny("llama")
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    lines = score(model, [[5] * 9] * 5, [[7] * 5] * 5, batch_size=64)
    assert shapes == [(2, 6, 50), (2, 6, 50), (1, 6, 50)]
    assert [len(line) for line in lines] == [5] * 5
    monkeypatch.undo()
    score(model, [[5] * 9] * 5, [[7] * 5] * 5, batch_size=64)
    assert shapes[3:] == [(5, 6, 50)]
