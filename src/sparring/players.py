"""Players and their weights on disk: load, save, identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring.config import ModelConfig
from sparring.errors import InputError
from sparring.types import Player

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sparring.plan import RoundPlan

_IDENTITY = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def looks_local(path: str) -> bool:
    """Whether a model or data name can only be meant as a path, so that it is never looked up on the Hub."""
    typo = "/" in path and Path(path).parent.is_dir()
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists() or "\\" in path or typo


def identify(path: str, revision: str | None = None) -> str:
    """sha256 (hex) of a player's weights, configuration and tokenizer; for a Hub id, of its name and revision.

    Raises InputError for a folder that is missing, holds no weights, or holds pickled weights only.
    """
    if not looks_local(path):
        return hashlib.sha256(f"hub:{path}@{revision}".encode()).hexdigest()
    folder = Path(path).expanduser()
    check_folder(folder)
    digest = hashlib.sha256()
    for file in sorted({f for pattern in _IDENTITY for f in folder.glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """Raises InputError unless the folder is a Hugging Face model with safetensors weights."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder; give a Hugging Face folder or a Hub id as model.path")
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
        model = AutoModelForCausalLM.from_pretrained(
            str(Path(path).expanduser()) if local else path,
            dtype=torch.float64 if config.compute == "float64" else torch.float32,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=local,
            use_safetensors=True,
            **extra,
        )
    except Exception as error:  # a broken file surfaces as almost any type, from KeyError to safetensors' own
        raise InputError(f"{path}: cannot load the model: {_first_line(error)}") from error
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
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(model_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return int(min(tokenizer.model_max_length, 1 << 20))


def stop_ids(path: str) -> list[int]:
    """Tokens at which the model itself stops: eos_token_id of its generation configuration, else of its configuration."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path).expanduser() / name
        if file.exists():
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            if ids is not None:
                return [ids] if isinstance(ids, int) else list(ids)
    return []


def device_of(config: ModelConfig) -> torch.device:
    """The device that `model.device` names. Raises InputError for one that is not there."""
    import torch

    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"model.device: `{name}` is no device; write auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("model.device: no CUDA device here; set model.device=cpu")
    return device


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Precision of forward passes."""
    import torch

    if config.compute == "auto":
        return torch.bfloat16 if device_of(config).type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[config.compute]


def save_player(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write an ordinary Hugging Face folder: float32 safetensors, tokenizer, configurations and a model card."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(str(folder))
    (folder / "README.md").write_text(card, encoding="utf-8")


def player_at(path: str, number: int | None, revision: str | None = None) -> Player:
    """A player from a folder or Hub id, with its content hash."""
    return Player(path=path, round=number, sha=identify(path, revision))


def model_card(r: RoundPlan, start: Player) -> str:
    """What a player's README says: where it comes from and how it was trained."""
    settings = {**r.settings.hyper, **r.settings.train.identity()}
    lines = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    roles = ", ".join(f"{role} = player {number}" for role, number in r.roles.items())
    return (
        f"---\nlibrary_name: transformers\ntags: [sparring, {r.method.name}]\n---\n"
        f"# Player {r.t + 1}\n\nMade by round {r.t} of `sparring` with the method `{r.method.name}` "
        f"({r.method.paper}) from player {start.round} (content hash {start.sha[:16]}). Roles: {roles}.\n\n"
        f"Settings:\n{lines}\n"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
