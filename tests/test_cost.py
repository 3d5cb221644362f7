"""What a plan counts, against transformers, torch's own counter, saved tensors and the sampler itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import cli, recipe, write_jsonl, write_recipe
from sparring import batching, cost, methods, spans, tree
from sparring.config import ModelConfig, TrainConfig
from sparring.cost import KNOWN, Hardware, Shape, Texts, memory, shape_of, texts, work
from sparring.cost.hardware import DEVICES, Rates, parse
from sparring.cost.memory import Pass, Where
from sparring.cost.planning import stages
from sparring.cost.work import Item, Machine
from sparring.errors import InputError
from sparring.gradient import Setting, gradient
from sparring.types import Frozen, Group

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = Shape("llama", hidden=32, layers=2, heads=4, key_heads=2, inner=48, vocabulary=80, context=256)


def built(shape: Shape, device: str = "cpu") -> Any:
    """transformers' model of a shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.kind, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads, intermediate_size=shape.inner, vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context, tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def groups_of(items: Sequence[Item], vocabulary: int) -> tuple[list[Group], dict[str, list[Frozen]]]:
    """Groups of random tokens with these lengths, and a reference's log-probs."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (length,), generator=draw).tolist())

    made = [
        Group("", ids(i.prompt), tuple(ids(c) for c in i.completions), (1.0, 0.0), 1.0, ("gold", ""), 0) for i in items
    ]
    return made, {
        "reference": [Frozen(g.sha, "reference", "", tuple((-1.0,) * len(c) for c in g.completions)) for g in made]
    }


def learn(model: nn.Module, items: Sequence[Item], compute: torch.dtype | None = None) -> None:
    """One micro-batch, forward and backward."""
    made, frozen = groups_of(items, 80)
    gradient(
        model, made, frozen, methods.make("spin", {}),
        micro_batch=64, micro_tokens=1 << 30, setting=Setting(compute),
    )  # fmt: skip


ITEMS = [Item(9, (7, 5)), Item(4, (12, 3)), Item(14, (2, 6))]


@pytest.mark.parametrize(
    "shape", sorted(set(KNOWN.values()), key=lambda s: s.parameters), ids=lambda s: f"{s.parameters:,}"
)
def test_a_known_shape_has_the_weights_that_transformers_makes(shape: Shape) -> None:
    """Weights are linear in layers, so one and two layers tell of all."""
    one, two = (sum(p.numel() for p in built(replace(shape, layers=n), "meta").parameters()) for n in (1, 2))
    assert shape.parameters == one + (shape.layers - 1) * (two - one)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("alignment-handbook/zephyr-7b-sft-full", 7_241_732_096),
        ("allenai/tulu-2-70b", 68_976_648_192),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct-1M", 7_615_616_512),
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
    ],
)
def test_a_known_shape_has_the_weights_that_its_model_card_says(name: str, parameters: int) -> None:
    assert KNOWN[name].parameters == parameters


def test_a_shape_is_read_from_a_folder(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert shape_of(ModelConfig(path=str(tiny_model))).parameters == sum(p.numel() for p in model.parameters())


def test_an_adapter_has_the_weights_that_peft_makes() -> None:
    from sparring.adapters import Base, fresh

    model = fresh(built(TINY), Base("", None, ""), ModelConfig(lora_rank=3), 0)
    assert TINY.adapter(3) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_that_torch_counts(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tree, batching):
        monkeypatch.setattr(module, "filler", lambda count: 0)  # which a plan does not count
    monkeypatch.setattr(spans, "kernel", lambda *_: None)  # which torch does not
    from torch.utils.flop_counter import FlopCounterMode

    shape = replace(TINY, tied=tied)
    model, rows = built(shape), work.rows(ITEMS)
    learn(model, ITEMS)
    with FlopCounterMode(display=False) as counter:
        learn(model, ITEMS)
    assert counter.get_total_flops() == work.forward(shape, rows) + work.backward(shape, Where(False, False), rows)


def test_operations_with_checkpointing_and_with_an_adapter() -> None:
    """Checkpointed layers are computed once more; of an adapter's base no gradients of weights are taken."""
    rows = work.rows(ITEMS)
    once = work.forward(TINY, rows)
    head = 2 * TINY.head * rows.scored
    assert work.backward(TINY, Where(False, False), rows) == 2 * once
    assert work.backward(TINY, Where(False, False, checkpointing=True), rows) == 2 * once + once - head
    layers = 2 * TINY.layers * TINY.layer * rows.tokens
    assert work.backward(TINY, Where(False, False, lora_rank=2), rows) == 2 * once - layers - head


def saved(shape: Shape, compute: torch.dtype | None, rank: int = 0) -> int:
    """Bytes of all that autograd keeps of one micro-batch, weights left out, a storage once."""
    from sparring.adapters import Base, fresh

    model = built(shape)
    if rank:
        model = fresh(model, Base("", None, ""), ModelConfig(lora_rank=rank), 0)
    learn(model, ITEMS[:1], compute)  # so that the fast path has been tried
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() and tensor.untyped_storage().data_ptr() not in own and tensor.shape[-1] > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learn(model, ITEMS, compute)
    casts = {tuple(p.shape) for p in model.parameters()} if compute else set()
    return sum(
        t.untyped_storage().nbytes()
        for t in kept.values()
        if not (t.dtype == compute and {tuple(t.shape), tuple(t.shape[::-1])} & casts)
    )


