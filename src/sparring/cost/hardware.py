"""Devices by name, with what their makers publish, and how much of it is reached.

Peaks are dense (without sparsity) and with float32 accumulation. What is reached is assumed until it is measured
(`calibrate.py`): 40 % of the peak in training and scoring, as the cost model of 7B runs on H100s assumes; 60 % of the
memory's bandwidth; and no less than 1.2 ms per layer and decoding step, which is what plain PyTorch took for Llama-7B
on an A100 (25.5 tokens/s over 32 layers, https://pytorch.org/blog/accelerating-generative-ai-2/).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from sparring import threads
from sparring.errors import InputError
from sparring.nearest import nearest

GB, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator, or this machine's CPU."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes/s."""
    bf16: float
    """Peak FLOP/s of bfloat16 products."""
    fp32: float
    """Peak FLOP/s of float32 products, as torch computes them by default (no TF32)."""
    link: float
    """Bytes/s that one device sends to its neighbours in a machine."""
    source: str

    @property
    def cuda(self) -> bool:
        return self.name != "cpu"

    @property
    def usable(self) -> float:
        """Bytes that tensors can fill: of a GPU what its context (1 GiB) and fragmentation (5 %) leave."""
        return 0.95 * self.memory - GIB if self.cuda else self.memory


def _gpu(name: str, gib: float, tb_s: float, bf16: float, fp32: float, link: float, source: str) -> Device:
    return Device(name, gib * GIB, tb_s * TERA, bf16 * TERA, fp32 * TERA, link * GB, source)


NVIDIA = "NVIDIA's data sheet of the "
DEVICES = {
    device.name: device
    for device in (
        _gpu("A100-40G", 40, 1.555, 312, 19.5, 300, NVIDIA + "A100 (SXM, 40 GB)"),
        _gpu("A100-80G", 80, 2.039, 312, 19.5, 300, NVIDIA + "A100 (SXM, 80 GB)"),
        _gpu("H100", 80, 3.35, 989, 67, 450, NVIDIA + "H100 (SXM)"),
        _gpu("H200", 140, 4.8, 989, 67, 450, NVIDIA + "H200 (SXM)"),
        _gpu("B200", 178, 7.7, 2250, 75, 900, NVIDIA + "HGX B200, per GPU"),
        _gpu("L40S", 48, 0.864, 362, 91.6, 32, NVIDIA + "L40S"),
        _gpu("L4", 24, 0.3, 121, 30.3, 32, NVIDIA + "L4"),
        _gpu("A10", 24, 0.6, 125, 31.2, 32, NVIDIA + "A10"),
        _gpu("RTX4090", 24, 1.008, 165.2, 82.6, 32, NVIDIA + "Ada architecture (appendix A), RTX 4090"),
        _gpu("RTX3090", 24, 0.936, 71, 35.6, 32, NVIDIA + "GA102 architecture (appendix A), RTX 3090"),
    )
}
NETWORK = 50 * GB
"""Bytes/s of one device between machines of eight: 400 Gb/s each, as HGX clusters have."""
PER_MACHINE = 8
_CORE, _CORE_BYTES = 5e10, 1e10


@dataclass(frozen=True)
class Hardware:
    """So many devices of one kind."""

    count: int
    device: Device

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}" if self.device.cuda else "cpu"

    @property
    def link(self) -> float:
        """Bytes/s of one device's slowest way to the others."""
        return self.device.link if self.count <= PER_MACHINE else min(self.device.link, NETWORK)


@dataclass(frozen=True)
class Rates:
    """What one device reaches."""

    train: float
    """FLOP/s of forward and backward passes."""
    score: float
    """FLOP/s of forward passes over whole rows."""
    decode: float
    """FLOP/s of a decoding step's products."""
    bandwidth: float
    """Bytes/s at which a step reads weights and keys."""
    update: float
    """Bytes/s of the optimizer's step."""
    launch: float
    """Seconds per layer that a decoding step takes at least."""
    disk: float = 1e9
    """Bytes/s, assumed."""
    draw: float = 0.0
    """Seconds in which one token is chosen from one logit; measured only, else part of the bandwidth's share."""
    measured: bool = False


def parse(text: str) -> Hardware:
    """`8xA100-80G`, `H200` or `cpu`. Raises InputError for a device that is not in the table."""
    match = re.fullmatch(r"(?:(\d+)\s*[xX*×]\s*)?(\S+)", text.strip())
    count, name = (int(match[1] or 1), match[2]) if match else (1, text)
    if name.lower() == "cpu" and count == 1:
        return Hardware(1, cpu())
    found = {known.lower(): device for known, device in DEVICES.items()}.get(name.lower())
    if found is None or count < 1:
        known = ", ".join(["cpu", *DEVICES])
        alike = [other for other in DEVICES if other.startswith(name.upper())] or [nearest(name.upper(), DEVICES)]
        near = f"; did you mean {' or '.join(alike)}?" if found is None else ""
        raise InputError(f"--hardware: `{text}` is not NUMBERxDEVICE with a device of {known}{near}")
    return Hardware(count, found)


def cpu() -> Device:
    """This machine's processor and memory; its speed is a guess of 50 GFLOP/s and 10 GB/s a core until calibrated."""
    cores = threads.allowed()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    speed = _CORE * cores
    return Device("cpu", memory, _CORE_BYTES * cores, speed, speed, _CORE_BYTES, "this machine")


def assumed(device: Device, bf16: bool) -> Rates:
    """What is taken to be reached where nothing was measured."""
    peak = device.bf16 if bf16 else device.fp32
    reached = 0.6 * device.bandwidth
    return Rates(0.4 * peak, 0.4 * peak, 0.4 * peak, reached, reached, 1.2e-3 if device.cuda else 2e-4)
