"""Engines of play for real: the built-in one, servers that are faulty or know little, vLLM as processes of its own."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from completions_server import Answer as Script
from completions_server import Server
from engine_contract import CHECKS, EOS, PROMPTS, Subject, keys, settings, write_engine_model
from helpers import character_tokenizer, cli, recipe, write_recipe
from rundirs import records
from sparring import api, players
from sparring.config import EngineConfig, ModelConfig, PlayConfig
from sparring.errors import InputError, SparringError
from sparring.logps import plain_token_logps
from sparring.play import engines, leash, vllm
from sparring.play.engines import Engine, health
from sparring.play.hf import Answer, sample
from sparring.play.server import Completions, listed
from sparring.prompts import Renderer, load_tokenizer
from sparring.remote import Remote
from sparring.rundir import RunDir
from sparring.rundir.store import Rows, read_json
from sparring.rundir.view import RunView
from sparring.types import Frozen, Group, Sample
from sparring.workshop import Workshop
from test_endpoint import breaks_off, fails, hangs_up, no_network, writes  # noqa: F401 -- the fixture: loopback is allowed

VLLM = os.environ.get("SPARRING_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(not VLLM, reason="SPARRING_VLLM_PYTHON names no Python with vllm")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_engine_model(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return players.load_model(str(folder), ModelConfig(device="cpu"))


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running: list[tuple[Server, threading.Thread]] = []

    def start(where: Path | Callable[[], dict[str, Path]], dialect: str = "vllm") -> Server:
        server = Server(where if callable(where) else lambda: {"m": where}, dialect)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[Answer]:
    """What an honest server answers to the contract's prompts."""
    server = Server(lambda: {"m": folder})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    got = completions(server, folder).answers(PROMPTS, keys(10), settings())
    server.shutdown()
    server.server_close()
    return got


def completions(server: Server, folder: Path, **fields: Any) -> Completions:
    tokenizer = load_tokenizer(str(folder))
    remote = Remote(server.url, **({"backoff": 0.01, "timeout": 20.0, "concurrency": 8} | fields))
    return Completions(remote, "m", tokenizer, Renderer(tokenizer))


# The contract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_built_in_engine_keeps_the_contract(check: Callable[[Subject], None], model: Any) -> None:
    def ask(prompts: Any, row_keys: Any, how: PlayConfig) -> Any:
        fields = how.model_dump(include={"temperature", "top_p", "top_k", "max_new_tokens"})
        return sample(model, prompts, row_keys, stop_ids=(EOS,), batch_size=64, **fields)

    check(Subject(ask, model, 1e-5))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_server_with_token_ids_keeps_the_contract(
    check: Callable[[Subject], None], model: Any, folder: Path, serve: Callable[..., Server]
) -> None:
    check(Subject(completions(serve(folder), folder).answers, model, 1e-5))


@pytest.fixture(scope="module")
def real_vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Completions]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = EngineConfig(python=VLLM, arguments=("--enforce-eager",))
    tokenizer = load_tokenizer(str(folder))
    given = ModelConfig(device="cpu", compute="float32")
    with vllm.serving(str(folder), given, engine, tmp_path_factory.mktemp("logs")) as served:
        yield Completions(Remote(served.urls[0], concurrency=64), served.name, tokenizer, Renderer(tokenizer))


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_vllm_keeps_the_contract(check: Callable[[Subject], None], model: Any, real_vllm: Completions) -> None:
    check(Subject(real_vllm.answers, model, 1e-4))


@needs_vllm
@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_vllm_on_cuda_is_near_and_gives_its_memory_back(folder: Path, tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    given = ModelConfig(device="cuda", compute="bfloat16")
    model, tokenizer = players.load_model(str(folder), given), load_tokenizer(str(folder))
    engine = EngineConfig(python=VLLM, replicas=1, gpu_memory=0.3)
    with vllm.serving(str(folder), given, engine, tmp_path) as served:
        own = Completions(Remote(served.urls[0], concurrency=64), served.name, tokenizer, Renderer(tokenizer))
        got = own.answers(PROMPTS * 6, keys(60), settings(temperature=1.5))
        assert torch.cuda.mem_get_info()[0] < 0.8 * free
    with torch.no_grad():
        ours = plain_token_logps(model, PROMPTS * 6, [a.tokens for a in got], compute=torch.bfloat16).cpu()
    gaps = [abs(a - float(b)) for x, line in zip(got, ours, strict=True) for a, b in zip(x.logps, line, strict=False)]
    assert sum(gaps) / len(gaps) < EngineConfig().max_gap
    assert {a.finish for a in got} == {"stop", "length"}
    assert until(lambda: torch.cuda.mem_get_info()[0] > 0.95 * free)


# What a server can do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "ids", "requests"), [("ids", True, 2), ("strict", True, 3), ("lenient", False, 4), ("text", False, 5)]
)
def test_a_server_that_gives_text_gives_the_same_answers_marked_so(
    dialect: str, ids: bool, requests: int, folder: Path, serve: Callable[..., Server]
) -> None:
    whole, text = serve(folder), serve(folder, dialect)
    wanted = completions(whole, folder).answers(PROMPTS, keys(10), settings(temperature=1.5))
    got = completions(text, folder).answers(PROMPTS, keys(10), settings(temperature=1.5))
    renderer = Renderer(character_tokenizer())
    assert [renderer.decode(a.tokens) for a in got] == [renderer.decode(a.tokens) for a in wanted]
    assert {a.finish for a in got} == {"stop", "length"} and {(a.how, a.logps) for a in got} == {("text", ())}
    for ours, theirs in zip(got, wanted, strict=True):
        # Text has no pad and no unknown token; all else is the same
        assert list(ours.tokens) == [t for t in theirs.tokens if t not in (0, 2)] and ours.finish == theirs.finish
    assert len(text.asked) == requests + 10
    assert {isinstance(body["prompt"], list) for body in text.asked[-10:]} == {ids}
    last = text.asked[-1]
    assert not {"return_token_ids", "logprobs"} & set(last) and last["stop"] == ["<eos>"]
    # Where it can be, what such a server would filter by itself is switched off
    assert [last.get(name) for name in ("top_k", "min_p")] == (
        [-1, 0.0] if dialect in ("ids", "lenient") else [None, None]
    )


