"""Quantised bases and optimizers of bitsandbytes. The oracle is a model whose weights are what the 4 bits stand for.

What computes runs where bitsandbytes is installed; its refusals are tested everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sparring
from helpers import character_tokenizer, cli, recipe, write_recipe
from sparring import adapters, lowbit, players
from sparring.config import Config, ModelConfig, TrainConfig
from sparring.cost import Shape, memory
from sparring.cost.memory import Where
from sparring.errors import InputError
from sparring.logps import token_logps
from sparring.preview import Bench
from sparring.prompts import load_tokenizer
from sparring.rundir.view import RunView
from sparring.train import _restore, _snapshot, make_optimizer
from sparring.types import Player
from sparring.workshop import Workshop
from test_card import read, snippet

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
PLAIN = ModelConfig(device="cpu", threads=1)
QLORA = ModelConfig(device="cpu", threads=1, lora_rank=2, quantize="nf4")
PROMPTS, ANSWERS = [[5, 6, 7], [9, 4], [11] * 6], [[8, 9, 3, 1], [10, 1], [22, 23, 24]]
# QLoRA, appendix E: the sixteen values of NF4
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(shared: Path) -> Path:
    """A random one-layer Llama of width 64, but for one matrix with 96 inputs. Read only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = shared / "wide", character_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=256, eos_token_id=1, bos_token_id=None, pad_token_id=0, initializer_range=0.1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def logps(model: nn.Module, compute: torch.dtype | None = None) -> Tensor:
    with torch.no_grad():
        return token_logps(model, PROMPTS, ANSWERS, compute=compute)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    token_logps(model, PROMPTS, ANSWERS).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def workshop(start: str, config: ModelConfig) -> tuple[Workshop, Player]:
    player = Player(start, 0, players.identify(start))
    whole = Config(model=config.model_copy(update={"path": start}), seed=3)
    return Workshop(None, whole, SimpleNamespace(first=0), player), player  # type: ignore[arg-type]


def trained(shop: Workshop, start: Player, t: int, folder: Path) -> Player:
    model: Any = shop.learner(start, t)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        (-token_logps(model, PROMPTS, ANSWERS).sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    folder.mkdir()
    players.save_player(model, load_tokenizer(start.path), folder, "card", template="t", stop_ids=(1,))
    shop.keep(model, players.identify(str(folder)))
    return Player(str(folder), t + 1, players.identify(str(folder)))


# A quantised base ------------------------------------------------------------------------------------------------


@installed
def test_weights_are_sixteen_values_times_a_scale_per_64(wide: Path) -> None:
    """Nearest of the paper's sixteen values, blocks in order of the rows; 8-bit scales are off by less than 1 %."""
    path = "model.layers.0.mlp.gate_proj"
    before = load_file(wide / "model.safetensors")[f"{path}.weight"]
    blocks = before.flatten().view(-1, 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks[..., None] / scales[..., None] - torch.tensor(NF4)).abs().argmin(dim=-1)
    by_hand = (torch.tensor(NF4)[nearest] * scales).view_as(before)
    model: Any = lowbit.rounded(players.load_model(str(wide), PLAIN), "nf4")
    got = model.get_submodule(path).weight
    assert (got - by_hand).abs().max() < 0.01 * scales.max()
    assert (got - before).abs().max() > 0.05 * scales.max()
    kept = load_file(wide / "model.safetensors")
    assert torch.equal(model.lm_head.weight, kept["lm_head.weight"])
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(down), kept[down])


@installed
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_quantised_model_is_what_its_bits_stand_for(wide: Path, kind: str) -> None:
    whole = players.load_model(str(wide), PLAIN)
    before = logps(whole)
    rounded = logps(lowbit.rounded(whole, kind))
    model: Any = players.load_model(str(wide), QLORA.model_copy(update={"quantize": kind}))
    assert (logps(model) - rounded).abs().max() < 1e-6
    assert (before - rounded).abs().max() > 1e-3
    layer = model.model.layers[0].mlp.up_proj
    # 64 x 96 weights of half a byte; the output and the embeddings stay what they were
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 3072
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    # The kernel for inference that some CPUs have would cut the gradient of whatever is trained after it
    assert (logps(model) - rounded).abs().max() < 1e-6 and not layer.support_avx512bf16_for_cpu


