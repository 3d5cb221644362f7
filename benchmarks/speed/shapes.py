"""Two Qwen2 shapes with random weights, a third for GPUs, a tokenizer whose ids are exact, and three shapes of data.

    python benchmarks/speed/shapes.py 8M /tmp/8M        # write model and tokenizer as a Hugging Face folder

A text of the data is `w12 w7 …`, one word per token, and the chat template adds nothing but the end token: a token list
survives the way through text and back. All ids are uniform at random, so nothing here can be learned, only timed.

Such a model gives every token about the same probability and hardly ever ends an answer. `stop_ids` makes 1 in `mean`
tokens end one: answers are then geometric with that mean, cut at `MAX_NEW` tokens, the end included.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sparring.types import Group

MODELS: dict[str, dict[str, int]] = {
    "8M": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "60M": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 43520,
    },
}
ON_GPUS: dict[str, dict[str, int]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
PAD, END, WORDS = 0, 1, 2
"""Ids of padding, of the end token, and of the first word."""
MAX_NEW = 256
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
Draw = Callable[[random.Random], int]


@dataclass(frozen=True)
class Shape:
    """How long prompts and answers are, in tokens."""

    prompt: Draw
    answer: Draw
    """Gold answers, and the other half of given pairs; the end token included."""
    mean: int
    """Mean length of played answers before they are cut."""


def _between(low: int, high: int) -> Draw:
    return lambda rng: rng.randint(low, high)


def _spread(low: float, high: float) -> Draw:
    return lambda rng: int(math.exp(rng.uniform(low, high)))


SHAPES = {
    "short/long": Shape(_between(20, 40), _between(180, 256), 1000),
    "long/short": Shape(_between(300, 400), _between(20, 60), 40),
    "ragged": Shape(_spread(2.5, 5.8), _spread(2.1, 5.55), 72),
}


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers; both end in END."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def pairs(shape: str, n: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """`n` random pairs, a function of the arguments."""
    rng, how = random.Random(seed), SHAPES[shape]

    def words(length: int) -> list[int]:
        return [rng.randrange(WORDS, vocabulary) for _ in range(length)]

    return [
        Pair(words(how.prompt(rng)), [*words(how.answer(rng) - 1), END], [*words(how.answer(rng) - 1), END])
        for _ in range(n)
    ]


def group(pair: Pair) -> Group:
    """A pair as what `sparring.train.train` takes."""
    from sparring.types import Group

    both = tuple(pair.chosen), tuple(pair.rejected)
    return Group("example", tuple(pair.prompt), both, (1.0, 0.0), 1.0, ("gold", "sample"), 0)


def preference(group: Group) -> dict[str, list[int]]:
    """The same as a row of TRL's, already tokenized; the first completion is the preferred one."""
    chosen, rejected = group.completions
    return {"prompt_ids": list(group.prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}


def write_jsonl(rows: list[Pair], file: Path) -> None:
    """Prompts and preferred answers as `prompt`/`completion` texts; the end token is the renderer's to add."""
    lines = [json.dumps({"prompt": text(row.prompt), "completion": text(row.chosen[:-1])}) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def text(ids: list[int]) -> str:
    """The words of token ids."""
    return " ".join(f"w{i}" for i in ids)


def stop_ids(shape: str, vocabulary: int) -> list[int]:
    """END and as many words as end a played answer after `Shape.mean` tokens on average."""
    return [END, *range(WORDS, WORDS + round(vocabulary / SHAPES[shape].mean) - 1)]


def model(name: str, kind: str = "qwen2", **changes: Any) -> Any:
    """The model in float32 and eval mode; the same name gives the same weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = (MODELS | ON_GPUS)[name] | changes
    config = AutoConfig.for_model(
        kind,
        **settings,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word, one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "</s>": END} | {f"w{i}": i for i in range(WORDS, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<pad>", model_max_length=4096
    )
    made.chat_template = TEMPLATE
    return made


def save(name: str, folder: Path, stops: list[int] | None = None) -> None:
    """Write a Llama of the model's sizes, and its tokenizer; `stops` are the generation configuration's end tokens.

    For a Qwen2 transformers 5 would read any tokenizer as Qwen2's own, and ours with it as one that knows no word.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = model(name, "llama")
    assert made.generation_config is not None
    made.generation_config.eos_token_id = stops or END
    made.save_pretrained(folder)
    tokenizer(made.config.vocab_size).save_pretrained(folder)


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