@pytest.mark.parametrize(("compute", "rank", "rel"), [(None, 0, 0), (None, 3, 0), (torch.bfloat16, 0, 0.03)])
def test_a_layer_keeps_what_autograd_saves(compute: torch.dtype | None, rank: int, rel: float) -> None:
    """The difference between a model of three layers and one of two is one layer's; spans and rotations are shared."""
    two, three = (saved(replace(TINY, layers=n), compute, rank) for n in (2, 3))
    where = Where(compute is not None, False, lora_rank=rank)
    assert memory.kept(TINY, where, work.rows(ITEMS)) == pytest.approx(three - two, rel=rel)


def test_the_store_of_slots_is_as_large_as_said() -> None:
    from sparring.attention import packed
    from sparring.play.slots import Slots

    model = built(TINY)
    with torch.no_grad(), packed(model):
        slots = Slots(model, 3, 29)
        slots.fill([[1, 2, 3], [4, 5]], [0, 1])
    held = sum(t.nbytes for pair in slots._store._layers.values() for t in pair)
    said = memory.playing(TINY, Where(False, True), 3, 29, Pass(2, 3, 5, 2))
    assert said["keys and values"] == held == 2 * 16 * 2 * 3 * 32 * 4


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_an_optimizer_keeps_as_many_numbers_as_said(optimizer: Any) -> None:
    from sparring.train import make_optimizer

    model = built(TINY)
    made = make_optimizer(model.parameters(), TrainConfig(optimizer=optimizer))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    numbers = sum(v.numel() for state in made.state.values() for v in state.values() if v.dim())
    assert numbers == memory.STATES[optimizer] * TINY.parameters


def test_memory_of_training_by_hand() -> None:
    """7B on one 80 GB card: masters, gradients and RMSprop's state alone are 87 GB."""
    shape = KNOWN["alignment-handbook/zephyr-7b-sft-full"]
    one = memory.training(shape, Where(True, True), "rmsprop", [Pass(1, 700, 700, 500)], [], steps=9, accumulates=True)
    assert one["weights"] == one["gradients"] == one["optimizer"] == 4 * 7_241_732_096
    eight = memory.training(
        shape, Where(True, True, devices=8), "adamw", [Pass(1, 700, 700, 500)], [], steps=9, accumulates=True
    )
    assert eight["weights"] == 4 * 7_241_732_096 / 8
    assert eight["optimizer"] == 2 * eight["weights"]
    # At the update, which is the most of two devices, nothing is gathered or cast
    where = Where(True, True, devices=2, checkpointing=True)
    two = memory.training(shape, where, "adamw", [Pass(1, 700, 700, 500)], [], steps=9, accumulates=True)
    assert sum(two.values()) == 5 * two["weights"] == 5 * 2 * 7_241_732_096
    lora = memory.training(
        shape, Where(True, True, lora_rank=16), "adamw", [Pass(1, 700, 700, 500)], [], steps=9, accumulates=True
    )
    assert lora["gradients"] == 4 * shape.adapter(16) < 0.01 * one["gradients"]


def test_slots_are_filled_and_dropped_as_the_sampler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths of all decoding steps, from the answers' lengths alone."""
    from sparring.play.hf import sample
    from sparring.play.slots import Slots

    model, widths = built(TINY), list[int]()
    step = Slots.step

    def counted(self: Slots, tokens: torch.Tensor, longest: int) -> torch.Tensor:
        widths.append(len(tokens))
        return step(self, tokens, longest)

    model_prompts = [[1 + i % 70] * (1 + i % 5) for i in range(60)]
    sample(model, model_prompts[:2], [0, 1], temperature=1.0, max_new_tokens=2, stop_ids=[], batch_size=2)
    monkeypatch.setattr(Slots, "step", counted)
    answers = sample(
        model, model_prompts, list(range(60)), temperature=1.0, max_new_tokens=30, stop_ids=[*range(6)], batch_size=24
    )
    order = sorted(range(60), key=lambda i: -len(model_prompts[i]))
    lengths = [len(answers[i].tokens) for i in order]
    assert len(set(lengths)) > 10
    assert [width for width, steps in work.decoding(lengths, 24) for _ in range(steps)] == widths


def test_micro_batches_are_the_trainers() -> None:
    """At most so many padded tokens: 20, 19 and 21 long make two batches of 45 tokens."""
    split = work.micro_batches([Item(10, (5, 5)), Item(9, (5, 5)), Item(11, (5, 5))], 64, 45)
    assert [[i.prompt for i in part] for part in split] == [[9, 10], [11]]
    assert work.rows(split[0]) == Pass(2, 18, 35, 20)


@pytest.mark.parametrize(
    ("entry", "groups", "completions"),
    [
        ({"method": "spin"}, 200, (300, 256)),
        ({"method": "sft"}, 100, (300,)),
        ({"method": "dpo"}, 100, (300, 300)),
        ({"method": "kto"}, 200, (300, 300)),
        ({"method": "space"}, 100, (300, 256, 256)),
        ({"method": "sppo"}, 100, (256, 256)),
        ({"method": "t_spin"}, 200, (300, 256)),
        ({"method": "upft"}, 200, (8,)),
        ({"method": "spin", "limit": 30}, 60, (300, 256)),
    ],
    ids=lambda v: str(v.get("method")) if isinstance(v, dict) else "",
)
def test_a_method_is_asked_for_its_groups(entry: dict[str, Any], groups: int, completions: tuple[int, ...]) -> None:
    """100 prompts, two answers each."""
    found = configured(entry)
    made = texts.groups(stages(found).rounds[0], ONE)
    assert sum(item.weight for item in made) == pytest.approx(groups)
    assert {item.completions for item in made} == {completions}


ONE = Texts(((200, 300),), 100, 10)


