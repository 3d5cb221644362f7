"""Attention in training on a CPU without a C compiler: tiles of long rows against one product over whole rows."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparring.attention import Rule, States
from sparring.batching import Tile, rounded, tiles
from sparring.tiles import scores
from sparring.tree import Tree, _Unpad

CPU = torch.device("cpu")
RULES: dict[str, Rule] = {
    "causal": lambda batch, head, q, k: k <= q,
    "window": lambda batch, head, q, k: (k <= q) & (k > q - 70),
    "looking on": lambda batch, head, q, k: k <= q + 3,
}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparring.spans.kernel", lambda *_: None)


def tree(segments: list[list[int]]) -> Tree:
    prompts = [[1] * own[0] for own in segments]
    return Tree(prompts, [[[1] * (n + 1) for n in own[1:]] for own in segments], CPU)


def drawn(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.choice(lengths) for _ in range(rng.randint(2, 5))] for _ in range(4)]


def attended(
    made: Tree, states: tuple[Tensor, Tensor, Tensor], rule: Rule, scale: float, *, whole: bool
) -> list[Tensor]:
    """Output and gradients; `whole` by `scores` over padded rows, the oracle."""
    own = [x.detach().requires_grad_() for x in states]
    if whole:
        padded = [made._padded(x) for x in own]
        mixed = scores(*padded, made._bias(rule, own[0].dtype), scale, None)
        out = _Unpad.apply(mixed.transpose(1, 2), made._place)
    else:
        out = made.attend(0, States(*own, scale, None), rule)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, own, upstream)]


def states(made: Tree, heads: int, groups: int, width: int, last: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator, count = torch.Generator().manual_seed(1), made.ids.shape[1]
    sizes = ((heads, width), (groups, width), (groups, last))
    return tuple(torch.randn(count, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def test_tiles_by_hand() -> None:
    """A completion of 200 leaves one of 300 before it out, one of 20 does not; parts are multiples of 16."""
    assert tiles([50, 300, 200], half=False, forward=True) == [
        Tile(0, 128, 0, 0), Tile(128, 256, 0, 0), Tile(256, 350, 0, 0), Tile(350, 462, 50, 350), Tile(462, 550, 50, 350),
    ]  # fmt: skip
    assert tiles([50, 300, 20], half=True, forward=True) == [Tile(0, 192, 0, 0), Tile(192, 370, 0, 0)]
    assert tiles([50, 300, 200], half=False, forward=False) == [Tile(0, 350, 0, 0), Tile(350, 550, 50, 350)]
    assert tiles([50, 300, 200], half=True, forward=True)[-1].keys == 250
    assert [len(tiles([50, 80, last], half=True, forward=True)) for last in (115, 116)] == [
        1,
        2,
    ]  # 96 · 96 / 80 = 115.2
    assert [rounded(n, half=half) for n in (1, 33, 208) for half in (False, True)] == [16, 32, 48, 64, 208, 224]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("half", [False, True])
def test_every_query_is_in_one_tile_that_has_all_its_keys(seed: int, half: bool) -> None:
    for segments in drawn(seed, [1, 30, 100, 260]):
        found = tiles(segments, half=half, forward=True)
        assert found[0].start == 0 and found[-1].end == sum(segments)
        assert all(a.end == b.start for a, b in pairwise(found))
        begin = [sum(segments[:i]) for i, n in enumerate(segments) for _ in range(n)]
        for tile in found:
            keys = {*range(tile.prompt), *range(tile.rest, tile.end)}
            assert len(keys) == tile.keys
            for query in (tile.start, tile.end - 1):
                seen = {*range(min(segments[0], query + 1)), *range(begin[query], query + 1)}
                assert seen <= keys


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("groups", "width", "last"), [(2, 6, 6), (4, 5, 3)])
@pytest.mark.parametrize("kept", [2**26, 0])
def test_tiles_are_one_product_over_whole_rows(
    rule: str, groups: int, width: int, last: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients in float64, to 1e-13; two or four key heads for four heads."""
    monkeypatch.setattr("sparring.tree.MOST_SCORES", kept)
    for seed, lengths in enumerate(([1, 3, 9, 40], [150, 100, 20])):
        made = tree([*drawn(seed, lengths), [140, 1]])
        given = states(made, 4, groups, width, last, torch.float64)
        found, wanted = (attended(made, given, RULES[rule], 0.3, whole=whole) for whole in (False, True))  # type: ignore[arg-type]
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert (a - b).norm() < 1e-13 * b.norm()


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 6e-3), (torch.float32, 6e-7)])
def test_tiles_are_as_near_to_float64_as_one_product(dtype: torch.dtype, most: float) -> None:
    """Relative errors of output and gradients of two rows of 470 tokens, heads of 64."""
    made = tree([[32, 220, 218], [350, 40, 60]])
    given = states(made, 4, 2, 64, 64, dtype)
    wide = tuple(x.double() for x in given)
    exact = attended(made, wide, RULES["causal"], 0.125, whole=True)  # type: ignore[arg-type]
    apart = [
        [
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(attended(made, given, RULES["causal"], 0.125, whole=whole), exact, strict=True)  # type: ignore[arg-type]
        ]
        for whole in (False, True)
    ]
    assert all(a < most and a < 1.1 * b for a, b in zip(*apart, strict=True)), apart


def test_weights_made_again_have_the_bits_of_those_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tree([[32, 120, 118], [150, 40, 60]])
    given = states(made, 4, 2, 16, 16, torch.float32)
    kept = attended(made, given, RULES["causal"], 0.25, whole=False)  # type: ignore[arg-type]
    monkeypatch.setattr("sparring.tree.MOST_SCORES", 0)
    again = attended(made, given, RULES["causal"], 0.25, whole=False)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_what_is_kept_grows_with_completions_not_with_their_square() -> None:
    """Eight completions of 250 tokens make eight times what one makes, but for their tiles' padding; all made is 34."""
    found = (tiles([30, *[250] * n], half=False, forward=True) for n in (1, 8))
    one, eight = (sum((t.end - t.start) * t.keys for t in every) for every in found)
    assert eight < 9 * one < 34 * one
