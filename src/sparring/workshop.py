"""What the stages of one run share: its plan, its players, its renderer, and the model loaded last."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring import players, prompts
from sparring.config import Config
from sparring.errors import InputError, SparringError
from sparring.plan import Plan
from sparring.rundir import RunDir
from sparring.rundir.store import Rows, read_json
from sparring.types import Example, Player

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

DATE = "date.json"


class Workshop:
    """One run being worked on."""

    def __init__(self, run: RunDir, config: Config, plan: Plan, start: Player) -> None:
        self.run, self.config, self.plan = run, config, plan
        self._start = start
        self._loaded: tuple[str, nn.Module] | None = None

    def player(self, number: int) -> Player:
        """Player `number`, from its finished stage. Raises InputError where it is not done."""
        if number == self.plan.first:
            return self._start
        stage = next(r for r in self.plan.rounds if r.t + 1 == number).stage("player")
        if not self.run.done(stage):
            raise InputError(
                f"player {number} is not there yet: {stage.folder} is not done; "
                f"continue with `sparring run {self.run.path}`"
            )
        folder = self.run.path / stage.folder
        return Player(str(folder), number, read_json(folder / "stage.json")["counts"]["sha"])

    def model(self, player: Player) -> nn.Module:
        """A player's weights, kept until another player's are asked for. Raises SparringError if they were changed."""
        if self._loaded is None or self._loaded[0] != player.sha:
            self._loaded = None
            if players.identify(player.path, self.config.model.revision) != player.sha:
                raise SparringError(
                    f"{player.path}: its files changed since it was made (another content hash); restore them"
                )
            self._loaded = (player.sha, players.load_model(player.path, self.config.model))
        return self._loaded[1]

    def learner(self, start: Player) -> nn.Module:
        """Weights to train, beginning as a player's; they are that player's no longer, so they are not kept."""
        model, self._loaded = self.model(start), None
        return model

    def keep(self, model: nn.Module, sha: str) -> None:
        """Hand a trained model on as the player it became, so that the next stage need not load it."""
        self._loaded = (sha, model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The start player's; every later player is saved with it."""
        model = self.config.model
        return prompts.load_tokenizer(
            self._start.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )

    @cached_property
    def renderer(self) -> prompts.Renderer:
        model = self.config.model
        stops = players.stop_ids(self._start.path, model)
        return prompts.Renderer(self.tokenizer, model.chat_template, stops, data_date(self.run.path))

    @cached_property
    def compute(self) -> torch.dtype:
        """Precision of forward passes."""
        return players.compute_dtype(self.config.model)

    @lru_cache(maxsize=4)  # noqa: B019 -- a workshop lives as long as the run it drives
    def rendered(self, part: str, max_new_tokens: int, limit: int | None) -> prompts.Rendering:
        """The first `limit` examples of `train` or `heldout` as token ids."""
        examples = Rows(self.run.path / "data" / part, Example)
        chosen = examples[: limit or len(examples)]
        model = players.model_config(self._start.path, self.config.model)
        return fitted(chosen, self.config, model, self.tokenizer, self.renderer, max_new_tokens)


def fitted(
    examples: Sequence[Example], config: Config, model: Any, tokenizer: PreTrainedTokenizerBase,
    renderer: prompts.Renderer, max_new_tokens: int,
) -> prompts.Rendering:  # fmt: skip
    """Examples as token ids that a model, given by its configuration, has room and embeddings for.

    Raises InputError where it has not.
    """
    context, vocabulary = players.context_length(model, tokenizer), players.vocabulary(model)
    rendering = prompts.render(examples, renderer, config.data, context=context, max_new_tokens=max_new_tokens)
    largest = max(max(ids, default=0) for r in rendering.rows for ids in (r.prompt, r.gold, r.generated or ()))
    if vocabulary is not None and largest >= vocabulary:
        raise InputError(
            f"{config.model.path}: its tokenizer writes `{tokenizer.convert_ids_to_tokens(largest)}` as {largest}, but the "
            f"model has {vocabulary} embeddings; resize them (model.resize_token_embeddings) or give the model its own tokenizer"
        )
    return rendering


def data_date(run: Path) -> datetime | None:
    """When a run's data was made, which is the date that its templates write; None before that."""
    file = run / "data" / DATE
    return datetime.fromisoformat(read_json(file)) if file.exists() else None