def configured(*entries: dict[str, Any], **sections: Any) -> Any:
    from sparring.config.recipe import load

    tree = {"model": {"path": "Qwen/Qwen2.5-0.5B"}, "data": {"path": "x"}, "play": {"samples": 2}} | sections
    return load(tree | {"rounds": list(entries)}, methods.signature)


def test_a_base_in_4_bits_by_hand() -> None:
    """TINY's 15,360 weights of layers take half a byte and 1/64 + 1/4096 of scales; on a CPU all are whole at first."""
    packed, whole = (memory.weights(TINY, Where(True, True, lora_rank=2, quantized=q)) for q in (True, False))
    assert whole["weights"] - packed["weights"] == 15_360 * (4 - 0.5 - 1 / 64 - 1 / 4096)
    assert (packed["casts"], packed["unpacked"]) == (2 * TINY.head, 2 * 48 * 32)
    rows = [Pass(1, 2, 2, 1)]
    on_cpu = memory.scoring(TINY, Where(False, False, lora_rank=2, quantized=True), rows)
    assert on_cpu == {"program": memory.PROGRAM, "weights": 4 * TINY.parameters, "heap": on_cpu["heap"]}
    tree = {"model": {"path": "meta-llama/Llama-2-70b-hf", "lora_rank": 16}, "data": {"path": "x", "limit": 100}}
    given = tree | {"rounds": [{"method": "spin"}], "train": {"gradient_checkpointing": True}}
    fits = [not cost.plan(given, more, hardware="1xH100").estimate.misfits for more in ([], ["model.quantize=nf4"])]
    assert fits == [False, True]


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_cost(name: str) -> None:
    found = configured({"method": name, "repeat": 2})
    said = cost.estimate(found, stages(found), KNOWN["Qwen/Qwen2.5-0.5B"], ONE, parse("1xA100-80G"))
    learned = [c for c in said.costs if c.name == "player"]
    assert len(learned) == 2 and all(c.flops > 1e12 and c.peak > 4 * 494_032_768 for c in learned)


def test_what_the_opponent_sampled_is_not_scored_again_in_full_precision() -> None:
    """200 pairs: in float32 gold answers alone, in bfloat16 both; a team of three scores the third round's thrice."""
    shape, hardware = KNOWN["Qwen/Qwen2.5-0.5B"], parse("1xA100-80G")

    def scored(compute: str, **entry: Any) -> list[float]:
        found = configured({"method": "spin"} | entry, model={"path": "Qwen/Qwen2.5-0.5B", "compute": compute})
        return [c.tokens for c in cost.estimate(found, stages(found), shape, ONE, hardware).costs if c.name == "frozen"]

    assert scored("float32") == [pytest.approx(200 * (200 + 299))]
    assert scored("bfloat16") == [pytest.approx(200 * (200 + 299 + 255))]
    rounds = scored("bfloat16", method="tpaw", repeat=3)
    assert rounds == pytest.approx([rounds[0], 4 * rounds[0], 9 * rounds[0]])


def test_the_samplers_log_probs_are_checked_on_a_few_groups() -> None:
    """In float32, 200 gold answers and both answers of sixteen groups; 200 of one length score as one does."""
    shape, hardware = KNOWN["Qwen/Qwen2.5-0.5B"], parse("1xA100-80G")
    found = configured({"method": "spin"}, model={"path": "Qwen/Qwen2.5-0.5B", "compute": "float32"})
    costs = cost.estimate(found, stages(found), shape, ONE, hardware).costs
    (frozen,) = (c for c in costs if c.name == "frozen")
    gold, both = (work.forward(shape, work.rows([Item(200, answers)])) for answers in ((300,), (300, 256)))
    assert frozen.flops == pytest.approx(200 * gold + 16 * both)


def test_answers_of_the_sampler_alone_are_kept_and_checked_not_scored() -> None:
    """SPPO's groups hold two answers of the opponent's: of 100 and of 7 such, 16 and 7 are read and all are written."""
    shape, hardware = KNOWN["Qwen/Qwen2.5-0.5B"], parse("1xA100-80G")
    group = work.forward(shape, work.rows([Item(200, (256, 256))]))
    for count, checked in ((100, 16), (7, 7)):
        found = configured(
            {"method": "sppo", "limit": count}, model={"path": "Qwen/Qwen2.5-0.5B", "compute": "float32"},
            play={"samples": 5},
        )  # fmt: skip
        costs = cost.estimate(found, stages(found), shape, ONE, hardware).costs
        (frozen,) = (c for c in costs if c.name == "frozen")
        assert frozen.flops == pytest.approx(checked * group)
        assert (frozen.tokens, frozen.disk) == (0, pytest.approx(count * 2 * 256 * 5))


def test_few_texts_stand_for_all_whatever_their_lengths() -> None:
    """A hundred prompts of 10 to 1000 tokens, 505 on average: so are those of 20, of 130, and what is trained on."""
    rows = tuple((10 * n, 20) for n in range(100, 0, -1))
    # The longest is always among those that stand for all, so that eight of them are a ninth too long
    shape, hardware = KNOWN["Qwen/Qwen2.5-0.5B"], parse("1xA100-80G")

    def tokens(count: int, name: str, **sections: Any) -> float:
        given = {"play": {"samples": 1, "max_new_tokens": 20}} | sections
        found = configured({"method": "spin", "limit": count}, **given)
        said = cost.estimate(found, stages(found), shape, Texts(rows, 130, 20), hardware)
        return next(c for c in said.costs if c.name == name).tokens

    assert tokens(20, "samples") == pytest.approx(20 * (505 + 20))  # of the prompts' mean
    for count in (20, 100, 130):
        passed = tokens(count, "player", train={"batch_size": 1, "epochs": 1})
        assert passed == pytest.approx(count * (505 + 2 * 19), rel=0.12)
    held = tokens(20, "held", evaluate={"limit": 20, "samples": 0}, controls={"prompts": 20})
    assert held == pytest.approx(2 * 20 * (505 + 2 * 19), rel=0.06)
    assert [texts.spread(range(4), n) for n in (1, 2, 6)] == [[0], [0, 2], [0, 0, 1, 2, 2, 3]]


