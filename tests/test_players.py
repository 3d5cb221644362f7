"""Players on disk: what may be loaded, what counts as their identity, and what another program finds in their folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import toy_tokenizers as toys
from helpers import player_shas, write_model
from sparring import players
from sparring.config import ModelConfig
from sparring.errors import InputError, told
from sparring.prompts import Renderer, load_tokenizer
from sparring.rundir.view import RunView
from sparring.types import Message

CPU = ModelConfig(device="cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """A cache in which `someone/tiny` was downloaded at commit aaa…; returns its folder."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--someone--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_model, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    return cached


def edit(file: Path, **fields: Any) -> None:
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | fields))


# Loading ---------------------------------------------------------------------------------------------------------


def test_missing_weights_are_refused_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "lm_head" not in name and "q_proj" not in name}
    save_file(kept, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        players.load_model(str(folder), CPU)
    assert str(error.value) == (
        f"{folder}: its files hold no weights for lm_head.weight and 1 more; save the whole causal language model there again"
    )


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_tied_embeddings_are_one_tensor_and_no_missing_one(family: str, tmp_path: Path) -> None:
    tokens: dict[str, Any] = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
    if family == "Llama":
        made: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **tokens, **SIZES))
    else:
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **tokens))
    made.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded: Any = players.load_model(str(tmp_path), CPU)
    assert torch.equal(loaded.lm_head.weight, made.get_input_embeddings().weight)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_an_adapter_is_told_apart_from_a_model(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": torch.zeros(1)}, str(adapter / "adapter_model.safetensors"))
    for place in (adapter, folder):
        edit(place / "adapter_config.json", peft_type="LORA", base_model_name_or_path="./x")
    with pytest.raises(InputError, match=rf"^{adapter}: its base is not there: x: no such model folder"):
        players.identify(str(adapter))
    for act in (players.identify, lambda path: players.load_model(path, CPU)):
        with pytest.raises(InputError) as error:
            act(str(folder))
        assert str(error.value) == (
            f"{folder}: holds a whole model and a LoRA adapter; move adapter_config.json and adapter_model.safetensors, or "
            "the rest, to a folder of their own"
        )
    edit(adapter / "adapter_config.json", peft_type="IA3")
    with pytest.raises(InputError, match="an adapter of kind IA3; only LoRA adapters are read, merge it into its base"):
        players.identify(str(adapter))
    (adapter / "adapter_config.json").write_text("{bad")
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot read it: "):
        players.identify(str(adapter))


def test_an_adapter_on_the_hub_is_refused(hub: Path, tiny_model: Path) -> None:
    """transformers would load it on a base that nobody checked, and leave both to be trained."""
    place = hub / "snapshots" / ("a" * 40)
    (place / "model.safetensors").unlink()
    edit(
        place / "adapter_config.json",
        peft_type="LORA",
        base_model_name_or_path=str(tiny_model),
        target_modules=["q_proj"],
        r=1,
    )
    names = {"A": (1, 16), "B": (16, 1)}
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {path.format(x): torch.ones(shape) for x, shape in names.items()}, str(place / "adapter_model.safetensors")
    )
    with pytest.raises(InputError, match=r"^someone/tiny: a LoRA adapter on the Hub; download it and give its folder"):
        players.load_model("someone/tiny", CPU)


def test_bf16_weights_become_float32_masters(folder: Path) -> None:
    whole: Any = players.load_model(str(folder), CPU)
    whole.to(torch.bfloat16).save_pretrained(folder)
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    loaded = players.load_model(str(folder), CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(a, b.float()) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))


def test_sharded_weights_load(folder: Path, tmp_path: Path) -> None:
    whole: Any = players.load_model(str(folder), CPU)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    loaded = players.load_model(str(folder), CPU)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))
    first, before = sorted(folder.glob("*.safetensors"))[0], players.identify(str(folder))
    edit(folder / "model.safetensors.index.json", more=1)
    assert players.identify(str(folder)) != before
    first.unlink()
    with pytest.raises(InputError, match="cannot load the model"):
        players.load_model(str(folder), CPU)


# Identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
        "merges.txt", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tool.jinja", "modeling_own.py",
    ],
)  # fmt: skip
def test_identity_covers_whatever_changes_a_player(folder: Path, name: str) -> None:
    before = players.identify(str(folder))
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    if name.endswith(".json"):
        edit(file, changed=1)
    else:
        file.write_text("x")
    assert players.identify(str(folder)) != before


@pytest.mark.parametrize("name", ["stage.json", "README.md", "README.txt"])
def test_identity_leaves_out_what_is_written_about_a_player(folder: Path, name: str) -> None:
    before = players.identify(str(folder))
    (folder / name).write_text("{}")
    assert players.identify(str(folder)) == before