def test_what_is_asked_greedily_first_can_be_drawn_afterwards(folder: Path, serve: Callable[..., Server]) -> None:
    """SGLang checks top_k only where a token is drawn; an evaluation begins with greedy answers."""
    whole, asked = completions(serve(folder), folder), completions(serve(folder, "sglang"), folder)
    for temperature in (0.0, 1.5):
        play = settings(temperature=temperature)
        answers = asked.answers(PROMPTS, keys(10), play)
        assert answers == whole.answers(PROMPTS, keys(10), play)
        assert {answer.how for answer in answers} == {""} and min(len(answer.logps) for answer in answers) > 0


def test_what_is_asked_of_a_server_with_token_ids(folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder)
    play = settings(temperature=0.7, top_p=0.9, top_k=3)
    completions(server, folder).answers(PROMPTS[:1], [2**63 + 5], play)
    body = server.asked[1]
    assert {k: v for k, v in body.items() if k not in ("at", "path")} == {
        "model": "m", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.0,
        "seed": 5, "logprobs": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "stop_token_ids": [EOS], "return_token_ids": True,
    }  # fmt: skip
    assert body["path"] == "/v1/completions"


def test_a_prompt_that_no_text_gives_is_marked(folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder, "text")
    merging = load_tokenizer(str(folder))
    merging.add_tokens(["ab"])  # a and b in a row are one token in any text
    own = Completions(Remote(server.url), "m", merging, Renderer(merging))
    a, b = merging.convert_tokens_to_ids(["a", "b"])
    answers = own.answers([[a, b, 9], [b, a, 9]], [1, 2], settings())
    assert [answer.how for answer in answers] == ["inexact", "text"]


def test_missing_log_probs_are_missing_and_not_guessed(folder: Path, serve: Callable[..., Server]) -> None:
    def without(handler: Any) -> None:
        del handler.body["logprobs"]
        handler.complete()

    server = serve(folder)
    server.rest = without
    got = completions(server, folder).answers(PROMPTS, keys(10), settings())
    assert {(a.logps, a.how) for a in got} == {((), "")} and min(len(a.tokens) for a in got) > 0


def choice(**fields: Any) -> Script:
    import json

    told = {"text": "ab", "finish_reason": "length", "token_ids": [3, 4], "logprobs": {"token_logprobs": [-1.0, -2.0]}}
    return writes(json.dumps({"choices": [told | fields]}).encode())