def test_a_plan_by_hand() -> None:
    """SPIN's 50k pairs: steps, tokens, player's bytes; 2·N operations per token in play, 6·N in training."""
    source = RECIPES / "spin_zephyr7b.yaml"
    said = cost.plan(source, hardware="1xH200", prompt_tokens=200, answer_tokens=300).estimate
    by_name = {c.folder: c for c in said.costs}
    trained = by_name["round_000/player"]
    per_pair = 200 + 299 + 255
    assert trained.tokens == 2 * 782 * 64 * per_pair  # 50,000 / 64 = 781.25 batches an epoch
    assert trained.disk == 4 * 7_241_732_096
    forward = 2 * (7_241_732_096 - 32000 * 4096) * per_pair
    # Attention, and the vocabulary for answers only, are a few percent; checkpointing is another forward pass
    assert trained.flops / (2 * 782 * 64) == pytest.approx(4 * forward, rel=0.03)
    played = by_name["round_000/samples"]
    assert played.flops == pytest.approx(50_000 * 2 * 7_241_732_096 * (200 + 256), rel=0.05)
    assert by_name["round_001/player"].tokens == pytest.approx(2 * trained.tokens, rel=0.01)


def test_what_would_make_it_fit_makes_it_fit() -> None:
    source = RECIPES / "spin_zephyr7b.yaml"
    found = cost.plan(source, hardware="1xA100-80G")
    assert {c.name for c in found.estimate.misfits} == {"player"} and not found.together
    two = "--hardware 2xA100-80G cluster.processes=2"
    assert [r.setting for r in found.remedies] == ["model.lora_rank=16", two, "--hardware 1xH200"]
    for remedy in found.remedies:
        words = remedy.setting.split()
        hardware, given = (words[1], words[2:]) if words[0] == "--hardware" else ("1xA100-80G", words)
        again = cost.plan(source, given, hardware=hardware)
        assert not again.estimate.misfits and again.estimate.seconds == remedy.seconds
        assert not any("cluster.processes" in note for note in again.estimate.notes)
    two = cost.plan(RECIPES / "spin_qwen7b_1gpu.yaml", ["model.path=Qwen/Qwen2.5-14B"], hardware="1xH100")
    assert two.together and two.remedies and all("--hardware" in r.setting and "=" in r.setting for r in two.remedies)
    few = cost.plan(RECIPES / "spin_tulu70b.yaml", WHOLE, hardware="4xH100")
    sharded = [r.setting for r in few.remedies if "sharded" in r.setting]
    assert few.together and sharded and all(text.count("cluster.processes=") == 1 for text in sharded)
    for text in sharded:
        _, hardware, *given = text.split()
        assert given[-1] == f"cluster.processes={hardware.partition('x')[0]}"
        assert not cost.plan(RECIPES / "spin_tulu70b.yaml", [*WHOLE, *given], hardware=hardware).estimate.misfits
    alone = cost.plan(RECIPES / "spin_tulu70b.yaml", WHOLE, hardware="1xH100").estimate.notes
    assert "planned for one process per device: cluster.processes=1 cluster.launcher=null makes it so" in alone
    none = cost.plan(RECIPES / "spin_tulu70b.yaml", WHOLE, hardware="1xA100-80G")
    assert none.remedies == () and "413 GB" in " ".join(none.estimate.notes)


WHOLE = ["cluster.players=whole", "play.engine=hf", "evaluate.engine=hf"]


def test_players_in_shards_make_70b_fit() -> None:
    """Whole players are 413 GB; cut over sixteen devices, with vLLM over two, everything fits an H100."""
    source = RECIPES / "spin_tulu70b.yaml"
    found = cost.plan(source, WHOLE, hardware="16xH100")
    assert {c.name for c in found.estimate.misfits} == {"samples", "frozen", "held", "eval"} and not found.together
    (remedy,) = found.remedies
    settings = "cluster.players=sharded play.engine=vllm evaluate.engine=vllm engine.tensor_parallel=2 "
    settings += "cluster.processes=16"  # the recipe has 32
    assert remedy.setting == settings and remedy.note == "vLLM samples"
    again = cost.plan(source, settings.split(), hardware="16xH100").estimate
    assert not again.misfits and again.seconds == remedy.seconds
    by_name = {c.name: c for c in again.costs}
    # Masters, gradients and RMSprop's state of a sixteenth, 17.2 GB each, and what is gathered and kept
    assert 3 * 17.2e9 < by_name["player"].peak == pytest.approx(71e9, rel=0.01)
    assert by_name["frozen"].memory["weights"] == 4 * 68_976_648_192 / 16
    assert not any("whole player" in note for note in again.notes)
    # Two GPUs hold 69 GB each, of 90 % of 86 GB; one of 8 does not hold a vLLM of its own
    assert by_name["samples"].memory["weights"] == 68_976_648_192
    one = cost.plan(source, ["engine.tensor_parallel=1"], hardware="16xH100").estimate
    assert {c.name for c in one.misfits} == {"samples", "held", "eval"}
    # Four hold 35 GB each, for which a share of 30 % has no room
    less = cost.plan(source, ["engine.gpu_memory=0.3"], hardware="16xH100").estimate
    assert {c.name for c in less.misfits} == {"samples", "held", "eval"}
    with pytest.raises(InputError, match=r"^engine.tensor_parallel: 4: a machine of 2xH100 has 2; lower it, or"):
        cost.plan(source, hardware="2xH100")


