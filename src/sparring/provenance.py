"""Where a run was made: versions, hardware and git state, for `env.json`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_CPUS = Path("/proc/cpuinfo")
_GPUS = Path("/proc/driver/nvidia/gpus")


def environment() -> dict[str, Any]:
    """Versions, hardware, git state and the command."""
    names = ("sparring", "torch", "transformers", "peft", "tokenizers", "datasets", "numpy", "safetensors", "pyarrow")
    return {
        "versions": {name: _version(name) for name in names},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cpu": _line("model name", _CPUS),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "gpus": _gpus(),
        "git": _git_state(),
        "command": " ".join(sys.argv),
    }


def _gpus() -> str | None:
    """The GPUs of this machine by the driver's files: asking torch would load it, also for a run that is finished."""
    names = Counter(_line("Model", file) or "unknown" for file in sorted(_GPUS.glob("*/information")))
    return ", ".join(f"{count} × {name}" for name, count in names.items()) or None


def _line(name: str, file: Path) -> str | None:
    """What the first line `name: …` of a file says; None without one, or where the file cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(name)), None)


def _git_state() -> str | None:
    """The commit of this package's own checkout; None without one, or without git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