@installed
def test_a_plan_counts_its_bytes() -> None:
    """All that a model holds, scales with it; tables that are the same for any matrix (1.1 kB each) left out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape("llama", hidden=256, layers=2, heads=4, key_heads=2, inner=512, vocabulary=80, context=64)
    config = LlamaConfig(
        vocab_size=80, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = lowbit.quantised(LlamaForCausalLM(config), "nf4", torch.float32, torch.device("cpu"))
    held = 0
    for parameter in model.parameters():
        held += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    said = memory.weights(shape, Where(False, True, quantized=True))
    assert said == {"weights": held, "unpacked": 4 * 256 * 512}


@installed
def test_an_adapter_on_it_has_the_gradient_of_one_on_what_the_bits_stand_for(wide: Path) -> None:
    on = adapters.Base("b", None, "0", "nf4")
    packed = players.load_model(str(wide), QLORA)
    rounded = lowbit.rounded(players.load_model(str(wide), PLAIN), "nf4")
    one, two = (adapters.fresh(base, on, QLORA, seed=7) for base in (packed, rounded))
    for model in (one, two):
        with torch.no_grad():
            for n, (name, p) in enumerate(model.named_parameters()):
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n % 7)) * 0.1)
    order = [name for name, p in one.named_parameters() if p.requires_grad]
    assert order == [name for name, p in two.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for (_, p), (_, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
            if p.requires_grad:
                q.copy_(p)
    logps(one)  # a pass without gradient before, as the guard makes them
    got, wanted = gradients(one), gradients(two)
    assert got.keys() == wanted.keys() == set(order)
    for name, grad in wanted.items():
        assert (got[name] - grad).norm() < 1e-5 * grad.norm(), name
    assert min(grad.norm() for grad in wanted.values()) > 1e-4


@installed
def test_adapters_share_the_packed_weights_and_their_scales(wide: Path) -> None:
    base: Any = players.load_model(str(wide), QLORA)
    one, two = (adapters.fresh(base, adapters.Base("b", None, "0", "nf4"), QLORA, seed) for seed in (1, 2))
    layers = [m.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer") for m in (one, two)]
    own = base.model.layers[0].mlp.up_proj
    assert own.weight is layers[0].weight is layers[1].weight
    assert own.quant_state is layers[0].quant_state is layers[1].weight.quant_state
    assert torch.equal(logps(one), logps(base))


@installed
def test_a_player_saved_and_loaded_again_has_the_same_logps(wide: Path, tmp_path: Path) -> None:
    shop, start = workshop(str(wide), QLORA)
    one = trained(shop, start, 0, tmp_path / "one")
    two = trained(shop, one, 1, tmp_path / "two")
    kept = logps(shop.model(two))
    assert (kept - logps(shop.model(start))).abs().max() > 0.1
    assert torch.equal(logps(workshop(str(wide), QLORA)[0].model(two)), kept)
    assert json.loads((tmp_path / "two" / "base.json").read_text())["quantize"] == "nf4"
    # Merged it is what the bits stand for and the adapter: as loaded by its folder, and as exported
    assert (logps(players.load_model(two.path, PLAIN)) - kept).abs().max() < 1e-5
    players.export_player(two.path, tmp_path / "out", QLORA, merge=True)
    out = players.load_model(str(tmp_path / "out"), PLAIN)
    assert {p.dtype for p in out.parameters()} == {torch.float32}
    assert (logps(out) - kept).abs().max() < 1e-5
    # On the base as it is, it would be another
    record = tmp_path / "two" / "base.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"quantize": None}))
    assert players.identify(two.path) != two.sha
    assert (logps(players.load_model(two.path, PLAIN)) - kept).abs().max() > 1e-3


@installed
def test_a_start_that_is_an_adapter_is_merged_and_then_quantised(wide: Path, tmp_path: Path) -> None:
    shop, start = workshop(str(wide), QLORA)
    one = trained(shop, start, 0, tmp_path / "one")
    merged = lowbit.rounded(players.load_model(one.path, PLAIN), "nf4")
    again = workshop(one.path, QLORA)[0]
    assert (logps(again.model(Player(one.path, 0, one.sha))) - logps(merged)).abs().max() < 1e-6
    # In another's run, under a role, it is what it is
    outside = Player(one.path, None, one.sha)
    assert (logps(shop.model(outside)) - logps(players.load_model(one.path, PLAIN))).abs().max() < 1e-6


@installed
def test_bfloat16(wide: Path) -> None:
    rounded = lowbit.rounded(players.load_model(str(wide), PLAIN), "nf4")
    model = players.load_model(str(wide), QLORA.model_copy(update={"compute": "bfloat16"}))
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    got, wanted = (logps(m, torch.bfloat16) for m in (model, rounded))
    assert (got - wanted).abs().max() < 0.03


@pytest.fixture(scope="module")
def qlora_run(shared: Path, wide: Path, tiny_data: Path) -> Path:
    """SFT and a round of SPIN on a quantised base, with 8-bit AdamW. Read only."""
    return sparring.run(tree(shared / "qlora", wide, tiny_data)).path


def tree(run: Path, model: Path, data: Path) -> dict[str, Any]:
    # 64 inputs, or 96, times rank 64: states of 8 bits
    return recipe(
        run, model, data, model={"lora_rank": 64, "lora_alpha": 16, "use_rslora": True, "quantize": "nf4"},
        train={"optimizer": "adamw_8bit"}, rounds=[{"method": "sft"}, {"method": "spin"}],
    )  # fmt: skip


@installed
def test_a_run(qlora_run: Path) -> None:
    view = RunView(qlora_run)
    log = [json.loads(line) for line in (qlora_run / "round_000" / "train" / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert log[-1]["loss"] != pytest.approx(0.693147, abs=1e-4)
    for number in (0, 1):
        assert players.base_of(view.players[number].path).quantize == "nf4"
    start = Bench(view, [view.players[-1]])._models[0][1]
    assert start.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


@installed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's affair
def test_its_card_loads_the_base_in_4_bits(qlora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bits are those that the player was trained on."""
    player = RunView(qlora_run).players[1]
    text, found = read(player.path)[1], dict[str, Any]()
    # On a CPU bitsandbytes 0.50 fails in generating with the matrix of 96 inputs, which transformers packs too
    exec(snippet(text, player.path).partition("turns =")[0], found)
    capsys.readouterr()
    start = Bench(RunView(qlora_run), [RunView(qlora_run).players[-1]])._models[0][1]
    mine = start.model.layers[0].mlp.up_proj
    theirs = found["model"].get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert theirs.weight.dtype == torch.uint8 and torch.equal(theirs.weight, mine.weight)
    assert (theirs.weight.quant_state.blocksize, theirs.compute_dtype) == (64, torch.float32)
    assert theirs.weight.quant_state.nested


