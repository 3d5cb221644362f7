"""A player behind any OpenAI-compatible server: answers are its completions.

What a server can do differs: vLLM takes and gives token ids, others give text alone. The best form of request that it
accepts is found by asking for one token. An answer that came as text is tokenised by us, which may give other tokens
than were sampled; it is marked so (`Answer.how`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sparring.errors import InputError
from sparring.play.hf import Answer
from sparring.progress import OnRows, silent
from sparring.remote import RefusedError, Remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparring.config import PlayConfig
    from sparring.prompts import Renderer

Prompts = Sequence[Sequence[int]]
_COMPLETION = "a completion"
_OTHER_FORM = (400, 422)
"""What a server answers that does not take the form of a request."""
_BROKEN_OFF = ("abort", "error")
"""Reasons to finish that may pass."""
_MOST_STOPS = 4
"""Texts at which OpenAI's protocol lets an answer stop."""
_SHOWN = 100
"""Characters of a prompt in a message."""


@dataclass(frozen=True)
class Form:
    """How a server is asked."""

    ids: bool = True
    """Prompts are token ids, else text."""
    tokens: bool = False
    """With vLLM's fields: answers are token ids with log-probs, and stop at token ids."""
    unfiltered: bool = True
    """With fields that OpenAI's protocol has not, which switch off what a server would filter by itself."""


FORMS = (
    Form(tokens=True),
    *(Form(ids, unfiltered=unfiltered) for ids in (True, False) for unfiltered in (True, False)),
)
"""From the best on."""


@dataclass(frozen=True)
class Choice:
    """What a server says of one answer."""

    text: str
    finish: str
    tokens: tuple[int, ...] | None
    """None: it gives text only."""
    logps: tuple[float, ...]
    """Per token of its own; empty where it gives none."""


