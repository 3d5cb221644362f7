"""What one of several processes does in tests of training that is shared; imported by the processes themselves."""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sparring import adapters, chosen, fused, methods
from sparring.adapters import Base
from sparring.config import ModelConfig, TrainConfig
from sparring.crew import FOLDER, Rank
from sparring.gradient import Setting, gradient
from sparring.logps import packs, plain_token_logps, score, use_plain
from sparring.rundir.shards import ShardedStates
from sparring.rundir.states import TrainStates
from sparring.sharding import Team, team
from sparring.train import prepare, train, trained_parameters
from sparring.types import Frozen, Group

VOCAB = 29
WARM = ["teams", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "peft"]


@dataclass(frozen=True)
class Case:
    """A training, small enough to be done a dozen times."""

    method: str = "spin"
    optimizer: str = "rmsprop"
    dtype: torch.dtype = torch.float64
    lora: bool = False
    checkpointing: bool = False
    tied: bool = False
    plain: bool = False
    layers: int = 2
    epochs: int = 2


CASES = {
    "rmsprop": Case(),
    "adamw": Case(optimizer="adamw", tied=True),
    "coupled": Case(method="iris"),
    "logits": Case(method="dnpo", optimizer="adamw"),
    "lora": Case(lora=True),
    "checkpointing": Case(checkpointing=True),
    "float32": Case(dtype=torch.float32),
}
PLAYERS = {
    "whole": Case(dtype=torch.float32),
    "double": Case(),
    "adapter": Case(dtype=torch.float32, lora=True),
    "plain": Case(dtype=torch.float32, tied=True, plain=True),
}
"""Players that are scored."""
DEEP = Case(dtype=torch.float32, checkpointing=True, layers=6)
"""A learner of which it is counted what 16 bits add to its memory."""


def model(case: Case) -> Any:
    """A random Llama, two heads to a key head."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        tie_word_embeddings=case.tied,
    )
    return LlamaForCausalLM(config).to(case.dtype).eval()


def learner(case: Case) -> Any:
    """What is trained: the model, or an adapter on it that changes something already."""
    whole = model(case)
    if not case.lora:
        return whole
    found = adapters.fresh(whole, Base("here", None, "sha"), ModelConfig(lora_rank=2), seed=5)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return found


def groups(n: int = 11) -> list[Group]:
    """Pairs of unequal lengths and weights; a step of four leaves three for the last."""
    draw = random.Random(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(low, high)))

    return [
        Group(f"e{i}", tokens(1, 9), (tokens(2, 12), tokens(2, 12)), (1.0, 0.0), 1.0 + i % 3, ("gold", "s"), 0)
        for i in range(n)
    ]


def frozen(case: Case, paired: Sequence[Group]) -> dict[str, list[Frozen]]:
    """The start's log-probs under every role of the method."""
    prompts = [g.prompt for g in paired for _ in g.completions]
    lines = iter(score(model(case), prompts, [c for g in paired for c in g.completions], batch_size=4))
    rows = [tuple(next(lines) for _ in g.completions) for g in paired]
    return {
        role: [Frozen(g.sha, role, "r", row) for g, row in zip(paired, rows, strict=True)]
        for role in methods.make(case.method, {}).frozen
    }


@contextmanager
def own_layers() -> Iterator[None]:
    """Whole models by their own layers, as those in shards are: what is compared is what sharing changes, which is nothing."""
    before = fused.layers
    fused.layers = lambda model: []
    try:
        yield
    finally:
        fused.layers = before


class Stop(Exception):
    """Ends a training as a kill would."""


def trained(case: Case, folder: Path, own: Team | None = None, *, stop: int = 0, spoil: float = 1.0) -> Any:
    """Train a case with its states in `folder`, alone or with others; returns the learner.

    stop: raise Stop after this step. spoil: the last process's gradients are multiplied by this.
    """
    paired, device = groups(), own.device if own else torch.device("cpu")
    states: Any = TrainStates(folder / "train", "key")
    with own.turn() if own else nullcontext():
        made: Any = own.share(learner(case)) if own else learner(case)
    method = methods.make(case.method, {})
    extras = None
    if method.extras is not None:
        torch.manual_seed(1)
        extras = method.extras(16, VOCAB).to(device, case.dtype)
    companions = {role: model(case).to(device) for role in method.frozen if "frozen_logits" in method.needs}
    parameters = trained_parameters(made, extras)
    if own is not None:
        states = ShardedStates(states, own, parameters)
    if own is not None and own.number == own.size - 1:
        for parameter in parameters.values() if spoil != 1 else ():
            parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(spoil))

    def on_step(done: int, total: int, row: Any) -> None:
        if stop and done == stop:
            raise Stop

    settings = TrainConfig(
        lr=1e-3,
        optimizer=case.optimizer,  # type: ignore[arg-type]
        batch_size=4,
        micro_batch=1,
        epochs=case.epochs,
        warmup=0,
        clip=0.5,
        save_every=1 if stop else 100,
        gradient_checkpointing=case.checkpointing,
    )
    setting = Setting(None, None, companions, extras, own)
    train(made, paired, frozen(case, paired), method, settings, states, seed=2, setting=setting, on_step=on_step)
    return made


