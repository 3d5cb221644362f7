"""Players and their weights on disk: load, save, identity, export.

A player's folder holds a whole model, or a LoRA adapter and the place and identity of its base.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring import adapters, lowbit, threads
from sparring.adapters import Base
from sparring.config import ModelConfig
from sparring.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sparring.types import Player

log = logging.getLogger("sparring")

_IDENTITY = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*/*.jinja", "*.py")
# The run's own record of the folder is finished after it was hashed; an adapter's two files are hashed by what they say
_NOT_IDENTITY = ("stage.json", "README.txt", adapters.CONFIG, adapters.BASE)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def looks_local(path: str) -> bool:
    """Whether a model or data name can only be meant as a path, so that it is never looked up on the Hub."""
    typo = "/" in path and Path(path).parent.is_dir()
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists() or "\\" in path or typo


def identify(path: str, revision: str | None = None) -> str:
    """sha256 (hex) of a player's weights, configurations, tokenizer and code; for a Hub id, of its name and commit.

    An adapter's covers its base's identity, not its base's place. A Hub id that cannot be resolved here counts as its
    name and `revision`. Raises InputError for a folder that is missing, holds no weights, or holds pickled weights only.
    """
    if not looks_local(path):
        return hashlib.sha256(f"hub:{path}@{_commit(path, revision)}".encode()).hexdigest()
    folder = Path(path).expanduser()
    check_folder(folder)
    digest = hashlib.sha256()
    for file in _own_files(folder):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    if is_adapter(path):
        digest.update(adapters.config_identity(folder))
        base = base_of(path)
        digest.update(base.sha.encode() + (base.quantize or "").encode())
    return digest.hexdigest()


def _own_files(folder: Path) -> list[Path]:
    return sorted({f for pattern in _IDENTITY for f in folder.glob(pattern) if f.name not in _NOT_IDENTITY})


def is_adapter(path: str) -> bool:
    """Whether a local folder holds a LoRA adapter instead of a whole model."""
    return looks_local(path) and (Path(path).expanduser() / adapters.CONFIG).exists()


def base_of(path: str) -> Base:
    """The model that an adapter's folder says it belongs to; one of peft's own folders says no hash, so it is taken now.

    Raises InputError where it says none, or is no adapter's.
    """
    folder = Path(path).expanduser()
    check_folder(folder)
    if (folder / adapters.BASE).exists():
        try:
            return Base(**adapters.read_json(folder / adapters.BASE))
        except TypeError:
            raise InputError(
                f"{folder / adapters.BASE}: does not say path, revision and sha; copy the adapter's folder again"
            ) from None
    settings = adapters.read_json(folder / adapters.CONFIG)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if (
        not isinstance(name, str)
        or not name
        or (looks_local(name) and Path(name).expanduser().resolve() == folder.resolve())
    ):
        raise InputError(f"{folder / adapters.CONFIG}: names no base; write its folder as base_model_name_or_path")
    try:
        return Base(name, revision, identify(name, revision))
    except InputError as error:
        raise InputError(f"{path}: its base is not there: {error}") from error


def check_base(path: str, base: Base) -> None:
    """Raises InputError where an adapter's base is not there or is not what it was when the adapter was made."""
    try:
        same = identify(base.path, base.revision) == base.sha
    except InputError as error:
        raise InputError(f"{path}: its base is not there: {error}; or mend `path` in {adapters.BASE}") from error
    if not same:
        raise InputError(
            f"{path}: its base {base.path} is another model than it was made on (another content hash); restore it there, "
            f"or mend `path` in {adapters.BASE}"
        )


