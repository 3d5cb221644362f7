"""SPIN's released habits, token by token: what is played, paired, cut and hidden, and what that does to log-probs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import toy_tokenizers as toys
from sparring.config import DataConfig, TrainConfig
from sparring.errors import InputError
from sparring.logps import token_logps
from sparring.methods.spin import method
from sparring.prompts import Renderer, official, render
from sparring.train import lr_factor, total_steps
from sparring.types import Batch, Example, LogProbs, Message, Sample

RECIPE = Path(__file__).parents[1] / "recipes" / "spin_official_zephyr7b.yaml"
# As zephyr-7b-sft-full writes turns: every one ends in EOS and a line break, the system turn even when it is empty.
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)
EOS, BREAK = 2, 13
LONG = {"max_length": 1024, "max_prompt_length": 512}


def stub(chat_template: str | None = ZEPHYR) -> Any:
    """The vectors' tokenizer: one id per character, a = 100, b = 101, …; `</s>` = 2, a line break = 13; BOS is 1."""
    letters = {chr(ord("a") + i): 100 + i for i in range(26)}
    capitals = {chr(ord("A") + i): 130 + i for i in range(26)}
    others = {character: 20 + i for i, character in enumerate(" <>|:#/_?.0123456789")}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": EOS, "\n": BREAK, **letters, **capitals, **others}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **names)


def example(question: str = "q", gold: str | None = "a", *before: Message) -> Example:
    return Example("e", (*before, Message("user", question)), gold, source="rows.jsonl:7")


def sampled(tokens: Sequence[int], finish: Any = "stop", player: str = "sha", text: str = "") -> Sample:
    return Sample("e", player, 0, 0, tuple(tokens), text, finish, (0.0,) * len(tokens), "settings")


# Text: vector V14


def test_strings() -> None:
    """vectors.md §9, V14; the response with two ends is what the collator then makes of it."""
    tokenizer = stub()
    turns, answer = official.first_round(example("Q", "A"))
    assert official.prompt_text(tokenizer, turns) == "<|system|>\n</s>\n<|user|>\nQ</s>\n<|assistant|>\n"
    assert official.answer_text(tokenizer, answer) == "A</s>\n"
    assert official.play_text("Q") == "### Instruction: Q\n\n### Response: "
    _, real, _ = official.pair_ids(tokenizer, "p", official.answer_text(tokenizer, "A"), "x", **LONG)
    assert tokenizer.convert_ids_to_tokens(real) == ["A", "</s>", "\n", "</s>"]


def test_both_writings_of_the_template_agree() -> None:
    """The toy tokenizers' template, written otherwise, gives the strings of V14 too, handed over as Jinja source."""
    turns = official.first_round(example("Q"))[0]
    assert official.prompt_text(stub(None), turns, toys.ZEPHYR) == official.prompt_text(stub(), turns)
    assert official.answer_text(stub(None), "A", toys.ZEPHYR) == "A</s>\n"


@pytest.mark.parametrize(("bos", "start"), [(False, []), (True, [1])])
def test_play_ids(bos: bool, start: list[int]) -> None:
    """spin.md §2.3: no BOS on the HF path, one on the vLLM path; no chat template on either, and a trailing space."""
    tokenizer = stub()
    ids = official.play_ids(tokenizer, "cab", bos=bos)
    assert ids == start + tokenizer("### Instruction: cab\n\n### Response: ", add_special_tokens=False)["input_ids"]
    assert ids[-2:] == [24, 20] and ids[len(start) + 17 : len(start) + 20] == [102, 100, 101]


def test_only_the_first_round_is_taken() -> None:
    """spin.md §2.2, §2.4: first user turn, first answer, an empty system turn where there is none."""
    talk = (Message("user", "one"), Message("assistant", "first"))
    assert official.first_round(example("two", "second", *talk)) == (
        (Message("system", ""), Message("user", "one")),
        "first",
    )
    system = Message("system", "be brief")
    assert official.first_round(example("one", "first", system)) == ((system, Message("user", "one")), "first")