def test_a_player_in_shards_by_hand() -> None:
    """TINY: layers of 7680 weights, a vocabulary of 2560; four devices hold a quarter, and gather three layers."""
    held = memory.scoring(TINY, Where(True, True, devices=4), [Pass(1, 10, 10, 5)])
    assert TINY.layer == 7680 and TINY.head == 2560
    assert held["weights"] == TINY.parameters
    assert (held["gathered"], held["casts"]) == (4 * (3 * 7680 + 2 * 2560), 2 * 2560)
    rates = Rates(1e9, 1e9, 1e9, 1e9, 1e9, 0.0)
    # Five passes are two for each; every pass brings three quarters of the weights to each of four
    sent = work.gathering(Machine(TINY, Where(True, True, devices=4), rates), 5, 1e6)
    assert sent.moved == 4 * 2 * 3 * TINY.parameters and sent.seconds == 2 * 3 * TINY.parameters / 1e6


def test_what_vllm_holds() -> None:
    """Two key heads of width 8, two layers: 128 bytes a token in bfloat16; room for what the share leaves."""
    where = Where(True, True)
    weights = 2 * TINY.parameters
    full, width = memory.served(TINY, where, 1, 100, 64, 0, weights + 10.5 * 128 * 100)
    assert (full, width) == ({"weights": weights, "keys and values": 10 * 128 * 100}, 10)
    both, width = memory.served(TINY, where, 2, 100, 64, 0, weights / 2 + 10.5 * 128 * 100)
    assert (both, width) == ({"weights": weights / 2, "keys and values": 21 * 64 * 100}, 21)
    few, width = memory.served(TINY, where, 1, 100, 4, 4000, 1e9)
    assert (few["keys and values"], width) == (128 * 4000, 4)


def test_engines_share_one_machine_and_servers_none() -> None:
    """Eight of sixteen devices play, four a vLLM: bytes of weights and keys over four times the bandwidth, half of it each."""
    source, tied = RECIPES / "spin_tulu70b.yaml", {"prompt_tokens": 200, "answer_tokens": 256}
    two, one = (cost.plan(source, given, hardware="16xH100", **tied).estimate for given in ([], ["engine.replicas=1"]))
    played = [next(c for c in e.costs if c.name == "samples") for e in (two, one)]
    assert played[1].seconds - played[0].seconds == pytest.approx(played[1].seconds / 2, rel=0.01)
    # 55,000 answers of 256 tokens, 64 at a time: each step reads 2 bytes a weight, 4 devices at 60 % of 3.35 TB/s
    steps = 55_000 / 64 * 255
    read = steps * 2 * 68_976_648_192 / (4 * 0.6 * 3.35e12)
    assert read < played[1].seconds < 2 * read
    server = cost.plan(source, ["play.engine=http://a/v1"], hardware="16xH100", **tied).estimate
    samples = next(c for c in server.costs if c.name == "samples")
    assert (samples.flops, samples.peak) == (0, 0) and "not counted: what a server samples" in server.notes
    short = cost.plan(source, ["engine.arguments=[--max-model-len, '600']"], hardware="16xH100", **tied).estimate
    held = [next(c for c in e.costs if c.name == "samples").memory["keys and values"] for e in (two, short)]
    assert held[0] == held[1]  # 64 sequences of 456 tokens are more than one of 8192
    one = [["engine.parallel=1"], *(["engine.parallel=1", f"engine.arguments={words}"] for words in LENGTHS)]
    alone = [cost.plan(source, given, hardware="16xH100", **tied).estimate.costs for given in one]
    held = [next(c for c in costs if c.name == "samples").memory["keys and values"] for costs in alone]
    assert held[1] == held[2] == held[0] * 600 / KNOWN["allenai/tulu-2-70b"].context
    with pytest.raises(
        InputError, match=r"^engine.replicas: 3: a machine of 16xH100 has 8 for 3 of 4 each; lower it, or"
    ):
        cost.plan(source, ["engine.replicas=3"], hardware="16xH100")


LENGTHS = ("[--max-model-len, '600']", "[--max-model-len=600]")


def test_as_many_processes_as_devices_are_planned_for() -> None:
    source = RECIPES / "spin_zephyr7b.yaml"
    note = "planned for one process per device: cluster.processes=8 makes it so"
    plain, told = (
        cost.plan(source, given, hardware="8xH200").estimate
        for given in (["cluster.cpu_offload=true"], ["cluster.processes=8"])
    )
    assert note in plain.notes and note not in told.notes and plain.seconds == told.seconds
    assert "not counted: cluster.cpu_offload" in plain.notes and "not counted: cluster.cpu_offload" not in told.notes


