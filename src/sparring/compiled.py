"""Decoder layers through torch.compile, and on a GPU log-probs, where timing shows that it pays.

What compiling saves is the way to memory and back between small operations: norms, rotations, gates, casts. Attention
stays as it is (`attention.py`), and so do the products. A compiled layer rounds elsewhere than a plain one, so a round
is trained by one of the two from its first step to its last, whatever happens in between.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from sparring.attention import unwrapped

log = logging.getLogger("sparring")
T = TypeVar("T")

FILE = "compile.json"
"""What was found for each round, in a run's folder: training that goes on computes as it began."""
LEAST = 300.0
"""Seconds that training must be about to take before compiling, which itself takes half a minute to two, is tried."""
SLOW = 2e10
"""Operations a second that every machine makes: not even one pass is timed for a training that is short by these."""
WORTH = 0.05
"""Share of a pass's time that it must save."""
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of which a transformers model is made; empty for a model that does not say."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in unwrapped(model).modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Within it the model's layers run compiled, for rows of any length; what is computed first is waited for."""
    import torch

    from sparring import chosen

    # What was compiled before, for other rows or another round's learner, would decide what is computed here
    torch.compiler.reset()
    own = layers(model)
    before = [layer.__dict__.get("forward") for layer in own]
    for layer in own:
        layer.__dict__["forward"] = torch.compile(layer.forward, dynamic=True)
    try:
        with chosen.compiled():
            yield
    finally:
        for layer, forward in zip(own, before, strict=True):
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward


def settled(model: nn.Module, once: Callable[[], object], passes: float, tokens: int) -> dict[str, Any]:
    """Whether compiling pays (`pays`) for so many passes like `once`, of so many tokens, and the seconds that say so.

    A short training is told by its tokens, of which each takes six operations a weight, else by one pass, which it does
    not wait to be a warm one.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    if 6 * weights * tokens * passes < SLOW * LEAST:
        return {"pays": False}
    found: dict[str, Any] = {"pays": False, "plain": _seconds(once)}
    if found["plain"] * passes < LEAST or not layers(model):
        return found
    log.info("compiling the model's layers, which takes a minute or two")
    with contextlib.ExitStack() as stack:
        if problem := begin(stack, model, once):
            return found | {"problem": problem}
        found["compiled"] = min(_seconds(once) for _ in range(2))
    found["plain"] = min(found["plain"], _seconds(once))
    return found | {"pays": found["compiled"] <= (1 - WORTH) * found["plain"]}


def begin(stack: contextlib.ExitStack, model: nn.Module, once: Callable[[], object]) -> str | None:
    """Have the model's layers compiled until `stack` ends; says what went wrong where they cannot be, and leaves them.

    They are compiled for the rows of `once`, and what they compute may depend on which those were: always the same ones
    make training that goes on repeat to the bit.
    """

    @contextlib.contextmanager
    def tried() -> Iterator[None]:
        with compiled(model):
            once()
            yield

    made = entered(stack, tried)
    if not isinstance(made, Failed):
        return None
    log.info("layers are not compiled, training takes longer: %s", made.problem)
    return made.problem


@dataclass(frozen=True)
class Failed:
    """Why something was not compiled."""

    problem: str
    kind: type[Exception]


def entered(stack: contextlib.ExitStack, make: Callable[[], contextlib.AbstractContextManager[T]]) -> T | Failed:
    """What `make` compiles, until `stack` ends.

    A program that is stopped while it compiles can leave a broken file in torch's cache, so a second attempt is made with
    an empty one.
    """
    failed = Failed("", Exception)
    for cache in (contextlib.nullcontext(), _empty_cache()):
        with contextlib.ExitStack() as trial:
            try:
                trial.enter_context(cache)
                made = trial.enter_context(make())
            except Exception as error:  # compilers fail in as many ways as there are machines
                failed = Failed(next(iter(str(error).strip().splitlines()), type(error).__name__), type(error))
                continue
            stack.enter_context(trial.pop_all())
            return made
    return failed


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """A cache of torch's that lasts as long as what is compiled with it."""
    before = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory(prefix="sparring_compiled_") as folder:
        os.environ[_CACHE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[_CACHE]
            else:
                os.environ[_CACHE] = before


def _seconds(once: Callable[[], object]) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began
