"""SPIN's token-level habits as its authors released them, for parity: what is played, paired, cut and attended to.

They differ from this library's own: another prompt to play than to train on, answers that are decoded and encoded
again, two end tokens (also behind an answer that was cut), tokens that are scored but hidden from later ones. Contents
are not guarded: `</s>` inside a message or an answer is a control token here.
Source: the released code, uclaml/SPIN at a12ba80; vectors V12-V14.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparring.errors import InputError
from sparring.types import Example, Group, Message, Paired, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER = "<|assistant|>\n"
"""What is taken off a rendered answer; a template with another header keeps its own in front of every answer."""
EOS_TEXT = "</s>"
"""What is taken out of a played answer, whatever the tokenizer's EOS is."""


def play_text(question: str) -> str:
    """The prompt that every released generator plays, whatever the chat template. Vector V14."""
    return f"### Instruction: {question}\n\n### Response: "


def play_ids(tokenizer: PreTrainedTokenizerBase, question: str, *, bos: bool = False) -> list[int]:
    """Token ids of `play_text`; `bos` puts a BOS first, as the released vLLM path does and the HF path does not."""
    return _ids(tokenizer, play_text(question), special=bos)


def first_round(example: Example) -> tuple[tuple[Message, Message], str]:
    """System turn (empty where there is none) and first user turn of a conversation, and the answer to the latter.

    Raises InputError for an example without a user turn or without an answer.
    """
    turns = [*example.messages, *([] if example.gold is None else [Message("assistant", example.gold)])]
    at = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    answers = [turn.content for turn in turns[at:] if turn.role == "assistant"]
    if not answers:
        raise InputError(
            f"{example.source or example.id}: official SPIN needs a user turn and its answer; drop the row"
        )
    system = turns[0] if turns[0].role == "system" else Message("system", "")
    return (system, turns[at]), answers[0]


def prompt_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], template: str | None = None) -> str:
    """The prompt that is trained on; `template` is Jinja source, None for the tokenizer's own. Vector V14."""
    return _rendered(tokenizer, turns, template, generation=True)


def answer_text(tokenizer: PreTrainedTokenizerBase, answer: str, template: str | None = None) -> str:
    """The answer that is trained on: an assistant turn rendered alone, without `HEADER`. Vector V14."""
    return _rendered(tokenizer, [Message("assistant", answer)], template, generation=False).removeprefix(HEADER)


def sampled_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """A played answer as text: special tokens written out, `EOS_TEXT` taken out, leading whitespace stripped."""
    text: Any = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).replace(EOS_TEXT, "").lstrip()


def pair_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, real: str, generated: str, *, max_length: int,
    max_prompt_length: int,
) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
    """Token ids of prompt, real and generated answer, cut to fit.

    Each text is tokenized alone and without a BOS, and each answer gets an EOS behind whatever end it has. Vector V12.
    """
    end = [_eos(tokenizer)]
    answers = (_ids(tokenizer, text) + end for text in (real, generated))
    return truncate(_ids(tokenizer, prompt), *answers, max_length=max_length, max_prompt_length=max_prompt_length)


def truncate(
    prompt: list[int], real: list[int], generated: list[int], *, max_length: int, max_prompt_length: int
) -> tuple[list[int], list[int], list[int]]:
    """Cut a pair whose longer row has over `max_length` tokens: the prompt's start first, then both answers' ends.

    The prompt keeps its last `max_prompt_length` tokens; if that is not enough, each answer keeps its first
    `max_length - max_prompt_length` and a longer one loses its EOS. The longer answer decides for both. Raises
    InputError where no token is left for answers. Vector V13.
    """
    if not 0 < max_prompt_length < max_length:
        raise InputError(
            f"max_prompt_length: {max_prompt_length} leaves no room for answers or prompts in max_length {max_length}; "
            "set it between the two"
        )
    longer = max(len(real), len(generated))
    if len(prompt) + longer > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longer > max_length:
        room = max_length - max_prompt_length
        real, generated = real[:room], generated[:room]
    return prompt, real, generated


def attention(row: Sequence[int], eos: int) -> list[int]:
    """1 for the tokens of a row (prompt and answer) that later ones attend to, 0 for each EOS before the last token.

    All of an answer's tokens are scored, hidden ones included. The released code tells an appended EOS from others by
    its origin; where a cut answer ends in another EOS it has 0 there, which no scored log-prob depends on, because a
    row's last token predicts nothing. Vector V12.
    """
    return [int(token != eos) for token in row[:-1]] + [1] * len(row[-1:])


def pairs(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], samples: Sequence[Sample], t: int, *,
    max_length: int, max_prompt_length: int, template: str | None = None,
) -> Paired:  # fmt: skip
    """Pairs (gold, sample) of round `t` with targets (1, 0), one for each sample in order, each of weight 1.

    Nothing is dropped: samples that are empty, repeat one another or equal the gold answer count. Raises InputError for
    an example that the template refuses.
    """
    texts: dict[str, tuple[str, str]] = {}
    by_id: Mapping[str, Example] = {example.id: example for example in examples}
    groups: list[Group] = []
    for sample in samples:
        if sample.example_id not in texts:
            turns, gold = first_round(by_id[sample.example_id])
            texts[sample.example_id] = prompt_text(tokenizer, turns, template), answer_text(tokenizer, gold, template)
        prompt, real = texts[sample.example_id]
        # An answer that came with the data was never sampled from these tokens: its text is what there is
        said = sample.text.lstrip() if sample.player == "unknown" else sampled_text(tokenizer, sample.tokens)
        generated = answer_text(tokenizer, said, template)
        limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        ids, one, two = pair_ids(tokenizer, prompt, real, generated, **limits)
        completions = tuple(one), tuple(two)
        groups.append(Group(sample.example_id, tuple(ids), completions, (1.0, 0.0), 1.0, ("gold", sample.id), t))
    return Paired(groups, {})


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], template: str | None, *, generation: bool
) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    options: dict[str, Any] = {"chat_template": template, "tokenize": False, "add_generation_prompt": generation}
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # a template can raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the chat template fails on {' + '.join(turn.role for turn in turns)}, which official SPIN renders: "
            f"{reason}; set model.chat_template, or use the method spin"
        ) from None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(f"{tokenizer.name_or_path}: no EOS token, which official SPIN appends; set eos_token")
    return int(eos)
