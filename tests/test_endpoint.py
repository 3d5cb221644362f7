"""Judges by text against a real server on loopback, faulty ones included, and against a player."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpers import cli, write_model
from sparring.config import ModelConfig
from sparring.errors import InputError, SparringError
from sparring.evaluate.asking import Asked, judgements
from sparring.evaluate.ledger import Ledger
from sparring.judge.endpoint import Endpoint
from sparring.judge.local import LocalJudge
from sparring.judge.replies import agreed, identity, load_judge, rating, replies, verdict
from sparring.play.chat import chat
from sparring.play.server import listed
from sparring.remote import Remote, _is_here
from sparring.types import Message
from test_mt_bench import bench_folder

HI = (Message("user", "hi"),)
KEY = "sk-secret-123"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but loopback."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def loopback(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1"
        connect(self, address)

    def loopback_name(host: Any, *rest: Any, **options: Any) -> Any:
        assert host in ("127.0.0.1", b"127.0.0.1")
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket.socket, "connect", loopback)
    monkeypatch.setattr(socket, "getaddrinfo", loopback_name)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Answers request i with `script[i]`, then with the last of it; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, *script: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.asked)
            server.asked.append(
                {"path": self.path, "headers": dict(self.headers), "body": body, "at": time.monotonic()}
            )
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            server.script[min(number, len(server.script) - 1)](self)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client hung up, as it should on a slow server
        finally:
            with server.lock:
                server.now -= 1

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def says(text: str | None, pause: float = 0.0) -> Answer:
    def answer(handler: Handler) -> None:
        time.sleep(pause)
        handler.send(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())

    return answer


def fails(status: int, message: str = "no", **headers: str) -> Answer:
    return lambda handler: handler.send(status, json.dumps({"error": {"message": message}}).encode(), headers)


def writes(body: bytes) -> Answer:
    return lambda handler: handler.send(200, body)


def breaks_off(handler: Handler) -> None:
    handler.send(200, b'{"choices": [{"mess', length=1000)
    handler.close_connection = True


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running: list[tuple[Server, threading.Thread]] = []

    def start(*script: Answer) -> Server:
        server = Server(*script)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def endpoint(server: Server, **fields: Any) -> Endpoint:
    return Endpoint(server.url, "m", **{"backoff": 0.01, "timeout": 5.0, **fields})


# What is sent and read ------------------------------------------------------------------------------------------------


def test_a_reply_and_what_was_sent_for_it(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    server = serve(says("Ünï [[5]]"))
    judge = endpoint(server, api_key_env="JUDGE_KEY", extra={"seed": 3})
    assert judge((Message("system", "s"), Message("user", "ü \ud800"))) == "Ünï [[5]]"
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions"
    assert asked["headers"]["Authorization"] == f"Bearer {KEY}"
    assert asked["body"] == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ü ?"}],
        "temperature": 0.0,
        "max_tokens": 2048,
        "seed": 3,
    }
    assert KEY not in repr(judge) + judge.identity


def test_no_key_is_sent_that_was_not_named(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(says("x"))
    assert endpoint(server, temperature=None, max_tokens=None)(HI) == "x"
    assert "Authorization" not in server.asked[0]["headers"]
    assert set(server.asked[0]["body"]) == {"model", "messages"}


def test_identity_changes_with_what_changes_replies() -> None:
    base = Endpoint("http://127.0.0.1:1/v1", "m")
    others = [
        Endpoint("http://127.0.0.1:2/v1", "m"),
        Endpoint(base.base_url, "n"),
        Endpoint(base.base_url, "m", temperature=1.0),
        Endpoint(base.base_url, "m", max_tokens=1),
        Endpoint(base.base_url, "m", extra={"seed": 1}),
    ]
    assert len({identity(judge) for judge in [base, *others]}) == 6
    assert Endpoint(base.base_url, "m", timeout=1.0, retries=0, concurrency=9).identity == base.identity


# Failures that may pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [fails(500), fails(503), fails(429), fails(408), writes(b"<html>"), writes(b'{"choices": []}'), writes(b"[]"), breaks_off,
     hangs_up, writes(b'{"choices": [{"message": {"content": 7}}]}'), writes(b"\xff")],
)  # fmt: skip
def test_two_faults_and_then_a_reply(serve: Callable[..., Server], fault: Answer) -> None:
    server = serve(fault, fault, says("fine"))
    assert endpoint(server, retries=2)(HI) == "fine"
    assert len(server.asked) == 3


def test_a_slow_server_is_given_up_after_the_timeout_and_tried_again(serve: Callable[..., Server]) -> None:
    server = serve(says("late", pause=8), says("in time"))
    start = time.monotonic()
    assert endpoint(server, timeout=0.2)(HI) == "in time"
    assert time.monotonic() - start < 6


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (fails(500, "over\nloaded \x1b[2J"), r"HTTP 500: over loaded \[2J"),
        (breaks_off, r"RemoteProtocolError .*without sending complete"),
        (writes(b"<html>hello"), r"not a chat completion: <html>hello"),
        (says("late", pause=0.6), r"ReadTimeout"),
    ],
)
def test_faults_that_stay_are_told_in_one_line(serve: Callable[..., Server], fault: Answer, told: str) -> None:
    server = serve(fault)
    with pytest.raises(
        SparringError, match=rf"^endpoint {server.url}: {told}.*\(after 3 tries\); nothing is lost"
    ) as caught:
        endpoint(server, retries=2, timeout=0.2)(HI)
    assert not isinstance(caught.value, InputError) and str(caught.value).isprintable()
    assert len(server.asked) == 3


def test_the_last_failure_is_told_without_another_pause(serve: Callable[..., Server]) -> None:
    server = serve(fails(503, **{"Retry-After": "30"}))
    start = time.monotonic()
    with pytest.raises(SparringError, match=r"after 1 try"):
        endpoint(server, retries=0)(HI)
    assert time.monotonic() - start < 15


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(SparringError, match="ConnectError"):
        Endpoint(url, "m", retries=1, backoff=0.01)(HI)


def test_pauses_double_and_heed_the_server(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout)
            return False

    monkeypatch.setattr("sparring.remote.Event", Watched)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    server = serve(
        fails(500),
        fails(429, **{"Retry-After": "7.5"}),
        fails(500, **{"Retry-After": "Sat, 21 Nov 2026 00:00:00 GMT"}),
        fails(429, **{"Retry-After": "3600"}),
        says("x"),
    )
    assert endpoint(server, backoff=0.5)(HI) == "x"
    assert pauses == [0.5, 7.5, 2.0, 60.0]


def test_a_limit_by_the_minute_is_outlasted(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return False

    monkeypatch.setattr("sparring.remote.Event", Watched)
    monkeypatch.setattr("random.uniform", lambda low, high: low)  # however unlucky
    server = serve(fails(429))
    with pytest.raises(SparringError, match=r"HTTP 429: no \(after 6 tries\)"):
        Endpoint(server.url, "m")(HI)
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0] and sum(pauses) > 60


def test_no_proxy_stands_before_this_machine(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = serve(fails(403, "by the proxy"))
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, nobody.url.removesuffix("/v1"))
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    assert endpoint(serve(says("x")))(HI) == "x" and nobody.asked == []
    here = (
        "http://localhost:8000/v1",
        "http://127.8.0.1/v1",
        "http://[::1]:8000/v1",
        "http://LocalHost/v1",
        "http://0.0.0.0:8000/v1",
    )
    away = (
        "http://gpu7:8000/v1",
        "https://api.openai.com/v1",
        "http://localhost.example.org/v1",
        "http://10.127.0.0.1/v1",
    )
    assert [_is_here(url) for url in (*here, *away)] == [True] * 5 + [False] * 4


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "ftp://127.0.0.1:1", "http://user:p#ss@proxy:8080"])
def test_a_proxy_that_cannot_be_used_is_told(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(
        InputError, match=r"^endpoint http://gpu7/v1: the environment's proxy \(ALL_PROXY, .* cannot be used"
    ):
        Endpoint("http://gpu7/v1", "m")(HI)


def test_a_server_that_lists_no_models_is_asked_once(serve: Callable[..., Server]) -> None:
    """501 Unsupported method ('GET')."""
    assert listed(Remote(serve(says("x")).url, backoff=60.0)) is None


# Failures that stay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_a_refusal_is_not_tried_again_and_hides_the_key(
    serve: Callable[..., Server], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(fails(status, f"wrong key {KEY}"))
    with pytest.raises(InputError, match=rf"HTTP {status}: wrong key …; mend the address") as caught:
        endpoint(server, api_key_env="JUDGE_KEY")(HI)
    assert len(server.asked) == 1 and KEY not in str(caught.value)


@pytest.mark.parametrize(
    "refusal",
    [fails(400, "This model's maximum context length is 8 tokens"), fails(413),
     lambda h: h.send(400, b'{"error": {"code": "context_length_exceeded", "message": "x"}}')],
)  # fmt: skip
def test_a_conversation_that_is_too_long_has_no_reply(serve: Callable[..., Server], refusal: Answer) -> None:
    server = serve(refusal)
    assert endpoint(server)(HI) is None
    assert ["max_tokens" in asked["body"] for asked in server.asked] == [True, False]
    assert endpoint(server, max_tokens=None)(HI) is None and len(server.asked) == 3


def test_a_reply_gets_what_room_is_left(serve: Callable[..., Server]) -> None:
    """4096 tokens of context, 2500 of them asked: no room for 2048, but for 1596."""
    server = serve(fails(400, "This model's maximum context length is 4096 tokens"), says("short"), says("[[7]]"))
    talks = [(Message("user", text),) for text in ("long", "brief")]
    assert list(endpoint(server, concurrency=1).many(talks)) == [(1, "short"), (0, "[[7]]")]
    sent = [(asked["body"]["messages"][0]["content"], asked["body"].get("max_tokens")) for asked in server.asked]
    assert sent == [("long", 2048), ("brief", 2048), ("long", None)]


def test_what_a_judge_had_no_room_for_is_asked_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(fails(413), says("[[7]]"))
    judge, ledger, asked = endpoint(server, max_tokens=None), tmp_path / "j.jsonl", [Asked(HI, {})]
    assert judgements(judge, asked, Ledger(ledger)) == [None]
    assert judgements(lambda _: None, asked, Ledger(ledger)) == judgements(lambda _: None, asked, Ledger(ledger))
    assert len(ledger.read_text().splitlines()) == 2  # a second None says nothing new
    assert judgements(judge, asked, Ledger(ledger)) == judgements(judge, asked, Ledger(ledger)) == ["[[7]]"]
    assert len(server.asked) == 2


def test_a_refusal_without_content_is_an_empty_reply(serve: Callable[..., Server]) -> None:
    assert endpoint(serve(says(None)))(HI) == ""


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"base_url": "localhost:8000/v1"}, "no address; write http://host:port/v1"),
        ({"base_url": "http://[::1"}, "write http://host:port/v1"),
        ({"base_url": "http://me:pw@host/v1"}, "^endpoint host: a password in the address"),
        ({"base_url": "http://host/v1?api-key=SECRET"}, "^endpoint host: a query in the address [^?]*api_key_env$"),
        ({"model": ""}, "model='' is out of range"),
        ({"temperature": -1.0}, "temperature=-1.0 is out of range"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"retries": -1}, "retries=-1"),
        ({"backoff": -1.0}, "backoff=-1.0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"extra": {"messages": []}}, "extra sets messages"),
        ({"api_key_env": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY is not set; export it"),
        ({"api_key_env": "ODD_KEY"}, "ODD_KEY holds no key that can be sent"),
    ],
)
def test_bad_settings(fields: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_KEY", "schlüssel")
    with pytest.raises(InputError, match=told) as caught:
        Endpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **fields})
    assert "pw" not in str(caught.value) and "SECRET" not in str(caught.value)


# Many at a time -------------------------------------------------------------------------------------------------------


def test_no_more_requests_at_a_time_than_allowed(serve: Callable[..., Server]) -> None:
    three = threading.Barrier(3, timeout=20)

    def together(handler: Handler) -> None:
        three.wait()  # nobody is answered before three have asked
        says("x", pause=0.05)(handler)

    server = serve(together)
    judge = endpoint(server, concurrency=3)
    got = dict(replies(judge, [(Message("user", str(i)),) for i in range(9)]))
    assert got == dict.fromkeys(range(9), "x")
    assert server.most == 3
    assert sorted(asked["body"]["messages"][0]["content"] for asked in server.asked) == list("012345678")


def test_replies_go_with_their_conversations(serve: Callable[..., Server]) -> None:
    class Echo(Handler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            word = body["messages"][0]["content"]
            says(word, pause=0.1 * (5 - int(word)))(self)

    server = serve(says("unused"))
    server.RequestHandlerClass = Echo
    got = list(endpoint(server, concurrency=5).many([(Message("user", str(i)),) for i in range(5)]))
    assert dict(got) == {i: str(i) for i in range(5)}
    assert [i for i, _ in got] != list(range(5))  # they are given as they come


def test_after_a_failure_what_is_under_way_is_still_given(serve: Callable[..., Server]) -> None:
    server = serve(fails(401), says("paid for", pause=0.3))
    got = []
    with pytest.raises(InputError, match="HTTP 401"):
        for pair in endpoint(server, concurrency=2).many([HI] * 10):
            got.append(pair[1])
    assert got == ["paid for"]
    assert len(server.asked) == 2


def test_after_an_interrupt_what_is_under_way_is_still_given(
    serve: Callable[..., Server], request: pytest.FixtureRequest
) -> None:
    # A shell starts what runs in the background with Ctrl-C ignored
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))

    def interrupts_once(handler: Handler) -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        says("paid for", pause=0.3)(handler)

    def interrupts(handler: Handler) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while len(handler.server.asked) < 3:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)
        says("paid for", pause=0.3)(handler)

    server = serve(interrupts, says("paid for", pause=0.6), fails(503))
    got = []
    alone = serve(interrupts_once)
    with pytest.raises(KeyboardInterrupt):
        endpoint(alone)(HI)
    assert len(alone.asked) == 1
    with pytest.raises(KeyboardInterrupt):
        for pair in endpoint(server, concurrency=3, backoff=60.0).many([HI] * 10):
            got.append(pair[1])
    assert got == ["paid for"] * 2  # and what failed is not tried again
    assert len(server.asked) == 3


def test_mt_bench_through_an_endpoint_that_goes_down_and_comes_back(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    model, folder, out = write_model(tmp_path / "model"), bench_folder(tmp_path / "bench"), tmp_path / "out"
    server = serve(says("[[4]]"), says("four"), says("[[8]]"), fails(401, "expired"), says("[[6]]"))
    command = ["mt-bench", model, "--data", folder, "--judge", server.url, "--judge-model", "m", "--key-env", "JUDGE_KEY",
               "--concurrency", 1, "--max-new-tokens", 2, "--out", out]  # fmt: skip
    code, _, err = cli(*command)
    assert code == 2 and "HTTP 401: expired" in err and len(server.asked) == 4
    code, told, _ = cli(*command)
    assert code == 0 and "judgements: 7, of which 1 could not be read and 0 not given" in told
    assert len(server.asked) == 8  # seven replies and the refusal: none was asked for twice
    # Questions 1 to 4: 4 (and one unread), 8 and 6, 6 and 6, 6
    assert "all          6.00" in told
    assert not any(KEY in file.read_text() for file in out.iterdir())


# Other judges ---------------------------------------------------------------------------------------------------------


def test_a_player_judges_greedily_and_says_where_it_has_no_room(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", context=64)
    judge = LocalJudge(chat(ModelConfig(path=str(folder), device="cpu", threads=1)), max_new_tokens=5)
    long = (Message("user", "a" * 60),)
    first = dict(judge.many([HI, long, (Message("user", "hello"),)]))
    assert first[1] is None and judge(long) is None
    assert first[0] == judge(HI) and isinstance(first[0], str)
    again = LocalJudge(chat(ModelConfig(path=str(folder), device="cpu", threads=1)), max_new_tokens=5)
    assert dict(again.many([HI]))[0] == first[0] and again.identity == judge.identity
    assert LocalJudge(chat(ModelConfig(path=str(folder)))).identity != judge.identity
    plain = ModelConfig(path=str(folder), chat_template="plain")
    assert chat(plain).identity != chat(ModelConfig(path=str(folder))).identity


def test_a_template_without_a_place_for_system_turns_gets_them_before_the_users(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (tmp_path / "t.jinja").write_text(
        refusing + "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    )
    config = ModelConfig(path=str(folder), chat_template=str(tmp_path / "t.jinja"), device="cpu", threads=1)
    judge = LocalJudge(chat(config), max_new_tokens=6)
    assert judge((Message("system", "s"), Message("user", "u"))) == judge((Message("user", "s\n\nu"),))
    with pytest.raises(InputError, match=r"chat template of .* fails: no"):
        judge((Message("system", "s"),))


def test_a_player_is_told_the_same_date_on_any_day(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    folder = write_model(tmp_path / "m")
    player = chat(ModelConfig(path=str(folder), chat_template=str(tmp_path / "t.jinja"), device="cpu", threads=1))
    assert player._loaded.renderer.text(HI) == "01 Jan 2026|hi"


def test_a_player_replies_as_the_sampler_does(tmp_path: Path) -> None:
    from sparring import players
    from sparring.play.hf import key, sample
    from sparring.prompts import Renderer, load_tokenizer

    folder = write_model(tmp_path / "m", context=78)
    config = ModelConfig(path=str(folder), device="cpu", threads=1)
    talks = [HI, (Message("user", "q"), Message("assistant", "r"), Message("user", "s")), (Message("user", "b" * 20),)]
    keys = [key(0, -1, str(i), 0) for i in range(3)]
    player = chat(config, batch_size=2)
    got = dict(player.replies(talks, keys, temperature=0.7, max_new_tokens=8, top_p=0.9))
    renderer = Renderer(load_tokenizer(str(folder)), None, players.stop_ids(str(folder), config))
    model = players.load_model(str(folder), config)
    for i, talk in enumerate(talks):
        prompt = renderer.prompt(talk)
        limit = (8, 7, 8)[i]  # the second fills the context
        assert limit == min(8, 78 - len(prompt))
        (want,) = sample(
            model, [prompt], [keys[i]], temperature=0.7, top_p=0.9, max_new_tokens=limit,
            stop_ids=renderer.stop_ids, batch_size=1,
        )  # fmt: skip
        assert got[i].text == renderer.decode(want.tokens).strip()
        assert (got[i].tokens, got[i].finish) == (len(want.tokens), want.finish)


def test_a_function_is_a_judge(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def judge(messages):\n    return messages[-1].content.upper()\n")
    judge = load_judge(f"{file}:judge")
    assert list(replies(judge, [HI, (Message("user", "b"),)])) == [(0, "HI"), (1, "B")]
    before = identity(judge)
    assert before.startswith("mine.py:judge@")
    file.write_text("def judge(messages):\n    return 'x'\n")
    assert identity(load_judge(f"{file}:judge")) != before
    assert identity(rating) == "sparring.judge.replies.rating"
    file.write_text(
        "class Judge:\n"
        "    def __call__(self, messages):\n        return 'one'\n"
        "    def many(self, talks):\n        return ((i, 'many') for i in range(len(talks)))\n"
        "judge = Judge()\n"
    )
    batched = load_judge(f"{file}:judge")
    assert dict(replies(batched, [HI, HI])) == {0: "many", 1: "many"} and identity(batched).startswith("mine.py:judge@")
    file.write_text(file.read_text().replace("return ((i, 'many') for i in range(len(talks)))", "return 1 / 0"))
    with pytest.raises(
        InputError, match=r"^judge mine\.py:judge@\w+: ZeroDivisionError: division by zero; it must reply"
    ):
        list(replies(load_judge(f"{file}:judge"), [HI]))


def test_bad_judges(tmp_path: Path) -> None:
    def seven(messages: object) -> Any:
        return 7

    def broken(messages: object) -> str:
        raise KeyError("x")

    for judge, told in ((seven, "gave int; it must give text or None"), (broken, "KeyError: 'x'; it must reply")):
        with pytest.raises(InputError, match=told):
            list(replies(judge, [HI]))
    with pytest.raises(InputError, match="which model of the endpoint"):
        load_judge("http://127.0.0.1:1/v1")
    with pytest.raises(InputError, match="api_key_env is a setting of an endpoint"):
        load_judge(str(tmp_path), api_key_env="X")
    with pytest.raises(InputError, match="no such model folder"):
        load_judge(str(tmp_path / "none"))
    (tmp_path / "n.py").write_text("judge = 3\n")
    with pytest.raises(InputError, match="not a function"):
        load_judge(f"{tmp_path}/n.py:judge")
    assert isinstance(load_judge("https://127.0.0.1/v1", model="m", concurrency=2), Endpoint)


# Reading a reply ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[7.5]] and then [[9]]", 7.5),
        ("the list [3] … Rating: [[8]]", 8.0),
        ("Rating: [6]", 6.0),
        ("[[10]]", 10.0),
        ("[[1]]", 1.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[rating]]", None),
        ("Rating: 5", None),
        ("[[-3]]", None),
        ('<think>The format is "Rating: [[5]]".</think>\n\nRating: [[9]]', 9.0),
        ("[[3]] or [[4]]?</think> Rating: [6]", 6.0),  # some templates begin the thinking
        ("<think>So [[5]]</think><think>Or [[6]]</think>[[7]]", 7.0),
        ("<think>I tend to [[5]], but", None),
        ("[[4]]: its <think>[[9]]</think> is left open", 4.0),  # a judge's words on an answer that thinks
        ("Its <think> never ends. Rating: [[2]]", 2.0),
        ("<think>It says <think>2 + 2</think>, so [[9]]?</think> Rating: [[3]]", 3.0),
        ("It says <think>2 + 2</think>, so [[9]]?</think> Rating: [[3]]", 3.0),
        ("<think>Its <think> never ends: [[9]]</think>[[1]]", 1.0),
        ("</think>" * 3000 + "[[5]]", 5.0),  # a judge that repeats itself
        ("<think>[[5]]</think>", None),
        ("", None),
        (None, None),
    ],
)
def test_ratings(reply: str | None, value: float | None) -> None:
    assert rating(reply) == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [("so [[A]]", 1.0), ("[[B]]", 0.0), ("[[C]]", 0.5), ("[[A]] yes [[A]]", 1.0), ("[[A]] or [[B]]", None), ("[A]", None),
     ("[[D]]", None), ("", None), (None, None), ("<think>[[A]] or [[B]]?</think>[[B]]", 0.0), ("<think>[[A]]", None)],
)  # fmt: skip
def test_verdicts(reply: str | None, value: float | None) -> None:
    assert verdict(reply) == value


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.5, 0.5, 0.5), (1.0, 1.0, 0.5), (0.0, 0.0, 0.5), (1.0, 0.5, 0.5), (0.5, 1.0, 0.5),
     (None, 1.0, None), (1.0, None, None)],
)  # fmt: skip
def test_both_orders_agree_or_it_is_a_tie(first: float | None, second: float | None, value: float | None) -> None:
    assert agreed(first, second) == value
