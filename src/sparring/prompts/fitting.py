"""A data set as token ids that fit the model's context: what is cut or dropped is counted and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparring.config import DataConfig
from sparring.errors import InputError
from sparring.prompts.control import unicode_text
from sparring.rundir.store import Rows, compact
from sparring.types import Example, Message, Rendered

if TYPE_CHECKING:
    from sparring.prompts import Renderer

_CHUNK = 1024
_COUNT_OF = {"prompt": "prompts_cut", "gold": "golds_cut", "generated": "generated_cut"}


@dataclass(frozen=True)
class Rendering:
    """A data set as token ids, with what was done to make it fit."""

    rows: Rows[Rendered]
    counts: dict[str, int]
    """Examples given (`prompts`); among them prompts_cut, prompts_dropped, golds_cut, golds_dropped, generated_cut,
    template_refused."""
    largest: int
    """Of all token ids."""


def render(
    examples: Sequence[Example], renderer: Renderer, data: DataConfig, *, context: int, max_new_tokens: int,
    template: str | None = None,
) -> Rendering:  # fmt: skip
    """Token ids of every example; `context` and `max_new_tokens` are in tokens. `template` makes `Rendered.retold`.

    A prompt may fill `data.max_prompt_tokens`, and no more than the context leaves beside `max_new_tokens`. An answer may fill
    `data.max_answer_tokens` and what the context leaves behind its prompt, the end token counted; a longer one is cut
    and has none. Raises InputError, naming the row, for a prompt that is too long (`data.long_prompt="fail"`), for one
    that the template refuses (`data.on_bad_row="fail"`; `skip` counts it), and where no row is left.
    """
    room = context - max_new_tokens
    limit = min(data.max_prompt_tokens or room, room)
    if limit < 1:
        raise InputError(
            f"play.max_new_tokens: {max_new_tokens} tokens leave no room for a prompt in the model's context of {context}; lower it"
        )
    kinds = (*_COUNT_OF.values(), "prompts_dropped", "golds_dropped", "template_refused")
    counts = Counter({"prompts": len(examples)} | dict.fromkeys(kinds, 0))
    chunks = (examples[start : start + _CHUNK] for start in range(0, len(examples), _CHUNK))
    largest = 0

    def parts() -> Iterator[list[Rendered]]:
        nonlocal largest
        for chunk in chunks:
            made = list(_rows(chunk, renderer, data, context, limit, counts, template))
            ids = (max(ids, default=0) for r in made for ids in (r.prompt, r.gold, r.generated or ()))
            largest = max(largest, max(ids, default=0))
            yield made

    rows = compact(Rendered, parts())
    if not rows and counts["template_refused"] == len(examples) > 0:
        _text(examples[0], renderer)
    if not rows:
        raise InputError(
            f"data: none of {len(examples)} rows is left ({counts['prompts_dropped']} had a prompt over {limit} tokens, "
            f"{counts['golds_dropped']} a long answer); raise the limits, or set data.long_prompt=keep_end and data.long_answer=cut"
        )
    return Rendering(rows, dict(counts), largest)


def _rows(
    examples: Sequence[Example], renderer: Renderer, data: DataConfig, context: int, limit: int, counts: Counter[str],
    template: str | None,
) -> Iterator[Rendered]:  # fmt: skip
    examples, texts = _texts(examples, renderer, data, counts)
    prompts = renderer.encode_prompts(texts)
    golds = _answers([example.gold for example in examples], texts, prompts, renderer)
    generations = _answers([example.generated for example in examples], texts, prompts, renderer)
    for example, prompt, gold, generated in zip(examples, prompts, golds, generations, strict=True):
        retold = None if template is None else renderer.prompt(_retold(example, template))
        size = max(len(prompt), len(retold or ()))
        cut = ["prompt"] if size > limit else []
        if cut and data.long_prompt == "fail":
            own = data.max_prompt_tokens == limit
            setting = "data.max_prompt_tokens" if own else "the model's context less play.max_new_tokens"
            raise InputError(
                f"{_where(example)}: the prompt has {size} tokens and the limit is {limit} ({setting}); shorten it, "
                "raise the limit, or set data.long_prompt to drop or keep_end"
            )
        if cut and data.long_prompt == "drop":
            counts["prompts_dropped"] += 1
            continue
        prompt = prompt[-limit:]
        room = min(data.max_answer_tokens or context, context - min(size, limit))
        if gold is not None and len(gold) >= room:
            if data.long_answer == "drop":
                counts["golds_dropped"] += 1
                continue
            cut.append("gold")
        if generated is not None and len(generated) >= room:
            cut.append("generated")
        counts.update(_COUNT_OF[what] for what in cut)
        yield Rendered(
            example_id=example.id,
            prompt=tuple(prompt),
            gold=() if gold is None else _ended(gold, room, renderer.end_id),
            gold_text=example.gold or "",
            generated=None if generated is None else _ended(generated, room, renderer.end_id),
            generated_text=example.generated,
            cut=tuple(cut),
            retold=None if retold is None else tuple(retold[-limit:]),
        )


def _retold(example: Example, template: str) -> list[Message]:
    """The conversation with its last turn inside the template."""
    *before, last = example.messages
    return [*before, Message(last.role, template.replace("{question}", last.content))]


def _ended(answer: list[int], room: int, end_id: int) -> tuple[int, ...]:
    """The answer with its end token, or as much of it as there is room for and no end token."""
    return tuple(answer[:room]) if len(answer) >= room else (*answer, end_id)


def _texts(
    examples: Sequence[Example], renderer: Renderer, data: DataConfig, counts: Counter[str]
) -> tuple[list[Example], list[str]]:
    """The examples that the template takes, and their prompts as text."""
    taken: list[Example] = []
    texts: list[str] = []
    for example in examples:
        try:
            texts.append(_text(example, renderer))
        except InputError:
            if data.on_bad_row == "fail":
                raise
            counts["template_refused"] += 1
        else:
            taken.append(example)
    return taken, texts


def _text(example: Example, renderer: Renderer) -> str:
    try:
        unicode_text((example.gold or "") + (example.generated or ""))
        return renderer.text(example.messages)
    except InputError as error:
        raise InputError(f"{_where(example)}: {error}") from None


def _answers(
    answers: Sequence[str | None], texts: Sequence[str], prompts: Sequence[list[int]], renderer: Renderer
) -> list[list[int] | None]:
    rows = [(text, prompt, a) for text, prompt, a in zip(texts, prompts, answers, strict=True) if a is not None]
    ids = iter(renderer.encode_answers([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))
    return [None if answer is None else next(ids) for answer in answers]


def _where(example: Example) -> str:
    return example.source or f"example {example.id}"
