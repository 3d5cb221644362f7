"""Verifiers on hand-made and real answers; evaluation's figures against hand values and a teacher-forced oracle."""

from __future__ import annotations

import json
import math
import random
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.config import EvaluateConfig, PlayConfig
from sparring.errors import InputError
from sparring.evaluate import Evaluation, Item, evaluate, mean_se
from sparring.evaluate.core import ROUND, accuracy, ratio_se, summarise
from sparring.judge.verify import final_number, gsm8k, load_verifier
from sparring.play.hf import key, sample
from sparring.types import Example, Message, Player, Rendered, Verifier

GSM8K = Path(__file__).parents[1].parent / "shared" / "data" / "gsm8k"
END, PAD = 2, 0


# The verifier ----------------------------------------------------------------------------------------------------


def example(gold: str | None) -> Example:
    return Example("x", (Message("user", "q"),), gold)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so it is 72.\n#### 72", "72"),
        ("####72", "72"),
        ("#### 72.", "72"),
        ("#### 72.00", "72"),
        ("#### 072", "72"),
        ("#### $72", "72"),
        ("#### 72%", "72"),
        ("####    72  \n", "72"),
        ("####\n72", "72"),
        ("#### **72**", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### −3", "-3"),
        ("#### - 3", "-3"),
        ("#### -$3.50", "-3.5"),
        ("#### $-3.5", "-3.5"),
        ("#### +3", "3"),
        ("#### -0", "0"),
        ("#### .5", "0.5"),
        ("#### 72 dollars", "72"),
        ("#### 72, or 6 dozen", "72"),
        ("#### 72\nI checked: 70 + 2 = 72", "72"),
        ("#### 5\nno:\n#### 72", "72"),
        ("##### 72", "72"),
        ("#### 0.1", "0.1"),
        ("#### 123456789012345678901234567890", "123456789012345678901234567890"),
        ("72", None),
        ("", None),
        ("####", None),
        ("#### ", None),
        ("#### seventy-two", None),
        ("#### answer: 72", None),
        ("#### 72\n####", None),
        ("### 72", None),
        ("# # # # 72", None),
        ("#### 5 1/2", None),
        ("#### 7\n14/2 = 7", "7"),
        ("#### 1/5", None),
        ("#### 14/3", None),
        ("#### 14.5 / 3", None),
        ("#### 70 + 2", None),
        ("#### 70-75", None),
        ("#### 1e9", None),
        ("#### 12 = 12", None),
        ("#### --3", None),
    ],
)
def test_final_number(answer: str, number: str | None) -> None:
    assert final_number(answer) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("… #### 72", "#### 72.00", True),
        ("… #### 1,000", "#### 1000", True),
        ("… #### 72", "#### 72.001", False),
        ("… #### 72", "#### -72", False),
        ("… #### 72", "#### 7", False),
        ("… #### 72", "it is 72", False),
        ("… #### 72", "", False),
        # Floats would call these equal.
        ("… #### 100000000000000000001", "#### 100000000000000000000", False),
        ("… #### 0", "no mark", False),
        ("no mark", "#### 72", None),
        ("#### many", "#### 72", None),
        (None, "#### 72", None),
    ],
)
def test_gsm8k(gold: str | None, answer: str, right: bool | None) -> None:
    assert gsm8k(example(gold), answer) is right


