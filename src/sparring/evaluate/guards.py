"""What makes an evaluation's figures worthless: items that were trained on, answers that are empty or repeat themselves."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparring.types import Example

WORDS = 13
"""Length of the word n-grams by which overlap is told (Brown et al. 2020, arXiv 2005.14165, appendix C)."""
BOILERPLATE = 10
"""An n-gram in more training prompts than this is a form that many share, and no sign of overlap (same source)."""
GRAM = 4
"""Tokens in the n-grams by which repetition is told."""
DISTINCT = 0.2
"""An answer repeats itself where a smaller share of its n-grams is distinct."""
FLAGGED = 0.1
"""A player is flagged where so large a share of its answers is empty, repeats itself or cannot be judged."""
NAMED = 20
"""Ids that are listed; all are counted."""
_FITTING = {
    "prompts_dropped": "were left out: their prompts are too long",
    "template_refused": "were left out: the chat template refuses them",
    "prompts_cut": "lost the beginning of their prompts, which are too long",
    "golds_cut": "have a gold answer that is too long for log p(gold)",
}
"""What `prompts.Rendering.counts` means for a task."""


@dataclass(frozen=True)
class Overlap:
    """Which evaluation items share words in a row with what was trained on."""

    words: int
    checked: frozenset[str]
    """Ids of the items that are long enough to tell."""
    found: frozenset[str]
    """Ids of those that overlap."""

    def among(self, ids: Iterable[str]) -> dict[str, Any]:
        """For a summary, of these items: `words`, `checked` and `overlap` (counts), and up to `NAMED` of the `ids`."""
        given = list(ids)
        found = [name for name in given if name in self.found]
        checked = sum(name in self.checked for name in given)
        return {"words": self.words, "checked": checked, "overlap": len(found), "ids": found[:NAMED]}


def overlap(train: Iterable[Example], items: Iterable[Example], *, words: int = WORDS) -> Overlap:
    """Evaluation items whose prompt or answer shares `words` words in a row with a training prompt.

    Words are runs of letters and digits, in lower case; system turns, which many rows share, are left out, and so are
    n-grams that stand in more than `BOILERPLATE` training prompts. An item with fewer words has no n-gram: it cannot be
    told.
    """
    grams = {item.id: _grams([*_turns(item), item.gold or ""], words) for item in items}
    wanted = set().union(*grams.values())
    seen: Counter[tuple[str, ...]] = Counter()
    for example in train if wanted else ():
        seen.update(_grams(_turns(example), words) & wanted)
    told = {gram for gram, count in seen.items() if count <= BOILERPLATE}
    checked = frozenset(name for name, own in grams.items() if own)
    return Overlap(words, checked, frozenset(name for name in checked if grams[name] & told))


def _turns(example: Example) -> list[str]:
    return [message.content for message in example.messages if message.role != "system"]


def _grams(texts: Iterable[str], words: int) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for text in texts:
        own = re.findall(r"\w+", text.lower())
        found.update(zip(*(own[i:] for i in range(words)), strict=False))
    return found


def repeats(tokens: Sequence[int]) -> bool:
    """Whether fewer than `DISTINCT` of an answer's token n-grams are distinct; never of one with eight tokens or fewer."""
    count = len(tokens) - GRAM + 1
    distinct = len(set(zip(*(tokens[i:] for i in range(GRAM)), strict=False)))
    return count > 0 and distinct / count < DISTINCT


def flags(summary: dict[str, Any]) -> list[str]:
    """What is wrong with a player's answers or with its evaluation, in words; nothing where all is well."""
    told = []
    for key, what in (("empty", "are empty"), ("repeated", "repeat themselves")):
        if summary.get(key, 0.0) >= FLAGGED:
            told.append(f"{100 * summary[key]:.0f} % of its answers {what}")
    if (unjudged := summary.get("unjudged") or 0) and unjudged >= FLAGGED * summary.get("answers", math.inf):
        told.append(
            f"{unjudged} of its {summary['answers']} answers could not be judged: the verifier does not suit these data"
        )
    if summary.get("trained"):
        kept = summary.get("trained_kept")
        told.append(
            f"{summary['trained']} items were {'kept, but' if kept else 'left out:'} their prompts are trained on"
        )
    for key, what in _FITTING.items():
        if count := summary.get("fitting", {}).get(key):
            told.append(f"{count} of {summary['fitting']['prompts']} items {what}")
    if (found := summary.get("overlap")) and found["overlap"]:
        told.append(
            f"{found['overlap']} of {summary['n']} items share {found['words']} words in a row with a training prompt"
        )
    return told
