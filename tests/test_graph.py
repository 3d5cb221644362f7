"""Decoders compiled as one graph: the plain ones' answers, when they are taken, and that nothing of them is left."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from sparring import attention, compiled, fused
from sparring.crew import Rank
from sparring.errors import InputError
from sparring.play import graph, hf, slots
from sparring.play.hf import Answer, sample
from sparring.rundir.store import Rows, read_json
from sparring.stages.play import _Graphs
from sparring.types import Sample, Turn
from test_packed import FAST, made

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
PROMPTS = [[3 + (7 * i * j) % 90 for j in range(1, 2 + i % 23)] for i in range(40)]
BOTH = [None, torch.bfloat16]


def answers(model: Any, **change: Any) -> list[Answer]:
    how = {"temperature": 1.0, "max_new_tokens": 20, "stop_ids": [5, 6, 7, 8], "batch_size": 16} | change
    return sample(model, PROMPTS, range(len(PROMPTS)), **how)  # type: ignore[arg-type]


def alike(some: list[Answer], others: list[Answer], most: float) -> None:
    assert [a.tokens for a in some] == [a.tokens for a in others]
    for a, b in zip(some, others, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=most)


class Eager:
    """torch.compile that compiles nothing; its graphs scale hidden states."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.widths: list[int] = []
        self.scale = 1.0
        patch.setattr(torch, "compile", self.compile)

    def compile(self, forward: Any, *, dynamic: bool, fullgraph: bool = False) -> Any:
        assert dynamic
        if not fullgraph:
            return forward  # a layer, in training

        def call(ids: Any, positions: Any) -> Any:
            self.widths.append(ids.shape[1])
            return forward(ids, positions) * self.scale

        return call


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Eager:
    return Eager(monkeypatch)


def broken(*_: Any, **__: Any) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    return forward