@pytest.mark.parametrize("tail", [" " * 100_000, "9" * 100_000, "9," * 50_000 + "/2", "#" * 100_000, "- " * 50_000])
def test_long_answers_take_no_time(tail: str) -> None:
    start = time.perf_counter()
    final_number("####" + tail)
    assert time.perf_counter() - start < 2  # quadratic time is minutes


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_gsm8k_agrees_with_the_flags_of_real_model_answers() -> None:
    def marked(text: str) -> str:
        return text.replace("A:", "####")  # these files write the result as `A: 18`

    lines = (GSM8K / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    right = {"6b_finetuning": 0, "6b_verification": 0, "175b_finetuning": 0, "175b_verification": 0}
    for row in map(json.loads, lines):
        gold = example(marked(row["ground_truth"]))
        for model in right:
            verdict = gsm8k(gold, marked(row[model]["solution"]))
            assert verdict is row[model]["is_correct"], row[model]["solution"]
            right[model] += bool(verdict)
    assert (len(lines), *right.values()) == (1319, 286, 515, 458, 742)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
@pytest.mark.parametrize(("file", "rows"), [("train.jsonl", 7473), ("test.jsonl", 1319)])
def test_every_gold_answer_has_a_number_and_is_right(file: str, rows: int) -> None:
    golds = [json.loads(line)["answer"] for line in (GSM8K / file).read_text(encoding="utf-8").splitlines()]
    assert len(golds) == rows
    assert all(gsm8k(example(gold), gold) for gold in golds)


def test_verifiers_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def short(example, answer):\n    return len(answer) < 3\nnumber = 3\n")
    assert load_verifier("gsm8k") is gsm8k
    verifier = load_verifier("./mine.py:short")
    assert [verifier(example("x"), text) for text in ("ab", "abc")] == [True, False]
    with pytest.raises(InputError) as unknown:
        load_verifier("gsm9k")
    assert str(unknown.value) == "verifier `gsm9k`: unknown; the nearest is `gsm8k`; your own is ./file.py:name"
    with pytest.raises(InputError, match="not a function"):
        load_verifier("./mine.py:number")
    with pytest.raises(InputError, match="no such file"):
        load_verifier("./gone.py:short")


def test_verifiers_from_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from sparring import plugins

    point = EntryPoint("exact", "sparring.judge.verify:gsm8k", "sparring.verifiers")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == "sparring.verifiers" else [])
    assert load_verifier("exact") is gsm8k
    with pytest.raises(InputError, match="nearest is `exact`"):
        load_verifier("exakt")


# Figures ---------------------------------------------------------------------------------------------------------


def test_mean_and_standard_error_by_hand() -> None:
    assert mean_se([1, 2, 3, 6]) == pytest.approx({"mean": 3.0, "se": math.sqrt((4 + 1 + 0 + 9) / 3 / 4), "n": 4})
    assert mean_se([True, False, False, False]) == pytest.approx({"mean": 0.25, "se": 0.25, "n": 4})
    assert mean_se([4.0]) == {"mean": 4.0, "se": None, "n": 1}
    assert mean_se([]) is None


def test_ratio_and_standard_error_by_hand() -> None:
    # 18 nats over 6 tokens; residuals −1, 1, 0: sqrt(2 · 3/2) / 6.
    assert ratio_se([2, 7, 9], [1, 2, 3]) == pytest.approx({"mean": 3.0, "se": math.sqrt(3) / 6, "n": 3})
    assert ratio_se([2, 7, 9], [1, 1, 1]) == pytest.approx(mean_se([2, 7, 9]))  # equal sizes: the plain mean
    assert ratio_se([5], [2]) == {"mean": 2.5, "se": None, "n": 1}
    assert ratio_se([], []) is None


def test_ratio_standard_error_is_the_spread_over_resampled_data() -> None:
    rng = random.Random(0)

    def data() -> tuple[list[float], list[float]]:
        sizes = [float(rng.randint(1, 9)) for _ in range(60)]
        return [s * 2 + rng.gauss(0, 3) for s in sizes], sizes

    figures = [f for f in (ratio_se(*data()) for _ in range(400)) if f is not None]
    spread = mean_se(f["mean"] for f in figures)
    told = mean_se(f["se"] for f in figures)
    assert spread is not None and told is not None
    assert told["mean"] == pytest.approx(spread["se"] * 400**0.5, rel=0.12)


def plain(figure: Any) -> Any:
    """A figure without its interval."""
    return figure and {name: figure[name] for name in ("mean", "se", "n")}


def item(example_id: str, kind: str, right: bool | None, text: str = "t", finish: str = "stop", n: int = 2) -> Item:
    return Item(example_id, kind, 0, text, (5,) * n, finish, right, (-0.5,) * n)


def test_accuracy_is_clustered_by_prompt() -> None:
    rights = {"a": [True, True], "b": [True, False], "c": [False, False, None], "d": [None]}
    items = [item(name, "sampled", right) for name, values in rights.items() for right in values]
    # Shares 1, ½, 0 of three judged prompts: s = ½, se = ½/√3; six independent answers would claim √(.3/6) = .22.
    assert plain(accuracy(items)) == pytest.approx({"mean": 0.5, "se": 0.5 / math.sqrt(3), "n": 3})


