"""Attention of rows in C against sums in float64, in both directions, and what happens where it cannot be had."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparring import chosen, fused, native, spans
from sparring.attention import Rule
from sparring.play import decode
from sparring.spans import Kernel, Rows, Seen

SIZES = [(8, 1, 6), (2, 2, 64), (1, 3, 80), (1, 5, 8), (3, 2, 1)]
RULES: dict[str, Rule] = {
    "causal": lambda batch, head, q, k: k <= q,
    "window": lambda batch, head, q, k: (k <= q) & (k > q - 37),
    "chunks": lambda batch, head, q, k: (k <= q) & (k // 50 == q // 50),
}
SEGMENTS = [[32, 220, 0, 64], [1], [31, 1, 33], [350, 40, 60], [3, 5, 7, 2, 9], [150, 180]]
"""Prompts with their completions: of no tokens, of a block's size, one less and one more; some apart from their prompts."""


def table(segments: list[list[int]], rule: str = "causal") -> tuple[Rows, Seen]:
    rows = spans.rows(segments)
    seen = spans.seen(rows, rows.positions(), RULES[rule])
    assert seen is not None
    return rows, seen


def visible(segments: list[list[int]], rule: str) -> Tensor:
    """[N, N] True where a token sees another, token by token."""
    told = [
        (b, j, i + (own[0] if j else 0)) for b, own in enumerate(segments) for j, n in enumerate(own) for i in range(n)
    ]
    row, segment, position = (torch.tensor(x) for x in zip(*told, strict=True))
    same = (segment == 0) | (segment == segment[:, None])
    zero = torch.zeros((), dtype=torch.long)
    return (row == row[:, None]) & same & RULES[rule](zero, zero, position[:, None], position)


def states(segments: list[list[int]], groups: int, shared: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    make, size = torch.Generator().manual_seed(width), sum(map(sum, segments))
    heads = (groups * shared, groups, groups)
    return [torch.randn(size, n, width, generator=make).to(dtype).requires_grad_() for n in heads]


def both(out: Tensor, own: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, own, upstream)]


