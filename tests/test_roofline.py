"""What benchmarks/speed/floor.py counts, by hand and against torch's own counter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import script
from sparring import chosen, fused, spans, tiles
from sparring.logps import packed_token_logps

floor = script("speed/floor")
PROMPT, COMPLETIONS = [3, 4, 5], [[6, 7, 8, 9], [10, 11]]
"""Seven tokens are computed, as the last of a completion predicts nothing, and six have logits."""
LINEAR = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12)
"""Weights of both layers."""


@pytest.fixture(scope="module")
def model() -> Any:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=20, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def operations(need: Any, kind: str) -> float:
    return sum(product.flops * times for (name, product), times in need.products.items() if name == kind)


@pytest.mark.parametrize(("learns", "times"), [(False, 1), (True, 3)])
def test_a_pass_needs_each_token_once_and_the_keys_that_it_may_see(model: Any, learns: bool, times: int) -> None:
    need = floor.completed(floor.sizes(model, 2), [(3, [4, 2])], learns)
    assert operations(need, "linear") == times * 2 * 7 * LINEAR
    assert operations(need, "vocabulary") == times * 2 * 6 * 8 * 20
    # 1 + 2 + 3 keys of the prompt, 4 + 5 + 6 of one completion, 4 of the other; two heads of 4, two products, two layers
    assert operations(need, "attention") == pytest.approx(times * 4 * 2 * 4 * (6 + 15 + 4) * 2)
    assert need.moved == (3 if learns else 1) * 6 * 20 * 2


@pytest.mark.parametrize("learns", [False, True])
def test_layers_products_are_those_that_torch_counts(model: Any, learns: bool) -> None:
    need = floor.completed(floor.sizes(model, 4), [(3, [4, 2])], learns)
    packed_token_logps(model, [PROMPT] * 2, COMPLETIONS)  # so that layers have been tried
    with FlopCounterMode(display=False) as counted, torch.set_grad_enabled(learns):
        logps = packed_token_logps(model, [PROMPT] * 2, COMPLETIONS)
        if learns:
            logps.sum().backward()
    table = counted.get_flop_counts()["Global"]
    layers = sum(table.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert operations(need, "linear") + operations(need, "vocabulary") == layers


def test_a_step_of_decoding_reads_the_keys_and_values_of_its_rows(model: Any) -> None:
    need = floor.decoded(floor.sizes(model, 2), [5, 2])
    assert operations(need, "linear") == 2 * 2 * LINEAR
    assert operations(need, "vocabulary") == 2 * 2 * 8 * 20
    assert need.flops == 4 * 2 * 4 * 2 * (5 + 2)
    # A key and a value of one head of 4 in two layers, read for 7 tokens and written for 2; the logits
    assert need.moved == 2 * 4 * 2 * 2 * (7 + 2) + 2 * 20 * 2
    assert need.weights == 2 * (LINEAR + 8 * 20)


def test_a_step_of_the_optimizer_reads_and_writes_weights_moments_and_gradients(model: Any) -> None:
    of = floor.sizes(model, 2)
    assert floor.stepped(of, moments=2).moved == of.parameters * (4 * 8 + 6)
    assert floor.stepped(floor.sizes(model, 4), moments=1).moved == of.parameters * 4 * 6


def test_the_profile_knows_our_own_operations_by_their_names() -> None:
    """Each would be told as Python's time otherwise."""
    file = Path(__file__).parents[1] / "benchmarks/speed/roofline.py"
    own = file.read_text(encoding="utf-8").split("OWN = {")[1].split("\n}")[0]
    for made in (spans._Attention, chosen._InC, chosen._InTorch, tiles.Tiles, tiles.Whole):
        assert f'"{made.__name__}Backward"' in own
    names = file.read_text(encoding="utf-8").split("LAYERS = (")[1].split(")")[0]
    assert all(f'"{made.__name__}"' in names for made in (fused._Begin, fused._End))


@pytest.mark.gpu
def test_training_on_a_gpu_is_timed_against_trls(tmp_path: Path) -> None:
    """Both in processes of their own, on a model that is far too small to keep the GPU busy."""
    pytest.importorskip("trl")
    file = Path(__file__).parents[1] / "benchmarks/speed/train.py"
    given = "--device cuda --models 8M --shapes ragged --pairs 4 --batch 4 --epochs 1 --repeats 1 --compile never"
    out = tmp_path / "train.jsonl"
    subprocess.run([sys.executable, file, *given.split(), "--trl", "sdpa,1", "--out", out], check=True)
    row = json.loads(out.read_text(encoding="utf-8"))
    assert row["same"] and row["on_gpu"]["gpu"] == torch.cuda.get_device_name()
    for side in ("sparring", "trl"):
        assert row["on_gpu"][side]["peak_gb"] > 0 and row["on_gpu"][side]["tokens_per_second"] > 0
