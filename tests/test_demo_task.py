import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from sparring.demo import build, task
from sparring.types import Example, Message


@pytest.fixture(scope="module")
def splits() -> task.Splits:
    return task.problems(0)


def example(prompt: str) -> Example:
    return Example("id", (Message("user", prompt),), None)


def chain(answer: str) -> list[tuple[int, str, int, int]]:
    *steps, final = answer.split("\n")
    parsed = [re.fullmatch(r"(\d\d)([+-])(\d)=(\d\d)", step) for step in steps]
    rows = [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in parsed if m]
    assert len(rows) == 2, answer
    assert final == f"#### {rows[-1][3]}"
    return rows


def test_the_universe_is_every_problem_whose_results_have_two_digits() -> None:
    counted = 0
    for start in range(10, 90):
        for first in [*range(-9, -1), *range(2, 10)]:
            for second in [*range(-9, -1), *range(2, 10)]:
                counted += 10 <= start + first <= 99 and 10 <= start + first + second <= 99
    assert counted == 19_220
    assert len(task.universe()) == len(set(task.universe())) == 19_220


@pytest.mark.parametrize(
    ("value", "step", "wrong"),
    [
        (15, ("+", 7), {12}),
        (11, ("+", 9), {10}),
        (52, ("-", 8), {54}),
        (20, ("-", 2), {28}),
        (41, ("+", 8), {48, 50}),
        (48, ("-", 8), {39, 41}),
    ],
)
def test_a_slip_forgets_the_carry_or_borrow_and_is_off_by_one_without(
    value: int, step: tuple[str, int], wrong: set[int]
) -> None:
    rng = random.Random(0)
    assert {task.slip(value, step, rng) for _ in range(50)} == wrong


def test_a_slip_carries_over_and_the_writer_stays_within_two_digits() -> None:
    rng = random.Random(3)
    drawn = {task.write_answer(15, [("+", 7), ("-", 9)], rng) for _ in range(200)}
    right, borrow, both = "15+7=22\n22-9=13\n#### 13", "15+7=22\n22-9=23\n#### 23", "15+7=12\n12-9=13\n#### 13"
    assert drawn == {right, borrow, both}, "12-9=3 has one digit: drawn again"
    drawn = {task.write_answer(59, [("+", 8), ("-", 6)], rng) for _ in range(200)}
    assert drawn == {
        "59+8=67\n67-6=61\n#### 61",
        "59+8=67\n67-6=60\n#### 60",
        "59+8=67\n67-6=62\n#### 62",
        "59+8=57\n57-6=51\n#### 51",
        "59+8=57\n57-6=50\n#### 50",
        "59+8=57\n57-6=52\n#### 52",
    }


def test_splits_are_disjoint_and_heldout_answers_are_right(splits: task.Splits) -> None:
    lists = (splits.train, splits.validation, splits.test)
    assert [len(each) for each in lists] == [10_000, 2_000, 2_000]
    prompts = [problem.prompt for each in lists for problem in each]
    assert len(set(prompts)) == 14_000
    for problem in splits.validation + splits.test:
        assert chain(problem.answer)[-1][3] == eval(problem.prompt.rstrip("?"))
        assert not problem.sloppy
        assert task.verify(example(problem.prompt), problem.answer) is True


def test_half_of_the_training_documents_are_sloppy_and_half_of_their_steps_slip(splits: task.Splits) -> None:
    sloppy = [problem for problem in splits.train if problem.sloppy]
    assert abs(len(sloppy) - 5_000) < 200
    slips = 0
    for problem in splits.train:
        first, second = chain(problem.answer)
        assert second[0] == first[3], "the second step starts from the first one's result"
        assert problem.prompt == f"{first[0]}{first[1]}{first[2]}{second[1]}{second[2]}?"
        wrong = [abs(eval(f"{a}{o}{b}") - r) for a, o, b, r in (first, second)]
        assert set(wrong) <= ({0, 1, 10} if problem.sloppy else {0})
        slips += sum(map(bool, wrong))
    assert abs(slips / (2 * len(sloppy)) - 0.5) < 0.02
    right = sum(bool(task.verify(example(problem.prompt), problem.answer)) for problem in splits.train)
    assert right == 6_706, "what SFT's sampled accuracy cannot pass; a change here changes every recorded figure"