def exact(own: list[Tensor], seen: Tensor, scale: float) -> list[Tensor]:
    """By one product over everything, in float64."""
    wide = [x.detach().double().requires_grad_() for x in own]
    query, key, value = (x.transpose(0, 1) for x in wide)
    key, value = (x.repeat_interleave(len(query) // len(key), 0) for x in (key, value))
    weights = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    out = (weights @ value).transpose(0, 1)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(own[0].dtype).double()
    return [out.detach(), *torch.autograd.grad(out, wide, upstream)]


def apart(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


def kernel(*sizes: Any) -> Kernel:
    made = spans.kernel(*sizes)
    assert made is not None
    return made


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_it_is_attention_over_what_a_token_sees(
    sizes: tuple[int, int, int], rule: str, dtype: torch.dtype, most: float
) -> None:
    """Output and gradients, by their norms; the scale is no power of two."""
    _, seen = table(SEGMENTS, rule)
    own = states(SEGMENTS, *sizes, dtype)
    scale = 1.3 * sizes[2] ** -0.5
    found = both(spans.attend(kernel(dtype, *sizes), *own, seen, scale), own)
    wanted = exact(own, visible(SEGMENTS, rule), scale)
    assert [x.dtype for x in found] == [dtype] * 4
    assert max(apart(found, wanted)) < most, apart(found, wanted)


def test_it_is_nearer_to_float64_than_products_of_bfloat16() -> None:
    """Scores are not rounded: torch's tiles, which round them, are at 6e-3."""
    _, seen = table([[32, 220, 218], [350, 40, 60]])
    own = states([[32, 220, 218], [350, 40, 60]], 2, 2, 64, torch.bfloat16)
    found = both(spans.attend(kernel(torch.bfloat16, 2, 2, 64), *own, seen, 0.125), own)
    assert max(apart(found, exact(own, visible([[32, 220, 218], [350, 40, 60]], "causal"), 0.125))) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it(dtype: torch.dtype) -> None:
    """In both directions, with one thread or two, and wherever its numbers lie."""
    made, threads = kernel(dtype, 2, 2, 64), torch.get_num_threads()
    own = states(SEGMENTS, 2, 2, 64, dtype)
    _, seen = table(SEGMENTS)
    out = spans.attend(made, *own, seen, 0.125)
    whole = [out, *torch.autograd.grad(out, own, torch.ones_like(out))]
    at = 0
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for segments in SEGMENTS:
            part = slice(at, at := at + sum(segments))
            mine = [x.detach()[part].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in own]
            out = spans.attend(made, *mine, table([segments])[1], 0.125)
            alone = [out, *torch.autograd.grad(out, mine, torch.ones_like(out))]
            assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart_and_numbers_that_are_none(dtype: torch.dtype) -> None:
    """A key ahead by 1,000 takes everything; a NaN stays in its own row."""
    made = kernel(dtype, 1, 1, 16)
    own = [x.detach() for x in states(SEGMENTS, 1, 1, 16, dtype)]
    _, seen = table(SEGMENTS)
    own[1][7, 0] = (own[0][100, 0].float() * 1000 / float(own[0][100, 0].float().square().sum())).to(dtype)
    own[2][320, 0, 2] = math.nan
    for x in own:
        x.requires_grad_()
    out = spans.attend(made, *own, seen, 1.0)
    assert torch.equal(out[100], own[2][7])
    grads = torch.autograd.grad(out, own, torch.ones_like(out))
    row = slice(317, 317 + 65)  # the third
    for x in (out, *grads):
        broken = x.isnan().flatten(1).any(1)
        assert bool(broken[row].any()) == (x is not grads[2]) and not broken[: row.start].any()
        assert not broken[row.stop :].any()


@pytest.mark.skipif(b"amx_bf16" not in native._machine(), reason="the CPU has no tiles")
def test_others_find_the_tiles_as_they_had_set_them_up(tmp_path: Path) -> None:
    """Libraries remember what they have set up on a thread; here the first tile has seven rows."""
    probe = b"""#include <immintrin.h>
    static unsigned char set[64] = {1};
    void begin(void) { set[16] = 64, set[48] = 7; _tile_loadconfig(set); }
    int rows(void) { unsigned char now[64]; _tile_storeconfig(now); _tile_release(); return now[48]; }
    """
    native._compile(["cc", "-march=native", "-shared", "-fPIC"], probe, tmp_path / "probe.so")
    made = ctypes.CDLL(str(tmp_path / "probe.so"))
    own = states(SEGMENTS, 2, 2, 64, torch.bfloat16)
    attention, seen = kernel(torch.bfloat16, 2, 2, 64), table(SEGMENTS)[1]
    made.begin()
    out = spans.attend(attention, *own, seen, 0.125)
    assert made.rows() == 7
    upstream = torch.ones_like(out)
    made.begin()
    torch.autograd.grad(out, own, upstream)
    assert made.rows() == 7


def test_what_tokens_see_by_hand() -> None:
    """A prompt of three, completions of four, two and no tokens; two tokens that fill the row up."""
    rows = spans.rows([[3, 4, 2, 0], [2]])
    positions = rows.positions()
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 0, 1]
    assert rows.predicting(torch.tensor([False, True, True, True, False])).tolist() == [2, 3, 4, 5, 6, 2, 7, 8, 2]
    positions[-2:] = 0
    seen = spans.seen(rows, positions, lambda b, h, q, k: (k <= q) & (k > q - 2))
    assert seen is not None and seen.firsts.tolist() == [0, 9, 11]
    prompt, prompt_end, own = seen.spans[:, :9].tolist()
    assert prompt[3:] == [2, 3, 3, 3, 2, 3] and prompt_end[3:] == [3] * 6
    assert own == [0, 0, 1, 3, 3, 4, 5, 7, 7] and prompt[:3] == prompt_end[:3]
    assert seen.spans[2, 9:].tolist() == [9, 10]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_spans_are_what_the_rule_says(seed: int, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, with the rule asked of a few positions at a time."""
    monkeypatch.setattr(spans, "_ROWS", 500)
    rng = random.Random(seed)
    segments = [[rng.randint(1, 60), *(rng.choice([0, 1, 30, 90]) for _ in range(rng.randint(0, 4)))] for _ in range(5)]
    _, seen = table(segments, rule)
    place = torch.arange(int(seen.firsts[-1]))
    start, end, own = seen.spans.long()[:, :, None]
    found = ((place >= start) & (place < end)) | ((place >= own) & (place <= place[:, None]))
    assert torch.equal(found, visible(segments, rule))


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, k: k <= q + 1,
        lambda b, h, q, k: (k <= q) & (k != 3),
        lambda b, h, q, k: k < q,
        lambda b, h, q, k: (k <= q) & (q != 5),
    ],
)
def test_other_rules_are_left_to_torch(rule: Rule) -> None:
    rows = spans.rows([[4, 5]])
    assert spans.seen(rows, rows.positions(), rule) is None


def test_other_types_are_left_to_torch() -> None:
    assert spans.kernel(torch.float16, 2, 2, 16) is None and spans.kernel(torch.float64, 2, 2, 16) is None


def _colder(made: Kernel, which: str) -> Kernel:
    """With a scale that is a hundredth too large in one direction."""
    function = getattr(made, which)
    return made._replace(**{which: lambda *given: function(*given[:-1], 1.01 * given[-1])})


def test_what_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparring")

    def said() -> str:
        assert spans.kernel.__wrapped__(torch.float32, 1, 2, 8) is None
        (record,) = caplog.records
        caplog.clear()
        return record.getMessage()

    loaded = spans._loaded
    for direction in ("forward", "backward"):
        with monkeypatch.context() as patch:
            broken = lambda sizes, which=direction: _colder(loaded(sizes), which)  # noqa: E731
            patch.setattr(spans, "_loaded", broken)
            assert said().startswith("attention in C cannot be had, passes take longer: its results are off by 0.")
    with monkeypatch.context() as patch:
        patch.setattr(native, "_FLAGS", (*native._FLAGS, "--no-such-flag"))
        assert "no-such-flag" in said()
    monkeypatch.setenv("CC", "no_such_compiler -m64")
    assert said().endswith("there is no C compiler `no_such_compiler`")


def test_a_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('gcc') or 'cc'} -DTHEIRS")
    assert spans.kernel.__wrapped__(torch.float32, 1, 2, 8) is not None


@pytest.mark.parametrize("full", [True, False])
def test_where_the_cache_takes_nothing_a_kernel_is_made_elsewhere(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full lets the folder be made, and the compiler fails; a file in its place lets nothing be made."""
    cache, compile_ = tmp_path / "cache", native._compile
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if not full:
        cache.write_text("")

    def failing(command: Any, source: bytes, file: Path) -> None:
        if cache in file.parents:
            raise subprocess.SubprocessError("no space left on device")
        compile_(command, source, file)

    monkeypatch.setattr(native, "_compile", failing)
    assert spans.kernel.__wrapped__(torch.float32, 1, 2, 8) is not None


def test_a_user_without_a_home_has_a_kernel_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers whose user the system does not know; nothing is made where the program happens to run."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    monkeypatch.chdir(tmp_path)
    assert spans.kernel.__wrapped__(torch.float32, 1, 2, 8) is not None
    assert not list(tmp_path.iterdir())


def test_many_heads_that_share_one_are_no_reason_to_doubt_a_kernel() -> None:
    """Gradients of values are sums over all of them, which bfloat16 rounds to 2**-8 of their size."""
    assert kernel(torch.bfloat16, 1, 71, 64) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_may_be_first_needed_within_inference_mode(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        assert spans.kernel.__wrapped__(dtype, 1, 2, 8) is not None
        assert chosen.kernel.__wrapped__(dtype) is not None
        assert fused.kernel.__wrapped__(dtype, 8) is not None
        assert decode.kernel.__wrapped__(dtype, 1, 2, 8) is not None


def test_second_derivatives_are_an_error_instead_of_wrong() -> None:
    own = states([[4, 3]], 1, 2, 8, torch.float32)
    out = spans.attend(kernel(torch.float32, 1, 2, 8), *own, table([[4, 3]])[1], 1.0)
    (grad,) = torch.autograd.grad(out.square().sum(), own[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of these machines")
@pytest.mark.parametrize("without", [("-mno-amx-bf16",), ("-mno-avx512f", "-mno-avx2", "-mno-fma")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_machines_that_can_do_less_compute_the_same(
    without: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, *without))
    half = {"HALF": 1} if dtype == torch.bfloat16 else {}
    made = spans._loaded({"GROUPS": 1, "SHARED": 2, "WIDTH": 40} | half)
    assert spans._problem(made, dtype, 1, 2, 40) is None
    assert chosen._problem(chosen._loaded(half), dtype) is None


def test_first_used_within_a_checkpoint_it_is_not_counted() -> None:
    """Its trial saves tensors, which a checkpoint would miss when it computes again."""
    own, (_, seen) = states([[9, 30]], 1, 2, 16, torch.float32), table([[9, 30]])
    expected = both(spans.attend(kernel(torch.float32, 1, 2, 16), *own, seen, 0.25), own)
    spans.kernel.cache_clear()

    def layer(*given: Tensor) -> Tensor:
        return spans.attend(kernel(torch.float32, 1, 2, 16), *given, seen, 0.25)

    found = both(checkpoint(layer, *own, use_reentrant=False), own)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_where_tiles_are_refused_other_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    library, asked = spans.library, list[int]()

    def refusing(name: str, sizes: dict[str, int]) -> Any:
        made = library(name, sizes)
        asked.append(sizes.get("UNTILED", 0))
        made.refused = lambda: not asked[-1]
        return made

    monkeypatch.setattr(spans, "library", refusing)
    made = spans._loaded({"GROUPS": 1, "SHARED": 2, "WIDTH": 16, "HALF": 1})
    assert asked == [0, 1] and spans._problem(made, torch.bfloat16, 1, 2, 16) is None


def test_other_rows_than_those_of_the_spans_are_refused() -> None:
    own, (_, seen) = states([[9, 30]], 1, 1, 8, torch.float32), table([[9, 31]])
    with pytest.raises(ValueError, match="39 queries and 39 keys for rows of 40 tokens"):
        spans.attend(kernel(torch.float32, 1, 1, 8), *own, seen, 1.0)


def test_no_memory_is_an_error() -> None:
    own = states([[4]], 1, 1, 8, torch.float32)
    with pytest.raises(MemoryError, match="no memory for a row of 4 tokens"):
        spans.attend(Kernel(lambda *_: 1, lambda *_: 1), *own, table([[4]])[1], 1.0)