def test_shards_are_what_devices_share() -> None:
    """500 held-out prompts are eight shards of 64, 200 groups eight of 25: eight devices take an eighth of the time."""
    shape, given = KNOWN["Qwen/Qwen2.5-0.5B"], replace(ONE, heldout=500)

    def costs(count: int, **play: Any) -> dict[str, cost.Cost]:
        found = configured({"method": "spin"}, play={"samples": 2, "chunk": 25} | play)
        said = cost.estimate(found, stages(found), shape, given, parse(f"{count}xA100-80G"))
        return {c.folder: c for c in said.costs}

    one, eight, wide = costs(1), costs(8), costs(1, batch_size=256)
    for folder in ("start/eval", "round_000/eval"):
        assert one[folder].seconds == pytest.approx(8 * eight[folder].seconds)
    scored = {n: c["round_000/frozen"] for n, c in ((1, one), (8, eight))}
    written = scored[1].disk / 1e9  # by all, at the same assumed rate
    assert scored[1].seconds - written == pytest.approx(8 * (scored[8].seconds - written))
    # No more than a shard's prompts are answered at a time
    assert wide["start/eval"].memory["keys and values"] == one["start/eval"].memory["keys and values"]


@pytest.mark.parametrize(
    ("entry", "groups"),
    [
        ({"method": "exspin", "verifier": "gsm8k", "right": "drop"}, 50),
        ({"method": "dpo", "pairs": "verified", "verifier": "gsm8k"}, 50),  # gold against wrong
        ({"method": "sppo"}, 0),
    ],
    ids=lambda v: str(v.get("method")) if isinstance(v, dict) else "",
)
def test_one_answer_a_prompt_is_right_for_every_other(entry: dict[str, Any], groups: int) -> None:
    """Of 100 prompts; where nothing is left to train on that is said."""
    found = configured(entry, play={"samples": 1})
    assert sum(item.weight for item in texts.groups(stages(found).rounds[0], ONE)) == pytest.approx(groups)

    def planned() -> Any:
        return cost.estimate(found, stages(found), KNOWN["Qwen/Qwen2.5-0.5B"], ONE, parse("1xA100-80G"))

    if groups:
        assert planned().costs
        return
    told = (
        rf"^play.samples: 1: so few answers a prompt give {entry['method']} nothing to train on in round_000; raise it$"
    )
    with pytest.raises(InputError, match=told):
        planned()


def test_answers_that_came_with_the_data_are_not_played() -> None:
    """Of 100 prompts a half has one: 50 are played and 50 scored in round 0, 100 are played in round 1."""
    shape, hardware = KNOWN["Qwen/Qwen2.5-0.5B"], parse("1xA100-80G")
    found = configured(
        {"method": "spin", "repeat": 2}, model={"path": "Qwen/Qwen2.5-0.5B", "compute": "float32"}, play={"samples": 1}
    )
    played, half, whole = (
        {c.folder: c for c in cost.estimate(found, stages(found), shape, replace(ONE, generated=g), hardware).costs}
        for g in (0.0, 0.5, 1.0)
    )
    score = work.forward(shape, work.rows([Item(200, (256,))]))
    samples = [costs["round_000/samples"] for costs in (played, half, whole)]
    assert samples[2].flops == pytest.approx(100 * score)
    assert samples[1].flops == pytest.approx((samples[0].flops + samples[2].flops) / 2)
    assert samples[0].tokens == samples[1].tokens == 100 * (200 + 256)
    assert half["round_001/samples"] == played["round_001/samples"]
    # They are nobody's, so that the frozen stage scores them beside the gold ones
    assert [c["round_000/frozen"].tokens for c in (played, half)] == [100 * (200 + 299), 100 * (200 + 299 + 255)]
    said = cost.estimate(found, stages(found), shape, replace(ONE, generated=0.5), hardware)
    assert "round_000: 50% of the prompts came with their answer" in said.notes
    sft = configured({"method": "sft"}, {"method": "sppo"}, play={"samples": 2})
    said = cost.estimate(sft, stages(sft), shape, replace(ONE, generated=0.5), hardware)
    assert not any("came with" in note for note in said.notes)


def test_a_guard_reads_up_to_twice_as_often_in_a_short_round() -> None:
    """39 steps are checked one by one where twenty checks are wanted, as training does; 40 every second one."""
    shape, hardware = KNOWN["Qwen/Qwen2.5-0.5B"], parse("1xA100-80G")

    def player(checks: int, **train: Any) -> cost.Cost:
        found = configured({"method": "spin"}, controls={"checks": checks}, train={"batch_size": 1} | train)
        return next(c for c in cost.estimate(found, stages(found), shape, ONE, hardware).costs if c.name == "player")

    assert player(20, max_steps=39).flops == player(39, max_steps=39).flops > player(13, max_steps=39).flops
    assert player(20, max_steps=40).flops < player(40, max_steps=40).flops
    assert player(20, epochs=2, stop_epoch=6) == player(20, epochs=2)


def test_smaller_batches_are_offered_before_anything_that_changes_results() -> None:
    big = ["train.micro_tokens=65536", "train.gradient_checkpointing=false", "train.micro_batch=64"]
    found = cost.plan(RECIPES / "spin_qwen05b_1gpu.yaml", big, hardware="1xRTX4090", answer_tokens=800)
    assert {c.name for c in found.estimate.misfits} == {"player"}
    settings = [r.setting for r in found.remedies]
    assert settings[0] == "train.micro_tokens=8192" and "train.gradient_checkpointing=true" in settings
    assert not cost.plan(
        RECIPES / "spin_qwen05b_1gpu.yaml", [*big, settings[0]], hardware="1xRTX4090", answer_tokens=800
    ).estimate.misfits


def test_more_devices_share_the_work() -> None:
    source = RECIPES / "spin_zephyr7b.yaml"
    one, eight = (cost.plan(source, hardware=f"{n}xH200").estimate for n in (1, 8))
    assert one.hardware.device is eight.hardware.device
    played = [next(c for c in e.costs if c.name == "samples") for e in (one, eight)]
    assert played[0].seconds / played[1].seconds == pytest.approx(8, rel=0.01)
    assert played[0].flops == played[1].flops and played[0].peak == played[1].peak