@pytest.mark.parametrize(
    "row", [example("q", None), Example("e", (Message("system", "s"),), "a", source="rows.jsonl:7")]
)
def test_an_example_without_question_or_answer_is_refused(row: Example) -> None:
    with pytest.raises(InputError, match=r"^rows\.jsonl:7: .*drop the row$"):
        official.first_round(row)


def test_another_header_stays() -> None:
    """spin.md §2.10h: only `<|assistant|>` is taken off, so other templates leave their header in the scored answer."""
    assert official.answer_text(stub(toys.CHATML), "a") == "<|im_start|>assistant\na<|im_end|>\n"
    assert official.answer_text(stub(), "<|assistant|>\na") == "<|assistant|>\na</s>\n"


def test_a_template_that_refuses_an_answer_alone() -> None:
    """spin.md §2.10h: Llama-2's raises on a list that starts with an assistant."""
    with pytest.raises(InputError, match=r"^the chat template fails on assistant, .*user first; set model"):
        official.answer_text(stub(LLAMA2), "a")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([20, 13, 100, 20, 101, EOS], "a b"),
        ([100, EOS, EOS], "a"),
        ([100, 20], "a "),
        ([1, 100, EOS], "<s>a"),
        ([EOS], ""),
    ],
)
def test_a_sample_becomes_text(tokens: list[int], text: str) -> None:
    """spin.md §2.3: decoded with specials, `</s>` taken out, then stripped on the left only."""
    assert official.sampled_text(stub(), tokens) == text


# Tokens and attention: vector V12


def test_collator() -> None:
    """vectors.md §9, V12."""
    prompt, real, generated = official.pair_ids(
        stub(), "ab</s>\n", "cde</s>\n", "f</s>\n", max_length=64, max_prompt_length=32
    )
    assert prompt + real == [100, 101, 2, 13, 102, 103, 104, 2, 13, 2]
    assert prompt + generated == [100, 101, 2, 13, 105, 2, 13, 2]
    assert (len(prompt), real, generated) == (4, [102, 103, 104, 2, 13, 2], [105, 2, 13, 2])
    assert official.attention(prompt + real, EOS) == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    assert official.attention(prompt + generated, EOS) == [1, 1, 0, 1, 1, 0, 1, 1]


def test_our_own_mode_has_one_end() -> None:
    """The same example in both modes: one EOS against two, and the player's tokens against a re-encoding."""
    tokenizer, row = stub(), example("ab", "cde")
    clean = render([row], Renderer(tokenizer), DataConfig(path="x"), context=200, max_new_tokens=8).rows[0]
    assert clean.gold == (102, 103, 104, 2) and clean.gold.count(EOS) == 1
    (group,) = official.pairs(tokenizer, [row], [sampled([105, 106, EOS])], 0, **LONG).groups
    assert group.completions == ((102, 103, 104, 2, 13, 2), (105, 106, 2, 13, 2))
    system = tokenizer("<|system|>\n</s>\n", add_special_tokens=False)["input_ids"]
    assert group.prompt == (*system, *clean.prompt)


def test_answers_are_tokenized_as_if_they_began_a_text() -> None:
    """spin.md §2.4: SentencePiece puts its space before an answer encoded alone; ours stands behind the prompt."""
    tokenizer, row = toys.zephyr("legacy"), example("the dog", "the fox")
    (group,) = official.pairs(tokenizer, [row], [sampled([EOS])], 0, **LONG).groups
    clean = render([row], Renderer(tokenizer), DataConfig(path="x"), context=200, max_new_tokens=8).rows[0]
    ours, theirs = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in (clean.gold, group.completions[0]))
    assert (theirs[0][0], ours[0][0]) == ("▁", "t")
    assert (theirs.count("</s>"), ours.count("</s>"), theirs.count("<s>"), group.prompt[0] == 1) == (2, 1, 0, False)


