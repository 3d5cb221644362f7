"""SPIN with the released code's token-level habits, for parity with its results and not as advice."""

from __future__ import annotations

from dataclasses import replace

from sparring.methods import choice, spin
from sparring.types import Method, Official


def method(
    *,
    beta: float = 0.1,
    loss: str = "logistic",
    memory: int = 0,
    memory_weight: float = 1.0,
    bos: bool = False,
    max_length: int = 1024,
    max_prompt_length: int = 512,
) -> Method:
    """SPIN on the tokens of the released code: its own prompt to play, two end tokens, hidden inner ones, its cuts.

    beta, memory, memory_weight: as in `spin`; the released recipe is beta 0.1, 0.1, 0.1, 5.0 and memory 1.
    loss: logistic or hinge, the two that the released code has.
    bos: whether the played prompt starts with a BOS, as on the released vLLM path.
    max_length, max_prompt_length: in tokens; the longer answer of a pair decides for both (docs/methods/spin.md).
    """
    choice("loss", loss, {"logistic": 0, "hinge": 0})
    if not 0 < max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length must lie between 0 and max_length ({max_length}), not {max_prompt_length}")
    return replace(
        spin.method(beta=beta, loss=loss, memory=memory, memory_weight=memory_weight),
        name="spin_official",
        paper="uclaml/SPIN at a12ba80, the released code of Chen et al. 2024, arXiv 2401.01335",
        official=Official(bos, max_length, max_prompt_length),
        pairing={"bos": bos, "max_length": max_length, "max_prompt_length": max_prompt_length},
        status="code",
    )