@installed
def test_a_killed_run_ends_bit_for_bit_the_same(
    qlora_run: Path, tmp_path: Path, wide: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring.rundir.states import TrainStates

    save = TrainStates.save
    kinds: set[torch.dtype] = set()

    def stop(self: Any, at: int, tensors: dict[str, Tensor]) -> None:
        save(self, at, tensors)
        kinds.update(tensor.dtype for name, tensor in tensors.items() if name.startswith("optimizer/state1"))
        if at == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainStates, "save", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                sparring.run(tree(tmp_path / "run", wide, tiny_data))
    assert kinds == {torch.uint8}
    sparring.run(tree(tmp_path / "run", wide, tiny_data))
    shas = [{n: p.sha for n, p in RunView(run).players.items()} for run in (qlora_run, tmp_path / "run")]
    assert shas[0] == shas[1] and len(shas[0]) == 3


@installed
def test_whatever_runs_a_model_is_redone_on_another_base(qlora_run: Path, tmp_path: Path) -> None:
    kept = ["data", "prep_000/groups"]  # the gold answers, which no model made
    assert sparring.fork(qlora_run, tmp_path / "fp4", ["model.quantize=fp4"]) == kept
    assert sparring.fork(qlora_run, tmp_path / "whole", ["model.quantize=null"]) == kept


# Optimizers ------------------------------------------------------------------------------------------------------


def steps(name: str, n: int, size: int, saved: dict[str, Tensor] | None = None, device: str = "cpu") -> Any:
    """A matrix and a vector after n steps with drawn gradients, and the state to save."""
    settings = TrainConfig(optimizer=name, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)  # type: ignore[arg-type]
    named = {"m": nn.Parameter(torch.ones(size, 8, device=device)), "v": nn.Parameter(torch.ones(8, device=device))}
    made = make_optimizer(named.values(), settings)
    first, _ = _restore(named, made, settings, (int(saved["at"]), saved) if saved else None)
    for step in range(first, n):
        draw = torch.Generator().manual_seed(step)
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=draw).to(device)
        made.step()
    return named, _snapshot(named, made, 0) | {"at": torch.tensor(n)}, (made, settings)


