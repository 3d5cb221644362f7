"""Attention of one token per row in C (`decode.c`), compiled for a model's sizes when they are first decoded on a CPU.

torch's own kernel computes every row as if it were as long as the longest; this one takes a row's own keys, once for all
query heads that share them, and stores the new ones on its way. Where there is no compiler, or what it made computes
something else, decoding goes on without, slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger("sparring")

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""query [N, heads, D], the new key and value [N, key heads, D], all keys and values [≥ N, key heads, room, D], which of
them a row sees (from and to, int64 [N]; the new ones go to the last place) and a scale: to [N, heads, D]."""

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_NEEDS = {"x86_64": ("-mprefer-vector-width=512",)}


@cache
def kernel(dtype: torch.dtype, groups: int, shared: int, width: int) -> Kernel | None:
    """The kernel for so many key heads, query heads for each and numbers a head; None where it cannot be had."""
    if dtype not in (torch.bfloat16, torch.float32) or width % 8:
        return None
    sizes = {"GROUPS": groups, "SHARED": shared, "WIDTH": width} | ({"HALF": 1} if dtype == torch.bfloat16 else {})
    try:
        made = _wrapped(_built(tuple(f"-D{name}={value}" for name, value in sizes.items())))
        problem = _problem(made, dtype, groups, shared, width)
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem:
        log.info("attention in C cannot be had, decoding takes longer: %s", problem)
        return None
    return made


def _built(sizes: tuple[str, ...]) -> ctypes.CDLL:
    """The library for these sizes, from the user's cache where it was compiled on such a machine before."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError(f"there is no C compiler `{os.environ.get('CC', 'cc')}`")
    source = files("sparring.play").joinpath("decode.c").read_bytes()
    command = [compiler, *_FLAGS, *_NEEDS.get(platform.machine(), ()), *sizes]
    parts = (source, repr(command).encode(), _machine(), subprocess.check_output([compiler, "--version"]))
    file = _cache() / f"{hashlib.sha256(b'-'.join(parts)).hexdigest()[:24]}.so"
    with contextlib.suppress(OSError):  # a home that cannot be written to, or a file that was cut off
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            _compile(command, source, file)
        return ctypes.CDLL(str(file))
    with tempfile.TemporaryDirectory(prefix="sparring_") as folder:  # what is loaded outlives its file
        _compile(command, source, Path(folder) / file.name)
        return ctypes.CDLL(f"{folder}/{file.name}")


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
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparring"


def _machine() -> bytes:
    """The CPU's kind and instructions: a home can be shared by machines that differ in them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        lines = []
    told = next((line for line in lines if line.lower().startswith((b"flags", b"features"))), b"")
    return platform.machine().encode() + told


def _wrapped(library: ctypes.CDLL) -> Kernel:
    function = library.decode
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 2 + [ctypes.c_float]
    function.restype = None

    def attend(
        query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(query)
        tensors = (query, key, value, keys, values, out, first, end)
        function(*(x.data_ptr() for x in tensors), len(query), keys.shape[2], scale)
        return out

    return attend


def _problem(made: Kernel, dtype: torch.dtype, groups: int, shared: int, width: int) -> str | None:
    """What is wrong with a kernel, tried on three rows of random numbers; None where nothing is."""
    random = torch.Generator().manual_seed(0)
    ends, room = (1, 33, 70), 70

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, width, generator=random).to(dtype)

    query, keys, values = states(3, groups * shared), states(3, groups, room), states(3, groups, room)
    key, value = (torch.stack([x[row, :, end - 1] for row, end in enumerate(ends)]) for x in (keys, values))
    first, end = torch.tensor([0, 5, 0]), torch.tensor(ends)
    got = made(query, key, value, keys.clone(), values.clone(), first, end, width**-0.5)
    place = torch.arange(room)
    seen = (place >= first[:, None]) & (place < end[:, None])
    folded = query.view(3, groups, shared, width).float()
    right = functional.scaled_dot_product_attention(folded, keys.float(), values.float(), seen[:, None, None])
    apart = float((got.view_as(right).float() - right).abs().max())
    return None if apart < (3e-2 if dtype == torch.bfloat16 else 1e-5) else f"its results are off by {apart:.2g}"
