"""Rows of every format to exact examples; the properties of the seeded split; real data."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_rows import SHARED, SYSTEM, TURNS, USER, WRONG, A, G, Q, jsonl, qa, read
from sparring import data
from sparring.config import DataConfig
from sparring.errors import InputError
from sparring.types import Example, Message

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not there")


# fmt: off
LONG = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
    {"from": "human", "value": Q},
    {"from": "gpt", "value": A},
    {"from": "human", "value": "Thanks"},
]
LONG_PROMPT = (SYSTEM, Message("user", "Hi"), Message("assistant", "Hello"), *USER)

FORMATS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[Message, ...], str | None, dict[str, Any]]] = [
    # name, row, settings, prompt, generated, meta
    ("messages", {"messages": TURNS}, {}, USER, None, {}),
    ("messages-system", {"messages": TURNS, "system": "Be brief."}, {}, (SYSTEM, *USER), None, {}),
    ("messages-same-system", {"messages": [{"role": "system", "content": "Be brief."}, *TURNS], "system": "Be brief."}, {}, (SYSTEM, *USER), None, {}),
    ("messages-ultrachat", {"prompt": Q, "prompt_id": "x", "messages": TURNS}, {}, USER, None, {"prompt": Q, "prompt_id": "x"}),
    ("messages-generated", {"messages": TURNS, "generated": G}, {}, USER, G, {}),
    ("messages-extra-keys", {"messages": [{**t, "weight": 1} for t in TURNS]}, {}, USER, None, {}),
    ("prompt-completion", {"prompt": Q, "completion": A, "level": 3}, {}, USER, None, {"level": 3}),
    ("prompt-response", {"prompt": Q, "response": A, "system": "Be brief."}, {}, (SYSTEM, *USER), None, {}),
    ("prompt-blank-system", {"prompt": Q, "completion": A, "system": " "}, {}, USER, None, {}),
    ("prompt-lists", {"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, USER, None, {}),
    ("prompt-longer-completion", {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Hello"}, *TURNS]}, {}, (Message("user", "Hi"), Message("assistant", "Hello"), *USER), None, {}),
    ("prompt-generated", {"prompt": Q, "completion": A, "generated": G}, {}, USER, G, {}),
    ("prompt-no-generated", {"prompt": Q, "completion": A, "generated": " "}, {}, USER, None, {}),
    ("gold-only", {"prompt": Q, "completion": A, "generated": G}, {"gold_only": True}, USER, None, {}),
    ("gold-only-bad-generated", {"prompt": Q, "completion": A, "generated": 7}, {"gold_only": True}, USER, None, {}),
    ("question-answer", {"question": Q, "answer": A, "id": "t1"}, {}, USER, None, {"id": "t1"}),
    ("alpaca", {"instruction": Q, "output": A, "text": "t"}, {}, USER, None, {"text": "t"}),
    ("alpaca-input", {"instruction": "Add.", "input": "2, 3", "output": A}, {}, (Message("user", "Add.\n\n2, 3"),), None, {}),
    ("alpaca-empty-input", {"instruction": Q, "input": "", "output": A}, {}, USER, None, {}),
    ("alpaca-input-alone", {"instruction": "", "input": Q, "output": A}, {}, USER, None, {}),
    ("gpteacher", {"instruction": Q, "input": "", "response": A}, {}, USER, None, {}),
    ("sharegpt", {"conversations": LONG, "id": 9}, {}, LONG_PROMPT, None, {"id": 9}),
    ("sharegpt-user-names", {"conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}]}, {}, USER, None, {}),
    ("sharegpt-role-keys", {"conversations": TURNS}, {}, USER, None, {}),
    ("spin", {"real": TURNS, "generated": WRONG}, {}, USER, G, {}),
    ("spin-system", {"real": TURNS, "generated": WRONG, "system": "Be brief."}, {}, (SYSTEM, *USER), G, {}),
    ("spin-real-alone", {"real": TURNS}, {}, USER, None, {}),
    ("spin-empty", {"real": TURNS, "generated": [TURNS[0], {"role": "assistant", "content": ""}]}, {}, USER, None, {}),
    ("spin-answer-alone", {"real": TURNS, "generated": WRONG[1:]}, {}, USER, G, {}),
    ("spin-gold-only", {"real": TURNS, "generated": WRONG}, {"gold_only": True}, USER, None, {}),
    ("map", {"task": Q, "solution": A, "k": None}, {"columns": {"prompt": "task", "completion": "solution"}}, USER, None, {"k": None}),
    ("map-completion", {"question": Q, "solution": A}, {"columns": {"completion": "solution"}}, USER, None, {}),
    ("map-messages", {"dialog": TURNS, "prompt": "p", "completion": "c"}, {"columns": {"messages": "dialog"}}, USER, None, {"prompt": "p", "completion": "c"}),
    ("map-optional", {"question": Q, "answer": A, "sys": "Be brief.", "rejected": G}, {"columns": {"system": "sys", "generated": "rejected"}}, (SYSTEM, *USER), G, {}),
    ("rejected-alone", {"question": Q, "answer": A, "rejected": G}, {}, USER, None, {"rejected": G}),
    ("map-keeps-pairs-out", {"question": Q, "better": A, "chosen": "x", "rejected": G}, {"columns": {"completion": "better"}}, USER, None, {"chosen": "x", "rejected": G}),
    (
        "format-settles",
        {"messages": [{"role": "user", "content": "other"}, TURNS[1]], "question": Q, "answer": A},
        {"format": "question_answer"},
        USER,
        None,
        {"messages": [{"role": "user", "content": "other"}, TURNS[1]]},
    ),
]
# fmt: on


@pytest.mark.parametrize(
    "row, settings, prompt, generated, meta", [f[1:] for f in FORMATS], ids=[f[0] for f in FORMATS]
)
def test_formats(tmp_path: Path, row: Any, settings: Any, prompt: Any, generated: Any, meta: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", row)
    identity = json.dumps([[[m.role, m.content] for m in prompt], A], separators=(",", ":"))
    expected = Example(hashlib.sha256(identity.encode()).hexdigest()[:24], prompt, A, generated, meta, f"{path}:1")
    assert read(path, **settings) == [expected]


@pytest.mark.parametrize(
    ("row", "prompt", "generated"),
    [
        ({"conversations": LONG}, (SYSTEM, Message("user", "Hi")), None),
        ({"prompt": "Hi", "completion": [{"role": "assistant", "content": "Hello"}, *TURNS]}, (Message("user", "Hi"),), None),
        ({"real": LONG, "generated": [*LONG[:2], {"from": "gpt", "value": G}, *LONG[3:]]}, (SYSTEM, Message("user", "Hi")), G),
    ],
)  # fmt: skip
def test_the_first_answer_of_a_conversation(tmp_path: Path, row: Any, prompt: Any, generated: Any) -> None:
    (got,) = read(jsonl(tmp_path / "rows.jsonl", row), turns="first")
    assert (got.messages, got.gold, got.generated) == (prompt, "Hello", generated)


def test_the_first_answer_must_hold_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"messages": [TURNS[0], {"role": "assistant", "content": " "}, *TURNS]})
    with pytest.raises(InputError, match=r"rows\.jsonl:1: no answer: the first assistant turn of `messages` is empty"):
        read(path, turns="first")
    assert [e.gold for e in read(path)] == [A]


def test_a_preference_has_no_first_answer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.turns: first: a preference's answers are its last turns"):
        read(jsonl(tmp_path / "rows.jsonl", {"chosen": TURNS, "rejected": WRONG}), turns="first")


# fmt: off
PAIRS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[Message, ...], str | None, dict[str, Any]]] = [
    # name, row, settings, prompt, rejected, meta
    ("texts", {"prompt": Q, "chosen": A, "rejected": G, "chosen_prob": 0.8}, {}, USER, G, {"chosen_prob": 0.8}),
    ("question-system", {"question": Q, "system": "Be brief.", "chosen": A, "rejected": G}, {}, (SYSTEM, *USER), G, {}),
    ("instruction", {"instruction": Q, "chosen": A, "rejected": G}, {}, USER, G, {}),
    ("equal", {"prompt": Q, "chosen": A, "rejected": A}, {}, USER, A, {}),
    ("ultrafeedback", {"prompt": Q, "prompt_id": "x", "chosen": TURNS, "rejected": WRONG, "messages": TURNS, "score_chosen": 8.0, "score_rejected": 6.5}, {}, USER, G, {"prompt_id": "x", "messages": TURNS, "score_chosen": 8.0, "score_rejected": 6.5}),
    ("conversations", {"chosen": TURNS, "rejected": WRONG}, {}, USER, G, {}),
    ("empty-prompt-column", {"prompt": None, "chosen": TURNS, "rejected": WRONG}, {}, USER, G, {}),
    ("rejected-text", {"chosen": TURNS, "rejected": G}, {}, USER, G, {}),
    ("chosen-text", {"prompt": Q, "chosen": A, "rejected": WRONG}, {}, USER, G, {}),
    ("prompt-turns", {"prompt": [{"role": "system", "content": "Be brief."}, TURNS[0]], "chosen": TURNS[1:], "rejected": WRONG[1:]}, {}, (SYSTEM, *USER), G, {}),
    ("system-within", {"prompt": f" {Q}\n", "chosen": [{"role": "system", "content": "Be brief."}, *TURNS], "rejected": [{"role": "system", "content": "Be brief."}, *WRONG]}, {}, (SYSTEM, *USER), G, {}),
    ("prompt-begins", {"prompt": "Hi", "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *TURNS], "rejected": G}, {}, (Message("user", "Hi"), Message("assistant", "Hello"), *USER), G, {}),
    ("sharegpt-turns", {"chosen": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "rejected": [{"from": "human", "value": Q}, {"from": "gpt", "value": G}]}, {}, USER, G, {}),
    ("gold-only", {"prompt": Q, "chosen": A, "rejected": 7}, {"gold_only": True}, USER, None, {}),
    ("map", {"task": Q, "better": A, "worse": G}, {"format": "preference", "columns": {"prompt": "task", "completion": "better", "generated": "worse"}}, USER, G, {}),
    ("map-prompt", {"task": Q, "chosen": A, "rejected": G}, {"columns": {"prompt": "task"}}, USER, G, {}),
]
# fmt: on


@pytest.mark.parametrize(
    "row, settings, prompt, rejected, meta", [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS]
)
def test_preferences(tmp_path: Path, row: Any, settings: Any, prompt: Any, rejected: Any, meta: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", row)
    identity = [[[m.role, m.content] for m in prompt], A, *([] if rejected is None else [rejected])]
    expected = Example(data.content_id(identity), prompt, A, rejected, meta, f"{path}:1")
    assert read(path, **settings) == [expected]


def test_a_format_given_reads_ultrafeedback_without_its_pairs(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"prompt": Q, "chosen": TURNS, "rejected": WRONG, "messages": TURNS})
    (example,) = read(path, format="messages")
    assert (example.messages, example.gold, example.generated) == (USER, A, None)


def test_pairs_with_another_rejected_answer_are_no_duplicates(tmp_path: Path) -> None:
    pairs = [{"prompt": Q, "chosen": A, "rejected": rejected} for rejected in ("6", "7", "6")]
    path = jsonl(tmp_path / "rows.jsonl", *pairs)
    loaded = data.load(DataConfig(path=str(path), heldout_size=0), seed=0)
    assert (loaded.counts["duplicates"], loaded.counts["generated"]) == (1, 2)
    assert {example.generated for example in loaded.train} == {"6", "7"}
    alone = data.load(DataConfig(path=str(path), heldout_size=0, gold_only=True), seed=0)
    assert (alone.counts["duplicates"], alone.counts["generated"], len(alone.train)) == (2, 0, 1)


def test_id_is_frozen() -> None:
    """Samples on disk are keyed by it: changing the hash would orphan every stored run."""
    assert data.content_id([[["user", Q]], A]) == "58a41a89843852baa9ce12f8"


def test_meta_can_be_written_as_json(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    row = {**qa(1)[0], "score": float("nan"), "day": datetime.date(2024, 1, 2), "tags": [{"a": 1.5, "b": None}]}
    pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
    (example,) = read(path)
    assert example.meta == {"score": None, "day": "2024-01-02", "tags": [{"a": 1.5, "b": None}]}
    assert json.loads(json.dumps(example.meta, allow_nan=False)) == example.meta


# --- counts, split, order ---------------------------------------------------


def test_duplicates_and_overlap_are_counted(tmp_path: Path) -> None:
    rows = [*qa(3), {"question": "q0", "answer": "a0", "generated": G}, {"question": "q1", "answer": "other"}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    held = jsonl(tmp_path / "b.jsonl", *qa(2, 2), *qa(1, 2), {"question": "q1"})
    loaded = data.load(DataConfig(path=str(path), heldout=str(held), on_bad_row="skip"), seed=0)
    assert loaded.counts == {
        "rows": 5, "bad": 0, "duplicates": 1, "heldout_rows": 4, "heldout_bad": 1, "heldout_duplicates": 1,
        "train": 4, "heldout": 2, "heldout_same_prompt": 0, "generated": 0, "overlap": 1,
    }  # fmt: skip
    assert {e.source for e in loaded.train} == {f"{path}:{i}" for i in (1, 2, 3, 5)}
    assert data.load(DataConfig(path=str(path), heldout_size=0), seed=0).counts["overlap"] == 0


def example(prompt: int, answer: int) -> Example:
    messages = (Message("user", f"q{prompt}"),)
    identity = [[["user", f"q{prompt}"]], f"a{answer}"]
    return Example(data.content_id(identity), messages, f"a{answer}")


@st.composite
def example_sets(draw: st.DrawFn) -> list[Example]:
    pairs = draw(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=2, max_size=30))
    return [example(*pair) for pair in sorted(pairs)]


@given(example_sets(), st.integers(0, 9), st.integers(0, 3), st.randoms(use_true_random=False))
def test_split_properties(examples: list[Example], size: int, seed: int, chance: random.Random) -> None:
    groups: dict[str, int] = {}
    for e in examples:
        groups[e.messages[0].content] = groups.get(e.messages[0].content, 0) + 1
    if size >= len(groups):
        with pytest.raises(InputError):
            data.split(examples, size, seed)
        return
    train, heldout = data.split(examples, size, seed)
    assert sorted(e.id for e in train + heldout) == sorted(e.id for e in examples)
    assert not {e.messages for e in train} & {e.messages for e in heldout}
    assert train
    assert len({e.messages for e in heldout}) == size
    mixed = chance.sample(examples, len(examples))
    again = data.split(mixed, size, seed)
    assert [{e.id for e in side} for side in again] == [{e.id for e in train}, {e.id for e in heldout}]
    assert data.shuffled(mixed, seed) == data.shuffled(examples, seed)


def test_a_held_out_prompt_counts_once_however_many_answers_it_has(tmp_path: Path) -> None:
    """A player's answer to it is one: ten golds would make ten equal verdicts, and standard errors a third of the true ones."""
    rows = [{"question": f"q{i}", "answer": f"a{i} {k}"} for i in range(20) for k in range(4)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    for size in (5, 0.25):
        loaded = data.load(DataConfig(path=str(path), heldout_size=size), seed=0)
        assert (len(loaded.heldout), len({e.messages for e in loaded.heldout}), len(loaded.train)) == (5, 5, 60)
        assert loaded.counts["heldout_same_prompt"] == 15
    held = jsonl(tmp_path / "b.jsonl", *({**row, "question": f"held {row['question']}"} for row in rows))
    first = data.load(DataConfig(path=str(path), heldout=str(held)), seed=0)
    assert (len(first.train), len(first.heldout), first.counts["heldout_same_prompt"]) == (80, 20, 60)
    jsonl(held, *({**row, "question": f"held {row['question']}"} for row in reversed(rows)))
    again = data.load(DataConfig(path=str(path), heldout=str(held)), seed=0)
    assert [e.gold for e in again.heldout] == [e.gold for e in first.heldout]


def test_split_takes_the_share_and_follows_the_seed() -> None:
    examples = [example(i, 0) for i in range(200)]
    chosen = [frozenset(e.id for e in data.split(examples, 0.05, seed)[1]) for seed in range(20)]
    assert {len(side) for side in chosen} == {10}
    assert len(set(chosen)) == 20
    assert len(data.split(examples[:5], 0.01, 0)[1]) == 1
    assert len(data.split(examples, 0, 0)[1]) == len(data.split(examples, 0.0, 0)[1]) == 0
    counts = [sum(e.id in side for side in chosen) for e in examples]
    assert max(counts) <= 6  # 200 · P(Binomial(20, 0.05) > 6) < 0.01


# By hand: the ranks are sha256 of `heldout:1:PROMPT_ID` and `order:1:EXAMPLE_ID`.
HELDOUT = ["a19", "a11", "a2"]
FIRST = ["a15", "a10", "a7", "a14", "a13"]


def test_order_and_limit_on_every_machine(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *qa(20))
    config = DataConfig(path=str(path), heldout_size=3)
    loaded = data.load(config, seed=1)
    assert [e.gold for e in loaded.heldout] == HELDOUT
    assert [e.gold for e in loaded.train[:5]] == FIRST
    assert data.load(config, seed=2).train != loaded.train
    jsonl(path, *reversed(qa(20)))
    mirrored = data.load(DataConfig(path=str(path), heldout_size=3, limit=5), seed=1)
    assert [e.gold for e in mirrored.train] == FIRST
    assert [e.gold for e in mirrored.heldout] == HELDOUT
    assert (mirrored.counts["rows"], mirrored.counts["train"], mirrored.counts["heldout"]) == (20, 5, 3)


def test_fingerprint(tmp_path: Path) -> None:
    path, held = jsonl(tmp_path / "a" / "x.jsonl", *qa(2)), jsonl(tmp_path / "b.jsonl", *qa(1))
    config = DataConfig(path=str(tmp_path / "a"), heldout=str(held))
    shas = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, held)]
    assert data.fingerprint(config) == {"train x.jsonl": shas[0], "heldout b.jsonl": shas[1]}
    jsonl(path, *qa(3))
    assert data.fingerprint(config)["train x.jsonl"] != shas[0]
    with pytest.raises(InputError, match="no such file"):
        data.fingerprint(DataConfig(path=str(tmp_path / "c.jsonl")))


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second = (jsonl(tmp_path / "all" / part / "rows.jsonl", *qa(2, 10 * i)) for i, part in enumerate("ab"))
    held = jsonl(tmp_path / "held" / "rows.jsonl", *qa(1, 50))
    found = data.fingerprint(DataConfig(path=str(tmp_path / "all"), heldout=str(held)))
    assert found == {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in (("train a/rows.jsonl", first), ("train b/rows.jsonl", second), ("heldout rows.jsonl", held))
    }