def _commit(path: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file, extract_commit_hash

    try:
        # The cache keeps every commit's files in a folder of its own, whose name is the commit
        return extract_commit_hash(cached_file(path, "config.json", revision=revision), None) or revision
    except (OSError, ValueError):
        return revision


def check_folder(folder: Path) -> None:
    """Raises InputError unless the folder is a Hugging Face model, or a LoRA adapter, with safetensors weights."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder; give a Hugging Face folder or a Hub id as model.path")
    found = {file.name for file in folder.glob("*.safetensors")}
    if (folder / adapters.CONFIG).exists():
        kind = adapters.read_json(folder / adapters.CONFIG).get("peft_type")
        if kind != "LORA":
            raise InputError(
                f"{folder}: an adapter of kind {kind}; only LoRA adapters are read, merge it into its base"
            )
        if found - {adapters.WEIGHTS}:
            raise InputError(
                f"{folder}: holds a whole model and a LoRA adapter; move {adapters.CONFIG} and {adapters.WEIGHTS}, or the "
                "rest, to a folder of their own"
            )
    elif not (folder / "config.json").exists():
        raise InputError(f"{folder}: no config.json in it, so it is not a Hugging Face model folder")
    if not found:
        pickled = [f.name for pattern in _PICKLES for f in folder.glob(pattern)]
        if pickled:
            raise InputError(
                f"{folder}: holds pickled weights only ({pickled[0]}), which can run code when loaded; "
                "convert them to safetensors first"
            )
        raise InputError(f"{folder}: no weights (*.safetensors) in it")


def load_model(path: str, config: ModelConfig) -> nn.Module:
    """The weights of a player as float32 masters (float64 for compute: float64), in eval mode, on the device.

    An adapter comes merged into its base, in that precision: a whole model of its own; where the base was quantised, into
    what that computes with. With `quantize` the linear layers are then held in 4 bits. Sets torch's number of threads
    where the configuration names one. Raises InputError where the files cannot be loaded, or where an adapter's base is
    not what it was.
    """
    if is_adapter(path):
        base = base_of(path)
        check_base(path, base)
        # What is to be quantised must not be whole on a GPU before
        place = {"device": "cpu"} if config.quantize else {}
        whole = load_model(base.path, _at(config, base).model_copy(update=place))
        if base.quantize:
            whole = lowbit.rounded(whole, base.quantize)
        return _placed(adapters.merged(whole, Path(path).expanduser()), config)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    local = looks_local(path)
    if local:
        check_folder(Path(path).expanduser())
    logging.disable_progress_bar()
    if isinstance(config.threads, int):
        threads.use(config.threads)
    extra = {"attn_implementation": config.attention} if config.attention else {}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(Path(path).expanduser()) if local else path,
            dtype=torch.float64 if config.compute == "float64" else torch.float32,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=local,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    except Exception as error:  # a broken file surfaces as almost any type, from KeyError to safetensors' own
        raise InputError(f"{path}: cannot load the model: {_first_line(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{path}: a LoRA adapter on the Hub; download it and give its folder, so that its base is checked"
        )
    # transformers fills these in at random, which would be another model on every start
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{path}: its files hold no weights for {missing[0]}{more}; save the whole causal language model there again"
        )
    return _placed(model, config)


def _placed(model: nn.Module, config: ModelConfig) -> nn.Module:
    device = device_of(config)
    if config.quantize:
        model = lowbit.quantised(model, config.quantize, compute_dtype(config), device)
    result: nn.Module = model.to(device).eval()
    if config.logps == "plain":
        from sparring.logps import use_plain

        use_plain(result)
    return result


def settings_of(player: Player, start: Player, config: ModelConfig) -> ModelConfig:
    """How a player of a run is loaded: `quantize` is the start's, and `revision` no other Hub model's."""
    changes: dict[str, None] = {} if player.round is not None else {"revision": None}
    if player.sha != start.sha:
        changes["quantize"] = None
    return config.model_copy(update=changes)


def model_config(path: str, config: ModelConfig) -> Any:
    """The configuration of a model, without its weights; for an adapter, its base's."""
    from transformers import AutoConfig

    if is_adapter(path):
        base = base_of(path)
        return model_config(base.path, _at(config, base))
    local = looks_local(path)
    if local:
        check_folder(Path(path).expanduser())
    try:
        return AutoConfig.from_pretrained(
            str(Path(path).expanduser()) if local else path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=local,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot read the model's configuration: {_first_line(error)}") from error


def _at(config: ModelConfig, base: Base) -> ModelConfig:
    """How an adapter's base is loaded as it is."""
    return config.model_copy(update={"revision": base.revision, "quantize": None})


def context_length(model_config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest sequence in tokens: the model's positions, or the tokenizer's limit for models without any."""
    text = model_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return min(value, _steady(text) or value, _undivided(text) or value)
    return int(min(tokenizer.model_max_length, 1 << 20))


def _steady(text: Any) -> int | None:
    """Up to which length rows do not change each other, where positions are rotated by the longest row of a pass."""
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    return rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)


def _undivided(text: Any) -> int | None:
    """Up to which length dual-chunk attention is ordinary attention, which is what transformers computes in its place.

    Source: Qwen2.5-1M, arXiv 2501.15383: a row of one chunk has no other chunk to attend to.
    """
    chunks = getattr(text, "dual_chunk_attention_config", None)
    return chunks["chunk_size"] - chunks["local_size"] if isinstance(chunks, dict) else None


def vocabulary(model_config: Any) -> int | None:
    """Number of the model's token embeddings, where its configuration tells it."""
    size: int | None = getattr(model_config.get_text_config(), "vocab_size", None)
    return size


def stop_ids(path: str, config: ModelConfig) -> list[int]:
    """Tokens at which the model itself stops: eos_token_id of its generation configuration, else of its configuration.

    An adapter without a generation configuration of its own stops where its base does.

    Raises InputError for a file that cannot be read.
    """
    from transformers import GenerationConfig

    local = looks_local(path)
    folder = Path(path).expanduser()
    ids = None
    if is_adapter(path) and not (folder / "generation_config.json").exists():
        base = base_of(path)
        return stop_ids(base.path, _at(config, base))
    if not local or (folder / "generation_config.json").exists():
        try:
            name = str(folder) if local else path
            ids = GenerationConfig.from_pretrained(name, revision=config.revision, local_files_only=local).eos_token_id
        except Exception as error:  # broken contents surface as almost any type
            # On the Hub, a model without the file and one that cannot be reached raise the same; the latter fails below
            if local or not isinstance(error, OSError):
                raise InputError(f"{path}: cannot read generation_config.json: {_first_line(error)}") from error
    if ids is None:
        whole = model_config(path, config)
        ids = getattr(whole, "eos_token_id", None)
        ids = getattr(whole.get_text_config(), "eos_token_id", None) if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def device_of(config: ModelConfig) -> torch.device:
    """The device that `model.device` names. Raises InputError for one that is not there."""
    import torch

    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise InputError(f"model.device: `{name}` is no device to train on; write auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError("model.device: no CUDA device here; set model.device=cpu")
        if (device.index or 0) >= count:
            raise InputError(f"model.device: `{name}`: there are cuda:0 … cuda:{count - 1} only; write one of them")
    return device


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Precision of forward passes."""
    import torch

    if config.compute == "auto":
        return torch.bfloat16 if device_of(config).type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[config.compute]


def save_player(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str, *,
    template: str | None, stop_ids: Sequence[int],
) -> None:  # fmt: skip
    """Write an ordinary Hugging Face folder: safetensors in the masters' precision, tokenizer, configurations, card.

    Of an adapter only its own weights are written, with the place and identity of its base.
    template, stop_ids: what the player was trained with; other programs then write its prompts and end its answers so.
    """
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = list(stop_ids)
        generation = model.generation_config = _savable(generation)  # type: ignore[assignment]
    if adapters.is_adapter(model):
        adapters.save(model, folder)
        if generation is not None:
            generation.save_pretrained(folder)
    else:
        model.save_pretrained(folder)  # type: ignore[operator]
    own = copy.copy(tokenizer)
    own.chat_template = template
    own.save_pretrained(str(folder))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _savable(generation: Any) -> Any:
    """Generation settings that transformers saves: published models have some that it loads and refuses to write again.

    What has no effect as it stands is taken out, and a temperature gets `do_sample`; of settings that are refused even then
    the special tokens are left.
    """
    from transformers import GenerationConfig

    def refusal() -> str | None:
        try:
            generation.validate(strict=True)
        except ValueError as error:
            return " ".join(str(error).split())
        return None

    if refusal():
        one_beam, uncached = (generation.num_beams or 1) == 1, generation.use_cache is False
        idle = {
            "pad_token_id": (generation.pad_token_id or 0) < 0,
            "early_stopping": one_beam,
            "length_penalty": one_beam,
            "cache_implementation": uncached,
            "cache_config": uncached,
            **dict.fromkeys(generation.extra_output_flags, generation.return_dict_in_generate is not True),
        }
        for name in (name for name, without_effect in idle.items() if without_effect):
            setattr(generation, name, None)
    if refusal():
        generation.do_sample = True
    if told := refusal():
        log.warning(
            "of the start's generation settings its special tokens alone are kept; transformers refuses: %s", told
        )
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(generation, name) for name in names})
    return generation


def export_player(path: str, out: Path, config: ModelConfig, *, merge: bool = False, card: str | None = None) -> None:
    """Copy a player to a folder of its own, without the run's records; `merge` makes an adapter a whole model.

    Merging adds in float32 (float64 for compute: float64); where the base was quantised, to what that computes with. A Hub id is written as a folder. `card` takes the place of
    the player's own. Raises InputError where `out` exists or the player does not load.
    """
    from sparring.prompts import load_tokenizer

    if out.exists():
        raise InputError(f"{out}: exists already; give a new folder")
    source = Path(path).expanduser()
    making = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    if card is None:
        card = (source / "README.md").read_text(encoding="utf-8") if (source / "README.md").exists() else ""
    if looks_local(path) and not (merge and is_adapter(path)):
        check_folder(source)
        also = [source / name for name in (adapters.CONFIG, adapters.BASE) if (source / name).exists()]
        for file in [*_own_files(source), *also]:
            target = making / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        (making / "README.md").write_text(card, encoding="utf-8")
    else:
        tokenizer = load_tokenizer(path, revision=config.revision, trust_remote_code=config.trust_remote_code)
        if is_adapter(path):
            base = base_of(path)
            name = Path(base.path).name if looks_local(base.path) else base.path
            card += f"\nMerged into its base {name} (content hash {base.sha[:16]}).\n"
        template: Any = tokenizer.chat_template
        save_player(
            load_model(path, config.model_copy(update={"quantize": None})),
            tokenizer,
            making,
            card,
            template=template,
            stop_ids=stop_ids(path, config),
        )
    making.rename(out)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