# Graphs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", BOTH)
@pytest.mark.parametrize("name", ["grouped heads", "window in some layers", "soft caps"])
def test_steps_of_two_rows_or_more_go_through_the_graph(
    name: str, compute: torch.dtype | None, eager: Eager, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compute is not None:
        monkeypatch.setattr(fused, "layers", lambda _: [])  # which round elsewhere in 16 bits
    model = made(*FAST[name])
    wanted = answers(model, compute=compute)
    steps: list[int] = []
    step = slots.Slots.step
    monkeypatch.setattr(slots.Slots, "step", lambda *given: (steps.append(len(given[1])), step(*given))[1])
    with graph.compiled(model, compute) as own:
        steps.clear()
        eager.widths.clear()
        got = answers(model, compute=compute, graph=own)
    assert (
        (1 in steps or name != "grouped heads")
        and eager.widths == [n for n in steps if n > 1]
        and len(set(eager.widths)) > 3
    )
    alike(got, wanted, 1e-5 if compute is None else 0.0)  # autocast without its cache rounds as with it


def test_a_graph_takes_the_players_steps_in_a_mixture(eager: Eager) -> None:
    model, other = made(*FAST["grouped heads"]), made(*FAST["two rotaries"])
    mixture = hf.Mixture(other, 0.5)
    with graph.compiled(model) as own:
        alike(answers(model, mixture=mixture, graph=own), answers(model, mixture=mixture), 1e-5)


def test_nothing_is_left_of_a_graph(eager: Eager) -> None:
    model = made(*FAST["grouped heads"]).train()
    model.model.embed_tokens.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    kept, modules = dict(vars(model.config)), set(sys.modules)
    with graph.compiled(model, torch.bfloat16) as own:
        copied = own.decoder
        assert {p.data_ptr() for p in copied.parameters()} <= {p.data_ptr() for p in model.parameters()}
        assert model.training and not copied.training
        assert model.config._attn_implementation_internal != copied.config._attn_implementation_internal
        assert copied.config._attn_implementation_internal == attention.TRACED
        answers(model, compute=torch.bfloat16, graph=own)
    decoder = weakref.ref(copied)
    del copied
    gc.collect()
    assert decoder() is None and not graph._now
    assert (
        vars(model.config) == kept
        and model.training
        and asked == {n: p.requires_grad for n, p in model.named_parameters()}
    )
    assert not any("forward" in vars(module) for module in model.modules())
    assert not torch._inductor.config.freezing
    assert not [name for name in set(sys.modules) - modules if "compile_tasks" in name]
    with pytest.raises(ValueError, match="has ended"):
        answers(model, compute=torch.bfloat16, graph=own)


def test_a_graph_is_one_models_in_one_precision(eager: Eager) -> None:
    model, other = made(*FAST["grouped heads"]), made(*FAST["grouped heads"])
    with graph.compiled(model) as own:
        assert answers(model, compute=torch.float32, graph=own) == answers(model, graph=own)
        for who, compute in ((other, None), (model, torch.bfloat16)):
            with pytest.raises(ValueError, match="another model's, for another precision"):
                answers(who, compute=compute, graph=own)


@pytest.mark.parametrize(("compute", "scale", "fits"), [
    (None, 1 + 1e-7, True), (None, 1.001, False), (torch.bfloat16, 1.001, True), (torch.bfloat16, 1.1, False),
    (None, float("nan"), False),
])  # fmt: skip
def test_a_graph_that_gives_other_numbers_is_none(
    compute: torch.dtype | None, scale: float, fits: bool, eager: Eager, caplog: pytest.LogCaptureFixture
) -> None:
    """float32 to 1e-4 nats, 16 bits to three times as far as they move the plain ones."""
    model = made(*FAST["grouped heads"])
    eager.scale = scale
    with contextlib.ExitStack() as stack, caplog.at_level(logging.INFO, "sparring"):
        own = graph.begin(stack, model, compute)
        assert isinstance(own, graph.Graph) == fits
    if not fits:
        assert isinstance(own, compiled.Failed) and own.kind is graph.Misfit
        assert caplog.text.count("the decoder is not compiled, playing takes longer: it would give log-probs that") == 1


def test_models_that_slots_do_not_take_have_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(*FAST["grouped heads"])
    monkeypatch.setattr(graph, "decodes", lambda _: False)
    with pytest.raises(graph.Misfit, match="not decoded in slots"), graph.compiled(model):
        pass


# Whether they pay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "fast", "answers", "found"),
    [
        ([1.0], [], 1, {"pays": False, "plain": 1.0, "stage": 299.5}),
        ([1.0, 1.1], [0.9, 0.8], 2, {"pays": True, "plain": 1.0, "compiled": 0.8, "stage": 599.0}),
        ([1.0, 1.1], [0.97, 0.96], 2, {"pays": False, "plain": 1.0, "compiled": 0.96, "stage": 599.0}),
        ([1.2, 1.0], [0.96, 1.0], 2, {"pays": False, "plain": 1.0, "compiled": 0.96, "stage": 678.2}),
        ([1.2, 1.0], [0.95, 1.0], 2, {"pays": True, "plain": 1.0, "compiled": 0.95, "stage": 678.2}),
    ],
)
def test_long_stages_are_compiled_where_a_step_takes_a_twentieth_less(
    monkeypatch: pytest.MonkeyPatch, plain: list[float], fast: list[float], answers: int, found: dict[str, Any]
) -> None:
    """A prompt is read in 101.5 seconds, and its answer has 198 tokens."""
    sides: dict[bool, Iterator[float]] = {False: iter(plain), True: iter(fast)}
    monkeypatch.setattr(graph, "_trial", lambda play, own: graph._Trial(101.5, next(sides[own is not None]), 0.0))
    ended: list[bool] = []

    def make(stack: contextlib.ExitStack) -> Any:
        stack.callback(lambda: ended.append(True))
        return object()

    with contextlib.ExitStack() as stack:
        own, got = graph.settled(stack, lambda *_: [], make, answers, 198)
        assert got == pytest.approx(found)
        assert (own is not None) == found["pays"] and bool(ended) == ("compiled" in found and not found["pays"])
    assert bool(ended) == ("compiled" in found)