def test_summary_by_hand() -> None:
    items = [
        item("a", "gold", None, n=2),
        item("b", "gold", None, n=6),
        item("a", "greedy", True, n=50, finish="length"),
        item("b", "greedy", None, n=50, finish="length"),
        item("a", "sampled", True, n=3),
        item("a", "sampled", False, n=9, finish="length"),
        item("b", "sampled", False, n=1, text=" \n"),
        item("b", "sampled", False, n=3),
    ]
    summary = summarise(items, prompts=3, gold_cut=1, verified=True)
    summary |= {key: plain(summary[key]) for key in ("greedy", "sampled")}
    assert summary == {
        "n": 3,
        "gold_nll": {"mean": 2.0, "se": 1.0, "n": 2},
        "gold_nll_token": {"mean": 0.5, "se": 0.0, "n": 2},
        "gold_cut": 1,
        "greedy": {"mean": 1.0, "se": None, "n": 1},
        "sampled": {"mean": 0.25, "se": 0.25, "n": 2},
        "answers": 6,
        "unjudged": 1,
        "answer_tokens": 4.0,
        "truncated": 0.25,
        "empty": 0.25,
        "repeated": 0.25,
        "flags": [
            "25 % of its answers are empty",
            "25 % of its answers repeat themselves",
            "1 of its 6 answers could not be judged: the verifier does not suit these data",
        ],
    }
    greedy_only = summarise(items[:4], prompts=3, gold_cut=1, verified=True)
    assert greedy_only["sampled"] is None
    assert (greedy_only["answer_tokens"], greedy_only["truncated"], greedy_only["empty"]) == (50.0, 1.0, 0.0)


# Evaluating a player ---------------------------------------------------------------------------------------------


class Letters:
    """A renderer as far as evaluation needs one."""

    stop_ids = (END,)

    def decode(self, tokens: Any) -> str:
        return "".join(chr(97 + t) for t in tokens if t != END)


RNG = random.Random(2)
ROWS = [
    Rendered(
        f"id{i}",
        tuple(RNG.choices(range(3, 20), k=1 + i % 5)),
        (*RNG.choices(range(3, 20), k=2 + i % 3), END),
        f"gold {i}",
    )
    for i in range(8)
]
EXAMPLES = [
    Example(row.example_id, (Message("user", "q"),), row.gold_text, source=f"f:{i}") for i, row in enumerate(ROWS)
]
RENDERER: Any = Letters()


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, initializer_range=0.3, **sizes)).eval()


def run(
    model: Any, verifier: Verifier | None, rows: list[Rendered] = ROWS, seed: int = 1, **settings: Any
) -> Evaluation:
    given = EvaluateConfig(**({"samples": 3, "temperature": 1.5} | settings))
    # The training round's own temperature and filters must not leak into evaluation.
    play = PlayConfig(max_new_tokens=6, batch_size=5, temperature=0.1, top_k=1, top_p=0.1)
    examples = EXAMPLES[::-1]
    return evaluate(model, Player("p", 0, "s"), examples, rows, given, play, RENDERER, verifier, seed=seed)


def test_gold_log_likelihood_is_that_of_unpadded_forward_passes(model: Any) -> None:
    cut = Rendered("id0", ROWS[0].prompt, ROWS[0].gold[:-1], "gold 0", cut=("gold",))
    kept = Rendered("id1", ROWS[1].prompt, ROWS[1].gold, "gold 1", cut=("prompt",))
    got = run(model, None, [cut, kept, *ROWS[2:]])
    nlls = []
    for row in ROWS[1:]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*row.prompt, *row.gold]])).logits[0].double()
        table = logits.log_softmax(-1)[len(row.prompt) - 1 : -1]
        nlls.append(-sum(table[i, token].item() for i, token in enumerate(row.gold)))
    mean = sum(nlls) / 7
    se = math.sqrt(sum((v - mean) ** 2 for v in nlls) / 6 / 7)
    assert got.summary["gold_nll"] == pytest.approx({"mean": mean, "se": se, "n": 7}, abs=2e-5)
    tokens = sum(len(row.gold) for row in ROWS[1:])
    assert got.summary["gold_nll_token"]["mean"] == pytest.approx(sum(nlls) / tokens, abs=1e-5)
    assert (got.summary["n"], got.summary["gold_cut"]) == (8, 1)
    gold = [i for i in got.items if i.kind == "gold"]
    assert [(i.example_id, i.text, i.tokens) for i in gold] == [(r.example_id, r.gold_text, r.gold) for r in ROWS[1:]]
    assert [-sum(i.logps) for i in gold] == pytest.approx(nlls, abs=2e-5)


