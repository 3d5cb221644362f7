"""A decoder as one graph of torch.compile, for steps of decoding on a CPU, where timing shows that it pays.

Compiled layers (`compiled.py`) decode no faster: what enters and leaves them costs more than their small operations do.
Here a step is entered once. Attention is an operator of its own, which looks up the layout of the step that it is part
of; prompts are read by the model itself. A graph holds the weights as they were when it was made, in the precision of
products and laid out for those. It rounds elsewhere than the model does, so a stage that goes on after a kill plays as it
began.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparring import compiled as layers
from sparring import native
from sparring.attention import TRACED, Layout, Rule, States, packed, unwrapped
from sparring.fused import linears
from sparring.logps import autocast
from sparring.play.halved import halved
from sparring.play.slots import Decoder, Slots, decodes
from sparring.progress import OnRows

if TYPE_CHECKING:
    from sparring.play.hf import Answer

log = logging.getLogger("sparring")

Play = Callable[["Graph | None", int, OnRows], "Sequence[Answer]"]
"""A batch of answers of at most so many tokens, by a graph or without."""
LEAST_STEPS = 1024
"""A stage of fewer is not tried: steps that make it long then take so long each that products are all they are."""
_TOKENS = 17
"""Of each answer of a trial."""
_ROWS = 64
"""What a graph is compiled for, whoever uses it, as its rounding may depend on that; it takes any number from two on."""
_SLACK = 1e-4
"""Nats by which log-probs may always differ from the plain ones, see `_apart`."""
_TIMES = 3.0
"""In 16 bits they may by so many times as much as the plain ones differ from those of float32."""


class Misfit(Exception):
    """A model that cannot be one graph, or whose graph gives other numbers than it does."""


class Graph:
    """The decoder of a model on a CPU, compiled: a `slots.Decoder` of two rows or more."""

    def __init__(self, model: Any, compute: torch.dtype | None) -> None:
        """The weights are shared with the model until they are compiled."""
        self._model: Any = model
        self._half = _half(compute)
        own = unwrapped(model).get_decoder()
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in own.parameters()}
        self.decoder: Any = copy.deepcopy(own, shared).eval()
        self.rules: dict[int, Rule] = {}
        """By which rule each layer sees, which a trace has no way to keep."""
        self._forward: Any = torch.compile(self._traced, dynamic=True, fullgraph=True)

    def made_for(self, model: Any, compute: torch.dtype | None) -> bool:
        """Whether it stands for this model in this precision."""
        return self._model is model and self._half == _half(compute)

    def __call__(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        # Copies, as views are traced with the table that they belong to
        return self._step(ids.clone(), positions.clone(), layout)

    def first(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """The first call, which compiles: for rows of any number, with the weights of today."""
        ids, positions = ids.clone(), positions.clone()
        for x in (ids, positions):
            torch._dynamo.mark_dynamic(x, 1)
        with torch._inductor.config.patch(freezing=True):
            return self._step(ids, positions, layout)

    def close(self) -> None:
        """Let go of everything; it stands for no model any more."""
        self._model = self.decoder = self._forward = None

    def _step(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        _now.append((layout, self.rules))
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the graph has its own
                hidden: Tensor = self._forward(ids, positions)
                return hidden
        finally:
            _now.pop()

    def _traced(self, ids: Tensor, positions: Tensor) -> Tensor:
        half = self._half
        with torch.autocast("cpu", dtype=half, enabled=half is not None, cache_enabled=False):
            out = self.decoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False,
                layout=_OPERATOR,
            )  # fmt: skip
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


def fits(model: Any) -> bool:
    """Whether a graph of the model can be tried: it is on a CPU, and decoded in slots."""
    return next(model.parameters()).device.type == "cpu" and decodes(model)


@contextlib.contextmanager
def compiled(model: Any, compute: torch.dtype | None = None) -> Iterator[Graph]:
    """A graph for `hf.sample`, as long as the model's weights stay what they are; takes half a minute, and no gradients.

    Raises Misfit for a model that is to be decoded without one, and whatever torch.compile raises.
    """
    if not fits(model):
        raise Misfit("it is not on a CPU, or not decoded in slots")
    # What was compiled before would decide what is computed here
    torch.compiler.reset()
    graph, training = Graph(model, compute), model.training
    model.eval()
    try:
        with packed(graph.decoder, TRACED):
            _check(graph, model, compute)
            model.train(training)
            yield graph
    finally:
        model.train(training)
        graph.close()
        _forget()


def begin(stack: contextlib.ExitStack, model: Any, compute: torch.dtype | None) -> Graph | layers.Failed:
    """`compiled` until `stack` ends; says what went wrong where that cannot be."""
    made = layers.entered(stack, lambda: compiled(model, compute))
    if isinstance(made, layers.Failed):
        log.info("the decoder is not compiled, playing takes longer: %s", made.problem)
    return made


def settled(
    stack: contextlib.ExitStack, play: Play, make: Callable[[contextlib.ExitStack], Graph | layers.Failed],
    answers: int, most: int,
) -> tuple[Graph | None, dict[str, Any]]:  # fmt: skip
    """Whether a graph pays (`pays`) for so many answers of at most `most` tokens, and what says so; with it, if it does.

    Seconds are those of a token. A short stage is told by one trial, which it does not wait to be a warm one.
    """
    trial = _trial(play, None)
    found: dict[str, Any] = {"pays": False, "plain": trial.token, "stage": trial.seconds(answers, most)}
    if found["stage"] < layers.LEAST:
        return None, found
    log.info("compiling the decoder, which takes half a minute")
    with contextlib.ExitStack() as kept:
        graph = make(kept)
        if isinstance(graph, layers.Failed):
            return None, found | {"problem": graph.problem}
        found["compiled"] = min(_trial(play, graph).token for _ in range(2))
        found["plain"] = min(found["plain"], _trial(play, None).token)
        found["pays"] = found["compiled"] <= (1 - layers.WORTH) * found["plain"]
        if found["pays"]:
            stack.enter_context(kept.pop_all())
            return graph, found
    return None, found


@dataclass(frozen=True)
class _Trial:
    """A batch of short answers."""

    prompt: float
    """Seconds of reading one."""
    token: float
    """Seconds of one token."""
    ends: float
    """How many answers end, per token."""

    def seconds(self, answers: int, most: int) -> float:
        """Of so many answers that end as often and are cut at `most` tokens."""
        tokens = (1 - (1 - self.ends) ** most) / self.ends if self.ends else most
        return answers * (self.prompt + tokens * self.token)


def _trial(play: Play, graph: Graph | None) -> _Trial:
    told: list[tuple[float, int]] = []
    began = time.perf_counter()
    answers = play(graph, _TOKENS, lambda ended, decoded: told.append((time.perf_counter(), decoded)))
    steps = [(now - before) / decoded for (before, _), (now, decoded) in pairwise(told)]
    ends = sum(answer.finish == "stop" for answer in answers) / sum(len(answer.tokens) for answer in answers)
    # The median: the first step may compile attention in C
    return _Trial((told[0][0] - began) / len(answers), median(steps or [0.0]), ends)


def _check(graph: Graph, model: Any, compute: torch.dtype | None) -> None:
    """Compile the graph and compare it with the model on random rows. Raises Misfit."""
    try:
        plain = _steps(model, compute, graph.rules)
        got = _steps(model, compute, {}, graph.first)
    except (torch._dynamo.exc.BackendCompilerFailed, torch._dynamo.exc.InvalidBackend):
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Misfit(
            f"it is no single graph: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
        ) from error
    exact = plain if _half(compute) is None else _steps(model, None, {})
    apart, allowed = _apart(got, plain), max(_SLACK, _TIMES * _apart(plain, exact))
    if not apart <= allowed:
        raise Misfit(f"it would give log-probs that differ by {apart:.2g}, and {allowed:.2g} is the precision")


@torch.no_grad()
def _steps(
    model: Any, compute: torch.dtype | None, rules: dict[int, Rule], decoder: Decoder | None = None
) -> list[Tensor]:
    """Log-probs [N, V] after a step of many rows, and of fewer and fewer; notes rules where the model computes them."""
    vocabulary = unwrapped(model).get_output_embeddings().weight.shape[0]
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (1 + i % 8,), generator=random).tolist() for i in range(_ROWS)]
    with autocast(torch.device("cpu"), compute), halved([model], compute, linears([model], compute)), packed(model):
        plain = Slots(model, _ROWS, 16).plain
        slots = Slots(model, _ROWS, 16, decoder or (lambda ids, at, layout: plain(ids, at, _Noting(layout, rules))))
        slots.fill(prompts, range(_ROWS))
        tokens = torch.randint(vocabulary, (3, _ROWS), generator=random)
        widths = (_ROWS, _ROWS // 2, 2)
        return [slots.step(t[:n], 9 + i).log_softmax(-1) for i, (t, n) in enumerate(zip(tokens, widths, strict=True))]


def _apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Nats between log-probs, the mean over the vocabulary in the row where it is largest."""
    return native.most((a - b).abs().mean(-1).max() for a, b in zip(some, others, strict=True))


