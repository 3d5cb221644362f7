"""Shared fixtures; everything runs on one CPU thread and nothing may reach the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests compare folders with what they were: methods and verifiers in them are imported, here and in child processes
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
# `CUDA_VISIBLE_DEVICES=0 pytest -m gpu` runs the tests that need one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import recipe, rows, write_jsonl, write_model

torch.set_num_threads(1)
sys.dont_write_bytecode = True


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"a test reached for the network: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for what tests only read."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def tiny_model(shared: Path) -> Path:
    """A random one-layer Llama of width 16 with a character tokenizer, 256 positions. Read only."""
    return write_model(shared / "model")


@pytest.fixture(scope="session")
def tiny_data(shared: Path) -> Path:
    """Sixteen question/answer rows as JSONL. Read only."""
    return write_jsonl(shared / "rows.jsonl", rows(16))


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> dict[str, Any]:
    """A recipe of one SFT and two SPIN rounds for `tmp_path/run`."""
    return recipe(tmp_path / "run", tiny_model, tiny_data)


@pytest.fixture(scope="session")
def finished_run(shared: Path, tiny_model: Path, tiny_data: Path) -> Path:
    """A finished tiny run. Read only: copy it to change it."""
    import sparring

    return sparring.run(recipe(shared / "finished", tiny_model, tiny_data)).path
