"""A commented recipe, made from the configuration's own documentation."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from sparring.config import SECTIONS, Config, fields

_HEAD = """\
# A recipe for `sparring run`. Every key is shown with its default; delete what you do not change.
# Any key of `play`, `train` and a method's hyper-parameters may be a list with one value per round.
"""
_ROUNDS = """\
# The rounds, in order. Leading rounds in which nobody plays (method: sft) prepare player 0, where self-play starts.
# `sparring methods` lists the methods with their hyper-parameters, which stand beside `method`.
# An entry may also have `repeat`, `limit` (use the first so many examples), `play: {…}` and `train: {…}`.
rounds:
  - method: spin
    repeat: 3
    # beta: [0.1, 0.1, 5.0]
    # memory: 1
"""


def recipe_text() -> str:
    """The recipe as YAML text."""
    parts = [_HEAD, *(_line(*field) for field in fields(Config))]
    for name, section in SECTIONS.items():
        parts.append(f"\n{name}:\n" + "".join(_line(*field, indent="  ") for field in fields(section)))
    return "".join([*parts, "\n", _ROUNDS])


def _line(name: str, default: Any, description: str, indent: str = "") -> str:
    comment = textwrap.fill(description, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    value = list(default) if isinstance(default, tuple) else default
    text = yaml.safe_dump({name: value}, default_flow_style=True, width=1000).strip()[1:-1]
    return f"{comment}\n{indent}{text}\n"
