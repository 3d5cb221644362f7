"""Players and their weights on disk: load, save, identity."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring.config import ModelConfig
from sparring.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_IDENTITY = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*/*.jinja", "*.py")
_NOT_IDENTITY = ("stage.json", "README.txt")  # the run's own record of the folder is finished after it was hashed
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def looks_local(path: str) -> bool:
    """Whether a model or data name can only be meant as a path, so that it is never looked up on the Hub."""
    typo = "/" in path and Path(path).parent.is_dir()
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists() or "\\" in path or typo


def identify(path: str, revision: str | None = None) -> str:
    """sha256 (hex) of a player's weights, configurations, tokenizer and code; for a Hub id, of its name and commit.

    A Hub id that cannot be resolved here counts as its name and `revision`. Raises InputError for a folder that is
    missing, holds no weights, or holds pickled weights only.
    """
    if not looks_local(path):
        return hashlib.sha256(f"hub:{path}@{_commit(path, revision)}".encode()).hexdigest()
    folder = Path(path).expanduser()
    check_folder(folder)
    digest = hashlib.sha256()
    for file in sorted({f for pattern in _IDENTITY for f in folder.glob(pattern) if f.name not in _NOT_IDENTITY}):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _commit(path: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file, extract_commit_hash

    try:
        # The cache keeps every commit's files in a folder of its own, whose name is the commit
        return extract_commit_hash(cached_file(path, "config.json", revision=revision), None) or revision
    except (OSError, ValueError):
        return revision


def check_folder(folder: Path) -> None:
    """Raises InputError unless the folder is a Hugging Face model with safetensors weights."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder; give a Hugging Face folder or a Hub id as model.path")
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: a LoRA adapter, not a whole model; merge it into its base first "
            "(peft: merge_and_unload, then save_pretrained of model and tokenizer)"
        )
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: no config.json in it, so it is not a Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        pickled = [f.name for pattern in _PICKLES for f in folder.glob(pattern)]
        if pickled:
            raise InputError(
                f"{folder}: holds pickled weights only ({pickled[0]}), which can run code when loaded; "
                "convert them to safetensors first"
            )
        raise InputError(f"{folder}: no weights (*.safetensors) in it")


def load_model(path: str, config: ModelConfig) -> nn.Module:
    """The weights of a player as float32 masters (float64 for compute: float64), in eval mode, on the device.

    Sets torch's number of threads where the configuration names one. Raises InputError where transformers cannot load them.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    local = looks_local(path)
    if local:
        check_folder(Path(path).expanduser())
    logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
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
    # transformers fills these in at random, which would be another model on every start
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{path}: its files hold no weights for {missing[0]}{more}; save the whole causal language model there again"
        )
    result: nn.Module = model.to(device_of(config)).eval()
    return result


def model_config(path: str, config: ModelConfig) -> Any:
    """The configuration of a model, without its weights."""
    from transformers import AutoConfig

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


def context_length(model_config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest sequence in tokens: the model's positions, or the tokenizer's limit for models without any."""
    text = model_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return int(min(tokenizer.model_max_length, 1 << 20))


def vocabulary(model_config: Any) -> int | None:
    """Number of the model's token embeddings, where its configuration tells it."""
    size: int | None = getattr(model_config.get_text_config(), "vocab_size", None)
    return size


def stop_ids(path: str, config: ModelConfig) -> list[int]:
    """Tokens at which the model itself stops: eos_token_id of its generation configuration, else of its configuration.

    Raises InputError for a file that cannot be read.
    """
    from transformers import GenerationConfig

    local = looks_local(path)
    folder = Path(path).expanduser()
    ids = None
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
    template: str, stop_ids: Sequence[int],
) -> None:  # fmt: skip
    """Write an ordinary Hugging Face folder: safetensors in the masters' precision, tokenizer, configurations, card.

    template, stop_ids: what the player was trained with; other programs then write its prompts and end its answers so.
    """
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = list(stop_ids)
        try:
            generation.validate(strict=True)
        except ValueError:
            # Published models name a temperature without this, which transformers loads but refuses to save
            generation.do_sample = True
    model.save_pretrained(folder)  # type: ignore[operator]
    own = copy.copy(tokenizer)
    own.chat_template = template
    own.save_pretrained(str(folder))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