def test_spins_published_cost() -> None:
    """Table 2: 6.69 s to generate and 10 s to train 64 examples on 8×A100-80G; docs/plan.md explains the factors."""
    source = RECIPES / "spin_zephyr7b.yaml"
    said = cost.plan(source, ["play.batch_size=8"], hardware="8xA100-80G").estimate
    played, learned = (next(c for c in said.costs if c.name == name) for name in ("samples", "player"))
    assert 6.69 / (played.seconds * 64 / 50_000) == pytest.approx(0.67, abs=0.05)
    assert 10 / (learned.seconds * 64 / 100_000) == pytest.approx(2.8, abs=0.2)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("8xA100-80G", 8, "A100-80G"), ("h200", 1, "H200"), ("2 x rtx4090", 2, "RTX4090"), ("cpu", 1, "cpu")],
)
def test_hardware_by_name(text: str, count: int, name: str) -> None:
    found = parse(text)
    assert (found.count, found.device.name) == (count, name)


def test_every_device_says_where_its_numbers_are_from() -> None:
    assert all(d.source and d.bf16 > d.fp32 and d.usable < d.memory for d in DEVICES.values())
    assert Hardware(16, DEVICES["H100"]).link == 50e9 < Hardware(8, DEVICES["H100"]).link


def test_bad_input_is_told_in_a_line(tmp_path: Path, tiny_model: Path) -> None:
    source = str(RECIPES / "spin_zephyr7b.yaml")
    code, _, err = cli("plan", source, "--hardware", "8xA100")
    assert code == 2 and "`8xA100` is not NUMBERxDEVICE" in err and "did you mean A100-40G or A100-80G?" in err
    code, _, err = cli("plan", source, "data.limit=null")
    assert code == 2 and "give --prompts, or data.limit" in err
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    code, _, err = cli("plan", source, f"model.path={other}")
    assert code == 2 and "model_type `gpt2` is not one that a plan can count (llama, mistral, qwen2)" in err
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    code, _, err = cli("plan", source, f"model.path={other}")
    assert code == 2 and "config.json does not say 'num_hidden_layers'" in err
    code, _, err = cli("plan", source, "model.path=Qwen/Qwen2.5-7B-Instrukt")
    assert code == 2 and "models such as Qwen/Qwen2.5-7B-Instruct" in err
    assert err.count("\n") == 1
    code, _, err = cli("plan", source, "model.compute=float64")
    assert code == 2 and "model.compute: float64: a plan counts float32 and bfloat16 only" in err


def test_the_command_shows_stages_and_what_fits() -> None:
    code, out, _ = cli("plan", RECIPES / "spin_zephyr7b.yaml", "--hardware", "1xA100-80G")
    assert code == 0
    assert "7.24 G parameters on 1xA100-80G" in out and "round_001 … round_003" in out
    assert "does not fit: player" in out and "model.lora_rank=16" in out
    code, out, _ = cli("plan", RECIPES / "spin_zephyr7b.yaml", "--hardware", "8xA100-80G", "--json")
    told = json.loads(out)
    assert told["parameters"] == 7_241_732_096 and len(told["stages"]) == 1 + 4 * 6
    assert sum(stage["seconds"] for stage in told["stages"]) == pytest.approx(told["seconds"])


def test_what_does_not_fit_is_marked() -> None:
    """Also where a vLLM has less of a device than the device has."""
    from rich.console import Console

    from sparring.views.cost import plan as shown

    given = ["engine.gpu_memory=0.3", "cluster.processes=16"]
    found = cost.plan(RECIPES / "spin_tulu70b.yaml", given, hardware="16xH100")
    console = Console(width=200)
    with console.capture() as out:
        console.print(shown(found))
    lines = [line for line in out.get().splitlines() if "✗" in line]
    assert [set(line.split()) & {"samples", "held", "eval"} for line in lines] == [
        {"eval"}, {"samples"}, {"held"}, {"eval"}
    ]  # fmt: skip
    assert "does not fit: eval, samples, held" in out.get()