@pytest.mark.parametrize(
    ("fields", "tokens", "logps", "finish"),
    [
        ({}, (3, 4), (-1.0, -2.0), "length"),
        # The end token is kept, and nothing behind it
        ({"token_ids": [3, EOS]}, (3, EOS), (-1.0, -2.0), "stop"),
        ({"token_ids": [EOS, 4], "finish_reason": "stop"}, (EOS,), (-1.0,), "stop"),
        # It left the end token out
        ({"token_ids": [3], "finish_reason": "stop", "logprobs": None}, (3, EOS), (), "stop"),
        ({"token_ids": [3], "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0]}}, (3, EOS), (), "stop"),
        ({"token_ids": [3, 4, 5]}, (3, 4), (), "length"),
        ({"logprobs": {"token_logprobs": [None, -1.0]}}, (3, 4), (), "length"),
        ({"logprobs": {"token_logprobs": [float("nan"), -1.0]}}, (3, 4), (), "length"),
        ({"logprobs": []}, (3, 4), (), "length"),
    ],
)
def test_what_is_made_of_a_choice(
    fields: Any, tokens: Any, logps: Any, finish: str, folder: Path, serve: Callable[..., Server]
) -> None:
    server = serve(folder)
    server.script, server.rest = [None], choice(**fields)
    (got,) = completions(server, folder).answers(PROMPTS[:1], [1], settings(max_new_tokens=2))
    assert (got.tokens, got.logps, got.finish) == (tokens, logps, finish)


# Faults ---------------------------------------------------------------------------------------------------------------


def slow(handler: Any) -> None:
    time.sleep(1.5)
    handler.complete()


FAULTS = {
    "429": fails(429, "slow down", **{"Retry-After": "0.01"}),
    "500": fails(500),
    "cut": breaks_off,
    "gone": hangs_up,
    "json": writes(b'{"choices": ['),
    "page": writes(b"<html>"),
    "none": writes(b'{"choices": []}'),
    "two": writes(b'{"choices": [{"text": "a", "finish_reason": "stop"}, {"text": "b", "finish_reason": "stop"}]}'),
    "text": choice(text=None),
    "finish": choice(finish_reason="abort"),
    "no finish": choice(finish_reason=None),
    "token": choice(token_ids=[3, "4"]),
    "slow": slow,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_no_answer(name: str, wanted: list[Answer], folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder)
    server.script = [None, FAULTS[name], None, FAULTS[name], FAULTS[name]]
    got = completions(server, folder, timeout=0.75 if name == "slow" else 20.0).answers(PROMPTS, keys(10), settings())
    assert got == wanted
    assert len(server.asked) == 1 + 10 + 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (fails(503, "over\nloaded"), r"HTTP 503: over loaded \(after 3 tries\); nothing is lost: give the same command again"),
        (FAULTS["two"], r"not a completion: .*\(after 3 tries\)"),
        (fails(401, "who are you"), r"HTTP 401: who are you; mend the address \(…/v1\), model or key"),
        (fails(400, "This model's maximum context length is 9 tokens"), r"a prompt of 3 tokens and an answer of 12 do not fit"),
        (choice(), r"a prompt of 3 tokens and an answer of 12 do not fit into its context; serve m with a longer one, or lower"),
    ],
)  # fmt: skip
def test_faults_that_stay_are_one_line(fault: Script, told: str, folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder)
    server.script, server.rest = [None], fault
    with pytest.raises(SparringError, match=f"^endpoint {server.url}: {told}") as caught:
        completions(server, folder, retries=2).answers(PROMPTS[:1], [1], settings())
    assert str(caught.value).isprintable()


def test_an_answer_that_the_server_stops_is_told_by_its_prompt(folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder)
    server.script, server.rest = [None], choice(finish_reason="content_filter")
    shown = completions(server, folder)._decode(PROMPTS[0])
    told = (
        rf"gives no answer to the prompt that ends in {re.escape(repr(shown))} \(finish_reason 'content_filter'\); take"
    )
    with pytest.raises(InputError, match=f"^endpoint {server.url}: {told}"):
        completions(server, folder).answers(PROMPTS[:1], [1], settings())
    assert len(server.asked) == 2


def test_the_first_refusal_is_told_where_no_form_is_taken(folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder)
    server.script, server.rest = [fails(400, "temperature must be in [0, 2]")], fails(422, "no")
    with pytest.raises(InputError, match=r"HTTP 400: temperature must be in \[0, 2\]"):
        completions(server, folder).answers(PROMPTS[:1], [1], settings())
    assert len(server.asked) == 5


def test_requests_are_bounded_and_spread_over_replicas(
    wanted: list[Answer], folder: Path, serve: Callable[..., Server]
) -> None:
    now: Counter[Server] = Counter()
    most: Counter[Server] = Counter()

    def waits(handler: Any) -> None:
        server = handler.server
        with server.lock:
            now[server] += 1
            most[server] = max(most[server], now[server])
        time.sleep(0.02)
        with server.lock:
            now[server] -= 1
        handler.complete()

    first, second = serve(folder), serve(folder)
    first.rest = second.rest = waits
    got = completions(first, folder, concurrency=3, replicas=(second.url,)).answers(
        PROMPTS * 2, keys(10) * 2, settings()
    )
    assert set(most) == {first, second} and max(most.values()) <= 3 and sum(most.values()) >= 4
    # One more asked first what the server can do
    assert len(first.asked) + len(second.asked) == 21 and min(len(first.asked), len(second.asked)) >= 6
    assert got == wanted * 2


def test_a_slow_replica_is_given_less(wanted: list[Answer], folder: Path, serve: Callable[..., Server]) -> None:
    def waits(handler: Any) -> None:
        time.sleep(1.0)
        handler.complete()

    quick, late = serve(folder), serve(folder)
    late.rest = waits
    assert completions(quick, folder, concurrency=1, replicas=(late.url,)).answers(
        PROMPTS, keys(10), settings()
    ) == wanted  # fmt: skip
    assert len(late.asked) <= 3


def test_models_that_are_not_listed(folder: Path, serve: Callable[..., Server]) -> None:
    assert listed(Remote(serve(folder).url)) == ["m"]
    assert listed(Remote(serve(folder).url.replace("/v1", "/v2"))) is None


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, folder: Path, tiny_data: Path) -> dict[str, Any]:
    """SFT, then SPIN for two rounds, with players 0 and 1 at a server under their numbers."""
    return recipe(
        tmp_path / "run", folder, tiny_data,
        engine={"model": "player {player}", "parallel": 4},
        evaluate={"limit": 1, "samples": 0}, controls={"displacement": None, "trust_region": None},
    )  # fmt: skip


