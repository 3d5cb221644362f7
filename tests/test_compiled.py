"""Compiled layers: the plain ones' values and gradients, when they are taken, and that a round keeps to what it began with."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from helpers import player_shas
from sparring import compiled, train
from sparring.errors import InputError
from sparring.logps import packed_token_logps
from sparring.rundir.store import read_json
from test_packed import FAST, made, value_and_gradient

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def check(name: str) -> None:
    model = made(*FAST[name])
    plain, plain_grad = value_and_gradient(model, packed_token_logps)
    assert len(compiled.layers(model)) == len({id(x) for x in compiled.layers(model)}) > 1
    with compiled.compiled(model):
        calls = [layer.forward for layer in compiled.layers(model)]
        assert all(hasattr(call, "_torchdynamo_orig_callable") for call in calls)
        value, grad = value_and_gradient(model, packed_token_logps)
    assert not any("forward" in vars(layer) for layer in compiled.layers(model))
    assert ((value - plain).abs() / (1 + plain.abs())).max() < 1e-5
    assert (grad - plain_grad).norm() < 1e-5 * plain_grad.norm()
    again, _ = value_and_gradient(model, packed_token_logps)
    assert torch.equal(again, plain)


@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_give_the_plain_ones_values_and_gradients() -> None:
    check("sliding window")


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FAST if name != "sliding window"])
def test_compiled_layers_of_every_kind_give_the_plain_ones_values_and_gradients(name: str) -> None:
    check(name)


class Clock:
    """Passes of so many seconds each, with and without compiled layers."""

    def __init__(self, patch: pytest.MonkeyPatch, plain: list[float], fast: list[float]) -> None:
        self.sides = {False: iter(plain), True: iter(fast)}
        self.on = False
        patch.setattr(compiled, "_seconds", lambda once: next(self.sides[self.on]))
        patch.setattr(compiled, "compiled", self.compiled)
        patch.setattr(compiled, "layers", lambda model: [model])

    @contextlib.contextmanager
    def compiled(self, model: Any) -> Iterator[None]:
        self.on = True
        yield
        self.on = False


@pytest.mark.parametrize(
    ("plain", "fast", "passes", "found"),
    [
        ([1.0], [], 299, {"pays": False, "plain": 1.0}),
        ([1.0, 1.1], [0.9, 0.8], 300, {"pays": True, "plain": 1.0, "compiled": 0.8}),
        ([1.0, 1.1], [0.97, 0.96], 300, {"pays": False, "plain": 1.0, "compiled": 0.96}),
        ([1.2, 1.0], [0.96, 1.0], 300, {"pays": False, "plain": 1.0, "compiled": 0.96}),
        ([1.2, 1.0], [0.95, 1.0], 300, {"pays": True, "plain": 1.0, "compiled": 0.95}),
    ],
)
def test_long_trainings_are_compiled_where_a_pass_takes_a_twentieth_less(
    monkeypatch: pytest.MonkeyPatch, plain: list[float], fast: list[float], passes: float, found: dict[str, Any]
) -> None:
    clock = Clock(monkeypatch, plain, fast)
    assert compiled.settled(torch.nn.Linear(1, 1), lambda: None, passes, 10**12) == found
    assert not clock.on


def test_trainings_that_are_short_on_any_machine_are_not_even_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 weights, 6 operations each: 300 s at 2e10 a second are 5e11 tokens."""
    Clock(monkeypatch, [0.0], [])
    given = torch.nn.Linear(1, 1), lambda: None
    assert compiled.settled(*given, 500, 10**9 - 1) == {"pays": False}
    assert compiled.settled(*given, 500, 10**9) == {"pays": False, "plain": 0.0}


