"""What the stages of one run share: its plan, its players, its renderer, and the models in memory.

Of whole models the one used last stays in memory; with LoRA the start player does, and every adapter on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparring import adapters, crew, players, progress, prompts, threads
from sparring.adapters import Base
from sparring.config import Config, ModelConfig
from sparring.crew import Crew, Rank
from sparring.errors import InputError, SparringError
from sparring.plan import Plan, RoundPlan
from sparring.progress import Progress
from sparring.rundir import RunDir
from sparring.rundir.metrics import Metrics
from sparring.rundir.store import Claim, Rows, read_json, write_json, write_shards
from sparring.rundir.view import read_run_recipe
from sparring.sinks import Trackers
from sparring.types import Example, Player

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sparring.sharding import Team

T = TypeVar("T")
_RENDERINGS = 4
"""Data as token ids that a workshop holds: what training, its guard and evaluation read."""
DATE = "date.json"


class Workshop:
    """One run being worked on."""

    def __init__(self, run: RunDir, config: Config, plan: Plan, start: Player, rank: Rank | None = None) -> None:
        """`rank`: which of several processes this is, in one that was started to share a stage's work."""
        self.run, self.config, self.plan, self.rank = run, config, plan, rank
        self._start = start
        self._outside: dict[str, Player] = {}
        self._settled = False
        self._models: dict[str, tuple[str, nn.Module]] = {}
        """Content hash to that of the whole model whose weights it holds, and the model."""
        self._team: Team | None = None
        self._renderings: dict[tuple[Any, ...], prompts.Rendering] = {}
        """The last few by what they were asked for; a cache on the method would hold every workshop."""

    @cached_property
    def progress(self) -> Progress:
        """What the stages tell of how far they are."""
        if self.rank is not None:
            return Progress(crew.progress_file(self.run.path, self.rank.number), terminal=False)
        return Progress(self.run.path / progress.FILE)

    @contextmanager
    def together(self, name: str) -> Iterator[None]:
        """Within the block players are cut over all processes, which do everything at the same time.

        name: by which the processes find each other, once.
        """
        from sparring.sharding import team

        assert self.rank is not None
        self.free()
        with team(self.rank, self.run.path, name, players.device_of(self.config.model), offload=False) as self._team:
            try:
                yield
            finally:
                self._models.clear()
                self._team = None

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank is None or not self.rank.number

    def claim(self, folder: Path) -> Claim:
        """Who makes which shard of a folder: this process all of them, unless several share the work."""
        if self._team is not None:
            return lambda n: nullcontext(self.first)
        return (lambda n: nullcontext(True)) if self.rank is None else crew.Claims(self.run.path, folder)

    def write(
        self,
        folder: Path,
        row_type: type[T],
        chunks: Sequence[Callable[[], Sequence[T]]],
        on_done: Callable[[int], None],
    ) -> None:
        """Make and write this process's part of a folder's shards."""
        if self._team is None:
            write_shards(folder, row_type, chunks, on_done, self.claim(folder))
        else:
            from sparring.rundir.shards import write_shards_together

            write_shards_together(self._team, folder, row_type, chunks, on_done)

    @cached_property
    def crew(self) -> Crew:
        """The processes that share the stages of this run."""
        cluster = self.config.cluster
        return Crew(self.run.path, cluster.processes, cluster.launcher, self.run.lock_handle)

    @cached_property
    def metrics(self) -> Metrics:
        """What the stages' figures are written to."""
        return Metrics(self.run.path, self.trackers.tell)

    @cached_property
    def trackers(self) -> Trackers:
        """Where the figures go besides."""
        return Trackers(self.run.path, self.config.track, lambda: read_run_recipe(self.run.path))

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

    def resolve(self, r: RoundPlan, role: str) -> Player:
        """Who plays a role in a round: a player of the run, the best one that the round found, or a model from elsewhere."""
        who = r.roles[role]
        if who == "best":
            from sparring.rundir.view import RunView

            view = RunView(self.run.path)
            best = view.best_player(upto=r.t)
            figure = self.config.evaluate.best if self.config.evaluate.best_task else "n"
            if best is None or any(e is None or figure not in e for e in view.evaluations(upto=r.t).values()):
                raise InputError(
                    f"{r.folder}: its {role} is `best`, but a player is not evaluated yet; do `sparring eval` of the "
                    f"rounds before, or `sparring run {self.run.path}`"
                )
            who = best
        if isinstance(who, int):
            return self.player(who)
        if who not in self._outside:
            self._outside[who] = Player(who, None, players.identify(who))
        return self._outside[who]

    def model(self, player: Player) -> nn.Module:
        """A player's weights, kept until another whole model is asked for; of an adapter as long as its base is.

        Within `together` this process's part of them, of which the one asked for last is kept.
        Nothing that is done with another player's model changes it. Raises SparringError if its files were changed.
        """
        if player.sha not in self._models:
            self._load(player)
        return self._models[player.sha][1]

    def beside(self, player: Player) -> nn.Module:
        """A player's weights that stay what they are while other players are loaded and the learner is trained."""
        if self._lora:
            return self.model(player)
        self._check(player)
        return self._read(player.path, self.settings_of(player))

    def learner(self, start: Player, t: int) -> nn.Module:
        """Weights to train in round t, beginning as a player's.

        With LoRA only an adapter's are trainable: a copy of the start's on the same base, or where the start is a whole
        model a new one on it. Else they are that player's no longer, so they are not kept.
        """
        model = self.model(start)
        if not self._lora:
            del self._models[start.sha]
            return model
        settings = self.config.model
        if adapters.is_adapter(model):
            base = players.base_of(start.path)
            weights = adapters.weights(model)
            return adapters.copied(self._whole(base, start), base, settings, weights, start.path)
        path = str(Path(start.path).expanduser().resolve()) if players.looks_local(start.path) else start.path
        seed = self.config.seed * 1009 + t - self.plan.first
        on = Base(path, self.settings_of(start).revision, start.sha, self.settings_of(start).quantize)
        return adapters.fresh(model, on, settings, seed)

    def aside(self) -> Workshop:
        """The same run with models of its own, on the CPU."""
        model = self.config.model.model_copy(update={"device": "cpu"})
        return Workshop(self.run, self.config.model_copy(update={"model": model}), self.plan, self._start, self.rank)

    def keep(self, model: nn.Module, sha: str) -> None:
        """Hand a trained model on as the player it became, so that the next stage need not load it."""
        self._make_room()
        if adapters.is_adapter(model):
            self._models[sha] = (adapters.base(model).sha, model.requires_grad_(False))
        else:
            self._models[sha] = (sha, model)

    def close(self) -> None:
        """End what looks on and what shares the work, and hold no weights."""
        self.crew.close()
        self.progress.close()
        self.trackers.close()
        self._models.clear()

    def free(self) -> None:
        """Hold no weights: whatever is asked for is loaded anew, and other processes have the memory."""
        import gc

        import torch

        self._models.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _lora(self) -> bool:
        return self.config.model.lora_rank > 0

    def _load(self, player: Player) -> None:
        self._check(player)
        settings = self.config.model
        if self._team is not None:
            self._models.clear()
            with self._team.turn():
                self._models[player.sha] = (player.sha, self._team.share(self.aside().model(player)))
            return
        # Whoever was trained here is an adapter; any other player counts as a whole model, even where it is stored as one
        if self._lora and player.round not in (None, self.plan.first):
            base, weights = players.base_of(player.path), adapters.load_weights(Path(player.path))
            model = adapters.copied(self._whole(base, player), base, settings, weights, player.path)
            self._models[player.sha] = (base.sha, model.requires_grad_(False))
        else:
            self._make_room()
            model = self._read(player.path, self.settings_of(player))
            if player.round is not None:
                self._check_trainable(model)
            self._models[player.sha] = (player.sha, model)

    def _check_trainable(self, model: Any) -> None:
        """Raises InputError where rounds are to recompute activations, which not every model can: told before they play."""
        wanted = any(r.train.gradient_checkpointing for r in self.config.rounds)
        if wanted and not model.supports_gradient_checkpointing:
            raise InputError(
                f"train.gradient_checkpointing: {type(model).__name__} cannot recompute activations; set it to false and "
                "lower train.micro_tokens instead"
            )

    def _read(self, path: str, config: ModelConfig) -> nn.Module:
        """A whole model from its files; the first one of a process is timed where the number of threads is to be found."""
        model = players.load_model(path, config)
        if config.threads == "auto" and self.rank is None and not self._settled:
            self._settled = True
            if threads.available() > 1 and next(model.parameters()).device.type == "cpu":
                file = self.run.path / threads.FILE
                before = read_json(file) if file.exists() else {}
                found = threads.settled(before, model, players.context_length(model.config, self.tokenizer))
                if found is not before:
                    write_json(file, found)
                threads.use(found["threads"])
        return model

    def _whole(self, base: Base, player: Player) -> nn.Module:
        """The base of a player that is an adapter; the start player at hand, wherever that lies now, if it is that."""
        if base.sha == self._start.sha:
            return self.model(self._start)
        if base.sha not in self._models:
            players.check_base(player.path, base)
            self._make_room()
            at = self.config.model.model_copy(update={"revision": base.revision, "quantize": base.quantize})
            self._models[base.sha] = (base.sha, self._read(base.path, at))
        return self._models[base.sha][1]

    def settings_of(self, player: Player) -> ModelConfig:
        """How a player is loaded."""
        return players.settings_of(player, self._start, self.config.model)

    def _check(self, player: Player) -> None:
        if self.rank is not None and self.rank.local:
            return  # the first process of each machine reads the same files
        if players.identify(player.path, self.settings_of(player).revision) != player.sha:
            raise SparringError(
                f"{player.path}: its files changed since it was made (another content hash); restore them"
            )

    def _make_room(self) -> None:
        """Drop every whole model, but with LoRA the start player, and the adapters on them."""
        self._models = {sha: kept for sha, kept in self._models.items() if self._lora and kept[0] == self._start.sha}

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

    def rendered(
        self, part: str, max_new_tokens: int, limit: int | None, template: str | None = None
    ) -> prompts.Rendering:
        """The first `limit` examples of `train` or `heldout` as token ids."""
        key = part, max_new_tokens, limit, template
        if key not in self._renderings:
            while len(self._renderings) >= _RENDERINGS:
                del self._renderings[next(iter(self._renderings))]
            self._renderings[key] = self._render(part, max_new_tokens, limit, template)
        return self._renderings[key]

    def _render(self, part: str, max_new_tokens: int, limit: int | None, template: str | None) -> prompts.Rendering:
        examples = Rows(self.run.path / "data" / part, Example)
        chosen = examples[:limit] if limit is not None and limit < len(examples) else examples
        model = players.model_config(self._start.path, self.config.model)
        return fitted(chosen, self.config, model, self.tokenizer, self.renderer, max_new_tokens, template)

    def examples(self, ids: Iterable[str]) -> list[Example]:
        """Training examples by id, in the order asked for."""
        return [self._by_id[name] for name in ids]

    @cached_property
    def _by_id(self) -> dict[str, Example]:
        return {example.id: example for example in Rows(self.run.path / "data" / "train", Example)}

    def hidden(self, r: RoundPlan) -> int | None:
        """The token that the released SPIN code hides from attention; None for this library's own tokens."""
        return None if r.method.official is None else self.tokenizer.eos_token_id


def fitted(
    examples: Sequence[Example], config: Config, model: Any, tokenizer: PreTrainedTokenizerBase,
    renderer: prompts.Renderer, max_new_tokens: int, template: str | None = None,
) -> prompts.Rendering:  # fmt: skip
    """Examples as token ids that a model, given by its configuration, has room and embeddings for.

    Raises InputError where it has not.
    """
    context, vocabulary = players.context_length(model, tokenizer), players.vocabulary(model)
    rendering = prompts.render(
        examples, renderer, config.data, context=context, max_new_tokens=max_new_tokens, template=template
    )
    if vocabulary is not None and (largest := rendering.largest) >= vocabulary:
        raise InputError(
            f"{config.model.path}: its tokenizer writes `{tokenizer.convert_ids_to_tokens(largest)}` as {largest}, but the "
            f"model has {vocabulary} embeddings; resize them (model.resize_token_embeddings) or give the model its own tokenizer"
        )
    return rendering


def data_date(run: Path) -> datetime | None:
    """When a run's data was made, which is the date that its templates write; None before that."""
    file = run / "data" / DATE
    return datetime.fromisoformat(read_json(file)) if file.exists() else None