def of_run(run: Path) -> Callable[[], dict[str, Path]]:
    """What a server serves that is shown every player of a run as soon as it is there."""

    def found() -> dict[str, Path]:
        folders = {0: run / "prep_000" / "player", 1: run / "round_000" / "player"}
        return {f"player {n}": folder for n, folder in folders.items() if folder.exists()}

    return found


def samples(run: Path, t: int) -> list[Sample]:
    return list(Rows(run / f"round_{t:03d}" / "samples", Sample))


def counts(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run / stage / "stage.json")["counts"]
    return found


def test_a_run_with_a_server_from_the_command_line(
    tree: dict[str, Any], tmp_path: Path, serve: Callable[..., Server]
) -> None:
    run = tmp_path / "run"
    server = serve(of_run(run))
    file = write_recipe(tmp_path / "recipe.yaml", tree | {"play": tree["play"] | {"engine": server.url}})
    code, _, err = cli("run", file)
    assert code == 0 and "differ" not in err, err
    for t in (0, 1):
        got, told = samples(run, t), counts(run, f"round_{t:03d}/samples")
        assert len(got) == 12 and {s.settings_id[-7:] for s in got} == {"-server"}
        assert told["engine_gap"] <= told["engine_gap_max"] < 1e-5 and "retokenised" not in {
            k for k, v in told.items() if v
        }
        # Rescored by us to the last bit, not taken from the server
        assert "sampler_gap" not in counts(run, f"round_{t:03d}/frozen")
    player = players.load_model(str(run / "prep_000" / "player"), ModelConfig(device="cpu"))
    groups = list(Rows(run / "round_000" / "groups", Group))
    frozen = list(Rows(run / "round_000" / "frozen" / "reference", Frozen))
    with torch.no_grad():
        ours = plain_token_logps(player, [g.prompt for g in groups], [g.completions[1] for g in groups])
    for row, line in zip(frozen, ours, strict=True):
        assert row.logps[1] == pytest.approx(line[: len(row.logps[1])].tolist(), abs=1e-5)
    # Where it is served is no part of a run, and who samples is
    before = records(run)
    assert cli("run", file, "play.engine=http://127.0.0.1:9/v1").code == 0 and records(run) == before
    code, _, err = cli("run", file, "play.engine=hf")
    assert code == 2 and 'round_000/samples: play.engine: "server" → (not set)' in err


@pytest.mark.cluster
def test_of_several_processes_one_asks_the_server(
    tree: dict[str, Any], tmp_path: Path, serve: Callable[..., Server]
) -> None:
    run = tmp_path / "run"
    server = serve(of_run(run))
    sparring.run(tree | {"play": tree["play"] | {"engine": server.url}, "cluster": {"processes": 2}})
    for t in (0, 1):
        assert len(samples(run, t)) == 12 and {s.settings_id[-7:] for s in samples(run, t)} == {"-server"}
        assert counts(run, f"round_{t:03d}/samples")["engine_gap_max"] < 1e-5
    asked = [
        (body["seed"], tuple(body["prompt"])) for body in server.asked if "seed" in body and body["max_tokens"] > 1
    ]
    assert len(asked) == len(set(asked)) == 24


def test_a_stage_that_broke_off_asks_for_the_rest_alone(
    tree: dict[str, Any], tmp_path: Path, serve: Callable[..., Server]
) -> None:
    tree |= {"rounds": [{"method": "sft"}, {"method": "spin"}]}
    whole, broken = tmp_path / "whole", tmp_path / "run"
    address = f"play.engine={serve(of_run(whole)).url}"
    sparring.run(tree, [address], out=whole)
    server = serve(of_run(broken))
    server.script, server.rest = [None] * 6, fails(500, "on fire")  # one to look, four for the first chunk
    with pytest.raises(
        SparringError, match=rf"^endpoint {server.url}: HTTP 500: on fire \(after 1 try\); nothing is lost"
    ):
        sparring.run(tree, [f"play.engine={server.url}", "engine.retries=0"])
    assert [p.name for p in sorted((broken / "round_000" / "samples.partial").glob("*.parquet"))] == ["00000.parquet"]
    server.script, server.rest, asked = [], None, len(server.asked)
    sparring.run(tree, [f"play.engine={server.url}"])
    assert len(server.asked) - asked == 1 + 8
    assert samples(broken, 0) == samples(whole, 0)