@installed
def test_small_tensors_are_steps_of_adamw() -> None:
    """Below 4096 numbers the state is float32, so that the step is AdamW's own: decay of the matrix alone, eps, betas."""
    ours, _, _ = steps("adamw_8bit", 5, size=4)
    wanted, _, _ = steps("adamw", 5, size=4)
    for name in ours:
        assert (ours[name] - wanted[name]).abs().max() < 1e-6
        assert (wanted[name] - 1).abs().max() > 0.01


@installed
def test_eight_bits_per_number_of_the_state() -> None:
    """Steps within a tenth of AdamW's length, and a state of a quarter of its bytes (and a scale for 256)."""
    (ours, state, _), (wanted, full, _) = steps("adamw_8bit", 5, size=512), steps("adamw", 5, size=512)
    error, length = (ours["m"] - wanted["m"]).norm(), (wanted["m"] - 1).norm()
    assert 1e-4 * length < error < 0.1 * length
    kinds = {name: t.dtype for name, t in state.items() if name.endswith("/m") and name.startswith("optimizer/")}
    assert kinds["optimizer/state1/m"] == kinds["optimizer/state2/m"] == torch.uint8
    assert kinds.keys() == {f"optimizer/{k}/m" for k in ("step", "state1", "state2", "absmax1", "absmax2")}

    def size(held: dict[str, Tensor]) -> int:
        return sum(t.numel() * t.element_size() for n, t in held.items() if n.endswith("/m") and "optimizer" in n)

    assert size(full) == 2 * 4 * 4096 + 4 and size(state) == 2 * (4096 + 4 * 16) + 8


@installed
@pytest.mark.parametrize("size", [4, 512])
def test_a_restored_state_goes_on_bit_for_bit(size: int) -> None:
    whole, end, _ = steps("adamw_8bit", 6, size)
    _, half, _ = steps("adamw_8bit", 3, size)
    copies = {name: tensor.clone() for name, tensor in half.items()}
    resumed, again, (made, settings) = steps("adamw_8bit", 6, size, copies)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert end.keys() == again.keys() and all(torch.equal(end[name], again[name]) for name in end)
    # Back, as behind a guard's limit: to a state, and to the very beginning, which has none
    state = made.state[resumed["m"]]
    assert _restore(resumed, made, settings, (3, half)) == (3, 0)
    assert torch.equal(state["state1"], half["optimizer/state1/m"]) and state["step"] == 3
    fresh = {f"model/{name}": torch.ones_like(p) for name, p in resumed.items()} | {"backoffs": torch.tensor(1)}
    assert _restore(resumed, made, settings, (0, fresh)) == (0, 1)
    assert state["step"] == 0 and not state["state1"].any() and not state["state2"].any()


@pytest.mark.gpu
@installed
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_restored_state_goes_on_bit_for_bit_on_a_gpu(name: str) -> None:
    size = 16384  # above the 100 000 numbers from which states are paged
    whole, _, (made, _) = steps(name, 6, size, device="cuda")
    assert getattr(made.state[whole["m"]]["state1"], "is_paged", False) == name.startswith("paged")
    _, half, _ = steps(name, 3, size, device="cuda")
    resumed, _, (again, _) = steps(name, 6, size, {k: v.clone().cpu() for k, v in half.items()}, device="cuda")
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert getattr(again.state[resumed["m"]]["state1"], "is_paged", False) == name.startswith("paged")