def test_what_cannot_be_compiled_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_trial", lambda play, own: graph._Trial(1.0, 1.0, 0.0))
    failed = compiled.Failed("no compiler here", RuntimeError)
    own, found = graph.settled(contextlib.ExitStack(), lambda *_: [], lambda _: failed, 1000, 9)
    assert own is None and found == {"pays": False, "plain": 1.0, "stage": 10000.0, "problem": "no compiler here"}


def test_a_trial_tells_reading_from_steps_and_how_often_answers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts in 8 s; a first step that compiles in C, then 2 s for 4 rows and 1 s for 2, which end."""
    now = [100.0]
    monkeypatch.setattr(graph.time, "perf_counter", lambda: now[0])

    def play(own: Any, most: int, on_rows: Any) -> list[Answer]:
        assert own is None and most == 17
        for seconds, rows in ((8.0, 4), (60.0, 4), (2.0, 4), (2.0, 4), (1.0, 2)):
            now[0] += seconds
            on_rows(0, rows)
        lengths = ((4, "stop"), (4, "length"), (5, "stop"), (5, "stop"))
        return [Answer((9,) * n, (), finish) for n, finish in lengths]  # type: ignore[arg-type]

    trial = graph._trial(play, None)
    assert (trial.prompt, trial.token, trial.ends) == (2.0, 0.5, 3 / 18)
    assert trial.seconds(10, 1000) == pytest.approx(10 * (2 + 6 * 0.5))  # 1 in 6 tokens ends an answer
    assert trial.seconds(10, 1) == pytest.approx(10 * 2.5)
    assert graph._Trial(2.0, 0.5, 0.0).seconds(10, 8) == 60


# The stage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage is long enough, and every graph fast enough."""
    monkeypatch.setattr(compiled, "LEAST", 0.0)
    monkeypatch.setattr(compiled, "WORTH", -1e9)
    monkeypatch.setattr(graph, "LEAST_STEPS", 0)


PLAYED = ["round_000/play/opponent", "round_001/play/opponent"]


def played(run: Path) -> list[Any]:
    return [[(s.tokens, s.logps) for s in Rows(run / f"round_00{t}" / "samples", Sample)] for t in (0, 1)]


def record_of(run: Path) -> dict[str, Any]:
    return {name: found for name, found in read_json(run / compiled.FILE).items() if "/" in name}


def test_a_short_stage_is_not_tried(tiny_recipe: dict[str, Any], eager: Eager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "settled", lambda *_: pytest.fail("tried"))
    assert record_of(sparring.run(tiny_recipe).path) == {} and not eager.widths