def test_another_model_at_the_server_is_told(
    tree: dict[str, Any], tmp_path: Path, serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    other = write_engine_model(tmp_path / "other", seed=5)
    tree |= {"rounds": [{"method": "spin"}], "engine": {}}
    address = [f"play.engine={serve(other).url}"]
    with caplog.at_level(logging.WARNING, "sparring"):
        sparring.run(tree, address)
    gap = counts(tmp_path / "run", "round_000/samples")["engine_gap"]
    assert gap > 0.5
    assert f"differ from ours by {gap:.3g} nats per token on average (engine.max_gap 0.05)" in caplog.text
    line = f"round 0: the engine's log-probs differ from ours by {gap:.3g} nats per token, beyond 0.05"
    assert line in RunView(tmp_path / "run").control_lines()
    caplog.clear()
    sparring.run(tree, [*address, "engine.max_gap=null"], out=tmp_path / "off")
    assert "differ" not in caplog.text and "engine_gap" not in counts(tmp_path / "off", "round_000/samples")


def test_what_a_server_could_not_give_is_counted(
    tree: dict[str, Any], tmp_path: Path, folder: Path, serve: Callable[..., Server]
) -> None:
    tree |= {"rounds": [{"method": "spin"}], "engine": {}}
    sparring.run(tree, [f"play.engine={serve(folder, 'text').url}"])
    told = counts(tmp_path / "run", "round_000/samples")
    assert (told["retokenised"], told["without_logps"]) == (12, 12) and "engine_gap" not in told
    assert {s.settings_id[-12:] for s in samples(tmp_path / "run", 0)} == {"-server-text"}


# Said before anything is spent ----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["play.engine=tgi"], "`play.engine=tgi`: play.engine: must be hf, vllm, or a server's address (http://host:port/v1)"),
        (["play.engine=http://:8000/v1"], "endpoint 'http://:8000/v1': no address; write http://host:port/v1"),
        (["play.engine=https://me:pw@h/v1"], "endpoint h: a password in the address would be written to files; use api_key_env"),
        (["play.engine=http://127.0.0.1:{port}/v1"], "endpoint http://127.0.0.1:{port}/v1: ConnectError"),
        (["play.engine=vllm", "engine.python=/no/such/python"], "engine.python: /no/such/python: no such program"),
        (["play.engine=vllm", "engine.python=/bin/false"], "engine.python: /bin/false has no vllm; pip install vllm there"),
        (["play.engine=vllm", "model.compute=float64"], "play.engine: vllm computes in float32 and bfloat16"),
        (["play.engine=vllm", "play.temperature=3"], "play.temperature: 3: vllm takes 0 … 2; lower it, or set play.engine=hf"),
        (["play.engine=vllm", "engine.parallel=0"], "`engine.parallel=0`: engine.parallel: must be greater than 0"),
        (["play.engine=http://127.0.0.1:9/v1", "engine.model=m"], "engine.model: m, but the rounds play several players"),
        (["play.engine=http://127.0.0.1:9/v1", "engine.model=m", "rounds=[{{method: spin, repeat: 2, opponent: best}}]"],
         "engine.model: m, but the rounds play several players"),
        (["play.engine=http://127.0.0.1:{port}/v1", "engine.model=m", "rounds=[{{method: spin, opponent: best}}]"],
         "endpoint http://127.0.0.1:{port}/v1: ConnectError"),
        (["play.engine=vllm", "rounds=[{{method: nash_md}}]"], "play.engine: round_000 (nash_md) mixes two players' logits"),
        (["play.engine=http://127.0.0.1:9/v1", "engine.api_key_env=NO_SUCH_KEY"],
         "endpoint http://127.0.0.1:9/v1: the environment variable NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_bad_settings_are_told_before_anything_is_made(
    given: list[str], told: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    port = free_port()
    file = write_recipe(tmp_path / "recipe.yaml", tree)
    code, out, err = cli("run", file, *(setting.format(port=port) for setting in given))
    assert err.startswith(f"sparring: {told.format(port=port)}"), err
    assert (code, out, err.count("\n")) == (1 if "ConnectError" in told else 2, "", 1)
    assert not (tmp_path / "run").exists()


def test_a_server_that_does_not_serve_the_player(
    tree: dict[str, Any], tmp_path: Path, folder: Path, serve: Callable[..., Server]
) -> None:
    tree |= {"rounds": [{"method": "spin", "repeat": 2}]}
    server = serve(lambda: {"x": folder, "y": folder})
    told = f"endpoint {server.url}: serves no `player 0`, but x, y; serve {folder} under that name and give the same"
    with pytest.raises(InputError) as caught:
        sparring.run(tree, [f"play.engine={server.url}"])
    assert str(caught.value).startswith(told) and not (tmp_path / "run").exists()
    one = [f"play.engine={server.url}", "engine.model=null", "rounds.0.repeat=1"]
    with pytest.raises(InputError, match=r"^engine.model: is missing; .* lists x, y: name the player's$"):
        sparring.run(tree, one)
    # A later player that is not served yet: what is done stays, and the same command goes on
    served = {"player 0": folder}
    server.players = lambda: served
    with pytest.raises(
        InputError, match=r"serves no `player 1`, but player 0; serve .*round_000/player under that name"
    ):
        sparring.run(tree, [f"play.engine={server.url}"])
    served["player 1"] = tmp_path / "run" / "round_000" / "player"
    assert len(samples(sparring.run(tree, [f"play.engine={server.url}"]).path, 1)) == 12


def test_the_engine_is_part_of_the_identity_and_its_place_is_not(tree: dict[str, Any]) -> None:
    def key(*given: str) -> str:
        return api.prepare(tree, given).plan.rounds[1].stage("samples").key

    server, start = key("play.engine=http://a/v1"), key("play.engine=vllm")
    assert len({key(), server, start}) == 3
    assert key("play.engine=https://b:1/v1", "engine.model=x", "engine.retries=0") == server
    assert key("play.engine=vllm", "engine.python=p", "engine.gpu_memory=0.5", "engine.tensor_parallel=2") == start
    assert key("play.engine=vllm", "engine.arguments=[--quantization, fp8]") != start
    assert key("engine.arguments=[x]") == key()
    # Runs that were made before there were engines keep their keys
    assert "engine" not in PlayConfig().identity()


# Processes ------------------------------------------------------------------------------------------------------------

SERVE = """#!/bin/sh
# Stands where vLLM's Python does: `-c` asks whether vllm is there, `-m` starts the server
case "$1" in -c) exit 0;; esac
PYTHONPATH={source} exec {python} {server} "$@"
"""
DIES = """#!/bin/sh
case "$1" in -c) exit 0;; esac
echo "(EngineCore pid=7) ERROR [core.py:9] ValueError: No available memory for the cache blocks"
echo "RuntimeError: Engine core initialization failed. See root cause above."
echo "nanobind: leaked 4 instances!"
exit 3
"""
LOCKED = """#!{python}
import http.server, sys
class Locked(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Locked).serve_forever()
"""
HANGS = """#!/bin/sh
echo starting; sleep 1000 & echo $! > {pid}; wait
"""


def program(path: Path, text: str, **fields: Any) -> str:
    path.write_text(text.format(**fields))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def own_server(tmp_path: Path) -> str:
    """A Python whose `vllm` is the tests' own server."""
    source = Path(sparring.__file__).parents[1]
    return program(
        tmp_path / "python", SERVE, python=sys.executable, server=HERE / "completions_server.py", source=source
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def test_a_process_that_dies_is_told_by_its_logs_last_error(tmp_path: Path, folder: Path) -> None:
    engine = EngineConfig(python=program(tmp_path / "python", DIES))
    told = rf"^vllm ended \(exit code 3\): ValueError: No available memory for the cache blocks; its log: {tmp_path}/vllm_0.log$"
    with pytest.raises(SparringError, match=told), vllm.serving(str(folder), ModelConfig(), engine, tmp_path):
        raise AssertionError("it is not ready")


def test_what_could_not_start_is_begun_again_with_other_settings(tree: dict[str, Any], tmp_path: Path) -> None:
    """The advice is to give it other arguments: nothing has been made yet that these would change."""
    vllms = ["play.engine=vllm", f"engine.python={program(tmp_path / 'python', DIES)}"]
    for given in ([], ["engine.arguments=[--max-model-len, '99']"]):
        with pytest.raises(SparringError, match=r"^vllm ended \(exit code 3\): ValueError: No available memory"):
            sparring.run(tree, [*vllms, *given])
    assert len(samples(sparring.run(tree, ["play.engine=hf"]).path, 0)) == 12


def test_what_an_earlier_process_logged_is_not_told_of_this_one(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "vllm_0.log").write_text("ValueError: No available memory for the cache blocks\n")
    engine = EngineConfig(python=program(tmp_path / "python", HANGS, pid=tmp_path / "pid"), startup=1.0)
    told = r"^vllm is not ready after 1 s: starting; its log: "
    with pytest.raises(SparringError, match=told), vllm.serving(str(folder), ModelConfig(), engine, tmp_path):
        raise AssertionError("it is not ready")
    assert (tmp_path / "vllm_0.log").read_text().startswith("ValueError")


def test_a_process_that_wants_a_key_is_told_at_once(tmp_path: Path, folder: Path) -> None:
    engine = EngineConfig(python=program(tmp_path / "python", LOCKED, python=sys.executable))
    told = (
        r"^engine.arguments: vllm wants a key \(HTTP 401\), and what serves one stage needs none; leave --api-key out$"
    )
    with pytest.raises(InputError, match=told), vllm.serving(str(folder), ModelConfig(), engine, tmp_path):
        raise AssertionError("it is not ready")


def test_vllm_is_told_nothing_of_our_launcher_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TORCHELASTIC_USE_AGENT_STORE its torch waits for a store that nobody keeps."""
    foreign = [
        "RANK",
        "LOCAL_RANK",
        "ROLE_RANK",
        "GROUP_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "ROLE_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "ROLE_NAME",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RUN_ID",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "VLLM_API_KEY",
        "PYTHONPATH",
    ]
    for name in (*foreign, "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "1")
    found = vllm._environment("2,3")
    assert not set(foreign) & set(found)
    assert (found["VLLM_CPU_KVCACHE_SPACE"], found["CUDA_VISIBLE_DEVICES"]) == ("1", "2,3")


def test_new_adapters_on_an_adapter_are_not_for_vllm(tree: dict[str, Any], tmp_path: Path, folder: Path) -> None:
    """The base is merged in memory then, and vllm reads folders: it would die in the second round."""
    adapter = write_adapter(tmp_path / "adapter", folder)
    vllms = [f"engine.python={program(tmp_path / 'python', SERVE, python='', server='', source='')}"]
    both = [f"model.path={adapter}", "model.lora_rank=2"]
    alone = "rounds=[{method: spin}]"  # in which the start itself plays
    for given, key in (
        (["play.engine=vllm", *both], "play.engine"),
        (["play.engine=vllm", *both, alone, "evaluate.engine=vllm"], "evaluate.engine"),
        (["play.engine=vllm", *both, alone], None),
        (["play.engine=vllm", "model.lora_rank=2"], None),
        (["play.engine=vllm", f"model.path={adapter}"], None),
    ):
        planned = api.prepare(tree, [*vllms, *given])
        told = rf"^{key}: vllm serves an adapter on a whole model, and the base here is an adapter itself"
        with pytest.raises(InputError, match=told) if key else nullcontext():
            engines.check(planned.config, planned.plan, lambda stage: False)


def test_gpus_are_counted_where_vllm_will_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    engine = EngineConfig(python=program(tmp_path / "python", "#!/bin/sh\n"), tensor_parallel=8)
    with pytest.raises(InputError, match=r"^engine.tensor_parallel: 8: "):
        vllm.check(ModelConfig(), engine)
    vllm.check(ModelConfig(), engine, here=False)


def test_a_process_that_is_never_ready_is_ended(tmp_path: Path, folder: Path) -> None:
    engine = EngineConfig(python=program(tmp_path / "python", HANGS, pid=tmp_path / "pid"), startup=1.0)
    told = r"^vllm is not ready after 1 s: starting; its log: .*vllm_0.log; raise engine.startup$"
    with pytest.raises(SparringError, match=told), vllm.serving(str(folder), ModelConfig(), engine, tmp_path):
        raise AssertionError("it is not ready")
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_one_who_holds_the_leash(number: int, tmp_path: Path) -> None:
    """The command ignores SIGTERM and has a child of its own; its starter is killed."""
    stubborn = f"trap '' TERM; sleep 1000 & echo $$ $! > {tmp_path}/pids; wait; wait"
    starter = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-I', {leash.__file__!r}, '0.5', 'sh', '-c', {stubborn!r}], stdin=subprocess.PIPE)\n"
        "time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    pids = tmp_path / "pids"
    assert until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    process.send_signal(number)
    process.wait()
    assert until(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()), 30)


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    command = ["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; exit 3"]
    done = subprocess.Popen([sys.executable, "-I", leash.__file__, "5", *command], stdin=subprocess.PIPE)
    assert done.wait(30) == 3
    assert until(lambda: not alive(int((tmp_path / "pid").read_text())))
    assert done.stdin is not None
    done.stdin.close()


def test_gpus_are_dealt_to_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    def dealt(gpus: int, visible: str | None = None, **fields: Any) -> list[str | None]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return vllm.gpu_groups(EngineConfig(**fields))

    assert dealt(0) == [None] and dealt(0, "", replicas=2) == [None, None]
    assert dealt(4) == ["0", "1", "2", "3"] and dealt(2, "5,GPU-7") == ["5", "GPU-7"]
    assert dealt(5, tensor_parallel=2) == ["0,1", "2,3"] and dealt(4, tensor_parallel=2, replicas=1) == ["0,1"]
    for gpus, fields in ((1, {"tensor_parallel": 2}), (4, {"tensor_parallel": 2, "replicas": 3})):
        with pytest.raises(InputError, match=rf"^engine.tensor_parallel: 2: .* and {gpus} are visible; lower it or"):
            dealt(gpus, **fields)


@pytest.mark.slow
def test_a_whole_player_and_an_adapter_are_served(
    tmp_path: Path, folder: Path, tiny_data: Path, own_server: str
) -> None:
    """Two rounds of LoRA with processes of their own: player 0 is a whole model, player 1 an adapter on it."""
    tree = recipe(
        tmp_path / "run", folder, tiny_data,
        model={"lora_rank": 2}, play={"engine": "vllm"}, rounds=[{"method": "spin", "repeat": 2}],
        engine={"python": own_server},
    )  # fmt: skip
    run = sparring.run(tree).path
    for t in (0, 1):
        assert {s.settings_id[-5:] for s in samples(run, t)} == {"-vllm"}
        assert (run / f"round_{t:03d}" / "samples" / "vllm_0.log").read_text().count("ready\n") == 1
    # The test's server merges an adapter into its base
    assert counts(run, "round_001/samples")["engine_gap"] < 1e-5
    left = subprocess.run(["pgrep", "-f", f"completions_server.py.*{tmp_path}"], capture_output=True, check=False)
    assert left.stdout == b""


def write_adapter(adapter: Path, base: Path) -> Path:
    """What tells an adapter of rank 9, without its weights."""
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": 9, "base_model_name_or_path": "{base}"}}'
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    return adapter


def test_the_arguments_of_vllm(tmp_path: Path, folder: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folder)
    assert vllm._player(str(adapter), "n", ModelConfig()) == [
        "--model", str(folder), "--served-model-name", "n-base", "--enable-lora", "--max-lora-rank", "16",
        "--lora-modules", f"n={adapter}",
    ]  # fmt: skip
    hub = ModelConfig(revision="abc")
    assert vllm._player("own/er", "n", hub) == [
        "--model", "own/er", "--served-model-name", "n", "--revision", "abc", "--tokenizer-revision", "abc"
    ]  # fmt: skip
    engine = EngineConfig(tensor_parallel=2, gpu_memory=0.5, arguments=("--max-model-len", "99"))
    how = vllm._how(ModelConfig(compute="bfloat16", trust_remote_code=True), engine)
    assert " ".join(how) == (
        "--host 127.0.0.1 --generation-config vllm --dtype bfloat16 --tensor-parallel-size 2 --gpu-memory-utilization 0.5 "
        "--trust-remote-code --max-model-len 99"
    )


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_goes_on(
    tmp_path: Path, folder: Path, tiny_data: Path, own_server: str
) -> None:
    tree = recipe(
        tmp_path / "run", folder, tiny_data,
        play={"engine": "vllm", "chunk": 1}, rounds=[{"method": "spin"}],
        engine={"python": own_server, "parallel": 1},
    )  # fmt: skip
    file = write_recipe(tmp_path / "recipe.yaml", tree)
    command = [sys.executable, "-m", "sparring", "run", str(file)]
    environment = os.environ | {"PYTHONPATH": str(Path(sparring.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "run" / "round_000" / "samples.partial"
    assert until(lambda: (partial / "00002.parquet").exists(), 90)
    process.kill()
    process.wait()

    def servers() -> bytes:
        look = ["pgrep", "-f", f"completions_server.py.*{folder}"]
        return subprocess.run(look, capture_output=True, check=False).stdout

    assert until(lambda: servers() == b"")
    assert not (tmp_path / "run" / "round_000" / "samples").exists()
    whole = sparring.run(tree | {"run": str(tmp_path / "whole")}).path
    assert samples(sparring.run(tree).path, 0) == samples(whole, 0)


def test_weights_are_dropped_for_vllm(finished_run: Path) -> None:
    prepared = api.prepare(finished_run)
    shop = Workshop(RunDir(finished_run), prepared.config, prepared.plan, prepared.start)
    held = weakref.ref(shop.model(shop.player(1)))
    assert held() is not None
    shop.free()
    assert held() is None


def test_players_of_one_stage_are_asked_each_by_its_name(
    finished_run: Path, tmp_path: Path, serve: Callable[..., Server]
) -> None:
    served = {f"p{n}": finished_run / f"round_00{n - 1}" / "player" for n in (1, 2)}
    server = serve(lambda: served)
    prepared = api.prepare(finished_run, [f"play.engine={server.url}", "engine.model=p{player}"])
    shop = Workshop(RunDir(finished_run), prepared.config, prepared.plan, prepared.start)
    rows = shop.rendered("train", 8, 2).rows
    settings = prepared.config.play.model_copy(update={"max_new_tokens": 8})
    with Engine(shop, server.url, tmp_path) as engine:
        for number, asked in ((1, 3), (2, 3), (2, 2), (1, 3)):
            before = len(server.asked)
            played = engine.play(
                rows, shop.player(number), settings, seed=0, round=1, role="opponent", indices=range(1)
            )
            # Another player is asked first for one token
            assert [body["model"] for body in server.asked[before:]] == [f"p{number}"] * asked
            assert {sample.player for sample in played} == {shop.player(number).sha}
            assert health(shop, [shop.player(number)], rows, played)["engine_gap_max"] < 1e-5


@pytest.mark.slow
def test_a_server_that_dies_on_the_way_is_told_by_its_log(
    tmp_path: Path, folder: Path, tiny_data: Path, own_server: str
) -> None:
    tree = recipe(
        tmp_path / "run", folder, tiny_data,
        play={"engine": "vllm", "chunk": 1}, rounds=[{"method": "spin"}],
        engine={"python": own_server, "parallel": 1, "retries": 1},
    )  # fmt: skip

    def kill() -> None:
        partial = tmp_path / "run" / "round_000" / "samples.partial"
        until(lambda: (partial / "00001.parquet").exists(), 90)
        found = subprocess.run(
            ["pgrep", "-f", f"^{sys.executable} .*server.py.*{folder}"], capture_output=True, check=True
        )
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGABRT)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(
        SparringError, match=r"^vllm ended \(exit code 134\): .*; its log: .*/samples.partial/vllm_0.log$"
    ):
        sparring.run(tree)
    thread.join()


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_with_vllm_whole_players_and_adapters(
    tmp_path: Path, folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    tree = recipe(
        tmp_path / "run", folder, tiny_data,
        model={"lora_rank": 2}, play={"engine": "vllm"}, rounds=[{"method": "spin", "repeat": 2}],
        engine={"python": VLLM, "arguments": ["--enforce-eager"]},
    )  # fmt: skip
    run = sparring.run(tree).path
    for t in (0, 1):
        told = counts(run, f"round_{t:03d}/samples")
        assert told["engine_gap"] < 1e-4 and not told["without_logps"] and not told["retokenised"]
    log = (run / "round_001" / "samples" / "vllm_0.log").read_text()
    assert "round_000/player" in log and "enable_lora" in log
