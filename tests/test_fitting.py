"""Exactly one end token on a whole answer, none on a cut one; what is cut or dropped is counted or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import toy_tokenizers as toys
from sparring.config import DataConfig
from sparring.errors import InputError
from sparring.prompts import Renderer, Rendering, render
from sparring.types import Example, Message


def user(text: str) -> list[Message]:
    return [Message("user", text)]


def example(prompt: str, gold: str | None = "abc", generated: str | None = None, source: str = "d.jsonl:1") -> Example:
    return Example(id=prompt, messages=tuple(user(prompt)), gold=gold, generated=generated, source=source)


def fit(examples: Sequence[Example], context: int = 100, max_new_tokens: int = 10, **data: Any) -> Rendering:
    return render(
        examples, Renderer(toys.characters()), DataConfig(**data), context=context, max_new_tokens=max_new_tokens
    )


OVERHEAD = len("### Instruction:\n\n\n### Response:\n")  # characters are tokens


def test_rows_have_exactly_one_end_token() -> None:
    eos = toys.characters().eos_token_id
    rendering = fit([example("q", "a<eos>", "b"), example("r", None)])
    first, second = rendering.rows
    spelled = toys.characters().convert_tokens_to_ids(list("a<eos>"))
    assert first.gold == (*spelled, eos) and first.generated == (toys.characters().convert_tokens_to_ids("b"), eos)
    assert (first.gold_text, first.generated_text, first.cut) == ("a<eos>", "b", ())
    assert (second.gold, second.gold_text, second.generated, second.generated_text) == ((), "", None, None)
    assert len(first.prompt) == OVERHEAD + 1 and eos not in first.prompt
    assert rendering.counts == {
        "prompts": 2, "prompts_cut": 0, "prompts_dropped": 0, "golds_cut": 0, "golds_dropped": 0, "generated_cut": 0,
        "template_refused": 0,
    }  # fmt: skip


def test_what_a_template_adds_counts_as_well() -> None:
    """Nothing of it is cut in silence: UPFT's question inside its template."""
    limit = OVERHEAD + 10
    given = [example("e" * 10)], Renderer(toys.characters())

    def made(**data: Any) -> Rendering:
        settings = DataConfig(max_prompt_tokens=limit, **data)
        return render(*given, settings, context=100, max_new_tokens=10, template="Begin {question}")

    with pytest.raises(InputError, match=f"the prompt has {limit + 6} tokens and the limit is {limit}"):
        made()
    assert made(long_prompt="keep_end").counts["prompts_cut"] == 1
    assert (
        render(*given, DataConfig(max_prompt_tokens=limit), context=100, max_new_tokens=10).counts["prompts_cut"] == 0
    )


def test_long_prompts() -> None:
    rows = [example("e" * n) for n in (9, 10, 11, 30)]
    limit = OVERHEAD + 10
    with pytest.raises(InputError) as error:
        fit(rows, max_prompt_tokens=limit)
    assert str(error.value) == (
        f"d.jsonl:1: the prompt has {limit + 1} tokens and the limit is {limit} (data.max_prompt_tokens); shorten it, "
        "raise the limit, or set data.long_prompt to drop or keep_end"
    )
    with pytest.raises(InputError, match=r"the limit is 43 \(the model's context less play\.max_new_tokens\)"):
        fit(rows, context=53)
    dropped = fit(rows, max_prompt_tokens=limit, long_prompt="drop")
    assert ([r.example_id for r in dropped.rows], dropped.counts["prompts_dropped"]) == (["e" * 9, "e" * 10], 2)
    kept = fit(rows, context=limit + 10, long_prompt="keep_end")
    full = Renderer(toys.characters()).prompt(user("e" * 30))
    assert kept.rows[3].prompt == tuple(full[-limit:]) and kept.rows[3].cut == ("prompt",)
    assert [len(r.prompt) for r in kept.rows] == [limit - 1, limit, limit, limit]
    assert (kept.counts["prompts_cut"], kept.counts["prompts_dropped"], kept.counts["prompts"]) == (2, 0, 4)


