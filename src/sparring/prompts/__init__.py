"""The one place that renders a chat template, encodes text and decodes tokens; playing and training both use it.

Prompts equal `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`. A tokenizer without a chat template,
or `chat_template="plain"`, gets this library's plain format, after a BOS if the tokenizer adds one by default:

    {system}\\n\\n### Instruction:\\n{user}\\n\\n### Response:\\n{assistant}\\n\\n### Instruction:\\n{user}\\n\\n### Response:\\n

What people or models wrote is text, never a control token: `</s>` or `<think>` inside a message or an answer is encoded
as the characters it consists of, while the template's own tokens are parsed (`control.py` says how).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any, cast

from sparring.errors import InputError
from sparring.prompts.control import ControlTokens, unicode_text
from sparring.prompts.fitting import Rendering, render
from sparring.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Renderer", "Rendering", "load_tokenizer", "render"]

# SentencePiece writes a space before the first word it encodes and drops one when it decodes. An answer is not the start
# of a text: it is encoded and decoded behind one of these, where the tokenizer can do that cleanly.
_ANCHORS = ("\n", "a")
_TRIMS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, or from the Hub when `path` is a name that cannot be a local path.

    Raises InputError for a folder that does not exist, is a file, holds no tokenizer or one that does not load.
    """
    if not path:
        raise InputError("model.path: is empty; give the folder of a model, or a Hub id like owner/name")
    folder = Path(path).expanduser()
    local = folder.is_dir()
    if not local:
        if folder.exists():
            raise InputError(f"{path}: is a file; give the folder of a model in Hugging Face layout")
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) or ("/" in path and folder.parent.exists()):
            raise InputError(f"{path}: no such folder; give the folder of a model, or a Hub id like owner/name")
    elif not any(folder.glob("*token*")) and not any(folder.glob("vocab.*")):
        raise InputError(f"{path}: no tokenizer in this folder; write one there with tokenizer.save_pretrained")
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local}
    try:
        return cast("PreTrainedTokenizerBase", auto.from_pretrained(str(folder) if local else path, **options))
    except Exception as error:  # a broken file surfaces as almost any type, from KeyError to Rust's bare Exception
        raise InputError(f"{path}: the tokenizer does not load: {_one_line(error)}") from None