def test_import_stays_light() -> None:
    code = "import sys, sparring.data; print([m for m in ('torch', 'datasets', 'pyarrow', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- real data --------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    "path, rows, examples",
    [
        ("gpteacher/codegen-instruct.json", 4535, 4535),
        ("gpteacher/roleplay-simple-deduped-roleplay-instruct.json", 1923, 1923),
        ("gpteacher", 6458, 6458),
        ("gsm8k/train.jsonl", 7473, 7473),
        ("gsm8k/test.jsonl", 1319, 1319),
    ],
)
def test_real_files(path: str, rows: int, examples: int) -> None:
    loaded = data.load(DataConfig(path=str(SHARED / path), heldout_size=0), seed=0)
    assert (loaded.counts["rows"], loaded.counts["bad"], len(loaded.train)) == (rows, 0, examples)


@needs_shared
def test_real_rows() -> None:
    loaded = data.load(DataConfig(path=str(SHARED / "gsm8k"), heldout_split="test"), seed=0)
    assert (len(loaded.train), len(loaded.heldout), loaded.counts["overlap"]) == (7473, 1319, 0)
    (first,) = (e for e in loaded.train if e.source.endswith("train.jsonl:1"))
    assert first.messages[0].content.startswith("Natalia sold clips to 48 of her friends")
    assert (first.gold or "").endswith("\n#### 72")
    (teacher,) = (e for e in read(SHARED / "gpteacher" / "codegen-instruct.json") if e.source.endswith("[0]"))
    assert teacher.messages == (
        Message(
            "user",
            "Write a C++ program that calculates the area of a rectangle, given its width and height.\n\nwidth: 5, height: 8",
        ),
    )
