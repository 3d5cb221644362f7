"""What many tests need: a tiny model folder, a tiny data set, a recipe that runs in about a second, the command line."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;?!#'+-=<>|/_()IR"
SPECIAL = ("<pad>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Result:
    """What a command gave; unpacks as (code, out, err)."""

    code: int
    out: str
    err: str

    def __iter__(self) -> Any:
        return iter((self.code, self.out, self.err))


def cli(*arguments: object) -> Result:
    """Run `sparring ARGUMENTS` in this process, as its own process would."""
    from sparring.cli import main

    logger = logging.getLogger("sparring")
    out, err = io.StringIO(), io.StringIO()
    # The command line adds a handler that writes to the stderr of its first call.
    logger.handlers.clear()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(a) for a in arguments])
    finally:
        logger.handlers.clear()
    return Result(code, out.getvalue(), err.getvalue())


def character_tokenizer(**options: Any) -> Any:
    """One token per character, `<eos>` and `<pad>`, no chat template unless given; options override the defaults."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in names.items() if v is not None})


def write_model(folder: Path, *, layers: int = 1, seed: int = 0, context: int = 256, tokenizer: Any = None) -> Path:
    """A Llama of width 16 with random weights, and its tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or character_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=context,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def rows(n: int = 16) -> list[dict[str, str]]:
    """Sums with their answers in GSM8K's format."""
    return [
        {"question": f"what is {a} + {a % 7}?", "answer": f"{a} + {a % 7} = {a + a % 7}\n#### {a + a % 7}"}
        for a in range(10, 10 + n)
    ]


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def recipe(run: Path, model: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """SFT, then two rounds of SPIN on 12 prompts, in about a second; a section given is merged over these."""
    tree: dict[str, Any] = {
        "run": str(run),
        "model": {"path": str(model), "threads": 1, "device": "cpu"},
        "data": {"path": str(data), "heldout_size": 4},
        "play": {"max_new_tokens": 8, "chunk": 4, "batch_size": 4},
        "train": {"lr": 1e-3, "batch_size": 4, "micro_batch": 2, "epochs": 1, "save_every": 1},
        "evaluate": {"limit": 4, "verifier": "gsm8k"},
        "rounds": [{"method": "sft"}, {"method": "spin", "repeat": 2}],
    }
    for name, given in sections.items():
        tree[name] = tree[name] | given if isinstance(given, Mapping) and name in tree else given
    return tree


def write_recipe(path: Path, tree: Mapping[str, Any]) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def tree_hash(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder` with its contents' hash: equal before and after means nothing was touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def player_shas(run: Path) -> dict[int, str]:
    """Player number to content hash, computed from the files on disk."""
    from sparring import players
    from sparring.rundir.view import RunView

    return {number: players.identify(player.path) for number, player in RunView(run).players.items()}


def script(name: str) -> Any:
    """A file of benchmarks/ as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its own module up by name
    spec.loader.exec_module(module)
    return module