def weights(found: Any) -> dict[str, torch.Tensor]:
    """What was trained, by name."""
    return {name: p.detach().clone() for name, p in found.named_parameters() if p.requires_grad}


def work(number: int, size: int, place: Path, jobs: Sequence[tuple[str, str, dict[str, Any]]], kind: str) -> None:
    """The body of a process: jobs are (what, name of the case, options); the first process leaves `NAME.pt`."""
    torch.set_num_threads(1)
    try:
        (place / FOLDER).mkdir(exist_ok=True)
        device = torch.device(kind, number) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
        with own_layers(), team(Rank(number, size, number), place, "test", device, offload=False) as own:
            for what, name, options in jobs:
                _job(own, place / f"{what}-{name}", what, (PLAYERS if what == "player" else CASES)[name], options)
    except BaseException:
        (place / f"{number}.failed").write_text(traceback.format_exc())
        raise


ROWS = [(g.prompt, c) for g in groups() for c in (*g.completions, ())] + [((5, 6), ()), ((7,), ())]
"""Eleven prompts with two completions and an empty one each, and two with an empty one alone."""


def player_scores(case: Case, made: Any, compute: torch.dtype | None) -> list[tuple[float, ...]]:
    """The scores of `ROWS`, with and without their prompts' common copy."""
    if case.plain:
        use_plain(made)
    return score(made, [p for p, _ in ROWS], [c for _, c in ROWS], batch_size=3, compute=compute)


class Casts(TorchDispatchMode):
    """Counts the numbers in 16 bits that were made from float32 ones and are still there, at the end of the block."""

    def __init__(self) -> None:
        super().__init__()
        chosen.kernel(torch.bfloat16)  # whose trial casts too
        self._made: list[tuple[StorageWeakRef, int]] = []
        self.held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16 and found.dim() == 2:
            self._made.append((StorageWeakRef(found.untyped_storage()), found.numel()))
            self.held = max(self.held, sum(n for storage, n in self._made if not storage.expired()))
        return found


def _score_player(own: Team, place: Path, case: Case) -> None:
    """A player in shards: its scores in three precisions, its passes, its part of the weights and the casts it keeps."""
    with own.turn():
        made = own.share(learner(case))
    told: dict[str, Any] = {"parts": sum(p.to_local().numel() for p in made.parameters()), "passes": 0}  # type: ignore[union-attr, misc]

    def counted(*_: Any) -> None:
        told["passes"] += 1

    hook = made.register_forward_pre_hook(counted)
    told["scores"] = player_scores(case, made, None)
    hook.remove()
    if case.dtype == torch.float32:
        with Casts() as casts:
            told["bfloat16"] = player_scores(case, made, torch.bfloat16)
        told["casts"] = casts.held
    torch.save(told, place / f"{own.number}.pt")


def casts_of_a_step(own: Team | None, case: Case) -> int:
    """The most numbers in 16 bits that are there at a time of a gradient of two micro-batches."""
    made: Any = own.share(learner(case)) if own else learner(case)
    prepare(made, TrainConfig(gradient_checkpointing=case.checkpointing))
    with Casts() as casts:
        gradient(
            made, groups(4), {"reference": frozen(case, groups(4))["reference"]}, methods.make("spin", {}),
            micro_batch=1, setting=Setting(torch.bfloat16, team=own),
        )  # fmt: skip
    return casts.held


def _job(own: Team, place: Path, what: str, case: Case, options: dict[str, Any]) -> None:
    place.mkdir(exist_ok=True)
    if what == "player":
        _score_player(own, place, case)
        return
    if what == "casts":
        torch.save(casts_of_a_step(own, DEEP), place / f"{own.number}.pt")
        return
    if what == "score":
        made = own.share(learner(case))
        fast, plain = packs(made), [(g.prompt, g.completions[0]) for g in groups(5)]
        got = score(made, [p for p, _ in plain], [c for _, c in plain], batch_size=3)
        wanted = plain_token_logps(learner(case), [p for p, _ in plain], [c for _, c in plain])
        apart = max(
            abs(a - b) for row, line in zip(got, wanted.tolist(), strict=True) for a, b in zip(row, line, strict=False)
        )
        parts = {name: p.to_local().numel() for name, p in trained_parameters(made, None).items()}
        torch.save({"fast": fast, "apart": apart, "parts": sum(parts.values())}, place / f"{own.number}.pt")
        whole = own.gather(made)
        if own.first:
            adapters.save(whole, place) if case.lora else whole.save_pretrained(place)
        own.wait()
        return
    try:
        made = trained(case, place, own, **options)
    except Stop:
        own.wait()
        return
    whole = own.gather(made)
    if own.first:
        torch.save(weights(whole), place / "weights.pt")
    own.wait()
