"""Recipes, overrides and per-round lists to one checked `Config`; every default is pinned here."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparring
from sparring import api, methods
from sparring.config import SECTIONS, Config, PlayConfig, Section, TrainConfig, fields
from sparring.config.recipe import load, override, read_recipe, recipe_with_defaults
from sparring.errors import InputError

DEFAULTS: dict[str, Any] = {
    "run": "runs/spin",
    "seed": 0,
    "keep_states": False,
    "model": {
        "path": "",
        "revision": None,
        "chat_template": None,
        "compute": "auto",
        "attention": None,
        "compile": "auto",
        "logps": "auto",
        "device": "auto",
        "threads": "auto",
        "trust_remote_code": False,
        "lora_rank": 0,
        "lora_alpha": None,
        "lora_targets": "all-linear",
        "use_rslora": False,
        "quantize": None,
    },
    "data": {
        "path": "",
        "name": None,
        "split": "train",
        "format": "auto",
        "columns": {},
        "turns": "last",
        "limit": None,
        "heldout": None,
        "heldout_split": None,
        "heldout_size": 0.05,
        "gold_only": False,
        "on_bad_row": "fail",
        "max_prompt_tokens": None,
        "max_answer_tokens": None,
        "long_prompt": "fail",
        "long_answer": "cut",
    },
    # The paper samples at temperature 1, top-p 1
    "play": {
        "samples": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 256,
        "batch_size": 64,
        "chunk": 512,
        "engine": "hf",
    },
    "engine": {
        "model": None,
        "api_key_env": None,
        "parallel": 64,
        "timeout": 600.0,
        "retries": 5,
        "max_gap": 0.05,
        "python": None,
        "tensor_parallel": 1,
        "replicas": None,
        "gpu_memory": 0.9,
        "startup": 900.0,
        "arguments": (),
    },
    # The paper: RMSprop without weight decay, peak 5e-7, linear, 10 % warm-up, 2 epochs, batch 64
    "train": {
        "optimizer": "rmsprop",
        "lr": 5e-7,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "schedule": "linear",
        "floor": 0.0,
        "warmup": 0.1,
        "epochs": 2,
        "stop_epoch": None,
        "max_steps": None,
        "batch_size": 64,
        "micro_batch": 64,
        "micro_tokens": 4096,
        "clip": 1.0,
        "gradient_checkpointing": False,
        "save_every": 100,
        "log_every": 1,
    },
    "evaluate": {
        "verifier": None,
        "limit": 500,
        "trained": "drop",
        "samples": 1,
        "temperature": 1.0,
        "max_new_tokens": None,
        "engine": "hf",
        "scorer": None,
        "tasks": (),
        "best": "auto",
    },
    # Figures and their evidence: docs/controls.md
    "controls": {
        "displacement": 0.05,
        "trust_region": 0.3,
        "prompts": 64,
        "checks": 20,
        "backoff": 0.3,
        "backoffs": 3,
        "patience": 2,
    },
    "track": {"to": (), "project": "sparring"},
    "cluster": {"processes": 1, "launcher": None, "players": "whole", "cpu_offload": False},
}
SPIN = {"beta": 0.1, "loss": "logistic", "memory": 0, "memory_weight": 1.0, "duplicates": "weight"}
EXECUTION = {
    "config": {"run", "keep_states"},
    "model": {"attention", "compile", "logps", "device", "threads"},
    "data": set(),
    "play": {"batch_size", "engine"},  # of `engine` its kind counts where it is not hf (tests/test_engines.py)
    "engine": {
        "model",
        "api_key_env",
        "parallel",
        "timeout",
        "retries",
        "max_gap",
        "python",
        "tensor_parallel",
        "replicas",
        "gpu_memory",
        "startup",
    },
    "train": {"micro_batch", "micro_tokens", "gradient_checkpointing", "save_every", "log_every"},
    "evaluate": {"best", "engine", "scorer", "tasks"},  # tasks and wins are stages of their own
    "controls": set(),
    "track": {"to", "project"},
    "cluster": {"processes", "launcher", "players", "cpu_offload"},
}


def loaded(tree: dict[str, Any], *overrides: str) -> Config:
    return load(override(tree, overrides), methods.signature, None, overrides)


def test_defaults_are_the_papers() -> None:
    config = loaded({})
    assert config.model_dump(exclude={"rounds"}) == DEFAULTS
    assert [(r.method, r.hyper, r.limit) for r in config.rounds] == [("spin", SPIN, None)] * 3
    assert all(r.play == config.play and r.train == config.train for r in config.rounds)


def test_every_key_is_documented() -> None:
    for section in (Config, *SECTIONS.values()):
        described = {name: text for name, _, text in fields(section)}
        missing = set(section.model_fields) - set(described) - {*SECTIONS, "rounds"}
        assert missing == set()
        assert all(text.rstrip().endswith((".", "`")) and len(text) > 10 for text in described.values())


def test_execution_fields_are_no_part_of_identity() -> None:
    sections: dict[str, type[Section]] = {"config": Config, **SECTIONS}
    for name, section in sections.items():
        assert set(section.model_fields) - set(section().identity()) == EXECUTION[name], name
    fast = TrainConfig(micro_batch=1, micro_tokens=1, gradient_checkpointing=True, save_every=7, log_every=9)
    assert fast.identity() == TrainConfig().identity() != TrainConfig(lr=1e-6).identity()


def test_every_key_is_read_somewhere() -> None:
    """A setting that nothing reads is a promise that is not kept."""
    package = Path(inspect.getfile(sparring)).parent
    read: set[str] = set()
    for path in package.rglob("*.py"):
        if path.name not in ("config.py", "recipe.py"):
            read |= {
                node.attr
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute)
            }
    for name, section in {"": Config, **SECTIONS}.items():
        assert set(section.model_fields) - read == set(), name


# Numbers and types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "0.0000005", "5.0e-7", "'5e-7'", "+5e-7"])
def test_a_number_is_a_number_however_yaml_reads_it(text: str) -> None:
    tree = yaml.safe_load(f"train: {{lr: {text}}}\nrounds: [{{method: spin, beta: {text}}}]")
    config = loaded(tree)
    assert config.train.lr == config.rounds[0].train.lr == config.rounds[0].hyper["beta"] == 5e-7
    assert loaded({}, f"train.lr={text}", f"spin.beta={text}").rounds[2].hyper["beta"] == 5e-7
    several = loaded({}, f"train.lr=[{text}, 1e-6, {text}]")
    assert [r.train.lr for r in several.rounds] == [5e-7, 1e-6, 5e-7]


def test_text_that_looks_like_a_number_stays_text() -> None:
    config = loaded({"run": "1e5", "model": {"path": "7", "revision": "1234e5"}, "data": {"path": "m", "split": ".5"}})
    assert (config.run, config.model.path, config.model.revision, config.data.split) == ("1e5", "7", "1234e5", ".5")


@pytest.mark.parametrize(
    "setting", ["train.epochs=yes", "train.lr=on", "play.samples=true", "seed=no", "spin.beta=true", "spin.memory=yes"]
)
def test_yes_is_no_number(setting: str) -> None:
    with pytest.raises(InputError, match="number"):
        loaded({}, setting)


@pytest.mark.parametrize("tasks", ["5", "true"])
def test_tasks_are_a_list(tasks: str) -> None:
    with pytest.raises(InputError, match=r"evaluate\.tasks: a list of tasks is wanted"):
        api.configured({"run": "r"}, ["model.path=m", "data.path=d", f"evaluate.tasks={tasks}"])


def test_hyper_parameters_keep_their_type() -> None:
    config = loaded({}, "spin.memory=2", "spin.beta=1", "spin.loss=hinge")
    assert config.rounds[0].hyper == SPIN | {"memory": 2, "beta": 1.0, "loss": "hinge"}
    with pytest.raises(InputError, match=r"rounds.0.loss: 3 is not text"):
        loaded({}, "spin.loss=3")


def test_heldout_size_is_a_count_or_a_share() -> None:
    assert loaded({}, "data.heldout_size=20").data.heldout_size == 20
    assert isinstance(loaded({}, "data.heldout_size=20").data.heldout_size, int)
    assert loaded({}, "data.heldout_size=0.2").data.heldout_size == 0.2


def test_a_config_is_frozen() -> None:
    config = loaded({})
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0


# Rounds ---------------------------------------------------------------------------------------------------------------


def test_lists_give_one_value_per_round() -> None:
    tree = {
        "train": {"lr": [1e-3, 5e-7, 5e-7, 1e-7, 1e-7], "epochs": 1},
        "play": {"temperature": [1, 1, 2, 2, 3]},
        "rounds": [{"method": "sft"}, {"method": "spin", "repeat": 4, "beta": [0.1, 0.1, 0.1, 5]}],
    }
    config = loaded(tree)
    assert [r.method for r in config.rounds] == ["sft", "spin", "spin", "spin", "spin"]
    assert [r.train.lr for r in config.rounds] == [1e-3, 5e-7, 5e-7, 1e-7, 1e-7]
    assert [r.play.temperature for r in config.rounds] == [1, 1, 2, 2, 3]
    assert [r.hyper.get("beta") for r in config.rounds] == [None, 0.1, 0.1, 0.1, 5.0]
    assert {r.train.epochs for r in config.rounds} == {1}
    # Outside the rounds (evaluation) the first value counts
    assert (config.train.lr, config.play.temperature) == (1e-3, 1.0)


def test_an_entry_has_its_own_settings() -> None:
    tree = {
        "train": {"lr": 1e-6, "optimizer": "adamw"},
        "rounds": [
            {"method": "sft", "limit": 10, "train": {"lr": 1e-3}},
            {"method": "spin", "repeat": 2, "play": {"temperature": [1, 2]}, "train": {"lr": [2e-6, 3e-6]}},
        ],
    }
    config = loaded(tree)
    assert [(r.limit, r.train.lr, r.play.temperature, r.train.optimizer) for r in config.rounds] == [
        (10, 1e-3, 1, "adamw"),
        (None, 2e-6, 1, "adamw"),
        (None, 3e-6, 2, "adamw"),
    ]


def test_betas_are_a_pair_and_not_one_per_round() -> None:
    config = loaded({"train": {"betas": [0.5, 0.6]}})
    assert {r.train.betas for r in config.rounds} == {(0.5, 0.6)}


# Overrides ------------------------------------------------------------------------------------------------------------

RECIPE = {"rounds": [{"method": "sft"}, {"method": "spin", "repeat": 2}, {"method": "spin", "beta": 5.0}]}


def test_a_methods_override_sets_all_its_rounds() -> None:
    config = loaded(RECIPE, "spin.beta=0.5", "spin.memory=1")
    assert [(r.method, r.hyper.get("beta"), r.hyper.get("memory")) for r in config.rounds] == [
        ("sft", None, None),
        ("spin", 0.5, 1),
        ("spin", 0.5, 1),
        ("spin", 0.5, 1),
    ]


def test_one_round_is_addressed_by_its_number() -> None:
    config = loaded(RECIPE, "rounds.1.beta=[0.2, 0.3]", "rounds.2.train.lr=1e-7", "rounds.0.train={epochs: 5}")
    assert [r.hyper.get("beta") for r in config.rounds] == [None, 0.2, 0.3, 5.0]
    assert [r.train.lr for r in config.rounds] == [5e-7, 5e-7, 5e-7, 1e-7]
    assert [r.train.epochs for r in config.rounds] == [5, 2, 2, 2]


def test_later_overrides_win_and_the_recipe_is_not_changed() -> None:
    tree = {"train": {"lr": 1e-5}, "rounds": [{"method": "spin"}]}
    assert loaded(tree, "train.lr=1e-6", "train.lr=1e-7", "rounds.0.repeat=2").rounds[1].train.lr == 1e-7
    assert tree == {"train": {"lr": 1e-5}, "rounds": [{"method": "spin"}]}
    loaded({}, "rounds.0.repeat=1")
    assert len(loaded({}).rounds) == 3


def test_an_override_makes_the_section_that_is_missing() -> None:
    assert loaded({"train": None}, "train.lr=1e-6").train.lr == 1e-6
    assert loaded({}, "data.columns={prompt: q}").data.columns == {"prompt": "q"}
    assert loaded({}, "data.columns.prompt=q", "data.columns.completion=a").data.columns == {
        "prompt": "q",
        "completion": "a",
    }
    assert loaded({}, "run=a=b").run == "a=b"


def test_an_empty_section_is_one_of_defaults() -> None:
    assert loaded({"train": None, "play": None, "model": None, "evaluate": None, "data": None}) == loaded({})


# Recipes on disk ------------------------------------------------------------------------------------------------------


def test_what_a_run_records_loads_back_to_the_same(tmp_path: Path) -> None:
    tree = override(RECIPE, ["train.lr=[1e-3, 5e-7, 5e-7, 1e-7]", "data.columns={prompt: ü}", "spin.loss=hinge"])
    full = recipe_with_defaults(tree)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(full, sort_keys=False, allow_unicode=True), encoding="utf-8")
    again = load(read_recipe(path), methods.signature)
    assert again == load(tree, methods.signature)
    assert again.rounds[3].train.lr == 1e-7 and again.data.columns == {"prompt": "ü"}
    assert set(full["train"]) == set(TrainConfig.model_fields)


def test_an_error_names_the_line_or_the_override(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train:\n  lr: 1e-6\nrounds:\n  - method: sft\n  - method: spin\n    beta: .nan\n")
    with pytest.raises(InputError) as caught:
        load(read_recipe(path), methods.signature, path)
    assert str(caught.value) == f"{path}:6: rounds.1.beta: nan is not a finite number"
    settings = ["spin.beta=1", "train.lr=0"]
    with pytest.raises(InputError) as caught:
        load(override(read_recipe(path), settings), methods.signature, path, settings)
    assert str(caught.value) == "`train.lr=0`: train.lr: must be greater than 0, not 0"
    with pytest.raises(InputError) as caught:
        loaded({"train": {"lr": "fast"}})
    assert str(caught.value).startswith("train.lr: must be a valid number") and str(caught.value).endswith(
        ", not 'fast'"
    )


def test_anchors_and_merges_of_yaml_work(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("rounds:\n- &a {method: spin, beta: 1}\n- {<<: *a, repeat: 2}\n")
    assert [r.hyper["beta"] for r in load(read_recipe(path), methods.signature, path).rounds] == [1, 1, 1]


def test_a_method_with_lists_and_optional_numbers() -> None:
    def own(*, grid: list[float] = [1.0], cap: float | None = None, flag: bool = False) -> None:  # noqa: B006
        raise AssertionError("not made here")

    def signature(name: str) -> inspect.Signature:
        return inspect.signature(own)

    tree = {"rounds": [{"method": "own", "repeat": 2, "grid": [0.1, 0.2, 0.3], "cap": [1, 2], "flag": True}]}
    config = load(tree, signature)
    assert [r.hyper for r in config.rounds] == [{"grid": [0.1, 0.2, 0.3], "cap": c, "flag": True} for c in (1, 2)]
    assert load({"rounds": [{"method": "own", "cap": None}]}, signature).rounds[0].hyper["cap"] is None
    for key, value, problem in (("cap", "x", "finite number"), ("flag", 1, "true or false")):
        with pytest.raises(InputError, match=f"rounds.0.{key}: .* is not .*{problem}"):
            load({"rounds": [{"method": "own", key: value}]}, signature)


def test_evaluation_gives_all_players_the_longest_rounds_length() -> None:
    rounds = [{"method": "sft"}, {"method": "spin", "repeat": 2, "play": {"max_new_tokens": [30, 20]}}]
    tree = {"play": {"max_new_tokens": 10, "batch_size": 3}, "rounds": rounds}
    assert loaded(tree).evaluation_play == PlayConfig(max_new_tokens=30, batch_size=3)
    assert loaded(tree, "evaluate.max_new_tokens=7").evaluation_play.max_new_tokens == 7
    assert Config().evaluation_play == PlayConfig()