def _half(compute: torch.dtype | None) -> torch.dtype | None:
    return compute if compute in (torch.bfloat16, torch.float16) else None


def _forget() -> None:
    """Have torch drop what it compiled; its modules would keep the frozen weights as long as the process lives."""
    torch.compiler.reset()
    with contextlib.suppress(ImportError, AttributeError):  # torch's own affair, which a version may keep elsewhere
        from torch._inductor.codecache import PyCodeCache

        for module in PyCodeCache.modules:
            sys.modules.pop(module.__name__, None)
        PyCodeCache.cache_clear()


# The operator -------------------------------------------------------------------------------------------------------

_now: list[tuple[Layout, dict[int, Rule]]] = []
"""The layout of the step that is being computed, and the rules of its graph."""


class _Noting:
    """A layout that notes by which rule each layer sees."""

    def __init__(self, layout: Layout, rules: dict[int, Rule]) -> None:
        self._layout, self._rules = layout, rules

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        self._rules[layer] = rule
        return self._layout.attend(layer, states, rule)


class _Operator:
    """A layout for tracing, which stands for those of all steps."""

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        mixed: Tensor = torch.ops.sparring.attend(
            states.query, states.key, states.value, layer, states.scale, states.softcap
        )
        return mixed


_OPERATOR = _Operator()


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, softcap: float | None) -> Tensor:
    layout, rules = _now[-1]
    return layout.attend(layer, States(query, key, value, scale, softcap), rules[layer]).contiguous()


def _shaped(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, softcap: float | None) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])


# Not `torch.library.custom_op`, whose own checks of a call take as long as the small operations that are saved
_LIBRARY: Any = torch.library.Library("sparring", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("attend(Tensor query, Tensor key, Tensor value, int layer, float scale, float? softcap) -> Tensor")
_LIBRARY.impl("attend", _attend, "CPU")
_LIBRARY.impl("attend", _shaped, "Meta")
