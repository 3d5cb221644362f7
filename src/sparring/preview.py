"""Looking before and after spending anything: what a recipe would train on, and what players answer."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparring import data, players, prompts
from sparring.config import Config, Tree
from sparring.errors import InputError
from sparring.rundir.view import RunView
from sparring.types import Message, Player
from sparring.workshop import data_date, fitted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparring.play.hf import Answer


@dataclass(frozen=True)
class Preview:
    """A recipe's data as it would be trained on; no weights were loaded."""

    rendering: prompts.Rendering
    renderer: prompts.Renderer
    counts: dict[str, int]
    """Loading's and rendering's counts together."""
    train: int
    heldout: int


def check(recipe: Tree | Path | str, overrides: Sequence[str] = ()) -> Preview:
    """Load and render a recipe's data; what is told is of the training data. Raises InputError as a run would."""
    from sparring.api import prepare

    config = prepare(recipe, overrides).config
    loaded = data.load(config.data, config.seed)
    tokenizer = load_tokenizer(config)
    renderer = prompts.Renderer(
        tokenizer, config.model.chat_template, players.stop_ids(config.model.path, config.model)
    )
    longest = max(r.play.max_new_tokens for r in config.rounds)
    model = players.model_config(config.model.path, config.model)
    rendering = fitted(loaded.train, config, model, tokenizer, renderer, longest)
    if asked := loaded.heldout[: config.evaluate.limit]:
        fitted(asked, config, model, tokenizer, renderer, config.evaluation_play.max_new_tokens)
    counts = {**loaded.counts, **rendering.counts}
    return Preview(rendering, renderer, counts, len(loaded.train), len(loaded.heldout))


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: its start player's."""
    model = config.model
    return prompts.load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def chosen_number(view: RunView, name: str) -> int:
    """A player's number by number or `best`. Raises InputError for one that does not exist."""
    found = chosen_players(view, [name])[0]
    return next(number for number, player in view.players.items() if player is found or player == found)


def chosen_players(view: RunView, names: Sequence[str]) -> list[Player]:
    """Players by number or `best`. Raises InputError for one that does not exist."""
    found = []
    for name in names:
        number = view.best if name == "best" else int(name) if re.fullmatch(r"-?\d+", name) else None
        if number is None or number not in view.players:
            known = ", ".join(map(str, sorted(view.players)))
            raise InputError(
                f"player `{name}`: not in {view.path}; there are {known}"
                + (" and best" if view.best is not None else "")
            )
        found.append(view.players[number])
    return found


def make_renderer(view: RunView) -> prompts.Renderer:
    """The renderer of a run: its start player's tokenizer and stop tokens, its chat template and date."""
    model = view.config.model
    stops = players.stop_ids(model.path, model)
    return prompts.Renderer(load_tokenizer(view.config), model.chat_template, stops, data_date(view.path))


class Bench:
    """Players of one run, loaded and ready to answer."""

    def __init__(self, view: RunView, chosen: Sequence[Player]) -> None:
        self._config = view.config
        self._renderer = make_renderer(view)
        model, start = view.config.model, view.players[min(view.players)]
        self._context = players.context_length(players.model_config(model.path, model), load_tokenizer(view.config))
        self._models = [
            (player, players.load_model(player.path, players.settings_of(player, start, model))) for player in chosen
        ]

    def answers(self, prompt: str, *, temperature: float, seed: int | None = None) -> list[tuple[Player, Answer, str]]:
        """Each player's answer to one user turn, with its text; the same randomness for all of them.

        seed: None draws a new one from the clock.
        """
        from sparring.play.hf import key, sample

        ids = self._renderer.prompt([Message("user", prompt)])
        room = self._context - self._config.evaluation_play.max_new_tokens
        if not prompt.strip() or len(ids) > room:
            problem = f"has {len(ids)} tokens; the model has room for {room}" if prompt.strip() else "is empty"
            raise InputError(f"the prompt {problem}; give another one")
        row_key = key(time.time_ns() if seed is None else seed, 0, prompt, 0)
        result = []
        for player, model in self._models:
            answer = sample(
                model,
                [ids],
                [row_key],
                temperature=temperature,
                max_new_tokens=self._config.evaluation_play.max_new_tokens,
                stop_ids=self._renderer.stop_ids,
                batch_size=1,
                compute=players.compute_dtype(self._config.model),
            )[0]
            result.append((player, answer, self._renderer.decode(answer.tokens)))
        return result