# Truncation: vector V13


def test_truncation() -> None:
    """vectors.md §9, V13: no EOS is left in the longer answer; the shorter one keeps its own; every mask is 1."""
    prompt, real, generated = official.pair_ids(
        stub(), "abcdefgh", "ijklmnop", "qr", max_length=10, max_prompt_length=4
    )
    assert prompt == [104, 105, 106, 107]
    assert real == [108, 109, 110, 111, 112, 113]
    assert generated == [116, 117, 2]
    assert official.attention(prompt + real, EOS) == [1] * 10
    assert official.attention(prompt + generated, EOS) == [1] * 7


P, R, G = list(range(10, 18)), list(range(30, 35)), [50, 51]


@pytest.mark.parametrize(
    ("max_length", "max_prompt", "kept", "room"),
    [
        (13, 4, 8, 5),  # exactly full: 8 + 5
        (12, 7, 7, 5),  # one over: the prompt alone gives way, to its limit and no further
        (12, 3, 3, 5),
        (11, 7, 7, 4),  # still one over: answers are cut to 11 - 7
        (10, 9, 8, 1),  # a prompt below its limit is whole, and answers get 10 - 9, not 10 - 8
    ],
)
def test_the_longer_answer_decides(max_length: int, max_prompt: int, kept: int, room: int) -> None:
    """spin.md §2.4; answers of 5 and 2 tokens behind a prompt of 8, whichever of the two is real."""
    for real, generated in ((R, G), (G, R)):
        cut = official.truncate(P, real, generated, max_length=max_length, max_prompt_length=max_prompt)
        assert cut == (P[-kept:], real[:room], generated[:room])


@pytest.mark.parametrize("limits", [(8, 8), (8, 9), (8, 0)])
def test_limits_that_leave_no_room(limits: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"^max_prompt_length: .* set it between the two$"):
        official.truncate(P, R, G, max_length=limits[0], max_prompt_length=limits[1])


# Pairs


def test_pairs_keep_what_our_own_mode_drops() -> None:
    """Cut, empty, repeated and gold-like samples all count once, end tokens included (spin.md §2.4, §2.10)."""
    rows = [([100, EOS], "stop"), ([EOS], "stop"), ([101, 101], "length"), ([101, 101], "length"), ([20, 99], "length")]
    paired = official.pairs(stub(), [example()], [sampled(tokens, finish) for tokens, finish in rows], 3, **LONG)
    end = (EOS, BREAK, EOS)
    assert [g.completions[1] for g in paired.groups] == [(100, *end), end, (101, 101, *end), (101, 101, *end), end]
    assert {(g.completions[0], g.targets, g.weight, g.origin_round) for g in paired.groups} == {
        ((100, *end), (1.0, 0.0), 1.0, 3)
    }
    assert paired.dropped == {}
    assert paired.groups[0].sources == ("gold", sampled([]).id)


def test_an_answer_that_came_with_the_data_is_its_text() -> None:
    given = sampled([140, EOS], player="unknown", text=" b ")
    (group,) = official.pairs(stub(), [example()], [given], 0, **LONG).groups
    assert group.completions[1] == (101, 20, EOS, BREAK, EOS)


def test_pairs_are_cut() -> None:
    (group,) = official.pairs(
        stub(), [example("q", "abcdef")], [sampled([105])], 0, max_length=10, max_prompt_length=6
    ).groups
    assert (len(group.prompt), group.completions) == (6, ((100, 101, 102, 103), (105, EOS, BREAK, EOS)))


# Log-probs: vector V18, and the collator's own way to its arrays


