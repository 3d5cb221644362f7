"""An OpenAI-compatible server that truly serves tiny models: its own decoding loop, transformers' own filters.

`python completions_server.py --model FOLDER --served-model-name NAME --port N` takes the arguments of vLLM's server that
`play/vllm.py` gives, and `--lora-modules NAME=FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DIALECTS = ("vllm", "sglang", "ids", "strict", "lenient", "text")
"""vllm: token ids in and out. sglang: so, and top_k 0 is refused where there is a choice. ids: takes token ids, ignores what
it does not know, gives text; drawn from 2 tokens where nothing is said of top_k. strict: takes them, and refuses what OpenAI's
protocol has not. lenient: text alone, else like ids. text: text alone, else like strict."""
IN = ("vllm", "sglang", "ids", "strict")
OUT = ("vllm", "sglang")
OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "n"}
Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Serves the models of `players` (name to folder, read at every request); request i first goes to `script[i]`."""

    daemon_threads = True

    def __init__(self, players: Callable[[], Mapping[str, Path]], dialect: str = "vllm", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.players, self.dialect = players, dialect
        self.script: list[Answer | None] = []
        self.rest: Answer | None = None
        """Answers the requests after those of the script; None: truly."""
        self.asked: list[dict[str, Any]] = []
        self.context = 256
        self.lock = threading.Lock()
        self.loaded: dict[str, tuple[Any, Any]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def model(self, name: str) -> tuple[Any, Any]:
        """Model and tokenizer; one at a time, since two that are loaded at once leave transformers unable to tie weights."""
        from sparring import players
        from sparring.config import ModelConfig
        from sparring.prompts import load_tokenizer

        with self.lock:
            if name not in self.loaded:
                path = str(self.players()[name])
                self.loaded[name] = players.load_model(path, ModelConfig(device="cpu")), load_tokenizer(path)
            return self.loaded[name]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self.refuse(404, "no such path")
        names = self.server.players()
        self.tell({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.asked)
            server.asked.append(self.body | {"path": self.path, "at": time.monotonic()})
        try:
            scripted = server.script[number] if number < len(server.script) else server.rest
            (scripted or Handler.complete)(self)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client hung up

    def complete(self) -> None:
        body, dialect = self.body, self.server.dialect
        if body["model"] not in self.server.players():
            return self.refuse(404, f"The model `{body['model']}` does not exist.")
        unknown = sorted(set(body) - OPENAI)
        if dialect in ("text", "strict") and unknown:
            return self.refuse(400, f"Unrecognized request argument: {unknown[0]}")
        if dialect not in IN and isinstance(body["prompt"], list):
            return self.refuse(400, "prompt must be a string")
        if dialect == "sglang" and body["temperature"] > 0 and body.get("top_k") == 0:
            return self.refuse(400, "top_k must be -1 (disable) or at least 1, got 0.")
        model, tokenizer = self.server.model(body["model"])
        prompt = body["prompt"] if isinstance(body["prompt"], list) else tokenizer(body["prompt"])["input_ids"]
        if len(prompt) >= self.server.context:
            return self.refuse(400, f"This model's maximum context length is {self.server.context} tokens.")
        with self.server.lock:
            told = decode(model, tokenizer, prompt, body, self.server.context, dialect)
        self.tell({"object": "text_completion", "model": body["model"], "choices": [told]})

    def refuse(self, status: int, message: str) -> None:
        self.send(status, json.dumps({"error": {"message": message}}).encode())

    def tell(self, answer: Any) -> None:
        self.send(200, json.dumps(answer).encode())

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def decode(
    model: Any, tokenizer: Any, prompt: list[int], body: dict[str, Any], context: int, dialect: str
) -> dict[str, Any]:
    """One choice, a forward pass over everything for each token, drawn by torch's own multinomial."""
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(body["seed"])
    stops = {tokenizer.eos_token_id} | set(body.get("stop_token_ids", ()) if dialect in OUT else ())
    ids, logps, finish, text = list(prompt), [], "length", ""
    while len(ids) < min(len(prompt) + body["max_tokens"], context):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        if body["temperature"] == 0:
            token = int(logits.argmax())
        else:
            warped = logits / body["temperature"]
            top_k = body.get("top_k", 2 if dialect in ("ids", "lenient") else 0)
            if top_k > 0:
                warped = TopKLogitsWarper(top_k)(None, warped)
            if body["top_p"] < 1:
                warped = TopPLogitsWarper(body["top_p"])(None, warped)
            token = int(torch.multinomial(warped.softmax(-1), 1, generator=generator))
        ids.append(token)
        logps.append(float(logits.log_softmax(-1)[0, token]))
        text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        if token in stops or any(stop in text for stop in body.get("stop", ())):
            finish = "stop"
            break
    told = {"index": 0, "text": text, "finish_reason": finish}
    if body.get("logprobs") is not None and not (dialect not in OUT and body["logprobs"] == 0):
        told |= {"logprobs": {"token_logprobs": logps, "tokens": tokenizer.convert_ids_to_tokens(ids[len(prompt) :])}}
    return told | ({"token_ids": ids[len(prompt) :]} if dialect in OUT and body.get("return_token_ids") else {})


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--served-model-name", "--lora-modules"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    given, _ = parser.parse_known_args()
    served = {given.served_model_name: Path(given.model)}
    if given.lora_modules:
        name, _, folder = given.lora_modules.partition("=")
        served[name] = Path(folder)
    server = Server(lambda: served, port=given.port)
    for name in served:
        server.model(name)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
