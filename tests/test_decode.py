"""Attention in C against sums in float64, and what happens where it cannot be had."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring import native
from sparring.play import decode

SIZES = [
    (1, 1, 8),
    (2, 2, 8),
    (2, 3, 16),
    (1, 8, 64),
    (4, 1, 72),
    (2, 2, 128),
    (8, 1, 64),
    (1, 17, 8),
    (8, 1, 6),
    (2, 2, 1),
    (1, 3, 42),
]
FIRST, END, ROOM = torch.tensor([0, 3, 0, 31, 0, 200]), torch.tensor([1, 4, 32, 65, 250, 233]), 256


def exact(query: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """Row by row and head by head, in float64."""
    out = torch.empty(query.shape, dtype=torch.float64)
    shared = query.shape[1] // keys.shape[1]
    for row in range(len(query)):
        own = slice(int(first[row]), int(end[row]))
        for head in range(query.shape[1]):
            k, v = (x[row, head // shared, own].double() for x in (keys, values))
            out[row, head] = (k @ query[row, head].double() * scale).softmax(0) @ v
    return out


def states(dtype: torch.dtype, groups: int, shared: int, width: int, spread: float = 1.0) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(width)
    query, key, value, keys, values = (
        torch.randn(len(END), *shape, width, generator=make).mul(spread).to(dtype)
        for shape in ((groups * shared,), (groups,), (groups,), (groups, ROOM), (groups, ROOM))
    )
    return query, key, value, keys, values


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_it_is_attention_over_a_rows_own_keys(sizes: tuple[int, int, int], dtype: torch.dtype, most: float) -> None:
    """float32 to 2e-6; bfloat16 to half a step of its own, as sums are float32."""
    made = decode.kernel(dtype, *sizes)
    assert made is not None
    for spread in (0.01, 1.0, 2.0):
        query, key, value, keys, values = states(dtype, *sizes, spread=spread)
        before = [x.clone() for x in (keys, values)]
        scale = sizes[2] ** -0.5
        got = made(query, key, value, keys, values, FIRST, END, scale)
        rows = torch.arange(len(END))
        for x, old, new in zip((keys, values), before, (key, value), strict=True):
            old[rows, :, END - 1] = new
            assert torch.equal(x, old)  # the new ones at the row's end, nothing else
        right = exact(query, keys, values, FIRST, END, scale)
        assert (got - right).abs().max() <= most * right.abs().max()
        assert torch.equal(got[0], value[0].repeat_interleave(sizes[1], 0))  # a first token sees itself


def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it() -> None:
    made = decode.kernel(torch.float32, 2, 2, 16)
    assert made is not None
    query, key, value, keys, values = states(torch.float32, 2, 2, 16)
    whole = made(query, key, value, keys, values, FIRST, END, 0.25)
    for row in range(len(END)):
        own = [x[row : row + 1].contiguous() for x in (query, key, value, keys, values, FIRST, END)]
        assert torch.equal(made(*own, 0.25)[0], whole[row])  # type: ignore[call-arg,arg-type]


def test_scores_far_apart_and_numbers_that_are_none() -> None:
    """A key ahead by 1,000 takes everything; a NaN stays one, in its own row only."""
    made = decode.kernel(torch.float32, 1, 1, 8)
    assert made is not None
    query, key, value, keys, values = states(torch.float32, 1, 1, 8)
    keys[4, 0, 7] = query[4, 0] * 1000 / float(query[4, 0].square().sum())
    values[3, 0, 40, 2] = math.nan
    got = made(query, key, value, keys, values, FIRST, END, 1.0)
    assert torch.equal(got[4, 0], values[4, 0, 7])
    assert got.isnan().nonzero().tolist() == [[3, 0, 2]]
    keys[2, 0, 5, 0] = math.nan
    assert made(query, key, value, keys, values, FIRST, END, 1.0)[2].isnan().all()
    half = decode.kernel(torch.bfloat16, 1, 1, 8)
    assert half is not None
    narrow = [x.bfloat16() for x in (query, key, value, keys, values)]
    assert half(*narrow, FIRST, END, 1.0)[2].isnan().all()  # type: ignore[call-arg,arg-type]


def test_other_types_are_left_to_torch() -> None:
    assert decode.kernel(torch.float16, 2, 2, 16) is None
    assert decode.kernel(torch.float64, 2, 2, 16) is None


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`decode.kernel` as a new process would run it, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return decode.kernel.__wrapped__


ONE = (torch.float32, 1, 2, 8)


def test_it_is_compiled_once_for_its_sizes(fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh(*ONE) is not None and fresh(torch.bfloat16, 1, 2, 8) is not None
    assert len(list((tmp_path / "sparring").iterdir())) == 2
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert fresh(*ONE) is not None


def test_another_machine_compiles_its_own(fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(*ONE)
    monkeypatch.setattr(native, "_machine", lambda: b"another")
    fresh(*ONE)
    assert len(list((tmp_path / "sparring").iterdir())) == 2


def test_a_broken_file_or_a_cache_that_cannot_be_written_to_costs_time_only(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh(*ONE) is not None
    (whole,) = (tmp_path / "sparring").iterdir()
    # At another place: what a process has loaded it does not look at again
    file = tmp_path / "other" / "sparring" / whole.name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\x7fELF, cut off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert fresh(*ONE) is not None
    assert file.stat().st_size > 1000  # mended, so that the next process need not compile
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert fresh(*ONE) is not None


def test_no_compiler_one_that_fails_and_wrong_code_are_told(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sparring")

    def said() -> str:
        assert fresh(*ONE) is None
        (record,) = caplog.records
        caplog.clear()
        return record.getMessage()

    flags = native._FLAGS
    monkeypatch.setattr(native, "_FLAGS", (*flags, "-Dexponential(x)=0.5f"))
    assert "attention in C cannot be had, decoding takes longer: " in said()
    with monkeypatch.context() as patch:
        wrapped = decode._wrapped
        patch.setattr(native, "_FLAGS", flags)
        patch.setattr(decode, "_wrapped", lambda made: lambda *given: wrapped(made)(*given) + 2e-4)
        assert said().endswith("its results are off by 0.0002")
    monkeypatch.setattr(native, "_FLAGS", (*flags, "--no-such-flag"))
    assert "no-such-flag" in said()
    monkeypatch.setenv("CC", "no_such_compiler")
    assert said().endswith("there is no C compiler `no_such_compiler`")