def collated(prompt: list[int], answer: list[int], limit: tuple[int, int] | None = None) -> tuple[list[int], ...]:
    """Row, mask and labels in the collator's order: mask the texts, append, cut to `limit` = (prompt, answer)."""
    masks = [[int(token != EOS) for token in text] for text in (prompt, answer)]
    answer, masks[1] = [*answer, EOS], [*masks[1], 1]
    if limit:
        prompt, masks[0] = prompt[-limit[0] :], masks[0][-limit[0] :]
        answer, masks[1] = answer[: limit[1]], masks[1][: limit[1]]
    return prompt + answer, masks[0] + masks[1], [-100] * len(prompt) + answer


def tiny() -> Any:
    """A random Llama of two layers; eager attention, the plainest."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=160, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)  # fresh weights give nearly uniform answers, which would hide a wrong mask
    return model


def scored(model: Any, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], pad: int = 0) -> Tensor:
    """Log-prob of every token but the first, [N, T - 1]; right-padded with `pad`, which is masked."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[*m, *[0] * (width - len(m))] for m in masks])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def pair_of(seed: int) -> tuple[list[int], list[int], list[int]]:
    draw = random.Random(seed)
    prompt, real, generated = ([draw.choice([EOS, BREAK, *range(100, 110)]) for _ in range(n)] for n in (5, 6, 3))
    return prompt, real, generated


@pytest.mark.parametrize("seed", range(8))
def test_hidden_positions_are_the_collators(seed: int) -> None:
    """Ids alone tell the mask: equal to the collator's, but at a row's last token, which no log-prob depends on."""
    prompt, real, generated = pair_of(seed)
    model = tiny()
    for answer in (real, generated):
        for limit in (None, (3, len(answer)), (3, 2)):
            row, mask, labels = collated(prompt, answer, limit)
            ours = official.attention(row, EOS)
            assert ours[:-1] == mask[:-1] and (mask[-1] == 1 or row[-1] == EOS)
            start = labels.count(-100)
            both = [scored(model, [row], [m])[0, start - 1 :] for m in (ours, mask)]
            assert torch.equal(*both) and both[0].isfinite().all()


PAIRS = [pair_of(seed) for seed in (11, 12, 13, 14)]


def official_logps(model: Any, order: Sequence[int] = range(4), pad: int = 0) -> Tensor:
    """Sums over the answers of `PAIRS`, [4, 2], in one batch of the given order."""
    rows = [(PAIRS[i][0], [*PAIRS[i][side], EOS]) for side in (1, 2) for i in order]
    table = scored(model, [p + a for p, a in rows], [official.attention(p + a, EOS) for p, a in rows], pad)
    sums = torch.stack([line[len(p) - 1 : len(p) + len(a) - 1].sum() for line, (p, a) in zip(table, rows, strict=True)])
    return sums.view(2, -1).T[torch.tensor(order).argsort()]


def spin_loss(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """The library's loss of four pairs whose sums are given, [4]."""
    held = {"reference": LogProbs(reference[..., None])}
    nothing = torch.zeros(4, 2, 1, dtype=torch.long)
    batch = Batch(nothing, nothing.bool(), torch.tensor([[1.0, 0.0]] * 4), torch.ones(4), held)
    return method(beta=beta).loss(LogProbs(policy[..., None]), batch)


def test_the_first_loss_is_log_2_with_frozen_and_present_log_probs_alike() -> None:
    """vectors.md §12, V18 (i) and (iv): precomputed one by one or taken in the training batch, the margin is 0."""
    model = tiny()
    with torch.no_grad():
        policy = official_logps(model)
        alone = torch.stack(
            [
                torch.stack([scored(model, [row], [mask])[0, len(p) - 1 :].sum() for row, mask, _ in both])
                for p, real, generated in PAIRS
                for both in [(collated(p, real), collated(p, generated))]
            ]
        )
    assert spin_loss(policy, policy).tolist() == [math.log(2)] * 4
    assert torch.allclose(alone, policy, rtol=0, atol=1e-4)
    assert spin_loss(policy, alone).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-5)