def test_recorded_identities_are_those_of_the_folders(finished_run: Path) -> None:
    recorded = {number: player.sha for number, player in RunView(finished_run).players.items()}
    assert len(set(recorded.values())) == 4
    assert player_shas(finished_run) == recorded


def test_a_hub_id_is_identified_by_its_commit(hub: Path) -> None:
    first = players.identify("someone/tiny")
    assert players.identify("someone/tiny", "a" * 40) == players.identify("someone/tiny", "main") == first
    assert players.identify("someone/tiny", "b" * 40) != first
    (hub / "refs" / "main").write_text("b" * 40)
    assert players.identify("someone/tiny") == players.identify("someone/tiny", "b" * 40)
    assert players.identify("someone/else") != players.identify("someone/else", "v2")


# What the model says about itself --------------------------------------------------------------------------------


def test_stop_ids_of_a_folder(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=7)
    (folder / "generation_config.json").unlink()
    assert players.stop_ids(str(folder), CPU) == [7]
    edit(folder / "generation_config.json", bos_token_id=1)
    assert players.stop_ids(str(folder), CPU) == [7]
    edit(folder / "generation_config.json", eos_token_id=[3, 5])
    assert players.stop_ids(str(folder), CPU) == [3, 5]
    (folder / "generation_config.json").write_text("{bad")
    with pytest.raises(InputError) as error:
        players.stop_ids(str(folder), CPU)
    assert str(error.value).startswith(f"{folder}: cannot read generation_config.json: ")
    assert "\n" not in str(error.value)


def test_stop_ids_of_a_hub_id(hub: Path) -> None:
    file = hub / "snapshots" / ("a" * 40) / "generation_config.json"
    edit(file, eos_token_id=[3, 5])
    assert players.stop_ids("someone/tiny", CPU) == [3, 5]
    file.unlink()
    assert players.stop_ids("someone/tiny", CPU) == [1]  # of config.json
    edit(hub / "snapshots" / ("b" * 40) / "generation_config.json", eos_token_id=9)
    assert players.stop_ids("someone/tiny", ModelConfig(device="cpu", revision="b" * 40)) == [9]


def test_nested_configurations_are_looked_into() -> None:
    text = {"max_position_embeddings": 77, "vocab_size": 99}
    config = transformers.Gemma3Config(text_config=text)
    tokenizer: Any = type("Tokenizer", (), {"model_max_length": 10**30})()
    assert (players.context_length(config, tokenizer), players.vocabulary(config)) == (77, 99)
    assert players.context_length(transformers.MambaConfig(), tokenizer) == 1 << 20
    # Rows of another length would change each other's rotations
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 40}
    dynamic = transformers.LlamaConfig(max_position_embeddings=80, rope_parameters=rope)
    assert players.context_length(dynamic, tokenizer) == 40
    # transformers leaves dual-chunk attention out: within one chunk, less what chunks share, that changes nothing
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    million = transformers.Qwen2Config(max_position_embeddings=1010000, dual_chunk_attention_config=chunks)
    assert players.context_length(million, tokenizer) == 253_952
    assert million.to_dict()["dual_chunk_attention_config"] == chunks