def stopped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Ctrl-C in the second chunk that is played; the graphs of all chunks as they are asked for."""
    play, calls = hf.play, list[Any]()

    def stop(*given: Any, **named: Any) -> Any:
        if "graph" in named:  # and not the guard's
            calls.append(named["graph"])
        if "graph" in named and len(calls) == 2:
            raise KeyboardInterrupt
        return play(*given, **named)

    monkeypatch.setattr(hf, "play", stop)
    return calls


@pytest.mark.usefixtures("tried")
def test_a_stage_goes_on_as_it_began(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], eager: Eager, tmp_path: Path
) -> None:
    """A graph that rounds in a way of its own is taken for the chunks after a kill, whatever a second trial would say."""
    eager.scale = 1 + 1e-6
    whole = sparring.run(tiny_recipe).path
    assert list(record_of(whole)) == PLAYED and all(found["pays"] for found in record_of(whole).values())
    tiny_recipe["run"] = str(tmp_path / "killed")
    play, calls = hf.play, stopped(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sparring.run(tiny_recipe)
    assert list(record_of(tmp_path / "killed")) == PLAYED[:1]
    monkeypatch.setattr(graph, "settled", lambda *_: (None, {"pays": False}))
    sparring.run(tiny_recipe)
    assert played(tmp_path / "killed")[0] == played(whole)[0]
    assert [own is not None for own in calls] == [True] * 4 + [False] * 3
    monkeypatch.setattr(hf, "play", play)
    tiny_recipe |= {"run": str(tmp_path / "plain"), "model": tiny_recipe["model"] | {"compile": "never"}}
    assert played(sparring.run(tiny_recipe).path)[0] != played(whole)[0]


@pytest.mark.usefixtures("tried")
def test_a_stage_that_began_without_a_graph_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], eager: Eager
) -> None:
    monkeypatch.setattr(compiled, "WORTH", 1e9)
    calls = stopped(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sparring.run(tiny_recipe)
    monkeypatch.setattr(compiled, "WORTH", -1e9)
    run = sparring.run(tiny_recipe).path
    assert [found["pays"] for found in record_of(run).values()] == [False, True]
    assert [own is not None for own in calls] == [False] * 4 + [True] * 3


def test_a_players_graph_ends_before_the_next_player_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shop:
        rank = None
        config = type("Config", (), {"model": type("Model", (), {"compile": "auto"})})

    told: list[str] = []

    def begin(self: _Graphs, turn: Turn, *_: Any) -> None:
        told.append(f"{turn.role} begins")
        self._stack.callback(told.append, f"{turn.role} ends")

    monkeypatch.setattr(_Graphs, "_begin", begin)
    graphs = _Graphs(Shop(), None)  # type: ignore[arg-type]
    with graphs:
        for turn in (one := Turn("one"), one, Turn("two")):
            graphs.of(turn, None, [], range(1), 9)  # type: ignore[arg-type]
    assert told == ["one begins", "one ends", "two begins", "two ends"]


@pytest.mark.usefixtures("tried")
def test_without_a_compiler_a_stage_is_played_plainly(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.INFO, "sparring"):
        run = sparring.run(tiny_recipe).path
    record = record_of(run)
    assert list(record) == PLAYED
    assert {(found["pays"], found["problem"]) for found in record.values()} == {(False, "no compiler here")}
    assert caplog.text.count("the decoder is not compiled, playing takes longer: no compiler here") == 2
    tiny_recipe |= {"run": str(tmp_path / "plain"), "model": tiny_recipe["model"] | {"compile": "never"}}
    other = sparring.run(tiny_recipe).path
    assert played(run) == played(other) and not (other / compiled.FILE).exists()


@pytest.mark.usefixtures("tried")
def test_a_stage_that_cannot_be_compiled_any_more_says_so(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    file = Path(tiny_recipe["run"]) / compiled.FILE
    play = hf.play

    def begun(*given: Any, **named: Any) -> Any:
        assert named.get("graph") is None  # nor has the guard's stage one
        return play(*given, **named)

    monkeypatch.setattr(hf, "play", begun)
    of = _Graphs._begin

    def on_record(self: Any, *given: Any) -> Any:
        record = read_json(file)
        file.write_text(json.dumps(record | {name: {"pays": True, "plain": 1.0} for name in PLAYED}))
        return of(self, *given)

    monkeypatch.setattr(_Graphs, "_begin", on_record)
    record = record_of(sparring.run(tiny_recipe).path)
    assert record[PLAYED[1]] == {"pays": False, "plain": 1.0, "problem": "no compiler here"}


def test_what_must_be_compiled_and_cannot_be_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], eager: Eager
) -> None:
    """Without a compiler; a model that does not fit is played plainly."""
    tiny_recipe["model"]["compile"] = "always"
    eager.scale = 2.0
    run = sparring.run(tiny_recipe).path
    assert eager.widths and not (run / compiled.FILE).exists()
    eager.scale = 1.0
    tiny_recipe["run"] = f"{run}2"
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: broken() if "fullgraph" in how else compile(f, **how))
    with pytest.raises(InputError, match=r"always, but the decoder cannot be compiled \(no compiler here\); say auto"):
        sparring.run(tiny_recipe)


@pytest.mark.parametrize(("mixed", "processes", "wanted"), [
    (None, None, "never"), ("start", None, "always"), (None, 2, "always"), (None, 1, "always"), (None, None, "always"),
])  # fmt: skip
def test_mixtures_and_several_processes_play_plainly(
    mixed: str | None, processes: int | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shop:
        rank = None if processes is None else Rank(0, processes, 0)
        config = type("Config", (), {"model": type("Model", (), {"compile": wanted})})

    begun: list[Any] = []
    monkeypatch.setattr(_Graphs, "_begin", lambda self, *given: begun.append(given))
    with (graphs := _Graphs(Shop(), None)):  # type: ignore[arg-type,func-returns-value]
        pass
    turn = Turn(mixed_with=mixed)
    for _ in range(2):
        assert graphs.of(turn, None, [], range(1), 9) is None  # type: ignore[arg-type]
    assert len(begun) == (wanted == "always" and mixed is None and processes in (None, 1))


# With a compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compute", BOTH)
def test_a_compiled_graph_gives_the_plain_answers(compute: torch.dtype | None) -> None:
    """One graph for all widths, which gives the same bits again, and of which no tensor is left."""
    from torch._subclasses.fake_tensor import FakeTensor

    def held() -> set[int]:
        gc.collect()
        found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        return {id(x) for x in found if x.device.type == "cpu" and x.numel() > 300}

    model = made(*FAST["sliding window"])
    plain, before = answers(model, compute=compute), held()
    got = []
    for _ in range(2):
        torch._dynamo.utils.counters.clear()
        with graph.compiled(model, compute) as own:
            got.append(answers(model, compute=compute, graph=own))
            assert answers(model, compute=compute, graph=own, batch_size=7) != plain
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert got[0] == got[1] != plain
    del own
    assert held() <= before
    if compute is None:
        alike(got[0], plain, 1e-4)
    else:
        first = [(a.tokens[0], a.logps[0]) for a in plain]
        assert [(a.tokens[0], a.logps[0]) for a in got[0]] == first  # prompts are read plainly
        assert sum(a.tokens == b.tokens for a, b in zip(got[0], plain, strict=True)) > 10


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FAST if name != "sliding window"])
def test_compiled_graphs_of_every_kind_give_the_plain_answers(name: str) -> None:
    model = made(*FAST[name])
    with graph.compiled(model) as own:
        alike(answers(model, graph=own), answers(model), 1e-4)


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("tried")
@pytest.mark.filterwarnings("ignore")
def test_a_killed_compiled_stage_gives_the_same_answers(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    tiny_recipe |= {"model": tiny_recipe["model"] | {"compute": "bfloat16"}, "rounds": [{"method": "spin"}]}
    whole = sparring.run(tiny_recipe).path
    assert record_of(whole)[PLAYED[0]]["pays"]
    tiny_recipe["run"] = str(tmp_path / "killed")
    play, calls = hf.play, list[Any]()

    def stop(*given: Any, **named: Any) -> Any:
        if "graph" in named:  # and not the guard's
            calls.append(named["graph"])
        if "graph" in named and len(calls) in (2, 4):
            raise KeyboardInterrupt
        return play(*given, **named)

    monkeypatch.setattr(hf, "play", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sparring.run(tiny_recipe)
    killed = sparring.run(tiny_recipe).path
    assert all(calls) and len(calls) == 5
    one, two = ([(s.tokens, s.logps) for s in Rows(run / "round_000" / "samples", Sample)] for run in (whole, killed))
    assert one == two