def test_lengths_are_the_datas_where_it_is_here(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """Sixteen sums, four held out; characters are tokens."""
    path = write_recipe(tmp_path / "r.yaml", recipe(tmp_path / "run", tiny_model, tiny_data))
    said = cost.plan(path, sample_tokens=5).estimate
    assert (said.texts.train, said.texts.heldout, said.texts.generated) == (12, 4, 0)
    assert all(prompt > 15 and gold > 15 for prompt, gold in said.texts.rows)
    played = next(c for c in said.costs if c.name == "samples")
    assert played.tokens == pytest.approx(12 * 5 + sum(prompt for prompt, _ in said.texts.rows))
    sums = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    other = write_jsonl(tmp_path / "played.jsonl", [row | {"generated": "none"} for row in sums])
    assert cost.plan(path, [f"data.path={other}"]).estimate.texts.generated == 1


@pytest.mark.parametrize("rank", [0, 4])
def test_calibration_measures_this_machine(
    rank: int, tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring.cost import calibrate

    monkeypatch.setattr(calibrate, "_SECONDS", 0.0)
    path = write_recipe(tmp_path / "r.yaml", recipe(tmp_path / "run", tiny_model, tiny_data))
    trained: list[int] = []
    step = calibrate.work.update
    monkeypatch.setattr(
        calibrate.work, "update", lambda m, name: (trained.append(memory.trained(m.shape, m.where)), step(m, name))[1]
    )
    rates = cost.plan(path, [f"model.lora_rank={rank}"], calibrate=True).estimate.rates
    assert rates.measured
    shape = shape_of(ModelConfig(path=str(tiny_model)))
    assert trained[0] == (shape.adapter(4) if rank else shape.parameters)
    measured = (rates.train, rates.score, rates.decode, rates.bandwidth, rates.update, rates.disk)
    assert all(1e3 < rate < 1e13 for rate in measured)
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.gpu
def test_calibration_on_a_gpu() -> None:
    given = ["model.device=cuda"]
    rates = cost.plan(RECIPES / "spin_qwen05b_1gpu.yaml", given, hardware="1xH200", calibrate=True).estimate.rates
    assert rates.measured and rates.train > 1e13


def test_calibration_needs_the_hardware_itself() -> None:
    code, _, err = cli("plan", RECIPES / "spin_qwen05b_1gpu.yaml", "--hardware", "1xH200", "--calibrate")
    assert code == 2 and "no CUDA device here" in err


@pytest.mark.parametrize(
    ("device", "name", "gib", "same"),
    [
        ("H200", "NVIDIA H200", 139.8, True),
        ("A100-80G", "NVIDIA A100-SXM4-80GB", 79.2, True),
        ("A100-40G", "NVIDIA A100-PCIE-40GB", 39.5, True),
        ("RTX4090", "NVIDIA GeForce RTX 4090", 23.6, True),
        ("L40S", "NVIDIA L40S", 44.4, True),
        ("A100-40G", "NVIDIA A100-SXM4-80GB", 79.2, False),
        ("H100", "NVIDIA H200", 139.8, False),
        ("H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8, False),
        ("RTX3090", "NVIDIA GeForce RTX 4090", 23.6, False),
        ("A10", "NVIDIA A10G", 22.0, False),
    ],
)
def test_calibration_is_of_the_gpu_that_is_planned_for(device: str, name: str, gib: float, same: bool) -> None:
    from sparring.cost.calibrate import check

    if same:
        check(DEVICES[device], name, gib * 2**30)
        return
    with pytest.raises(
        InputError, match=rf"^--calibrate: this machine's GPU is {name} with \d+ GiB, not {device}; give"
    ):
        check(DEVICES[device], name, gib * 2**30)


def test_time_is_work_over_rates() -> None:
    """One pass, one optimizer step and one decoding step at round rates."""
    rates = Rates(train=1e9, score=2e9, decode=1e9, bandwidth=1e9, update=1e9, launch=0.0, measured=True)
    machine = Machine(TINY, Where(False, False), rates)
    rows = work.rows(ITEMS)
    flops = work.forward(TINY, rows)
    assert work.scoring(machine, [rows]).seconds == flops / 2e9
    learned = work.learning(machine, [rows], coupled=False, companions=0)
    assert (learned.flops, learned.seconds) == (3 * flops, 3 * flops / 1e9)
    assert work.update(machine, "adamw").seconds == 4 * TINY.parameters * 10 / 1e9
    two = work.answering(machine, [(4, 3)], 1, repeats=1, models=1)
    one = work.answering(machine, [(4, 2)], 1, repeats=1, models=1)
    assert two.seconds > one.seconds > work.scoring(machine, [work.rows([Item(4, ())])]).seconds


def test_sharded_devices_send_weights_twice_and_gradients_once() -> None:
    """Seven eighths of 3 · 4 bytes per parameter and pass; one device sends nothing."""
    rates = Rates(1e9, 1e9, 1e9, 1e9, 1e9, 0.0)
    eight = work.exchange(Machine(TINY, Where(True, True, devices=8), rates), 5, 1e6)
    assert eight.moved == pytest.approx(5 * 7 / 8 * 12 * TINY.parameters)
    assert eight.seconds == eight.moved / 1e6
    assert work.exchange(Machine(TINY, Where(True, True), rates), 5, 1e6) == work.Work()


def test_logits_come_in_pieces_where_they_are_many() -> None:
    """2 · 1000 · 150,000 numbers are 1.2 GB in float32 and their gradient as much; pieces of 2²⁵ are 0.27 GB together."""
    shape = replace(TINY, vocabulary=150_000)
    few, many = Pass(1, 900, 900, 800), Pass(2, 1500, 3000, 2000)
    assert memory.logits(shape, Where(False, False), few, learns=True) == 2 * 4 * 800 * 150_000
    assert memory.logits(shape, Where(False, False), many, learns=True) == 2 * 4 * 2**25
    assert memory.logits(shape, Where(True, False), many, learns=False) == 2 * 2**25


def test_what_is_not_counted_is_said() -> None:
    tree = {
        "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
        "data": {"path": "x", "limit": 100},
        "rounds": [{"method": "spin"}],
    }
    given = cost.plan(tree, ["play.engine=vllm"], hardware="1xH200")
    told = "vllm: 1 of 1 devices each; what it reaches is assumed, its start is not counted"
    assert told in given.estimate.notes
    with pytest.raises(InputError, match=r"model\.quantize: nf4: works in one process only; plan for one device"):
        cost.plan(tree, ["model.lora_rank=8", "model.quantize=nf4"], hardware="2xH200")
    whole, small = (cost.plan(tree, [f"train.optimizer={name}"], hardware="1xH200") for name in ("adamw", "adamw_8bit"))
    trained = [next(c for c in p.estimate.costs if c.name == "player") for p in (whole, small)]
    assert trained[0].memory["optimizer"] == 4 * trained[1].memory["optimizer"] == 8 * whole.estimate.shape.parameters