@pytest.mark.parametrize("name", ["mps", "meta", "xpu", "tpu", "cuda:x", "gpu"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(InputError) as error:
        players.device_of(ModelConfig(device=name))
    assert str(error.value) == (f"model.device: `{name}` is no device to train on; write auto, cpu, cuda or cuda:N")


def test_a_cuda_device_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^model\.device: no CUDA device here; set model\.device=cpu$"):
        players.device_of(ModelConfig(device="cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert players.device_of(ModelConfig(device="cuda:1")) == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"^model\.device: `cuda:2`: there are cuda:0 … cuda:1 only; write one of"):
        players.device_of(ModelConfig(device="cuda:2"))


def test_out_of_gpu_memory_is_told_in_one_line() -> None:
    assert told(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\n…")) == (
        "out of GPU memory; lower train.micro_tokens or play.batch_size (neither changes results) and try again",
        1,
    )
    assert told(RuntimeError("anything else")) is None


# Saving ----------------------------------------------------------------------------------------------------------

TALK = [Message("system", "S"), Message("user", "U </s>"), Message("assistant", "A"), Message("user", " V")]


@pytest.mark.parametrize("name", toys.MAKERS)
@pytest.mark.parametrize("template", ["plain", "own", "file"])
def test_a_saved_player_renders_as_it_was_trained(name: str, template: str, tmp_path: Path) -> None:
    if name == "stories260K" and not toys.STORIES.exists():
        pytest.skip("the real tokenizer is not here")
    file = tmp_path / "t.jinja"
    file.write_text(toys.ZEPHYR)
    tokenizer: Any = toys.MAKERS[name]()
    given = {"plain": "plain", "own": None, "file": str(file)}[template]
    if name == "characters" and template == "file":
        pytest.skip("its letters do not spell that template")
    renderer, before = Renderer(tokenizer, given, [1]), tokenizer.chat_template
    talk = TALK[1:] if name in ("zephyr-legacy",) else TALK
    wanted = renderer.prompt(talk)
    model = players.load_model(str(write_model(tmp_path / "model", tokenizer=tokenizer)), CPU)
    players.save_player(
        model, tokenizer, tmp_path / "player", "card", template=renderer.template, stop_ids=renderer.stop_ids
    )
    assert (tokenizer.chat_template, renderer.prompt(talk)) == (before, wanted)
    saved: Any = load_tokenizer(str(tmp_path / "player"))
    turns = [{"role": m.role, "content": m.content} for m in TALK[2:]]
    bare = [Message(m.role, m.content) for m in TALK[2:]]
    # Without control tokens in the text, transformers alone gives the same ids
    assert saved.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] == renderer.prompt(bare)
    again = Renderer(saved, None, players.stop_ids(str(tmp_path / "player"), CPU))
    assert (again.prompt(talk), again.stop_ids) == (wanted, renderer.stop_ids)
    assert again.completion(talk, "a b") == renderer.completion(talk, "a b")
    kept = json.loads((tmp_path / "player" / "generation_config.json").read_text())["eos_token_id"]
    assert kept == list(renderer.stop_ids)


def test_the_plain_template_refuses_other_roles() -> None:
    renderer = Renderer(toys.chatml(), "plain")
    with pytest.raises(Exception, match="only system, user and assistant have a place in the plain format"):
        toys.chatml().apply_chat_template([{"role": "tool", "content": "x"}], chat_template=renderer.template)


def test_sampling_settings_that_transformers_would_not_save_are_kept(folder: Path, tmp_path: Path) -> None:
    edit(folder / "generation_config.json", temperature=0.9, top_p=0.6)
    model, tokenizer = players.load_model(str(folder), CPU), load_tokenizer(str(folder))
    players.save_player(model, tokenizer, tmp_path / "player", "card", template="t", stop_ids=(1,))
    kept = json.loads((tmp_path / "player" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["top_p"], kept["do_sample"]) == (0.9, 0.6, True)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"pad_token_id": -1, "max_length": 99}, {"pad_token_id": None, "max_length": 99, "do_sample": None}),
        ({"early_stopping": True, "length_penalty": 2.0, "pad_token_id": 0},
         {"early_stopping": None, "length_penalty": None, "pad_token_id": 0, "do_sample": None}),
        ({"output_attentions": True}, {"output_attentions": None, "do_sample": None}),
        ({"use_cache": False, "cache_config": {"a": 1}}, {"use_cache": False, "cache_config": None, "do_sample": None}),
        ({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 4, "length_penalty": 2.0}),
        ({"pad_token_id": -1, "temperature": 0.5}, {"pad_token_id": None, "temperature": 0.5, "do_sample": True}),
    ],
)  # fmt: skip
def test_a_player_is_saved_whatever_its_start_says_of_generation(
    given: dict[str, Any], wanted: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """transformers loads these and refuses to save them, once the end tokens are others: after a whole training."""
    edit(folder / "generation_config.json", **given)
    model, tokenizer = players.load_model(str(folder), CPU), load_tokenizer(str(folder))
    players.save_player(model, tokenizer, tmp_path / "player", "card", template="t", stop_ids=(1, 3))
    kept = json.loads((tmp_path / "player" / "generation_config.json").read_text())
    assert {name: kept.get(name) for name in wanted} == wanted and kept["eos_token_id"] == [1, 3]


def test_settings_that_are_refused_whatever_is_done_cost_no_player(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As another version of transformers may do."""
    edit(folder / "generation_config.json", max_length=99, pad_token_id=0)
    model, tokenizer = players.load_model(str(folder), CPU), load_tokenizer(str(folder))
    whole = transformers.GenerationConfig.validate

    def strict(config: transformers.GenerationConfig, *given: Any, **named: Any) -> None:
        if config.max_length == 99:
            raise ValueError("GenerationConfig is invalid: \n- `max_length`: 99")
        whole(config, *given, **named)

    monkeypatch.setattr(transformers.GenerationConfig, "validate", strict)
    players.save_player(model, tokenizer, tmp_path / "player", "card", template="t", stop_ids=(1, 3))
    kept = json.loads((tmp_path / "player" / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["pad_token_id"], kept.get("max_length")) == ([1, 3], 0, None)
    assert "transformers refuses: GenerationConfig is invalid: - `max_length`: 99" in caplog.text