def test_answers_are_greedy_and_sampled_with_evaluations_own_keys(model: Any) -> None:
    got = run(model, None)
    rule: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": (END,), "batch_size": 99}
    prompts = [r.prompt for r in ROWS]
    greedy = sample(model, prompts, [0] * 8, temperature=0.0, **rule)
    assert [i.tokens for i in got.items if i.kind == "greedy"] == [a.tokens for a in greedy]
    assert ROUND == -1
    keys = [key(1, -1, r.example_id, k) for r in ROWS for k in range(3)]
    sampled = sample(model, [p for p in prompts for _ in range(3)], keys, temperature=1.5, **rule)
    mine = [i for i in got.items if i.kind == "sampled"]
    assert [(i.tokens, i.finish) for i in mine] == [(a.tokens, a.finish) for a in sampled]
    assert [(i.example_id, i.index) for i in mine] == [(r.example_id, k) for r in ROWS for k in range(3)]
    assert got.summary["answer_tokens"] == sum(len(a.tokens) for a in sampled) / 24
    assert got.summary["truncated"] == sum(a.finish == "length" for a in sampled) / 24 > 0
    assert (got.summary["greedy"], got.summary["sampled"], got.summary["unjudged"]) == (None, None, None)
    assert {i.right for i in got.items} == {None}


def test_the_verifier_sees_each_answer_with_its_own_example(model: Any) -> None:
    seen: list[tuple[str, str]] = []

    def verifier(example: Example, answer: str) -> bool | None:
        seen.append((example.id, answer))
        return None if example.id == "id0" else example.id in ("id1", "id2")

    got = run(model, verifier)
    assert seen == [(i.example_id, i.text) for i in got.items if i.kind != "gold"]
    assert len(seen) == 32
    se = math.sqrt(2 / 7 * 5 / 7 / 6)
    assert plain(got.summary["greedy"]) == pytest.approx({"mean": 2 / 7, "se": se, "n": 7})
    assert plain(got.summary["sampled"]) == pytest.approx(
        {"mean": 2 / 7, "se": se, "n": 7}
    )  # three answers are one prompt
    assert got.summary["unjudged"] == 4


def test_evaluation_repeats_itself_and_is_strict_json(model: Any) -> None:
    first = run(model, gsm8k)
    assert run(model, gsm8k) == first
    assert json.loads(json.dumps(first.summary, allow_nan=False)) == first.summary
    other = run(model, gsm8k, seed=2)
    assert [i.tokens for i in other.items if i.kind == "sampled"] != [
        i.tokens for i in first.items if i.kind == "sampled"
    ]
    assert other.summary["gold_nll"] == first.summary["gold_nll"]


def test_limit_no_samples_and_no_rows(model: Any) -> None:
    got = run(model, gsm8k, limit=3, samples=0)
    assert [(i.kind, i.example_id) for i in got.items] == [(k, f"id{i}") for k in ("gold", "greedy") for i in range(3)]
    assert (got.summary["n"], got.summary["sampled"]) == (3, None)
    empty = run(model, gsm8k, rows=[])
    assert empty.items == []
    assert (empty.summary["n"], empty.summary["gold_nll"], empty.summary["truncated"]) == (0, None, 0.0)


def test_a_verifier_that_fails_is_told_in_one_line(model: Any) -> None:
    def verifier(example: Example, answer: str) -> bool | None:
        raise KeyError("final")

    with pytest.raises(InputError) as told:
        run(model, verifier)
    assert str(told.value) == "verifier: KeyError: 'final' (f:0): it must give true, false or None for any answer"


def test_dropout_is_off_while_evaluating_and_the_mode_is_restored() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropping = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    wanted = run(dropping, None)
    dropping.train()
    assert run(dropping, None) == wanted
    assert dropping.training
