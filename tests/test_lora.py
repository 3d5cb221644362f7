"""LoRA: adapters on one frozen base. The oracle everywhere is a model of its own whose weights are W + (α/r)·B·A."""

from __future__ import annotations

import gc
import json
import math
import shutil
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparring
from helpers import recipe, write_model
from sparring import adapters, players
from sparring.config import Config, ModelConfig
from sparring.errors import InputError, SparringError
from sparring.logps import score, token_logps
from sparring.play.hf import sample
from sparring.prompts import load_tokenizer
from sparring.rundir.view import RunView
from sparring.types import Player
from sparring.workshop import Workshop

LORA = ModelConfig(device="cpu", threads=1, lora_rank=2)
PLAIN = ModelConfig(device="cpu", threads=1)
PROMPTS, ANSWERS = [[5, 6, 7], [9, 4], [11] * 6], [[8, 9, 3, 1], [10, 1], [22, 23, 24]]


def logps(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return token_logps(model, PROMPTS, ANSWERS)


def step(model: nn.Module, lr: float = 0.5) -> None:
    """One ascent of the answers' log-probs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    (-token_logps(model, PROMPTS, ANSWERS).sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@dataclass
class Made:
    """A start player and the players that were made from it, one after the other, as the stages make them."""

    shop: Workshop
    start: Player
    made: list[Player]


def workshop(start: str, config: ModelConfig) -> tuple[Workshop, Player]:
    player = Player(start, 0, players.identify(start))
    whole = Config(model=config.model_copy(update={"path": start}), seed=3)
    return Workshop(None, whole, SimpleNamespace(first=0), player), player  # type: ignore[arg-type]


def next_player(shop: Workshop, start: Player, t: int, folder: Path, steps: int = 2) -> Player:
    model: Any = shop.learner(start, t)
    for _ in range(steps):
        step(model)
    folder.mkdir()
    players.save_player(model, load_tokenizer(start.path), folder, "card", template="t", stop_ids=(1,))
    sha = players.identify(str(folder))
    shop.keep(model, sha)
    return Player(str(folder), t + 1, sha)


@pytest.fixture
def made(tmp_path: Path, tiny_model: Path) -> Made:
    shop, start = workshop(str(tiny_model), LORA)
    one = next_player(shop, start, 0, tmp_path / "one")
    return Made(shop, start, [one, next_player(shop, one, 1, tmp_path / "two")])


@pytest.fixture
def base(tiny_model: Path) -> Any:
    return players.load_model(str(tiny_model), PLAIN)


def on(base: Any, config: ModelConfig = LORA, seed: int = 0) -> Any:
    return adapters.fresh(base, adapters.Base("b", None, "0"), config, seed)


# An adapter in memory --------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(base: Any) -> None:
    """B = 0, so the policy is W0 (spin_family.md §15.1); Σ r·(in + out) over q k v o (16→16), gate up (16→32), down."""
    before = logps(base)
    learner = on(base)
    assert torch.equal(logps(learner), before)
    trained = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 4 * 2 * (16 + 16) + 3 * 2 * (16 + 32) == 544
    assert all("lora_" in name for name in trained)
    step(learner)
    assert not torch.allclose(logps(learner), before, atol=1e-3)
    assert torch.equal(logps(base), before)


def test_a_is_drawn_from_the_seed_alone(base: Any) -> None:
    def drawn(seed: int, config: ModelConfig = LORA) -> dict[str, Tensor]:
        return adapters.weights(on(base, config, seed))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = drawn(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = drawn(7), drawn(8)
    assert all(torch.equal(first[n], again[n]) for n in first)
    for name, weight in first.items():
        assert (
            torch.equal(weight, torch.zeros_like(weight))
            if ".lora_B." in name
            else not torch.equal(weight, other[name])
        )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    by_hand = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) / math.sqrt(48)
    assert next(iter(first)) == name
    assert torch.equal(first[name], by_hand.float())


@pytest.mark.parametrize(("alpha", "factor"), [(None, 2.0), (6.0, 3.0)])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_an_adapter_is_w_plus_alpha_over_r_times_b_times_a(
    alpha: float | None, factor: float, compute: Any, tiny_model: Path
) -> None:
    config = LORA.model_copy(update={"lora_alpha": alpha, "compute": compute})
    learner = on(players.load_model(str(tiny_model), config), config)
    step(learner)
    weights = adapters.weights(learner)
    wanted: Any = players.load_model(str(tiny_model), config)
    for path, module in wanted.named_modules():
        if f"base_model.model.{path}.lora_A.weight" in weights:
            a, b = (weights[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
            assert (a.dtype, a.shape[0]) == (module.weight.dtype, 2)
            module.weight.data += factor * b @ a
    limit = 1e-6 if compute == "float32" else 1e-14
    assert (logps(learner) - logps(wanted)).abs().max() < limit
    assert (logps(learner) - logps(players.load_model(str(tiny_model), config))).abs().max() > 0.01


def test_conv1d_layers_are_transposed(tmp_path: Path) -> None:
    made: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30))
    made.eval()
    learner = on(made)
    assert {name.split(".")[-3] for name in adapters.weights(learner)} == {"c_attn", "c_proj", "c_fc"}
    step(learner)
    whole: Any = transformers.GPT2LMHeadModel(made.config).eval()
    whole.load_state_dict({k.replace("base_layer.", ""): v for k, v in made.state_dict().items() if "lora" not in k})
    for name, weight in adapters.weights(learner).items():
        if ".lora_A." in name:
            module = whole.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += 2 * (adapters.weights(learner)[name.replace("_A.", "_B.")] @ weight).T
    assert (logps(learner) - logps(whole)).abs().max() < 1e-6


def test_dropout_is_off(base: Any) -> None:
    learner = on(base)
    step(learner)
    before = logps(learner)
    learner.train()
    assert torch.equal(logps(learner), before)


def test_layers_can_be_chosen(base: Any) -> None:
    learner = on(base, LORA.model_copy(update={"lora_targets": ("q_proj", "layers.0.mlp.down_proj")}))
    assert {name.split(".")[-3] for name in adapters.weights(learner)} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (("q_pro",), "`q_pro` is no linear layer of this model; it has down_proj, gate_proj, k_proj, o_proj, q_proj,"),
        (("embed_tokens",), "`embed_tokens` is no linear layer of this model"),
        (("q_proj", "mlp"), "`mlp` is no linear layer of this model"),
        ((), r"no layers; write all-linear, or names of linear layers"),
    ],
)
def test_layers_that_are_not_there_are_told(base: Any, targets: tuple[str, ...], problem: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.lora_targets: {problem}"):
        on(base, LORA.model_copy(update={"lora_targets": targets}))


def test_a_tied_output_layer_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=30, tie_word_embeddings=True, **sizes))
    with pytest.raises(InputError, match="`lm_head` shares its weights with the input embeddings"):
        on(tied, LORA.model_copy(update={"lora_targets": ("lm_head",)}))
    assert not any("lm_head" in name for name in adapters.weights(on(tied)))


def test_the_base_is_in_memory_once(made: Made) -> None:
    models = [made.shop.model(p) for p in (made.start, *made.made)]
    models.append(made.shop.learner(made.made[1], 2))
    base = {p.data_ptr() for p in models[0].parameters()}
    for model in models[1:]:
        own = {p.data_ptr(): p.numel() for p in model.parameters() if p.data_ptr() not in base}
        assert sum(own.values()) == 544
    assert len({p.data_ptr() for m in models for p in m.parameters()}) == len(base) + 3 * 14


# The reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", ["kept", "from disk"])
def test_an_adapter_reference_is_a_separate_frozen_copy(made: Made, loaded: str) -> None:
    """Issue 3, item 10: to 1e-6, before and after the learner moves; and never the base, nor the learner."""
    shop = made.shop if loaded == "kept" else workshop(made.start.path, LORA)[0]
    one, two = made.made
    copies = {p.sha: players.load_model(p.path, PLAIN) for p in (made.start, one, two)}
    assert not any(adapters.is_adapter(m) for m in copies.values())
    references = {p.sha: shop.model(p) for p in (two, one, made.start)}
    learner = shop.learner(two, 2)
    before = {sha: score(m, PROMPTS, ANSWERS, batch_size=2) for sha, m in references.items()}
    assert torch.equal(logps(learner), logps(references[two.sha]))  # so that a round starts at log 2
    for _ in range(3):
        step(learner)
    for sha, reference in references.items():
        assert (logps(reference) - logps(copies[sha])).abs().max() < 1e-6
        assert score(reference, PROMPTS, ANSWERS, batch_size=2) == before[sha]
        assert not any(p.requires_grad for p in reference.parameters())
        assert not torch.allclose(logps(reference), logps(learner), atol=0.01)
    for a, b in ((made.start, one), (one, two), (made.start, two)):
        assert not torch.allclose(logps(references[a.sha]), logps(references[b.sha]), atol=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_that_answers_between_forward_and_backward_changes_no_gradient(
    made: Made, checkpointing: bool
) -> None:
    def gradients(disturbed: bool) -> list[Tensor]:
        learner: Any = made.shop.learner(made.made[1], 2)
        if checkpointing:
            learner.train()
            learner.activation_checkpointing_enable({"use_reentrant": False})
        loss = -token_logps(learner, PROMPTS, ANSWERS).sum()
        if disturbed:
            for player in (made.start, *made.made):
                logps(made.shop.beside(player))
        loss.backward()
        return [p.grad for p in learner.parameters() if p.requires_grad]

    assert len(gradients(False)) == 14
    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert float(a.abs().max()) > 0
        assert torch.equal(a, b)


def test_adapters_are_whole_differences_to_one_base(made: Made) -> None:
    for player in made.made:
        assert players.base_of(player.path) == adapters.Base(made.start.path, None, made.start.sha)
    first, second = (adapters.load_weights(Path(p.path)) for p in made.made)
    learner: Any = made.shop.learner(made.made[0], 1)
    assert all(torch.equal(w, first[n]) for n, w in adapters.weights(learner).items())
    step(learner)
    step(learner)
    assert all(torch.equal(w, second[n]) for n, w in adapters.weights(learner).items())


def test_a_learner_from_the_base_is_new_in_every_round(made: Made) -> None:
    a, b, again = (adapters.weights(made.shop.learner(made.start, t)) for t in (0, 1, 0))  # type: ignore[arg-type]
    name = next(iter(a))
    assert torch.equal(a[name], again[name])
    assert not torch.equal(a[name], b[name])


def test_a_whole_model_from_elsewhere_takes_part_as_itself(made: Made, tmp_path: Path) -> None:
    path = str(write_model(tmp_path / "other", seed=5))
    other = Player(path, None, players.identify(path))
    wanted = logps(players.load_model(path, PLAIN))
    assert torch.equal(logps(made.shop.model(other)), wanted)
    two = made.made[1]
    assert (logps(made.shop.model(two)) - logps(players.load_model(two.path, PLAIN))).abs().max() < 1e-6
    three = next_player(made.shop, other, 2, tmp_path / "three")
    assert players.base_of(three.path).sha == other.sha
    for shop in (made.shop, workshop(made.start.path, LORA)[0]):
        four = next_player(shop, three, 3, tmp_path / f"four{id(shop)}")
        assert players.base_of(four.path).sha == other.sha
        for player in (three, four):
            assert (logps(shop.model(player)) - logps(players.load_model(player.path, PLAIN))).abs().max() < 1e-6


def test_full_fine_tuning_beside_is_a_copy_of_its_own(tiny_model: Path) -> None:
    shop, start = workshop(str(tiny_model), PLAIN)
    beside, before = shop.beside(start), logps(shop.model(start))
    learner = shop.learner(start, 0)
    step(learner)
    assert torch.equal(logps(beside), before)
    assert not torch.allclose(logps(learner), before, atol=1e-3)
    assert torch.equal(logps(shop.model(start)), before)


def test_one_whole_model_is_in_memory_and_with_lora_the_start_besides(tiny_model: Path, tmp_path: Path) -> None:
    others = [str(write_model(tmp_path / str(seed), seed=seed)) for seed in (5, 6)]
    for config in (PLAIN, LORA):
        shop, start = workshop(str(tiny_model), config)
        learner = shop.learner(start, 0)
        shop.keep(learner, "made")
        held = [weakref.ref(learner)]
        del learner
        for player in (start, *(Player(path, None, players.identify(path)) for path in others)):
            held.append(weakref.ref(shop.model(player)))
        gc.collect()
        # The adapter that was kept and its base, the start player, stay
        assert [ref() is not None for ref in held] == [config is LORA, config is LORA, False, True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adapter_answers_as_its_merged_copy(made: Made, temperature: float) -> None:
    two = made.made[1]
    rule: Any = {"temperature": temperature, "max_new_tokens": 12, "stop_ids": (1,), "batch_size": 2}
    got, wanted = (
        sample(model, PROMPTS, [1, 2, 3], **rule)
        for model in (made.shop.model(two), players.load_model(two.path, PLAIN))
    )
    assert [a.tokens for a in got] == [a.tokens for a in wanted]


# On disk ---------------------------------------------------------------------------------------------------------


def test_a_players_folder_holds_only_the_adapter(made: Made) -> None:
    folder = Path(made.made[0].path)
    assert {f.name for f in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base.json", "generation_config.json", "README.md",
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sum(t.numel() for t in tensors.values()) == 544
    kept = json.loads((folder / "adapter_config.json").read_text())
    assert (kept["r"], kept["lora_alpha"], kept["lora_dropout"], kept["task_type"]) == (2, 4.0, 0.0, "CAUSAL_LM")
    assert kept["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert kept["base_model_name_or_path"] == made.start.path
    assert json.loads((folder / "base.json").read_text()) == {
        "path": made.start.path, "revision": None, "sha": made.start.sha, "quantize": None,
    }  # fmt: skip
    assert players.stop_ids(str(folder), PLAIN) == [1]
    assert players.model_config(str(folder), PLAIN).hidden_size == 16


def test_other_programs_load_a_player(made: Made) -> None:
    folder = made.made[1].path
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (logps(loaded) - logps(made.shop.model(made.made[1]))).abs().max() < 1e-6


def test_identity_is_the_adapters_and_its_bases(made: Made, tmp_path: Path) -> None:
    one = made.made[0]
    folder = Path(shutil.copytree(one.path, tmp_path / "copy"))

    def edited(name: str, **fields: Any) -> str:
        old = (folder / name).read_text()
        (folder / name).write_text(json.dumps(json.loads(old) | fields))
        try:
            return players.identify(str(folder))
        finally:
            (folder / name).write_text(old)

    assert players.identify(str(folder)) == one.sha
    assert (
        edited("base.json", path="/elsewhere") == edited("adapter_config.json", base_model_name_or_path="x") == one.sha
    )
    assert edited("base.json", sha="0") != one.sha
    assert edited("adapter_config.json", lora_alpha=5) != one.sha
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t + 1e-3 for n, t in tensors.items()}, str(folder / "adapter_model.safetensors"))
    assert players.identify(str(folder)) != one.sha


def test_a_changed_or_missing_base_is_told(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    shop, start = workshop(str(base), LORA)
    one = next_player(shop, start, 0, tmp_path / "one")
    wrong = write_model(tmp_path / "wrong", seed=1)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=rf"^{one.path}: its base is not there: {base}: no such model folder;"):
        players.load_model(one.path, PLAIN)
    shutil.copytree(wrong, base)
    for load in (lambda: players.load_model(one.path, PLAIN), lambda: workshop(str(wrong), LORA)[0].model(one)):
        with pytest.raises(InputError, match=rf"^{one.path}: its base {base} is another model than it was made on"):
            load()
    # The start player at hand is the base, wherever it lies
    assert torch.equal(logps(workshop(str(moved), LORA)[0].model(one)), logps(shop.model(one)))
    record = tmp_path / "one" / "base.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"path": str(moved)}))
    assert players.identify(one.path) == one.sha
    assert (logps(players.load_model(one.path, PLAIN)) - logps(shop.model(one))).abs().max() < 1e-6


def test_a_changed_adapter_is_told(made: Made) -> None:
    file = Path(made.made[0].path) / "adapter_model.safetensors"
    save_file({n: t + 1 for n, t in load_file(file).items()}, str(file))
    with pytest.raises(SparringError, match="its files changed since it was made"):
        workshop(made.start.path, LORA)[0].model(made.made[0])


def test_adapters_that_do_not_fit_are_told(made: Made, tmp_path: Path) -> None:
    folder = Path(made.made[0].path)
    other = workshop(made.start.path, LORA.model_copy(update={"lora_rank": 3}))[0]
    with pytest.raises(InputError, match=r"not of the shape that model\.lora_rank and model\.lora_targets say"):
        other.model(made.made[0])
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    with warnings.catch_warnings(), pytest.raises(InputError, match=rf"^{folder}: .*: Found missing adapter keys"):
        warnings.simplefilter("ignore")
        players.load_model(str(folder), PLAIN)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"^{folder}: cannot load the adapter"):
        players.load_model(str(folder), PLAIN)
    with pytest.raises(InputError, match=rf"^{folder}: cannot load the adapter"):
        adapters.load_weights(folder)


# A start that is an adapter, and export --------------------------------------------------------------------------


def test_a_start_that_is_an_adapter_counts_as_a_whole_model(made: Made, tmp_path: Path) -> None:
    two = made.made[1]
    merged = logps(players.load_model(two.path, PLAIN))
    for config in (PLAIN, LORA):
        shop, start = workshop(two.path, config)
        assert start.sha == two.sha
        assert torch.equal(logps(shop.model(start)), merged)
        assert torch.equal(logps(shop.learner(start, 0)), merged)
        made_of_it = next_player(shop, start, 0, tmp_path / f"next{config.lora_rank}")
        assert (tmp_path / f"next{config.lora_rank}" / "base.json").exists() == bool(config.lora_rank)
        copy = players.load_model(made_of_it.path, PLAIN)
        assert (logps(copy) - logps(shop.model(made_of_it))).abs().max() < 1e-6


def test_pefts_own_folders_are_read(base: Any, tiny_model: Path, tmp_path: Path) -> None:
    import peft

    whole = logps(base)
    settings = peft.LoraConfig(r=3, target_modules=["v_proj"], use_dora=True, task_type="CAUSAL_LM", lora_alpha=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model: Any = peft.get_peft_model(base, settings)
    step(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tiny_model)}))
    assert players.base_of(str(tmp_path)) == adapters.Base(str(tiny_model), None, players.identify(str(tiny_model)))
    got = logps(players.load_model(str(tmp_path), PLAIN))
    assert (got - logps(model)).abs().max() < 1e-6
    assert (got - whole).abs().max() > 0.01
    assert players.stop_ids(str(tmp_path), PLAIN) == [1]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(InputError, match="names no base"):
        players.identify(str(tmp_path))


RSLORA = ModelConfig(device="cpu", threads=1, lora_rank=4, lora_alpha=6, use_rslora=True)


def test_rslora_divides_by_the_root_of_the_rank(base: Any, tiny_model: Path) -> None:
    """6/√4 = 3, where LoRA has 6/4: the oracle is W + 3·B·A by hand (arXiv 2312.03732, Theorem 3.2)."""
    learner = on(base, RSLORA)
    for name, p in learner.named_parameters():
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    kept = adapters.weights(learner)
    whole: Any = players.load_model(str(tiny_model), PLAIN)
    for name, a in kept.items():
        if ".lora_A." in name:
            layer = whole.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight.data += 3 * kept[name.replace("lora_A", "lora_B")] @ a
    assert (logps(learner) - logps(whole)).abs().max() < 1e-5
    assert (logps(learner) - logps(base)).abs().max() > 0.1


def test_pefts_own_rslora_is_the_same_and_each_reads_the_other(base: Any, tiny_model: Path, tmp_path: Path) -> None:
    import peft

    shop, start = workshop(str(tiny_model), RSLORA)
    one = next_player(shop, start, 0, tmp_path / "one")
    ours = logps(shop.model(one))
    assert (ours - logps(base)).abs().max() > 0.01
    kept = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (kept["r"], kept["lora_alpha"], kept["use_rslora"]) == (4, 6.0, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs: Any = peft.PeftModel.from_pretrained(players.load_model(str(tiny_model), PLAIN), one.path).eval()
    assert (logps(theirs) - ours).abs().max() < 1e-6
    # As the start of another run peft's folder counts as a whole model, by its own factor
    theirs.save_pretrained(tmp_path / "peft")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(tiny_model)}
    file.write_text(json.dumps(settings))
    for config in (PLAIN, LORA, RSLORA):
        next_shop, again = workshop(str(tmp_path / "peft"), config)
        assert (logps(next_shop.model(again)) - ours).abs().max() < 1e-6
        assert torch.equal(logps(next_shop.learner(again, 0)), logps(workshop(again.path, config)[0].model(again)))
    file.write_text(json.dumps(settings | {"use_rslora": False}))
    assert (logps(players.load_model(str(tmp_path / "peft"), PLAIN)) - ours).abs().max() > 1e-3


def test_export(made: Made, tmp_path: Path) -> None:
    two = made.made[1]
    (Path(two.path) / "stage.json").write_text("{}")
    players.export_player(two.path, tmp_path / "copy", PLAIN)
    assert players.identify(str(tmp_path / "copy")) == two.sha
    assert {f.name for f in (tmp_path / "copy").iterdir()} == {f.name for f in Path(two.path).iterdir()} - {
        "stage.json"
    }
    players.export_player(two.path, tmp_path / "sub" / "whole", PLAIN, merge=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sub" / "whole").eval()
    assert not list((tmp_path / "sub" / "whole").glob("adapter*"))
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert (logps(whole) - logps(made.shop.model(two))).abs().max() < 1e-6
    card = (tmp_path / "sub" / "whole" / "README.md").read_text()
    name = Path(made.start.path).name
    assert card == f"card\nMerged into its base {name} (content hash {made.start.sha[:16]}).\n"
    assert load_tokenizer(str(tmp_path / "sub" / "whole")).chat_template == "t"
    for merge in (False, True):
        players.export_player(made.start.path, tmp_path / f"start{merge}", PLAIN, merge=merge)
        assert players.identify(str(tmp_path / f"start{merge}")) == made.start.sha
    with pytest.raises(InputError, match="exists already; give a new folder"):
        players.export_player(two.path, tmp_path / "copy", PLAIN)
    assert not list(tmp_path.glob("**/.*.tmp"))


# A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(shared: Path, tiny_model: Path, tiny_data: Path) -> Path:
    """SFT and two rounds of SPIN with LoRA. Read only."""
    return sparring.run(recipe(shared / "lora", tiny_model, tiny_data, model={"lora_rank": 2})).path


def test_a_run_with_lora(run: Path, tiny_model: Path) -> None:
    view = RunView(run)
    size = (tiny_model / "model.safetensors").stat().st_size
    assert sorted(view.players) == [-1, 0, 1, 2]
    for number in (0, 1, 2):
        folder = Path(view.players[number].path)
        assert players.identify(str(folder)) == view.players[number].sha
        assert players.base_of(str(folder)).sha == view.players[-1].sha
        weights = list(folder.glob("*.safetensors"))
        assert [w.name for w in weights] == ["adapter_model.safetensors"]
        assert weights[0].stat().st_size < size
    for folder in ("round_000", "round_001"):
        log = (run / folder / "train" / "log.jsonl").read_text().splitlines()
        assert json.loads(log[0])["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert float(json.loads(log[-1])["loss"]) != pytest.approx(math.log(2), abs=1e-7)


def test_a_killed_run_with_lora_ends_bit_for_bit_the_same(
    run: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring.rundir.states import TrainStates

    tree = recipe(tmp_path / "run", tiny_model, tiny_data, model={"lora_rank": 2})
    save, saved = TrainStates.save, []

    def stop(self: Any, at: int, tensors: dict[str, Tensor]) -> None:
        save(self, at, tensors)
        names = {name for name in tensors if name.startswith("model/")}
        assert names and all("lora_" in name for name in names)
        saved.append(at)
        if at == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainStates, "save", stop)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                sparring.run(tree)
    sparring.run(tree)
    assert {n: p.sha for n, p in RunView(tmp_path / "run").players.items()} == {
        n: p.sha for n, p in RunView(run).players.items()
    }


def test_a_fork_with_lora_shares_all_but_the_players(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """A run's keys cover the adapter's shape, and only where there is one."""
    full = recipe(tmp_path / "full", tiny_model, tiny_data, rounds=[{"method": "spin"}])
    sparring.run(full)
    shared = sparring.fork(tmp_path / "full", tmp_path / "r2", ["model.lora_rank=2"])
    assert shared[:2] == ["data", "start/eval"]
    assert {f.rpartition("/")[2] for f in shared[2:]} >= {"samples", "groups", "frozen"}
    assert not any(f.endswith("/player") for f in shared)
    sparring.run(tmp_path / "r2")
    for name, change in (
        ("alpha", "model.lora_alpha=8"),
        ("targets", "model.lora_targets=[q_proj]"),
        ("rank", "model.lora_rank=1"),
    ):
        assert sparring.fork(tmp_path / "r2", tmp_path / name, [change]) == shared
    both = ["model.lora_alpha=4", "model.use_rslora=true"]
    assert sparring.fork(tmp_path / "r2", tmp_path / "rslora", both) == shared
    assert "round_000/player" in sparring.fork(tmp_path / "r2", tmp_path / "same", ["model.lora_alpha=4"])
