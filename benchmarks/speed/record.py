"""What every benchmark of this folder shares: the machine, the versions, interleaved clocks, children with a memory peak.

A result is one line of JSON: what was measured beside `hardware`, `versions` and `command`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def quiet() -> None:
    """Two threads for torch, or OMP_NUM_THREADS, in this process and its children; no network, progress bars or warnings."""
    os.environ |= {
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "TRL_TELEMETRY": "0",
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="append the lines to this file as well")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def emit(row: Mapping[str, Any], out: Path | None) -> None:
    """Print a result as a line of JSON, and append it to `out`."""
    line = json.dumps({**row, "hardware": hardware(), "versions": versions(), "command": command()})
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def command() -> str:
    """What this process was started with, but for where it writes to; of other absolute paths the last part."""
    given = [part for before, part in pairwise(["", *sys.argv]) if "--out" not in (before, part)]
    return " ".join(["python", *(Path(part).name if part.startswith("/") else part for part in given)])


def hardware() -> dict[str, Any]:
    """The CPU with the instruction sets that matter here, its cores, torch's threads, and the load of the last minute."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = f"{said.get('model name', 'unknown')} (family {said.get('cpu family')}, model {said.get('model')})"
    found = said.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in found],
        "memory_gb": round(memory / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    return {name: version(name) for name in ("sparring", "torch", "transformers", "trl")}


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call took, and what it returned."""
    started = time.perf_counter()
    got = work()
    return time.perf_counter() - started, got


def interleaved(
    ours: Callable[[], float], theirs: Callable[[], float], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of both sides, taken in turns and with the first place changing hands; a side returns its own seconds."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            seconds[side].append((ours, theirs)[side]())
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and all."""
    rounded = [round(value, 3) for value in values]
    return {"median": median(rounded), "min": min(rounded), "max": max(rounded), "all": rounded}


def faster(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as long they take: of the medians, and the extremes over pairs."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    whole = median(theirs) / median(ours)
    return {"median": round(whole, 2), "min": round(min(each), 2), "max": round(max(each), 2)}


def child(script: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Run `script --child TASK` in a process of its own and return the JSON of its last line.

    Where it fails, `error` says how: a negative number is the signal that killed it.
    """
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps(task)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": f"exit {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


class Peer:
    """The other side of a comparison, in a process of its own that is idle while it is not asked.

    What one side does to its process, such as keeping memory that it frees, is then not the other's.
    """

    def __init__(self, command: Sequence[str], **environment: str | None) -> None:
        """`environment` is what it has beside this process's own, or without where None."""
        kept = {name: value for name, value in os.environ.items() if name not in environment}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=kept | {name: value for name, value in environment.items() if value is not None},
        )  # fmt: skip

    def ask(self, task: Any = None) -> dict[str, Any]:
        """Have it do its work once; returns what it tells, of which `seconds` comes first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"seconds"'):
                return dict(json.loads(line))
        raise SystemExit(f"the other side ended with {self._process.wait()}: run {self._process.args!r}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def task() -> Any:
    """What a `Peer` is asked at first."""
    return json.loads(sys.stdin.readline())


def serve(work: Callable[[], Mapping[str, Any]]) -> None:
    """The life of a `Peer` that has had its task: do the work and tell of it, at once and whenever it is asked again."""
    while True:
        print(json.dumps(work()), flush=True)
        if not sys.stdin.readline():
            return


def first_to_die() -> None:
    """Should memory run out, the system ends this process before any other."""
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def peak_mb() -> float:
    """The most memory this process has held so far, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def cpu_seconds() -> float:
    """User and system seconds that this process and its ended children have taken."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