def test_long_answers() -> None:
    letters, eos = toys.characters().convert_tokens_to_ids(list("abcdef")), toys.characters().eos_token_id
    rows = [example("q", "abc", "abcdef"), example("q", "abcd"), example("q", "abcdef", "abc")]
    cut = fit(rows, max_answer_tokens=4)
    assert [r.gold for r in cut.rows] == [(*letters[:3], eos), tuple(letters[:4]), tuple(letters[:4])]
    assert [r.generated for r in cut.rows] == [tuple(letters[:4]), None, (*letters[:3], eos)]
    assert [r.cut for r in cut.rows] == [("generated",), ("gold",), ("gold",)]
    assert cut.rows[2].gold_text == "abcdef"
    assert cut.counts == {
        "prompts": 3, "prompts_cut": 0, "prompts_dropped": 0, "golds_cut": 2, "golds_dropped": 0, "generated_cut": 1,
        "template_refused": 0,
    }  # fmt: skip
    dropped = fit(rows, max_answer_tokens=4, long_answer="drop")
    assert len(dropped.rows) == 1
    assert (dropped.counts["golds_dropped"], dropped.counts["golds_cut"], dropped.counts["generated_cut"]) == (2, 0, 1)
    by_context = fit(rows, context=OVERHEAD + 1 + 5, max_new_tokens=5)
    assert [len(r.gold) for r in by_context.rows] == [4, 5, 5] and by_context.counts["golds_cut"] == 1


def test_a_prompt_limit_leaves_room_for_an_answer() -> None:
    rows = fit([example("e" * 200)], max_prompt_tokens=500, long_prompt="keep_end").rows
    assert (len(rows[0].prompt), len(rows[0].gold)) == (90, 4)


def test_rendering_is_the_renderers_prompt_and_completion_over_many_rows() -> None:
    renderer = Renderer(toys.zephyr("legacy"))
    kinds = ("plain", "a</s>b", " led", "\n\nnl", "<|assistant|>", "x <", "🙂")
    texts = [f"{i} {kinds[i % 7]}" for i in range(1100)]
    rows = render([example(t, t) for t in texts], renderer, DataConfig(), context=500, max_new_tokens=10).rows
    assert len(rows) == 1100
    for text, row in list(zip(texts, rows, strict=True))[::9]:
        assert row.prompt == tuple(renderer.prompt(user(text)))
        assert row.gold == (*renderer.completion(user(text), text), renderer.end_id)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 100}, r"^play\.max_new_tokens: 100 tokens leave no room .* context of 100; lower it$"),
        (
            {"max_prompt_tokens": 5, "long_prompt": "drop"},
            r"^data: none of 1 rows is left \(1 had a prompt over 5 tokens, 0 a",
        ),
        (
            {"max_answer_tokens": 2, "long_answer": "drop"},
            r"^data: none of 1 rows is left \(0 had .*, 1 a long answer\)",
        ),
    ],
)
def test_nothing_left_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit([example("q")], **settings)


@pytest.mark.parametrize("where", ["prompt", "gold", "generated"])
def test_lone_surrogate_names_the_row(where: str) -> None:
    texts: dict[str, Any] = {"prompt": "q", "gold": "a", "generated": "b"} | {where: "xy\ud800"}
    with pytest.raises(InputError, match=r"^d\.jsonl:7: character \d is half of a surrogate pair"):
        fit([example(**texts, source="d.jsonl:7")])


def test_template_that_refuses_a_row_names_it(tmp_path: Path) -> None:
    template = tmp_path / "inst.jinja"
    template.write_text(toys.INST)
    rows = [example("fine"), Example("x", (Message("system", "s"), *user("u")), "a", source="d.jsonl:2")]
    with pytest.raises(InputError) as error:
        render(rows, Renderer(toys.zephyr("first"), str(template)), DataConfig(), context=99, max_new_tokens=9)
    assert str(error.value) == (
        f"d.jsonl:2: the chat template of {template} fails: only user and assistant; mend the row, or set model.chat_template"
    )


def test_rows_that_the_template_refuses_can_be_skipped(tmp_path: Path) -> None:
    template = tmp_path / "inst.jinja"
    template.write_text(toys.INST)
    renderer = Renderer(toys.zephyr("first"), str(template))
    refused = Example("x", (Message("system", "s"), *user("u")), "a", source="d.jsonl:2")
    skip = DataConfig(on_bad_row="skip")
    given = [example("one"), refused, example("two", "b"), example("three", "\ud800")]
    rendering = render(given, renderer, skip, context=99, max_new_tokens=9)
    assert [(r.example_id, r.gold_text) for r in rendering.rows] == [("one", "abc"), ("two", "b")]
    assert (rendering.counts["template_refused"], rendering.counts["prompts"]) == (2, 4)
    with pytest.raises(InputError, match=r"^d\.jsonl:2: the chat template of .* fails: only user and assistant;"):
        render([refused, refused], renderer, skip, context=99, max_new_tokens=9)
