"""The published recipes load, fit the hardware they name, run on a shrunk model, and say what their papers say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import sparring
import toy_tokenizers
from helpers import rows, write_jsonl
from sparring import cost, methods
from sparring.config.recipe import load, read_recipe
from sparring.cost import KNOWN

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
LOCAL = ("gsm8k_small", "stories_gpteacher")
"""Those whose models are made or given, and are planned where they lie."""
PLANNED = [path for path in RECIPES if path.stem not in LOCAL]
TOKENIZERS = {
    "mistral": toy_tokenizers.MAKERS["zephyr-legacy"],
    "llama": toy_tokenizers.llama3,
    "qwen2": toy_tokenizers.chatml,
}


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of two layers of each architecture, with a tokenizer of its family. Read only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}
    for kind, tokenizer in TOKENIZERS.items():
        folder, own = tmp_path_factory.mktemp(kind), tokenizer()
        config = AutoConfig.for_model(
            kind, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, vocab_size=len(own) + 3, max_position_embeddings=2048, bos_token_id=None,
            eos_token_id=own.eos_token_id, pad_token_id=None, tie_word_embeddings=kind != "mistral",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        own.save_pretrained(str(folder))
        made[kind] = folder
    return made


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_loads(path: Path) -> None:
    config = load(read_recipe(path), methods.signature, path)
    assert config.model.path and config.data.path
    assert config.run.startswith("runs/")


@pytest.mark.parametrize("path", PLANNED, ids=lambda p: p.stem)
def test_conversations_give_the_turns_that_spin_trains_on(path: Path) -> None:
    """SPIN takes the first turn of a conversation only (§6.1 and reformat.py); `limit` counts rows before any is dropped."""
    data = load(read_recipe(path), methods.signature, path).data
    if re.search("ultrachat|tulu", str(data.path)):
        assert data.turns == "first"


@pytest.mark.parametrize("path", PLANNED, ids=lambda p: p.stem)
def test_a_recipe_fits_the_hardware_that_it_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head has the command."""
    monkeypatch.chdir(path.parents[1])
    line = re.search(r"sparring plan (\S+)(.*)", path.read_text(encoding="utf-8"))
    assert line and line[1] == f"recipes/{path.name}"
    options = dict(re.findall(r"--([a-z-]+)(?: (\d\S*))?", line[2]))
    lengths = {
        name.replace("-", "_"): int(options[name]) for name in ("prompt-tokens", "answer-tokens") if name in options
    }
    planned = cost.plan(path, hardware=options.get("hardware", "cpu"), **lengths)
    config = load(read_recipe(path), methods.signature, path)
    assert config.model.path in KNOWN
    assert not planned.estimate.misfits
    assert planned.estimate.seconds > 600 and planned.estimate.disk > 1e8


def reward_model(model: Path, folder: Path) -> Path:
    """A random sequence classifier with one output, of a model's shape and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AutoConfig.from_pretrained(model, num_labels=1, pad_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def small(path: Path, model: Path, folder: Path) -> dict[str, Any]:
    """A recipe's first rounds with a small model, three rows and one step each; everything else is its own."""
    tree = read_recipe(path)
    data = write_jsonl(folder / "rows.jsonl", rows(3))
    tree["run"] = str(folder / "run")
    tree["model"] |= {"path": str(model), "revision": None, "device": "cpu", "threads": 1, "compute": "float32"}
    tree["data"] = {"path": str(data), "heldout_size": 0, "long_prompt": tree["data"].get("long_prompt", "fail")}
    tree["play"] = tree.get("play", {}) | {"max_new_tokens": 4, "engine": "hf"}
    tree["evaluate"] = tree.get("evaluate", {}) | {"engine": "hf"}
    tree.pop("cluster", None)
    tree["train"] |= {"max_steps": 1, "save_every": 1}
    # A team of three is whole in the third round; any other recipe is all there in the second
    most = 3 if path.stem.startswith("tpaw") else 2
    tree["rounds"] = [first_rounds(entry, min(entry.get("repeat", 1), most)) for entry in tree["rounds"]]
    return tree


def first_rounds(entry: dict[str, Any], n: int) -> dict[str, Any]:
    """The first n rounds of an entry: lists have a value per round."""
    cut = {
        k: first_rounds(v, n) if isinstance(v, dict) else v[:n] if isinstance(v, list) else v for k, v in entry.items()
    }
    return cut | {"repeat": n} if "repeat" in entry else cut


@pytest.mark.parametrize("path", PLANNED, ids=lambda p: p.stem)
def test_a_recipe_runs_with_a_shrunk_model(
    path: Path, shrunk: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first rounds train, with the optimizer, the rates and the roles of the recipe."""
    kind = KNOWN[read_recipe(path)["model"]["path"]].kind
    monkeypatch.chdir(path.parents[1])
    if path.stem.startswith("sppo"):
        monkeypatch.setenv("SPARRING_REWARD_MODEL", str(reward_model(shrunk[kind], tmp_path / "reward")))
    run = sparring.run(small(path, shrunk[kind], tmp_path))
    config = run.config
    assert [turn.stages["player"] for turn in run.rounds] == ["done"] * len(config.rounds)
    assert len(run.players) == 1 + len(config.rounds)


def test_spin_zephyr_is_the_papers() -> None:
    """SPIN Appendix B and §6.1."""
    path = next(p for p in RECIPES if p.stem == "spin_zephyr7b")
    config = load(read_recipe(path), methods.signature, path)
    assert [r.hyper["beta"] for r in config.rounds] == [0.1, 0.1, 0.1, 5.0]
    assert [r.train.lr for r in config.rounds] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert {(r.train.optimizer, r.train.epochs, r.train.batch_size, r.train.weight_decay) for r in config.rounds} == {
        ("rmsprop", 2, 64, 0.0)
    }
    assert {(r.hyper["memory"], r.hyper["loss"], r.play.temperature) for r in config.rounds} == {(1, "logistic", 1.0)}
    assert config.data.limit == 50_000
