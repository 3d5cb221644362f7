"""Models over several processes: torch's own FSDP2 around a learner, or around a player that only scores.

Every process holds a part of each parameter, of its gradient and of the optimizer's state; a layer's parameters are
gathered while it computes. The precision is that of one process: masters are gathered as they are, and autocast does the
rest. Gradients and figures are sums over processes, so the objective does not depend on their number.
"""

from __future__ import annotations

import fcntl
import gc
import math
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparring.attention import unwrapped
from sparring.crew import FOLDER, Rank

T = TypeVar("T")
_PATIENCE = timedelta(hours=1)
"""How long a process waits for another one's part, for example while the first one writes a player."""


class Sharded(nn.Module):
    """A model in shards. FSDP gathers parameters when `forward` is called, so everything is done within a call of it.

    Scoring calls parts of a model (`packed.py`); within this module's call all that no layer holds is there for them.
    """

    def __init__(self, model: nn.Module, team: Team) -> None:
        super().__init__()
        self.model, self.team = model, team

    def forward(self, use: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """`use(model, …)`"""
        kept = torch.is_autocast_cache_enabled()
        # Else the casts of all layers would be kept to the end of a pass, and with them what shards are to spare
        torch.set_autocast_cache_enabled(False)
        try:
            return use(self.model, *arguments, **options)
        finally:
            torch.set_autocast_cache_enabled(kept)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def get_base_model(self) -> Any:
        """The model without wrappers, as an adapter's is called."""
        return unwrapped(self.model)


class Team:
    """This process among those that hold a model together."""

    def __init__(self, rank: Rank, run: Path, device: torch.device, offload: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.number, self.size, self.device = rank.number, rank.size, device
        self._rank, self._run = rank, run
        self._offload = offload and device.type == "cuda"
        self._mesh = init_device_mesh(device.type, (rank.size,))

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.number == 0

    def wait(self) -> None:
        """Until all have come here."""
        torch.distributed.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        torch.distributed.all_reduce(values)
        return values

    def dealt(self, passes: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This process's part of some passes, each with whether it counts.

        Gathering parameters takes all processes, so all make equally many: who has none left makes the first one again.
        """
        for at in range(self.number, len(passes) + -len(passes) % self.size, self.size):
            yield (passes[at], True) if at < len(passes) else (passes[0], False)

    def joined(self, rows: Sequence[Sequence[float]], lengths: Sequence[int]) -> list[list[float]]:
        """All rows, each known to one process; the others have it empty."""
        flat = [value for row, n in zip(rows, lengths, strict=True) for value in (row or [0.0] * n)]
        found: list[float] = self.sum(torch.tensor(flat, dtype=torch.float64, device=self.device)).tolist()
        values = iter(found)
        return [[next(values) for _ in range(n)] for n in lengths]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One process of a machine after the other: within it a whole model is in the machine's memory."""
        with (self._run / FOLDER / f"loading-{socket.gethostname()}").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def share(self, model: nn.Module) -> Sharded:
        """A whole model on the CPU, which every process has, to this process's shards on its device."""
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

        from sparring.logps import packs

        packs(model)  # is found out on the whole model
        base = unwrapped(model)
        names = set(getattr(base, "_no_split_modules", None) or ())
        layers = [module for module in base.modules() if type(module).__name__ in names]
        policy = CPUOffloadPolicy() if self._offload else OffloadPolicy()
        whole = Sharded(model, self)
        # Else the root's parameters would stay whole after a pass without gradient, in the midst of a state to save
        for module in [*reversed(layers), whole]:
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True, offload_policy=policy)
        for module in whole.modules():
            if isinstance(module, FSDPModule):
                # Means of the processes' means would weigh groups by who has them
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                # An expert may have no token in one process's part
                module.set_reduce_scatter_unused_params(True)
        return whole

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """Scale gradients to a norm of at most `most`; returns the norm before, over all processes."""
        from torch.distributed.tensor import DTensor

        grads = [p.grad for p in parameters if p.grad is not None]
        parts = [g.to_local() if isinstance(g, DTensor) else g / math.sqrt(self.size) for g in grads]
        squares = [torch.linalg.vector_norm(part, dtype=torch.float64).square().to(self.device) for part in parts]
        norm = float(self.sum(torch.stack(squares).sum()).sqrt())
        # As torch.nn.utils.clip_grad_norm_; a norm that is not finite is told before a step is taken
        scale = min(1.0, most / (norm + 1e-6))
        for grad in grads:
            grad.mul_(scale)
        return norm

    def gather(self, model: Sharded) -> nn.Module:
        """What was trained, whole, tensor by tensor on the first process's CPU; the model can then only be saved there."""
        from torch.distributed.tensor import DTensor

        adapter = hasattr(model.model, "peft_config")
        found: dict[int, tuple[nn.Parameter, nn.Parameter | None]] = {}
        for module in model.model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or not isinstance(parameter, DTensor) or adapter > parameter.requires_grad:
                    continue
                if id(parameter) not in found:
                    full = cast(DTensor, parameter.detach()).full_tensor()
                    found[id(parameter)] = parameter, nn.Parameter(full.cpu()) if self.first else None
                module._parameters[name] = found[id(parameter)][1]
        return model.model


@contextmanager
def team(rank: Rank, run: Path, name: str, device: torch.device, offload: bool) -> Iterator[Team]:
    """The processes that hold models together, connected within the block; they find each other by `name`, once."""
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(run / FOLDER / f"{name}.store"), rank.size)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=store,
        rank=rank.number,
        world_size=rank.size,
        timeout=_PATIENCE,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Team(rank, run, device, offload)
    finally:
        dist.destroy_process_group()
        gc.collect()  # hooks and the parameters that they hold are cycles
