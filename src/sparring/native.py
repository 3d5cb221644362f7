"""The package's C files, compiled for a model's sizes when they are first needed, and kept in the user's cache.

Each of them does what torch does too, in less time: where there is no compiler, what calls them goes on with torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

log = logging.getLogger("sparring")

Made = TypeVar("Made")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SHARED = b'#include "lanes.h"\n'
_NEEDS = {"x86_64": ("-mprefer-vector-width=512",)}


def tried(load: Callable[[], Made], problem: Callable[[Made], str | None], lost: str) -> Made | None:
    """What `load` makes of a library, if `problem` finds nothing wrong with it; else None, and one line that says why.

    lost: what cannot be had, and what that means.
    """
    import torch

    try:
        with torch.inference_mode(False):  # where first needed, but trials have gradients
            made = load()
            why = problem(made)
    except (OSError, subprocess.SubprocessError) as error:
        why = str(error)
    if why:
        log.info("%s: %s", lost, why)
        return None
    return made


def sized(dtype: torch.dtype, **sizes: int) -> dict[str, int] | None:
    """What C files are compiled for, for numbers of this type; None for types that they do not know."""
    import torch

    return {torch.float32: sizes, torch.bfloat16: sizes | {"HALF": 1}}.get(dtype)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """For trials of a library with gradients: what they save is nothing that a checkpoint around the first use may count."""
    import torch

    keep: Callable[[Any], Any] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, keep), torch.enable_grad():  # type: ignore[no-untyped-call]
        yield


def most(numbers: Iterable[torch.Tensor]) -> float:
    """The largest, and none where one is none: Python's `max` would pass over it."""
    import torch

    return float(torch.stack(list(numbers)).max())


def library(name: str, sizes: Mapping[str, int]) -> ctypes.CDLL:
    """What a C file of the package makes of these sizes, from the user's cache where such a machine compiled it before.

    Raises OSError or SubprocessError, with a line that says why, where it cannot be had.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        raise OSError(f"there is no C compiler `{compiler[0]}`")
    package = files("sparring")
    source = package.joinpath(name).read_bytes().replace(_SHARED, package.joinpath("lanes.h").read_bytes())
    defined = [f"-D{key}={value}" for key, value in sizes.items()]
    command = [*compiler, *_FLAGS, *_NEEDS.get(platform.machine(), ()), *defined]
    parts = (source, repr(command).encode(), _machine(), subprocess.check_output([*compiler, "--version"]))
    made = f"{hashlib.sha256(b'-'.join(parts)).hexdigest()[:24]}.so"
    # No home, one that cannot be written to or is full, or a file that was cut off
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        file = _cache() / made
        if file.exists():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(file))
        file.parent.mkdir(parents=True, exist_ok=True)
        _compile(command, source, file)
        return ctypes.CDLL(str(file))
    with tempfile.TemporaryDirectory(prefix="sparring_") as folder:  # what is loaded outlives its file
        _compile(command, source, Path(folder) / made)
        return ctypes.CDLL(f"{folder}/{made}")


def _compile(command: Sequence[str], source: bytes, file: Path) -> None:
    """Raises SubprocessError with the first line that the compiler says."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        done = subprocess.run(
            [*command, "-xc", "-", "-o", str(made), "-lm"], input=source, capture_output=True, check=False
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
            raise subprocess.SubprocessError(f"{command[0]}: {said[0]}")
        made.replace(file)


def _cache() -> Path:
    """Raises OSError for a user without a home."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if place.startswith("~"):
        raise OSError("this user has no home")
    return Path(place) / "sparring"


def _machine() -> bytes:
    """The CPU's kind and instructions: a home can be shared by machines that differ in them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        lines = []
    told = next((line for line in lines if line.lower().startswith((b"flags", b"features"))), b"")
    return platform.machine().encode() + told
