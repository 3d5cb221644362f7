"""What several processes write together: rows, and training states as torch's distributed checkpoints."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from sparring.rundir.store import sync, write_shard
from sparring.types import Group

if TYPE_CHECKING:
    from sparring.rundir.states import TrainStates
    from sparring.sharding import Team


T = TypeVar("T")


def write_shards_together(
    team: Team,
    folder: Path,
    row_type: type[T],
    chunks: Sequence[Callable[[], Sequence[T]]],
    on_done: Callable[[int], None] = lambda n: None,
) -> None:
    """`store.write_shards` where every process has a part in making each shard; the first one writes it."""
    paths = [folder / f"{n:05d}.parquet" for n in range(len(chunks))]
    # The others' file systems may tell later what is there
    told = torch.tensor([team.first and path.exists() for path in paths], dtype=torch.int32, device=team.device)
    there = team.sum(told).tolist()
    for number, make in enumerate(chunks):
        if not there[number]:
            rows = make()
            if team.first:
                write_shard(paths[number], row_type, rows)
        on_done(number)


class ShardedStates:
    """A training's states (`train.States`) of which every process reads and writes its part; the first one logs."""

    def __init__(self, kept: TrainStates, team: Team, like: Mapping[str, Tensor]) -> None:
        """like: what is trained, by name."""
        self._kept, self._team, self._like = kept, team, like

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """The last state, by however many processes it was written."""
        if self._team.first:
            self._kept.begin()
        self._team.wait()
        found = read_state(self._kept.folder / "state", self._like)
        if self._team.first:
            self._kept.keep(found[0] if found else 0, int(found[1]["backoffs"]) if found else 0)
        self._team.wait()
        return found

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Keep the state after a step, in place of the one before."""
        from torch.distributed.checkpoint.state_dict_saver import save

        place = self._kept.folder / "state"
        writing = place / "writing"
        if self._team.first:
            shutil.rmtree(writing, ignore_errors=True)
            place.mkdir(parents=True, exist_ok=True)
        self._team.wait()
        save(dict(tensors), checkpoint_id=writing)
        if self._team.first:
            # Later states have larger names: backoffs never fall, and between two of them steps only rise
            target = place / f"{int(tensors['backoffs']):04d}-{step:09d}"
            shutil.rmtree(target, ignore_errors=True)
            self._kept.sync_log()
            sync(writing)
            writing.rename(target)
            sync(place)
            for old in place.iterdir():
                if old != target:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()

    def log(self, row: dict[str, float]) -> None:
        if self._team.first:
            self._kept.log(row)

    def keep_batch(self, step: int, groups: Sequence[Group]) -> str:
        return self._kept.keep_batch(step, groups) if self._team.first else "the run"


def read_state(place: Path, like: Mapping[str, Tensor] | None = None) -> tuple[int, dict[str, Tensor]] | None:
    """Step and tensors of the newest state in a folder, of one file or of several processes' shards; None without one.

    like: parameters whose tensors, and their optimizer state's, are cut as they are; None: all come whole.
    """
    file, folders = place / "last.safetensors", sorted(p for p in place.glob("*-*") if p.is_dir())
    single = _Single(file, like) if file.exists() else None
    if folders:
        backoffs, step = map(int, folders[-1].name.split("-"))
        if single is None or (backoffs, step) >= single.age:
            return step, _read_shards(folders[-1], like)
    return None if single is None else single.read()


class _Single:
    """A state that one process wrote."""

    def __init__(self, file: Path, like: Mapping[str, Tensor] | None) -> None:
        self._file, self._like = file, like

    @property
    def age(self) -> tuple[int, int]:
        """Backoffs and step: the larger, the newer."""
        from safetensors import safe_open

        with safe_open(str(self._file), "pt") as tensors:
            return int(tensors.get_tensor("backoffs")), int(tensors.get_tensor("step"))

    def read(self) -> tuple[int, dict[str, Tensor]]:
        from safetensors import safe_open

        with safe_open(str(self._file), "pt") as tensors:
            found = {name: _cut(tensors.get_tensor(name), name, self._like) for name in tensors.keys()}  # noqa: SIM118
        return int(found.pop("step")), found


def _read_shards(folder: Path, like: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors: dict[str, Tensor] = {}
    for name, stored in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        given = _counterpart(name, stored.size, like)
        tensors[name] = (
            torch.empty(stored.size, dtype=stored.properties.dtype)
            if given is None
            else torch.empty_like(given, requires_grad=False)
        )
    with warnings.catch_warnings():
        # That one process reads is no accident
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        load(tensors, checkpoint_id=folder, no_dist=like is None)
    return tensors


def _cut(whole: Tensor, name: str, like: Mapping[str, Tensor] | None) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    given = _counterpart(name, whole.shape, like)
    if not isinstance(given, DTensor):
        return whole
    # Every process has read it, so nobody needs to send anything
    part: Tensor = distribute_tensor(whole, given.device_mesh, given.placements, src_data_rank=None)
    return part.to(given.device)


def _counterpart(name: str, shape: torch.Size, like: Mapping[str, Tensor] | None) -> Tensor | None:
    """The parameter that a tensor of a state is, or belongs to and is as large as."""
    kind, _, rest = name.partition("/")
    parameter = (like or {}).get(rest if kind == "model" else rest.partition("/")[2])
    return parameter if parameter is not None and parameter.shape == shape else None
