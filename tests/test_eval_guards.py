"""Guards: overlap with training prompts, answers that repeat themselves or are empty."""

from __future__ import annotations

import pytest

from sparring.evaluate.guards import FLAGGED, flags, overlap, repeats
from sparring.types import Example, Message


def example(name: str, prompt: str, gold: str | None = None, system: str | None = None) -> Example:
    turns = [Message("user", prompt)]
    return Example(name, tuple([Message("system", system)] * bool(system) + turns), gold)


WORDS = [f"w{i}" for i in range(40)]
TEXT = " ".join(WORDS[:13])


def test_thirteen_words_in_a_row_are_an_overlap() -> None:
    train = [example("t", f"start {TEXT} end")]
    items = [
        example("same", f"other {TEXT.upper().replace(' ', ', ')}!"),  # case and punctuation do not matter
        example("answer", "a short question", gold=f"so {TEXT}"),
        example("twelve", " ".join([*WORDS[:12], "x", *WORDS[12:24]])),
        example("short", "w0 w1 w2"),
    ]
    found = overlap(train, items)
    assert (found.found, found.checked) == ({"same", "answer"}, {"same", "answer", "twelve"})
    assert found.among(["same", "short", "twelve"]) == {"words": 13, "checked": 2, "overlap": 1, "ids": ["same"]}
    assert overlap(train, items, words=12).found == {"same", "answer", "twelve"}
    assert overlap([], items).found == overlap(train, []).found == set()


def test_forms_that_many_prompts_share_are_no_overlap() -> None:
    item = [example("i", f"{TEXT} what is 3 + 4?")]
    ten = [example(f"t{i}", f"{TEXT} question {i} a b c d e f") for i in range(10)]
    assert overlap(ten, item).found == {"i"}
    assert overlap([*ten, example("t", TEXT)], item).found == set()
    # Within one prompt it counts once; system turns do not count
    assert overlap([example("t", f"{TEXT} " * 20)], item).found == {"i"}
    assert overlap([example("t", "hello", system=TEXT)], [example("i", "hi", system=TEXT)]).checked == set()


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([7] * 9, True),  # one 4-gram of six: 1/6
        ([7] * 8, False),  # one of five: a fifth
        ([1, 2] * 12, True),  # two of 21
        ([1, 2, 3, 4, 5] * 5, False),  # five of 22 are more than a fifth
        ([1, 2, 3, 4, 5] * 6, True),  # five of 27
        (list(range(50)), False),
        ([], False),
    ],
)
def test_repeats(tokens: list[int], told: bool) -> None:
    assert repeats(tokens) is told


def test_flags() -> None:
    assert FLAGGED == 0.1
    fine = {"n": 20, "empty": 0.05, "repeated": 0.05, "trained": 0, "overlap": {"words": 13, "overlap": 0}}
    assert flags(fine) == flags({"n": 0}) == []
    assert flags(fine | {"answers": 40, "unjudged": 3}) == flags(fine | {"answers": 0, "unjudged": None}) == []
    assert flags(fine | {"unjudged": 40}) == []  # written by a version that did not count answers
    assert flags(fine | {"answers": 40, "unjudged": 4}) == [
        "4 of its 40 answers could not be judged: the verifier does not suit these data"
    ]
    assert flags(fine | {"trained": 3, "trained_kept": True}) == ["3 items were kept, but their prompts are trained on"]
    bad = {"n": 20, "empty": 0.1, "repeated": 0.5, "trained": 3, "overlap": {"words": 13, "overlap": 2}}
    assert flags(bad) == [
        "10 % of its answers are empty",
        "50 % of its answers repeat themselves",
        "3 items were left out: their prompts are trained on",
        "2 of 20 items share 13 words in a row with a training prompt",
    ]
