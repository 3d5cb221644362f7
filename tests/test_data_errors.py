"""Every bad row, file and setting gives one exact line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data_rows import TURNS, WRONG, A, Q, failure, jsonl, qa, read
from sparring import data
from sparring.config import DataConfig

MEND = "; mend it, or set data.on_bad_row=skip"
OUT = "; name yours with data.columns.prompt=… and data.columns.completion=… (or data.columns.messages=…)"
ALL = (
    "; formats are messages (messages), prompt_completion (prompt + completion|response), question_answer (question + answer), "
    "alpaca (instruction + output|response), sharegpt (conversations), spin (real), preference (chosen + rejected)"
)


# fmt: off
BAD_ROWS: list[tuple[str, Any, dict[str, Any], str]] = [
    ("broken", b'{"question": "q", }', {}, "not valid JSON at column 18: Illegal trailing comma before end of object"),
    ("cut", b'{"question": "q', {}, "not valid JSON at column 14: Unterminated string starting at"),
    ("deep", b"[" * 200_000, {}, "not readable JSON: "),
    ("big-number", b'{"question": "q", "answer": "a", "n": ' + b"9" * 5000 + b"}", {}, "not readable JSON: "),
    ("utf8", b'{"question": "caf\xe9", "answer": "a"}', {}, "not valid UTF-8 at byte 18 of the line"),
    ("list", ["q", "a"], {}, "the row is a list, not an object with columns"),
    ("null", None, {}, "the row is null, not an object with columns"),
    ("no-columns", {}, {}, "the row has no columns"),
    ("answer-missing", {"question": Q}, {}, f"no answer column beside `question`: found `question`{ALL}{OUT}"),
    ("answer-none", {"question": Q, "answer": None}, {}, "no answer: `answer` is empty"),
    ("answer-empty", {"question": Q, "answer": ""}, {}, "no answer: `answer` is empty"),
    ("answer-blank", {"question": Q, "answer": " \n\u3000"}, {}, "no answer: `answer` is empty"),
    ("answer-nan", b'{"question": "q", "answer": NaN}', {}, "no answer: `answer` is empty"),
    ("answer-number", {"question": Q, "answer": 5}, {}, "`answer` is a number, not text"),
    ("answer-object", {"question": Q, "answer": {"text": A}}, {}, "`answer` is an object, not text"),
    ("prompt-empty", {"prompt": "", "completion": A}, {}, "empty prompt: `prompt` is empty"),
    ("prompt-none", {"prompt": None, "completion": A}, {}, "empty prompt: `prompt` is empty"),
    ("prompt-flag", {"prompt": True, "completion": A}, {}, "`prompt` is true or false, not text"),
    ("alpaca-empty", {"instruction": " ", "input": "", "output": A}, {}, "empty prompt: `instruction` is empty"),
    ("alpaca-input-number", {"instruction": "Double.", "input": 4, "output": A}, {}, "`input` is a number, not text"),
    ("prompt-turns-empty", {"prompt": [{"role": "user", "content": " "}], "completion": A}, {}, "empty prompt: nothing is said in `prompt` before the answer"),
    ("completion-user", {"prompt": TURNS, "completion": TURNS[:1]}, {}, "no answer: `completion` has no assistant turn"),
    ("system-number", {"question": Q, "answer": A, "system": 1}, {}, "`system` is a number, not text"),
    ("turns-none", {"messages": None}, {}, "no answer: `messages` is empty"),
    ("turns-empty", {"messages": []}, {}, "no answer: `messages` is empty"),
    ("turns-text", {"messages": Q}, {}, "`messages` is text, not a list of turns"),
    ("turn-text", {"messages": [Q]}, {}, "turn 1 of `messages` is text, not an object with `role` and `content`"),
    ("turn-keys", {"messages": [{"role": "user", "text": Q}]}, {}, "turn 1 of `messages` needs `role` and `content` (or `from` and `value`); it has `role`, `text`"),
    ("turn-content", {"messages": [TURNS[0], {"role": "assistant", "content": None}]}, {}, "`content` in turn 2 of `messages` is null, not text"),
    ("tool-calls", {"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, *TURNS]}, {}, "turn 2 of `messages` has `tool_calls`, of which nothing is read; write it into the content"),
    ("function-call", {"messages": [TURNS[0], {"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, {}, "turn 2 of `messages` has `function_call`, of which nothing is read; write it into the content"),
    ("reasoning", {"prompt": Q, "completion": [{**TURNS[1], "reasoning_content": "2 + 3"}]}, {}, "turn 1 of `completion` has `reasoning_content`, of which nothing is read; write it into the content"),
    ("thinking", {"messages": [TURNS[0], {**TURNS[1], "thinking": "2 + 3"}]}, {}, "turn 2 of `messages` has `thinking`, of which nothing is read; write it into the content"),
    ("no-assistant", {"messages": TURNS[:1]}, {}, "no answer: `messages` has no assistant turn"),
    ("blank-assistant", {"messages": [TURNS[0], {"role": "assistant", "content": "\n"}]}, {}, "no answer: the last assistant turn of `messages` is empty"),
    ("assistant-alone", {"messages": TURNS[1:]}, {}, "empty prompt: nothing is said in `messages` before the answer"),
    ("system-alone", {"messages": [{"role": "system", "content": "x"}, TURNS[1]]}, {}, "empty prompt: nothing is said in `messages` before the answer"),
    ("two-systems", {"messages": [{"role": "system", "content": "x"}, *TURNS], "system": "y"}, {}, "two system prompts: `system` and the first turn differ; keep one of them"),
    ("sharegpt-speaker", {"conversations": [{"from": "humna", "value": Q}]}, {}, "turn 1 of `conversations` is from `humna`; known are human, gpt, system, user, assistant"),
    ("generated-number", {"question": Q, "answer": A, "generated": 3}, {}, "`generated` is a number, not text"),
    (
        "generated-other-prompt",
        {"real": TURNS, "generated": [{"role": "user", "content": "other"}, WRONG[1]]},
        {},
        "`generated` answers another prompt than the gold answer; data.gold_only=true ignores it",
    ),
    ("surrogate", b'{"question": "ab\\ud800", "answer": "a"}', {}, "`question` holds a lone surrogate at character 3, which UTF-8 cannot hold"),
    ("surrogate-answer", b'{"question": "q", "answer": "\\udc00"}', {}, "`answer` holds a lone surrogate at character 1, which UTF-8 cannot hold"),
    ("surrogate-meta", b'{"question": "q", "answer": "a", "m": {"x": ["\\ud83d"]}}', {}, "`m` holds a lone surrogate at character 1, which UTF-8 cannot hold"),
    ("surrogate-key", b'{"question": "q", "answer": "a", "\\ud83d": 1}', {}, "a column's name holds a lone surrogate at character 1, which UTF-8 cannot hold"),
    ("surrogate-unknown", b'{"x\\ud83d\\n": 1}', {}, f"no known format: found `x\\ud83d\\n`{ALL}{OUT}"),
    ("typo", {"promt": Q, "completion": A}, {}, f"no known format: found `completion`, `promt`; the nearest known are `prompt` for `promt`{ALL}{OUT}"),
    ("typo-answer", {"question": Q, "Anwser": A}, {}, f"no answer column beside `question`: found `Anwser`, `question`; the nearest known are `answer` for `Anwser`{ALL}{OUT}"),
    ("many-columns", {f"c{i:02}": i for i in range(20)}, {}, f"no known format: found {', '.join(f'`c{i:02}`' for i in range(12))}, …{ALL}{OUT}"),
    (
        "ambiguous",
        {"messages": TURNS, "prompt": Q, "completion": A},
        {},
        "several formats or columns fit (messages: `messages`; prompt_completion: `prompt` + `completion`): "
        "set data.format, or name yours with data.columns.prompt=… and data.columns.completion=… (or data.columns.messages=…)",
    ),
    (
        "two-answers",
        {"instruction": Q, "output": A, "response": A},
        {},
        "several formats or columns fit (alpaca: `instruction` + `output`; alpaca: `instruction` + `response`): "
        "set data.format, or name yours with data.columns.prompt=… and data.columns.completion=… (or data.columns.messages=…)",
    ),
    ("pair-prompts", {"chosen": TURNS, "rejected": [{"role": "user", "content": "other"}, WRONG[1]]}, {}, "`rejected` answers another prompt than `chosen`; drop the row"),
    ("pair-system", {"chosen": TURNS, "rejected": [{"role": "system", "content": "x"}, *WRONG]}, {}, "`rejected` answers another prompt than `chosen`; drop the row"),
    ("pair-other-prompt", {"prompt": "other", "chosen": TURNS, "rejected": WRONG}, {}, "`chosen` answers another prompt than `prompt`; keep one of them"),
    ("pair-no-prompt", {"chosen": A, "rejected": "6"}, {}, "empty prompt: `prompt` is empty, and `chosen` is an answer alone"),
    ("pair-empty-prompt", {"question": " ", "chosen": A, "rejected": "6"}, {}, "empty prompt: `question` is empty, and `chosen` is an answer alone"),
    ("pair-blank-prompt", {"chosen": [{"role": "user", "content": " "}, TURNS[1]], "rejected": "6"}, {}, "empty prompt: nothing is said in `chosen` before the answer"),
    ("pair-no-chosen", {"prompt": Q, "chosen": "", "rejected": "6"}, {}, "no answer: `chosen` is empty"),
    ("pair-no-rejected", {"prompt": Q, "chosen": A, "rejected": None}, {}, "no answer: `rejected` is empty"),
    ("pair-blank-chosen", {"chosen": [TURNS[0], {"role": "assistant", "content": " "}], "rejected": WRONG}, {}, "no answer: the last assistant turn of `chosen` is empty"),
    ("pair-blank-rejected", {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": " "}]}, {}, "no answer: the last assistant turn of `rejected` is empty"),
    ("pair-user-last", {"chosen": [*TURNS, TURNS[0]], "rejected": WRONG}, {}, "no answer: the last turn of `chosen` is by `user`, not the assistant"),
    ("pair-user-last-rejected", {"chosen": TURNS, "rejected": [*WRONG, TURNS[0]]}, {}, "no answer: the last turn of `rejected` is by `user`, not the assistant"),
    ("pair-user-alone", {"prompt": Q, "chosen": TURNS[:1], "rejected": WRONG}, {}, "no answer: `chosen` has no assistant turn"),
    ("pair-number", {"prompt": Q, "chosen": 5, "rejected": "6"}, {}, "`chosen` is a number, not text"),
    ("pair-half", {"prompt": Q, "rejected": "6"}, {}, f"no answer column beside `prompt`: found `prompt`, `rejected`{ALL}{OUT}"),
    ("pair-format", {"prompt": Q, "completion": A}, {"format": "preference"}, f"no answer column beside `prompt`: found `completion`, `prompt`; formats are preference (chosen + rejected){OUT}"),
    (
        "pair-two-prompts",
        {"prompt": Q, "question": Q, "chosen": A, "rejected": "6"},
        {},
        "several formats or columns fit (preference: `prompt` + `chosen` + `rejected`; preference: `question` + `chosen` + `rejected`): "
        "set data.format, or name yours with data.columns.prompt=… and data.columns.completion=… (or data.columns.messages=…)",
    ),
    ("wrong-format", {"question": Q, "answer": A}, {"format": "alpaca"}, f"no known format: found `answer`, `question`; formats are alpaca (instruction + output|response){OUT}"),
    (
        "map-misses",
        {"task": Q, "solution": A},
        {"columns": {"prompt": "task", "completion": "solutions"}},
        f"no answer column beside `task`: found `solution`, `task`; the nearest known are `solutions` for `solution`; formats are prompt_completion (task + solutions){OUT}",
    ),
]
# fmt: on


@pytest.mark.parametrize("row, settings, problem", [b[1:] for b in BAD_ROWS], ids=[b[0] for b in BAD_ROWS])
def test_bad_rows(tmp_path: Path, row: Any, settings: Any, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    raw = row if isinstance(row, bytes) else json.dumps(row).encode()
    good = not settings  # a good row of the same layout first, so that line numbers are tested
    first = json.dumps({"question": "good", "answer": "a"}).encode()
    path.write_bytes((first + b"\n" if good else b"") + raw + b"\n")
    message = failure(path, **settings)
    line = 2 if good else 1
    if problem.endswith(": "):
        assert message.startswith(f"{path}:{line}: {problem}")
        assert message.endswith(MEND)
    elif "JSON" not in problem or sys.version_info[:2] == (3, 13):
        assert message == f"{path}:{line}: {problem}{MEND}"
    else:  # json's own words differ between Python versions
        assert message.startswith(f"{path}:{line}: not valid JSON at column ")
    if good:
        loaded = data.load(DataConfig(path=str(path), on_bad_row="skip", heldout_size=0), seed=0)
        assert (loaded.counts["rows"], loaded.counts["bad"], [e.gold for e in loaded.train]) == (2, 1, ["a"])
    else:
        skipped = failure(path, on_bad_row="skip", **settings)
        assert skipped == f"{path}: every row is bad (1); the first, {path}:1: {problem}"


# fmt: off
BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"", ": the file is empty; it needs at least one row"),
    ("a.csv", b"", ": the file is empty; it needs at least one row"),
    ("a.parquet", b"", ": the file is empty; it needs at least one row"),
    ("blank.jsonl", b"\n \n", ": no rows in it; it needs at least one"),
    ("blank.json", b"\n \n", ": the file is empty; it needs at least one row"),
    ("none.json", b"[]", ": no rows in it; it needs at least one"),
    ("header.csv", b"question,answer\n", ": no rows in it; it needs at least one"),
    ("broken.json", b'[\n{"question": "q",\n"answer" "a"}]', ":3: not valid JSON at column 10: Expecting ':' delimiter"),
    ("extra.json", b"[1]\n[2]", ":2: not valid JSON at column 1: Extra data"),
    ("latin.json", b'[\n{"question": "caf\xe9"}]', ":2: not valid UTF-8; save the file as UTF-8"),
    ("deep.json", b"[" * 200_000, ": not readable JSON: "),
    ("text.json", b'"hello"', ": the file is text; wanted is a list of rows"),
    ("object.json", b'{"question": "q"}', ': an object with no list of rows in it; wanted is a list of rows, or {"data": [rows]}'),
    ("lists.json", b'{"train": [], "test": []}', ': an object with several lists (`train`, `test`); keep one; wanted is a list of rows, or {"data": [rows]}'),
    ("number.json", b"[7]", f"[0]: the row is a number, not an object with columns{MEND}"),
    ("none.parquet", b"PAR1 no parquet", ": not a readable Parquet file: "),
    ("rows.txt", b"hello", ": unknown suffix `.txt`; known are .jsonl .ndjson .json .parquet .csv"),
    ("rows", b"hello", ": unknown suffix ``; known are .jsonl .ndjson .json .parquet .csv"),
    ("twice.csv", b"question,answer,answer\n", ":1: column `answer` stands twice in the header; rename one"),
    ("cells.csv", b'question,answer\n"a\nb",c\nd\n', f":4: 1 cells where the header has 2 columns{MEND}"),
    ("latin.csv", b"question,answer\nq,a\ncaf\xe9,b\n", f":3: not valid UTF-8{MEND}"),
    ("answer.csv", b'question,answer\n"q\n2",a\nq3,\n', f":4: no answer: `answer` is empty{MEND}"),
    ("open.csv", b'question,answer\nq,a\nq,"b\nq,c\n', ":3: not valid CSV: unexpected end of data; put a cell with quotes into quotes and double those inside"),
    ("header.csv", b"\xff,answer\nq,a\n", f":2: no known format: found `answer`, `\\udcff`{ALL}{OUT}{MEND}"),
]
# fmt: on


@pytest.mark.parametrize("name, content, problem", BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = failure(path)
    assert message.startswith(f"{path}{problem}") if problem.endswith(": ") else message == f"{path}{problem}"
    if MEND not in message:  # what breaks the whole file is never skipped as if it were one row
        assert failure(path, on_bad_row="skip") == message


def test_no_data() -> None:
    assert failure("").startswith("data.path: missing: name a JSONL")


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    assert (
        failure(tmp_path)
        == f"{tmp_path}: a folder without data; it needs files that end in .jsonl .ndjson .json .parquet .csv"
    )


def test_invalid_utf8_in_parquet_is_named_by_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"q\xe9"))
    pyarrow.parquet.write_table(pa.table({"question": broken, "answer": ["a", "b"]}), path)
    assert failure(path) == f"{path}[1]: not valid UTF-8{MEND}"
    assert [e.gold for e in read(path, on_bad_row="skip")] == ["a"]


@pytest.mark.parametrize(
    "settings, problem",
    [
        (
            {"columns": {"promt": "x"}},
            "data.columns.promt: unknown column; the nearest is `prompt`; known are prompt, completion, system, messages, generated",
        ),
        (
            {"columns": {"prompt": "question"}, "format": "messages"},
            "data.columns.prompt: format messages has no such column; leave it out or set data.format",
        ),
        (
            {"columns": {"prompt": "question", "messages": "m"}},
            "data.columns.prompt: format messages has no such column; leave it out or set data.format",
        ),
        (
            {"columns": {"system": "anser"}},
            "data.columns.system: no row of {path} has `anser`; the nearest is `answer`",
        ),
        ({"heldout": ""}, "data.heldout: empty; name a file, or leave it out to hold out by seed"),
        (
            {"heldout": "{path}"},
            "{path}: held out and trained on at once; name another file in data.heldout or another split",
        ),
        (
            {"heldout_size": 4},
            "data.heldout_size: holding out 4 of 4 prompts leaves none to train on; lower it, 0 holds out none",
        ),
        ({"heldout_size": 1.0}, "data.heldout_size: 1.0 is not a share below 1; write 1 for a number of prompts"),
        (
            {"heldout_size": 0.9},
            "data.heldout_size: holding out 4 of 4 prompts leaves none to train on; lower it, 0 holds out none",
        ),
    ],
)
def test_bad_settings(tmp_path: Path, settings: Any, problem: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", *qa(4))
    settings = {k: v.replace("{path}", str(path)) if isinstance(v, str) else v for k, v in settings.items()}
    assert failure(path, **settings) == problem.replace("{path}", str(path))


def test_one_prompt_cannot_be_held_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"question": Q, "answer": f"a{i}"} for i in range(4)))
    assert failure(path, heldout_size=2).startswith(
        "data.heldout_size: holding out 2 of 1 prompts leaves none to train on"
    )