def broken(*_: Any, **__: Any) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    return forward


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile that compiles nothing; the forward passes it was given."""
    given: list[Any] = []

    def compile(forward: Any, *, dynamic: bool, fullgraph: bool = False) -> Any:
        assert dynamic
        if fullgraph:
            return forward  # a decoder, in play
        return lambda *a, **k: (given.append(forward), forward(*a, **k))[1]

    monkeypatch.setattr(torch, "compile", compile)
    return given


def test_layers_that_cannot_be_compiled_are_left(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled, "LEAST", 0.0)
    with caplog.at_level(logging.INFO, "sparring"):
        run = sparring.run(tiny_recipe)
    record = read_json(run.path / compiled.FILE)
    assert list(record) == ["prep_000", "round_000", "round_001"]
    assert all(not found["pays"] and found["problem"] == "no compiler here" for found in record.values())
    assert caplog.text.count("layers are not compiled, training takes longer: no compiler here") == 3
    tiny_recipe |= {"run": str(run.path) + "2", "model": tiny_recipe["model"] | {"compile": "never"}}
    other = sparring.run(tiny_recipe)
    assert player_shas(run.path) == player_shas(other.path)
    assert not (other.path / compiled.FILE).exists()


def test_what_must_be_compiled_and_cannot_be_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    tiny_recipe["model"]["compile"] = "always"
    with pytest.raises(InputError, match=r"always, but the layers cannot be compiled \(no compiler here\); say auto"):
        sparring.run(tiny_recipe)


def test_a_short_run_compiles_nothing(tiny_recipe: dict[str, Any], eager: list[Any]) -> None:
    run = sparring.run(tiny_recipe)
    assert not eager
    assert {found["pays"] for found in read_json(run.path / compiled.FILE).values()} == {False}


def test_a_round_goes_on_as_it_began(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], eager: list[Any]
) -> None:
    """Whatever a second trial would say, what is on record stands; the first pass after a kill is that of the trial."""
    monkeypatch.setattr(compiled, "LEAST", 0.0)
    monkeypatch.setattr(compiled, "WORTH", -1e9)
    take = train.batch_rows
    taken: list[int] = []

    def stop(step: int, *given: Any) -> list[int]:
        taken.append(step)
        if len(taken) == 4:  # the trial, two steps, the third
            raise KeyboardInterrupt
        return take(step, *given)

    monkeypatch.setattr(train, "batch_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        sparring.run(tiny_recipe)
    run = Path(tiny_recipe["run"])
    before = read_json(run / compiled.FILE)
    assert before["prep_000"]["pays"] and len(before) == 1
    monkeypatch.setattr(compiled, "WORTH", 1e9)
    eager.clear()
    sparring.run(tiny_recipe)
    after = read_json(run / compiled.FILE)
    assert after["prep_000"] == before["prep_000"] and not after["round_000"]["pays"]
    assert len(eager) > 4  # round 0's first pass, then its last steps; one trial in each later round


def test_several_passes_make_a_trial_of_the_first_pass_only(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any]
) -> None:
    """12 groups, 4 a batch, 2 a pass: an epoch is 6 passes like the one that is timed."""
    asked: list[float] = []

    def settled(model: Any, once: Any, passes: float, tokens: int) -> dict[str, Any]:
        rows: list[int] = []
        with model.get_input_embeddings().register_forward_pre_hook(lambda _, given: rows.append(given[0].numel())):
            once()
        # The row has no token for the last of each of two or four answers, and is filled up by a sixteenth at most
        assert 0 <= rows[-1] + 4 - tokens <= tokens / 16 + 2
        asked.append(passes)
        assert all(p.grad is None for p in model.parameters()) and not model.training
        return {"pays": False}

    monkeypatch.setattr(compiled, "settled", settled)
    sparring.run(tiny_recipe)
    assert asked == [6.0, 6.0, 6.0]


def test_where_compiling_fails_an_empty_cache_is_tried(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The first attempt meets a broken cache; the second one's is there until training ends, and gone then."""
    torn, caches = str(tmp_path / "torn"), set[str]()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", torn)

    def compile(forward: Any, *, dynamic: bool, fullgraph: bool = False) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            cache = os.environ["TORCHINDUCTOR_CACHE_DIR"]
            if cache == torn:
                raise ImportError("file too short")
            assert Path(cache).is_dir()
            caches.add(cache)
            return forward(*given, **named)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    tiny_recipe["model"]["compile"] = "always"
    run = sparring.run(tiny_recipe)
    assert len(caches) == 3 + 2 and len(player_shas(run.path)) == 4  # one for each training, one for each play
    assert not any(map(os.path.exists, caches))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == torn


def test_a_round_that_cannot_be_compiled_any_more_says_so(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], eager: list[Any]
) -> None:
    monkeypatch.setattr(compiled, "LEAST", 0.0)
    monkeypatch.setattr(compiled, "settled", lambda *_: {"pays": True, "plain": 1.0})
    monkeypatch.setattr(torch, "compile", broken)
    record = read_json(sparring.run(tiny_recipe).path / compiled.FILE)
    assert {(found["pays"], found["problem"]) for found in record.values()} == {(False, "no compiler here")}


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_a_cut_off_file_in_the_cache_is_no_end(tmp_path: Path) -> None:
    """A new process meets a cache of which every library was cut in half."""
    cache = tmp_path / "cache"
    code = (
        "import contextlib; from test_compiled import *; model = made(*FAST['sliding window'])\n"
        "once = lambda: value_and_gradient(model, packed_token_logps)\n"
        "with contextlib.ExitStack() as stack: print(compiled.begin(stack, model, once))"
    )
    paths = os.pathsep.join((str(Path(__file__).parent), str(Path(sparring.__file__).parents[1])))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["None"]
        libraries = list(cache.rglob("*.so"))
        assert libraries
        for library in libraries:
            library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_a_killed_compiled_run_ends_in_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    tiny_recipe["model"]["compile"] = "always"
    whole = player_shas(sparring.run(tiny_recipe).path)
    tiny_recipe["run"] = str(tmp_path / "killed")
    take = train.batch_rows
    taken: list[int] = []

    def stop(step: int, *given: Any) -> list[int]:
        taken.append(step)
        if len(taken) in (3, 8):
            raise KeyboardInterrupt
        return take(step, *given)

    monkeypatch.setattr(train, "batch_rows", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sparring.run(tiny_recipe)
        torch.compiler.reset()
    assert player_shas(sparring.run(tiny_recipe).path) == whole
    tiny_recipe |= {"run": str(tmp_path / "plain"), "model": tiny_recipe["model"] | {"compile": "never"}}
    assert player_shas(sparring.run(tiny_recipe).path) != whole
