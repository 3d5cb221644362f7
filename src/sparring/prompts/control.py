"""Control tokens (`</s>`, `<|im_end|>`, `<think>`) and text that only looks like them; `prompts.py` is its one user.

While a template is rendered, look-alikes in the contents are broken up by marks, so every control token then found is
the template's own and gets a secret name. The result is encoded by a *blind* copy of the tokenizer, which knows the
control tokens by those names alone: one pass, so the text around them is tokenized as it always is. Marks and names
are Unicode noncharacters around a random key: no content holds one by chance or design, and no template filter (trim,
upper, tojson) changes them.
"""

from __future__ import annotations

import json
import re
import secrets
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sparring.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TAGS = (
    "a abbr b blockquote body br button caption center code dd del details div dl dt em figure font footer form h[1-6] head "
    "header hr html i iframe img input ins kbd label li link mark meta nav ol option p pre q samp script section select "
    "small span strike strong style sub summary sup table tbody td textarea tfoot th thead title tr tt u ul var"
)
_SPELLING = re.compile(rf"\s+|.|</?(?:{'|'.join(_TAGS.split())})>", re.DOTALL)
"""Added tokens that are no control tokens unless the tokenizer says so. `<s>` and `</s>` are always: begin and end."""


def spelling(token: str, template: str) -> bool:
    """Whether an added token is one of ordinary text."""
    return _SPELLING.fullmatch(token) is not None and not (len(token) > 1 and token in template and not token.isspace())


def unicode_text(text: str) -> str:
    """The text itself. Raises InputError where it holds a lone surrogate, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start} is half of a surrogate pair; mend the row's \\u escapes") from None
    return text


class ControlTokens:
    """The control tokens of one tokenizer: all added tokens but whitespace, single ordinary characters and HTML tags.

    Those exceptions (Gemma's `\\n\\n` and `<b>`, Phi's runs of spaces) are spelling: ordinary text is meant to use them, and
    a player answers with them, so that gold answers without would be told apart by their tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        """`template`: a chat template's source; the tags that it writes are control tokens."""
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        added, named = tokenizer.added_tokens_decoder, set(tokenizer.all_special_tokens)
        self.ids = {
            token.content: id
            for id, token in added.items()
            if token.content
            and (token.special or token.content in named or not spelling(token.content, template or ""))
        }
        # Longest first, because tokenizers take the longest of the added tokens that start at one place
        either = "|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or "(?!)"
        self._pattern = re.compile(either)
        self._look_alike = re.compile(either, re.IGNORECASE)  # a template may change the case of what it is given
        key = "".join(secrets.choice([chr(c) for c in range(0xFDDC, 0xFDF0)]) for _ in range(12))
        digits = {ord(str(d)): 0xFDD0 + d for d in range(10)}
        number = {token: str(i).translate(digits) for i, token in enumerate(self.ids)}
        self.mark = f"{key}\ufdda\ufdda"
        self._letter = {token: f"{key}\ufdda{n}\ufdda" for token, n in number.items() if len(token) == 1}
        self._text = {mark: token for token, mark in self._letter.items()} | {self.mark: ""}
        self._name = {token: f"{key}\ufddb{n}\ufddb" for token, n in number.items()}
        self._token = {name: token for token, name in self._name.items()}
        self._marks = re.compile(f"{key}\ufdda[\ufdd0-\ufdd9]*\ufdda")
        self._names = re.compile(f"({key}\ufddb[\ufdd0-\ufdd9]+\ufddb)")
        self._heads = {token[:n] for token in self.ids for n in range(1, len(token))}
        self._tails = {token[n:] for token in self.ids for n in range(1, len(token))}
        self._longest = max(map(len, self.ids), default=0)
        normalized = any(added[id].normalized for id in self.ids.values())
        self._normalizer = self._backend.normalizer if self._backend is not None and normalized else None

    def found(self, text: str) -> list[str]:
        """The control tokens that the tokenizer would see in a text."""
        return self._pattern.findall(self._normalizer.normalize_str(text) if self._normalizer else text)

    def at_start(self, text: str) -> int | None:
        """Id of the control token that a text starts with."""
        match = self._pattern.match(text)
        return self.ids[match[0]] if match else None

    def risky(self, text: str) -> bool:
        """Whether a text holds a look-alike, or could make a token together with what the template puts around it."""
        core = text.strip()
        touches = any(core[-n:] in self._heads or core[:n] in self._tails for n in range(1, self._longest))
        return touches or self._look_alike.search(text) is not None or bool(self._normalizer and self.found(text))

    def hide(self, text: str) -> str:
        """Break look-alikes up and mark both ends, inside the outer whitespace that a template may trim."""
        core = text.strip()
        if not core:
            return text
        # A mark before and after every character: no part of a look-alike can pair with another or with its neighbours
        broken = self._look_alike.sub(
            lambda m: self._letter.get(m[0]) or f"{self.mark}{self.mark.join(m[0])}{self.mark}", core
        )
        start = len(text) - len(text.lstrip())
        return f"{text[:start]}{self.mark}{broken}{self.mark}{text[len(text.rstrip()) :]}"

    def name(self, text: str) -> str:
        """Give control tokens their names and marks their text back; the mark in front says: encode this blindly."""
        named = self._pattern.sub(lambda m: self._name[m[0]], text)
        return self.mark + self._marks.sub(lambda m: self._text[m[0]], named)

    def named(self, text: str) -> bool:
        """Whether a text came from `name`."""
        return text.startswith(self.mark)

    def encode(self, text: str) -> list[int]:
        """Token ids of a named text: names give control ids, everything else is spelled."""
        text = text.removeprefix(self.mark)
        if self._backend is not None:
            return list(self._blind.encode(text, add_special_tokens=False).ids)
        ids: list[int] = []
        for piece in filter(None, self._names.split(text)):
            token = self._token.get(piece)
            if token is None:
                ids += self._tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
            else:
                ids.append(self.ids[token])
        return ids

    @cached_property
    def _blind(self) -> Any:
        """The blind copy. Added tokens are renamed where they stand, so it gives out the same ids."""
        from tokenizers import Tokenizer

        spec: dict[str, Any] = json.loads(self._backend.to_str())
        model, name = spec["model"], self._name
        # Unigram and WordLevel models match any entry of their vocabulary, control tokens included: rename it there too
        if isinstance(model["vocab"], dict):
            model["vocab"] = {name.get(entry, entry): id for entry, id in model["vocab"].items()}
        else:
            model["vocab"] = [[name.get(entry, entry), score] for entry, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [[a, b] for a, b in model["merges"] if not {a, b, a + b} & name.keys()]
        if model.get("unk_token") in name:
            model["unk_token"] = name[model["unk_token"]]
        for token in spec["added_tokens"]:
            if token["content"] in name:
                # A name must always be found: without these flags a neighbouring letter or a normalizer could hide it
                token |= {"content": name[token["content"]], "normalized": False, "single_word": False}
        return Tokenizer.from_str(json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None}))