class Completions:
    """The answers of a server's model `model`, for prompts and settings as `play.hf.sample` takes them."""

    def __init__(self, remote: Remote, model: str, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> None:
        self._remote, self._model, self._renderer = remote, model, renderer
        self._tokenizer: Any = tokenizer
        self._form: Form | None = None

    def answers(
        self, prompts: Prompts, keys: Sequence[int], settings: PlayConfig, on_rows: OnRows = silent
    ) -> list[Answer]:
        """One answer per prompt, in the order given; a key seeds the server's randomness for its answer.

        Raises what `Remote.post` raises, and InputError where the server's context is too short or it stopped an answer.
        """
        if not prompts:
            return []
        if self._form is None:
            self._form = self._agreed(prompts[0], settings)
        form = self._form
        bodies = (self._body(p, key, settings, form) for p, key in zip(prompts, keys, strict=True))
        found: list[Answer | None] = [None] * len(prompts)
        for index, choice in self._remote.post("completions", bodies, read, _COMPLETION):
            answer = self._answer(self._fits(choice, prompts[index], settings), prompts[index], settings)
            found[index] = answer
            on_rows(1, len(answer.tokens))
        return [answer for answer in found if answer is not None]

    def _agreed(self, prompt: Sequence[int], settings: PlayConfig) -> Form:
        """The best form of request that the server takes."""
        short = settings.model_copy(update={"max_new_tokens": 1})
        refused: RefusedError | None = None
        for form in FORMS:
            try:
                bodies = [self._body(prompt, 0, short, form)]
                ((_, choice),) = self._remote.post("completions", bodies, read, _COMPLETION)
            except RefusedError as error:
                if error.status not in _OTHER_FORM:
                    raise
                refused = refused or error
                continue
            # A server may take vLLM's fields and not know them
            if not form.tokens or self._fits(choice, prompt, short).tokens is not None:
                return form
        assert refused is not None
        raise refused

    def _fits(self, choice: Choice | None, prompt: Sequence[int], settings: PlayConfig) -> Choice:
        """The choice, if the server's context was long enough for it (some say so, others cut it) and it let it end."""
        longest = settings.max_new_tokens
        if choice is None or (choice.finish == "length" and choice.tokens is not None and len(choice.tokens) < longest):
            raise InputError(
                f"endpoint {self._remote.base_url}: a prompt of {len(prompt)} tokens and an answer of {longest} do not "
                f"fit into its context; serve {self._model} with a longer one, or lower play.max_new_tokens"
            )
        if choice.finish not in ("stop", "length"):
            asked = " ".join(self._decode(prompt).split())[-_SHOWN:]
            raise InputError(
                f"endpoint {self._remote.base_url}: gives no answer to the prompt that ends in {asked!r} (finish_reason "
                f"{choice.finish!r}); take its row out of the data, or play by another engine"
            )
        return choice

    def _body(self, prompt: Sequence[int], key: int, settings: PlayConfig, form: Form) -> dict[str, Any]:
        body = {
            "model": self._model,
            "prompt": list(prompt) if form.ids else self._spelled(prompt)[0],
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": key % 2**31,
        }
        if form.unfiltered:
            # A server may have defaults of its own for these, or the model's generation_config.json has. That all tokens
            # may be drawn is -1 to vLLM, SGLang and llama.cpp; SGLang refuses 0
            body |= {"top_k": settings.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
            body |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        elif settings.top_k:
            body["top_k"] = settings.top_k
        if form.tokens:
            # logprobs: how many others than the sampled token's
            return body | {"logprobs": 0, "stop_token_ids": list(self._renderer.stop_ids), "return_token_ids": True}
        return body | ({"stop": self._stops} if self._stops else {})

    @cached_property
    def _stops(self) -> list[str]:
        """The texts of the tokens that end an answer."""
        texts = [self._tokenizer.decode([i], skip_special_tokens=False) for i in self._renderer.stop_ids]
        return [text for text in texts if text.strip()][:_MOST_STOPS]

    def _spelled(self, prompt: Sequence[int]) -> tuple[str, bool]:
        """The text that a tokenizer with its default special tokens reads as a prompt, and whether ours reads it so."""
        texts = [self._decode(prompt), self._decode(prompt[1:])]
        for text in texts:
            if self._tokenizer(text, verbose=False)["input_ids"] == list(prompt):
                return text, True
        begins = self._tokenizer("")["input_ids"][:1] == list(prompt[:1])
        return texts[begins], False

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _answer(self, choice: Choice, prompt: Sequence[int], settings: PlayConfig) -> Answer:
        stops, most = self._renderer.stop_ids, settings.max_new_tokens
        tokens, logps, how = choice.tokens, choice.logps, ""
        if tokens is None:
            text, exact = self._spelled(prompt)
            tokens, logps = tuple(self._renderer.encode_answers([text], [prompt], [choice.text])[0]), ()
            assert self._form is not None
            how = "text" if exact or self._form.ids else "inexact"
        if len(logps) != len(tokens):
            logps = ()
        end = next((i for i, token in enumerate(tokens) if token in stops), None)
        if end is not None:
            tokens = tokens[: end + 1]
        elif choice.finish == "stop":
            tokens, logps = (*tokens, self._renderer.end_id), ()
        tokens = tokens[:most]
        logps = logps[: len(tokens)]
        stopped = bool(tokens) and tokens[-1] in stops
        return Answer(tokens, logps, "stop" if stopped else "length", how)


def read(answer: Any) -> Choice:
    """The one choice of a completion. Raises ValueError, LookupError or TypeError for anything else."""
    (choice,) = answer["choices"]
    text, finish, tokens = choice["text"], choice["finish_reason"], choice.get("token_ids")
    if not isinstance(text, str) or not isinstance(finish, str) or finish in _BROKEN_OFF:
        raise TypeError
    if tokens is not None and not all(type(token) is int and token >= 0 for token in tokens):
        raise TypeError
    told = choice.get("logprobs")
    logps = told.get("token_logprobs") if isinstance(told, dict) else None
    if not isinstance(logps, list) or not all(type(p) in (int, float) and math.isfinite(p) for p in logps):
        logps = []
    return Choice(text, finish, None if tokens is None else tuple(tokens), tuple(map(float, logps)))


def listed(remote: Remote) -> list[str] | None:
    """The names of a server's models; None where it does not list them."""

    def names(answer: Any) -> list[str]:
        return [str(model["id"]) for model in answer["data"]]

    try:
        return remote.get("models", names, "a list of models")
    except RefusedError as error:
        if error.status in (404, 405, 501):
            return None
        raise