@pytest.mark.gpu
@installed
def test_a_quantised_model_on_a_gpu(wide: Path) -> None:
    rounded = lowbit.rounded(players.load_model(str(wide), PLAIN), "nf4")
    model = players.load_model(str(wide), QLORA.model_copy(update={"device": "cuda", "compute": "float32"}))
    assert (logps(model).cpu() - logps(rounded)).abs().max() < 1e-4


# Refusals --------------------------------------------------------------------------------------------------------

RSLORA = {"lora_rank": 2, "lora_alpha": 4, "use_rslora": True}
BITS = {"lora_rank": 2, "quantize": "nf4"}


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"model": {"quantize": "nf4"}}, "model.quantize: needs model.lora_rank above 0"),
        ({"model": BITS | {"quantize": "int3"}}, "model.quantize: must be 'nf4' or 'fp4'"),
        ({"model": BITS | {"compute": "float64"}}, "model.quantize: computes in float32 or bfloat16"),
        ({"model": RSLORA | {"lora_rank": 0}}, "model.use_rslora: needs model.lora_rank above 0"),
        (
            {"model": RSLORA | {"lora_alpha": None}},
            "model.use_rslora: needs model.lora_rank above 0 and a model.lora_a",
        ),
        ({"model": BITS}, "model.quantize: nf4: needs bitsandbytes; pip install 'sparring[quant]'"),
        ({"train": {"optimizer": "adamw_8bit"}}, "train.optimizer: adamw_8bit: needs bitsandbytes;"),
        ({"model": BITS, "cluster": {"processes": 2}}, "model.quantize: nf4: works in one process only"),
        (
            {"train": {"optimizer": ["rmsprop", "rmsprop", "adamw_8bit"]}, "cluster": {"processes": 2}},
            "train.optimizer: adamw_8bit: works in one process only; set cluster.processes=1",
        ),
    ],
)
def test_one_line_says_why_not(
    sections: Any, problem: str, tmp_path: Path, wide: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    file = write_recipe(tmp_path / "r.yaml", recipe(tmp_path / "run", wide, tiny_data, **sections))
    code, _, err = cli("run", file)
    assert code == 2 and problem in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "run" / "round_000").exists()


def test_states_are_not_paged_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    rounds = Config.model_validate(
        {"rounds": [{"method": "spin", "hyper": {}, "play": {}, "train": {"optimizer": "paged_adamw_8bit"}}]}
    )
    cpu = rounds.model_copy(update={"model": PLAIN})
    with pytest.raises(
        InputError, match=r"paged_adamw_8bit: pages between .* on a CPU set train.optimizer=adamw_8bit$"
    ):
        lowbit.check(cpu)
    with pytest.raises(InputError, match=r"paged_adamw_32bit: pages between .* set train.optimizer=adamw$"):
        make_optimizer([nn.Parameter(torch.ones(3, 3))], TrainConfig(optimizer="paged_adamw_32bit"))


def test_without_bitsandbytes_nothing_is_loaded(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"^model\.quantize: nf4: needs bitsandbytes"):
        players.load_model(str(wide), QLORA)
    with pytest.raises(InputError, match=r"^train\.optimizer: adamw_8bit: needs bitsandbytes"):
        make_optimizer([nn.Parameter(torch.ones(3, 3))], TrainConfig(optimizer="adamw_8bit"))


@installed
def test_a_model_without_linear_layers_is_told() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11, n_positions=8))
    with pytest.raises(
        InputError, match=r"^model\.quantize: nf4: this model has no linear layer with a multiple of 64"
    ):
        lowbit.quantised(model, "nf4", torch.float32, torch.device("cpu"))


def test_vllm_does_not_serve_a_quantised_base() -> None:
    from sparring.config import EngineConfig
    from sparring.play import vllm

    with pytest.raises(InputError, match=r"^play\.engine: vllm serves the base whole, not in the 4 bits"):
        vllm.check(QLORA, EngineConfig())