class Renderer:
    """Conversations to token ids and back, for one tokenizer and template.

    `chat_template`: None for the tokenizer's own, `plain`, or a Jinja file. `model_stop_ids`: the model's
    generation_config.eos_token_id. `date`: what a template that asks for the time is told, whenever it asks; None for
    the present. Raises InputError for a missing or malformed template, and where no token can end
    an answer.
    """

    end_id: int
    """The token that ends an answer: what the template puts after an assistant turn, else EOS."""
    stop_ids: tuple[int, ...]
    """Each of these ends a sampled answer; `end_id` is the first."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        model_stop_ids: Sequence[int] = (),
        date: datetime | None = None,
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._source = chat_template or tokenizer.name_or_path or "the tokenizer"
        self._template = _read_template(tokenizer, chat_template)
        self._control = ControlTokens(tokenizer, self._template)
        self._date = _date_parts(date or datetime.now())
        self._bos = [] if self._template is not None else _default_prefix(tokenizer)
        self._trim, self._lead, end = self._answer_facts()
        ends = [i for i in (end, self._tokenizer.eos_token_id) if i is not None]
        if not ends:
            raise InputError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: no EOS token, and no chat template that ends an answer with one; "
                "set eos_token in tokenizer_config.json"
            )
        self.end_id = ends[0]
        self.stop_ids = tuple(dict.fromkeys((*ends, *model_stop_ids)))
        anchor, probe = self._encode([_ANCHORS[0], _ANCHORS[0] + "b"])
        shown = self._decode(anchor)
        clean = probe[: len(anchor)] == anchor and self._decode(probe) == shown + "b"
        self._anchor, self._anchor_text = (anchor, shown) if clean else ([], "")

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt, generation prompt included. Raises InputError when the template fails."""
        return self.encode_prompts([self.text(messages)])[0]

    def completion(self, messages: Sequence[Message], answer: str) -> list[int]:
        """Token ids of an answer as it follows the prompt, without the end token."""
        text = self.text(messages)
        return self.encode_answers([text], self.encode_prompts([text]), [answer])[0]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, without special tokens and end tokens."""
        kept = [i for i in tokens if i not in self.stop_ids]
        return self._decode([*self._anchor, *kept])[len(self._anchor_text) :].removeprefix(self._lead)

    def text(self, messages: Sequence[Message]) -> str:
        """What `encode_prompts` reads: the prompt's text, its control tokens named where a content holds look-alikes."""
        control = self._control
        text = self._render(messages)
        if not any(control.risky(message.content) for message in messages):
            return text
        hidden = self._render([Message(message.role, control.hide(message.content)) for message in messages])
        return text if control.found(hidden) == control.found(text) else control.name(hidden)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts made by `text`."""
        return [[*self._bos, *ids] for ids in self._encode(texts)]

    def encode_answers(
        self, texts: Sequence[str], prompts: Sequence[Sequence[int]], answers: Sequence[str]
    ) -> list[list[int]]:
        """Token ids of answers, without end tokens, behind their prompts as `text` and `encode_prompts` gave them."""
        answers = [self._lead + self._trim(unicode_text(answer)) for answer in answers]
        together = self._encode([self._join(text, answer) for text, answer in zip(texts, answers, strict=True)])
        rests = []
        for prompt, answer, ids in zip(prompts, answers, together, strict=True):
            body = list(prompt[len(self._bos) :])
            # A tokenizer may merge the prompt's end with the answer's start, but a player answers behind the whole prompt
            rests.append(ids[len(body) :] if ids[: len(body)] == body else self._alone(answer))
        return rests

    def _alone(self, answer: str) -> list[int]:
        for anchor in _ANCHORS:
            start, ids = self._encode([anchor, self._join(anchor, answer)])
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return self._encode([self._join("", answer)])[0]

    def _join(self, text: str, answer: str) -> str:
        control = self._control
        if control.named(text):
            return text + answer
        if not control.risky(answer) or control.found(text + answer) == control.found(text):
            return text + answer
        return control.name(text) + answer

    def _render(self, messages: Sequence[Message], generation: bool = True) -> str:
        turns = [{"role": message.role, "content": unicode_text(message.content)} for message in messages]
        if self._template is None:
            return _plain(turns)
        options: dict[str, Any] = {"chat_template": self._template, "add_generation_prompt": generation}
        if "strftime_now" in self._template:
            # The clock would give training another prompt than the one that was answered
            options |= {"chat_template": _DATED + self._template, "date_parts": self._date}
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except Exception as error:  # a template can raise anything: its own message, an undefined name, a TypeError
            raise InputError(
                f"the chat template of {self._source} fails: {_one_line(error)}; mend the row, or set model.chat_template"
            ) from error

    def _answer_facts(self) -> tuple[Callable[[str], str], str, int | None]:
        """How the template trims an answer, the whitespace it puts before it, and the end token after it, if any."""
        plain = _TRIMS[0], "", None
        user, word = Message("user", "question"), f"answer{self._control.mark}"
        wide = f"\n {word} \n"
        if self._template is None:
            return plain
        from jinja2 import TemplateSyntaxError

        try:
            prompt = self._render([user])
            one, other = (self._render([user, Message("assistant", answer)], False) for answer in (word, wide))
        except InputError as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise
            return plain  # it wants other turns than these; `render` names the rows that a template refuses
        before, seen, after = one.partition(word)
        if not seen:
            return plain
        trim = next((trim for trim in _TRIMS if before + trim(wide) + after == other), str)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return trim, lead if lead.isspace() else "", self._control.at_start(after.lstrip())

    @cached_property
    def template(self) -> str:
        """The Jinja template that gives these prompts in any program, with the tokenizer's special tokens parsed."""
        if self._template is not None:
            return self._template
        start = "".join(self._tokenizer.convert_ids_to_tokens(self._bos))
        probe = Message("user", "a")
        # Behind a BOS that is parsed, some SentencePiece tokenizers need a space where a text's start has none
        candidates = [f"{{{{ {json.dumps(start + gap)} }}}}{_PLAIN}" if start else _PLAIN for gap in ("", " ")]
        for candidate in candidates:
            text = self._tokenizer.apply_chat_template(
                [{"role": probe.role, "content": probe.content}],
                chat_template=candidate, tokenize=False, add_generation_prompt=True,
            )  # fmt: skip
            if self._encode([text]) == [self.prompt([probe])]:
                return candidate
        return candidates[0]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        ordinary = [text for text in texts if not self._control.named(text)]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids = iter(self._tokenizer(ordinary, **options)["input_ids"] if ordinary else ())
        return [self._control.encode(text) if self._control.named(text) else next(ids) for text in texts]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


# Templates take no functions from outside. The line's end is no part of the template (trim_blocks).
_DATED = (
    "{% macro strftime_now(format) %}{% set made = namespace(text=format) %}{% for code, part in date_parts.items() %}"
    "{% set made.text = made.text | replace(code, part) %}{% endfor %}{{ made.text }}{% endmacro %}\n"
)


def _date_parts(date: datetime) -> dict[str, str]:
    """What each code of strftime gives, `%-d` (no leading zero) and its like included."""
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in ascii_letters]
    return {code: date.strftime(code) for code in codes} | {"%%": "%"}


_PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'system' or m['role'] == 'assistant' %}{{ m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n### Response:\\n' }}"
    "{% else %}{{ raise_exception('only system, user and assistant have a place in the plain format') }}"
    "{% endif %}{% endfor %}"
)
"""`_plain` for other programs."""


def _plain(turns: Sequence[Mapping[str, str]]) -> str:
    formats = {"system": "{}\n\n", "user": "### Instruction:\n{}\n\n### Response:\n", "assistant": "{}\n\n"}
    for turn in turns:
        if turn["role"] not in formats:
            raise InputError(
                f"role `{turn['role']}` has no place in the plain format (system, user, assistant); set model.chat_template to a Jinja file"
            )
    return "".join(formats[turn["role"]].format(turn["content"]) for turn in turns)


def _read_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    """The Jinja source to render with, None for the plain format."""
    if chat_template == "plain" or (chat_template is None and not tokenizer.chat_template):
        return None
    try:
        return (
            Path(chat_template).expanduser().read_text(encoding="utf-8")
            if chat_template
            else tokenizer.get_chat_template()
        )
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else _one_line(error)
        where = chat_template or tokenizer.name_or_path
        raise InputError(f"{where}: cannot read the chat template: {reason}; give a Jinja file or `plain`") from None


def _default_prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text by default: BOS or nothing."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return list(full[:start])


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
