"""The published recipes load, and say what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparring import methods
from sparring.config.recipe import load, read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_loads(path: Path) -> None:
    config = load(read_recipe(path), methods.signature, path)
    assert config.model.path and config.data.path
    assert config.run.startswith("runs/")


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
