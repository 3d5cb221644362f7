"""docs/extending.md writes a method from nothing: it must fit on a page and run like any other."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from helpers import cli, recipe, write_recipe
from sparring.rundir.view import RunView

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


def test_a_new_method_is_at_most_sixty_lines() -> None:
    assert len(BLOCKS[0].splitlines()) <= 60


@pytest.mark.parametrize("samples", [1, 3])
def test_the_page_method_runs_and_starts_at_log_one_plus_k(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, samples: int
) -> None:
    own = tmp_path / "choir.py"
    own.write_text(BLOCKS[0], encoding="utf-8")
    rounds = [{"method": f"{own}:method", "repeat": 2, "beta": 0.5}]
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds, play={"samples": samples})
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    assert code == 0, err
    for r in RunView(tmp_path / "run").rounds:
        assert r.log[0]["loss"] == pytest.approx(math.log(1 + samples), abs=1e-5)


def test_the_page_variant_starts_at_its_bar(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(BLOCKS[1], encoding="utf-8")
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": f"{own}:method", "bar": 4.0}])
    assert cli("run", write_recipe(tmp_path / "r.yaml", tree)).code == 0
    first = RunView(tmp_path / "run").rounds[0].log[0]["loss"]
    assert first == pytest.approx(math.log1p(math.exp(0.1 * 4.0)), abs=1e-5)