def test_problems_are_a_function_of_the_seed(splits: task.Splits, tmp_path: Path) -> None:
    assert task.problems(0) == splits
    assert task.problems(1).train[:20] != splits.train[:20]
    task.write(tmp_path, 0)
    written = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    assert list(written) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    rows = [json.loads(line) for line in written["train.jsonl"].decode().splitlines()]
    assert rows == [{"prompt": problem.prompt, "completion": problem.answer} for problem in splits.train]
    assert len(written["validation.jsonl"].splitlines()) == len(written["test.jsonl"].splitlines()) == 2_000
    digest = hashlib.sha256(b"".join(written.values())).hexdigest()[:16]
    assert digest == "4b2429b81104a3ab", "the same on every platform and Python"


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError):
        task.problems(0, train=19_000, heldout=200)


@pytest.mark.parametrize(
    ("prompt", "answer", "right"),
    [
        ("59+8-6?", "59+8=67\n67-6=61\n#### 61", True),
        ("59+8-6?", "#### 61", True),
        ("59+8-6?", "59+8=57\n57-6=51\n#### 61", True),
        ("59+8-6?", "59+8=67\n67-6=61\n#### 60", False),
        ("59+8-6?", "59+8=67\n67-6=61", False),
        ("59+8-6?", "#### 61\n#### 60", False),
        ("59+8-6?", "#### 61+", False),
        ("59+8-6?", "#### 061", True),
        ("59+8-6?", "#### -61", False),
        ("59+8-6?", "#### ", False),
        ("59+8-6?", "", False),
        ("what is 59+8-6?", "#### 61", None),
    ],
)
def test_verify_reads_the_final_number_only(prompt: str, answer: str, right: bool | None) -> None:
    assert task.verify(example(prompt), answer) is right


def test_verify_computes_the_truth_from_the_prompt_not_from_a_sloppy_gold() -> None:
    sloppy = Example("id", (Message("user", "59+8-6?"),), "59+8=57\n57-6=51\n#### 51")
    assert task.verify(sloppy, sloppy.gold or "") is False


def test_the_same_seed_builds_the_same_bytes_and_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        build.build(tmp_path / name, seed)
    assert torch.equal(before, torch.get_rng_state())
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert files["model.safetensors"] != (tmp_path / "c" / "model.safetensors").read_bytes()
    assert files["tokenizer.json"] == (tmp_path / "c" / "tokenizer.json").read_bytes()


def test_the_folder_loads_as_an_ordinary_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build.build(tmp_path, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.num_parameters() == 47_328
    assert abs(model.model.layers[0].mlp.up_proj.weight.std().item() - build.INIT_STD) < 0.01
    assert model.generation_config.eos_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 21)
    prompt = [{"role": "user", "content": "59+8-6?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert ids == [3, 10, 14, 15, 13, 16, 11, 18, 4]
    answer = {"role": "assistant", "content": "59+8=67\n67-6=61\n#### 61"}
    whole = tokenizer.apply_chat_template([*prompt, answer], return_dict=False)
    assert whole == [*ids, 10, 14, 15, 13, 17, 11, 12, 19, 11, 12, 16, 11, 17, 11, 6, 19, 20, 11, 6, 1]
    assert len(whole) - len(ids) == 20 <= task.MAX_ANSWER_TOKENS
    assert len(ids) + task.MAX_ANSWER_TOKENS <= build.CONTEXT
    assert tokenizer.decode(whole[len(ids) :], skip_special_tokens=True) == answer["content"]
    assert tokenizer.encode("x####5") == [2, 2, 2, 2, 2, 10], "what it does not know becomes <unk>, never an error"