def test_padding_and_order_do_not_matter() -> None:
    """vectors.md §12, V18 (ii): nor does a pad token that is the EOS; rows differ in length by three tokens."""
    model = tiny()
    with torch.no_grad():
        first = official_logps(model)
        for other in (official_logps(model, [2, 0, 3, 1]), official_logps(model, pad=EOS)):
            assert torch.allclose(other, first, rtol=0, atol=1e-4)


def test_a_hidden_end_changes_what_follows_it_in_official_mode_only() -> None:
    """vectors.md §12, V18 (iii).

    Clean: tokens are scored as they were played, to rounding, with an EOS in the prompt and one at the end. Official:
    the same tokens score otherwise behind the hidden EOS, which is itself scored as before.
    """
    model, prompt, answer = tiny(), [100, EOS, BREAK, 101], [102, 103, 104, EOS]
    row = prompt + answer
    with torch.no_grad():
        steps = [model(input_ids=torch.tensor([row[:n]])).logits[0, -1].log_softmax(-1) for n in range(4, len(row))]
        played = [step[token].item() for step, token in zip(steps, answer, strict=True)]
        assert token_logps(model, [prompt], [answer])[0].tolist() == pytest.approx(played, abs=1e-4)
        hidden = scored(model, [row], [official.attention(row, EOS)])[0, len(prompt) - 1 :]
        assert ((hidden - torch.tensor(played)).abs() > 1e-2).all()

        row = [100, 101, 102, EOS, BREAK, EOS]
        shown, masked = (scored(model, [row], [mask])[0] for mask in ([1] * 6, official.attention(row, EOS)))
        assert official.attention(row, EOS) == [1, 1, 1, 0, 1, 1]
        assert shown[:3].tolist() == pytest.approx(masked[:3].tolist(), abs=1e-5)
        assert ((shown - masked)[3:].abs() > 1e-2).all()
        # One EOS, at the end: nothing is hidden, so the two modes agree.
        assert official.attention(row[:4], EOS) == [1] * 4


def test_a_row_that_starts_hidden_is_finite() -> None:
    """A prompt cut to its end may begin with an EOS; the first token then attends to nothing."""
    for attention in ("eager", "sdpa"):
        model = tiny()
        model.config._attn_implementation = attention
        row = [EOS, 100, 101, 102]
        with torch.no_grad():
            assert scored(model, [row], [official.attention(row, EOS)]).isfinite().all()


# The recipe


def test_recipe_is_the_released_one() -> None:
    """spin.md §2.7 and V17: the schedule spans six epochs and stops after two, at 3.7039e-7 in round 0."""
    tree = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    (entry,) = tree["rounds"]
    assert entry == {
        "method": "spin_official",
        "max_length": 1024,
        "max_prompt_length": 512,
        "repeat": 4,
        "memory": 1,
        "memory_weight": 1.0,
        "beta": [0.1, 0.1, 0.1, 5.0],
        "train": {"lr": [5e-7, 5e-7, 1e-7, 1e-7]},
    }
    assert (tree["play"]["max_new_tokens"], tree["play"]["samples"], tree["seed"]) == (256, 1, 42)
    assert tree["controls"] == {"displacement": None, "trust_region": None, "patience": None}
    assert tree["model"]["revision"] == "ac6e600eefcce74f5e8bae1035d4f66019e93190"
    train = {**tree["train"]}
    stop = train.pop("stop_epoch")
    settings = TrainConfig(lr=5e-7, **train)
    assert (settings.optimizer, settings.schedule, settings.clip, settings.weight_decay) == (
        "rmsprop",
        "linear",
        1.0,
        0.0,
    )
    n = tree["data"]["limit"]
    for rows, steps in ((n, 4668), (2 * n, 9336)):
        total = total_steps(rows, settings)
        assert (stop, total, math.ceil(settings.warmup * total)) == (2, steps, math.ceil(steps / 10))
        assert 5e-7 * lr_factor(total // 3, total, settings) == pytest.approx(3.7039e-7, abs=5e-12)
