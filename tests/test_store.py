"""Rows on disk come back as they were, and a file is whole or absent."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rundirs import needs_proc
from sparring.evaluate import Item
from sparring.plan import Stage
from sparring.rundir import RunDir, store
from sparring.rundir.shards import ShardedStates
from sparring.rundir.states import TrainStates
from sparring.rundir.store import Rows, read_json, write_json, write_shard, write_shards, write_text
from sparring.types import Example, Frozen, Group, Message, Player, Rendered, Sample

ODD = "a\x00b \u202eשלום 🤺 \r\n\u2028 </s> "
ROWS: dict[type, list[Any]] = {
    Example: [
        Example("a", (Message("user", ODD), Message("system", "")), None),
        Example("b", (), "", "", {"ü": [1, None, {"x": ODD}], "half": "\ud800"}, "f.json:3"),
    ],
    Rendered: [
        Rendered("a", (1, 2), (), ODD),
        Rendered("b", (), (3,), "", (), "", ("prompt", "gold")),
    ],
    Player: [Player("p", None, "s"), Player("p", -1, "s")],
    Sample: [
        Sample("a", "p", 0, 2**62, (2**31 - 1, 0), ODD, "stop", (-0.5, -(2.0**-100)), "id"),
        Sample("b", "unknown", 3, 0, (), "", "length", (), "off-policy"),
    ],
    Group: [
        Group("a", (1,), ((1, 2), ()), (1.0, 0.0), 1 / 3, ("gold", "a/p/0"), -2),
        Group("b", (), (), (), 0.0, (), 0),
    ],
    Frozen: [Frozen("g", "reference", "p", ((-1.5, -0.25), ())), Frozen("h", "r", "p", ())],
    Item: [
        Item("a", "greedy", 0, ODD, (1,), "stop", None, (-1.0,)),
        Item("b", "gold", 0, "", (), "stop", True, ()),
        Item("c", "sampled", 1, "", (), "length", False, ()),
    ],
}


def synced(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of files and folders in the order in which they are brought to the disk from now on."""
    fsync, seen = os.fsync, list[str]()
    patch.setattr(os, "fsync", lambda h: (seen.append(Path(os.readlink(f"/proc/self/fd/{h}")).name), fsync(h)))
    return seen


SIZES = pytest.mark.parametrize(("eager", "kept"), [(1 << 20, 0), (0, 1 << 20), (0, 0)], ids=["eager", "kept", "lazy"])


@SIZES
@pytest.mark.parametrize("row_type", ROWS, ids=lambda t: t.__name__)
def test_every_type_comes_back(
    row_type: type, eager: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_EAGER_BYTES", eager)
    monkeypatch.setattr(store, "_KEPT_BYTES", kept)
    rows = ROWS[row_type]
    write_shard(tmp_path / "00000.parquet", row_type, rows)
    back: Rows[Any] = Rows(tmp_path, row_type)
    assert list(back) == rows
    assert [back[i] for i in range(-len(rows), len(rows))] == rows + rows
    for name in row_type.__dataclass_fields__:
        for row, other in zip(rows, back, strict=True):
            assert type(getattr(row, name)) is type(getattr(other, name)), name


@SIZES
def test_rows_are_a_sequence(eager: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_EAGER_BYTES", eager)
    monkeypatch.setattr(store, "_KEPT_BYTES", kept)
    players = [Player(str(i), i, "") for i in range(11)]
    sizes = (4, 0, 7)
    parts = [players[:4], [], players[4:]]
    done: list[int] = []
    assert write_shards(tmp_path, Player, [partial(list, part) for part in parts], done.append) == sum(sizes)
    assert done == [0, 1, 2]
    rows = Rows(tmp_path, Player)
    cuts = (None, -20, -11, -3, 0, 2, 7, 11, 20)
    for step in (None, 1, 3, -1, -2):
        for start in cuts:
            for stop in cuts:
                assert rows[start:stop:step] == players[start:stop:step], (start, stop, step)
    for index in (11, -12):
        with pytest.raises(IndexError):
            rows[index]
    assert list(reversed(rows)) == players[::-1]


def test_no_rows_at_all(tmp_path: Path) -> None:
    assert write_shards(tmp_path, Player, []) == 0
    assert len(Rows(tmp_path, Player)) == 0
    write_shard(tmp_path / "00000.parquet", Frozen, [])
    assert list(Rows(tmp_path, Frozen)) == []


def test_a_shard_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make(number: int) -> list[Player]:
        made.append(number)
        if number == 2 and made.count(2) == 1:
            raise KeyboardInterrupt
        return [Player("p", number, "")]

    chunks = [partial(make, n) for n in range(4)]
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, Player, chunks)
    assert write_shards(tmp_path, Player, chunks) == 4
    assert made == [0, 1, 2, 2, 3]
    assert [p.round for p in Rows(tmp_path, Player)] == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [{"a": [1.5, None, ODD]}, "\ud83e", [], {"ü": float("inf")}])
def test_json_comes_back(value: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "v.json", "old")
    write_shard(tmp_path / "0.parquet", Player, [Player("old", 0, "")])

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space"):
            write_json(tmp_path / "v.json", "new")
        with pytest.raises(OSError, match="No space"):
            write_shard(tmp_path / "0.parquet", Player, [Player("new", 0, "")])
    assert read_json(tmp_path / "v.json") == "old"
    assert Rows(tmp_path, Player)[0].path == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.parquet", "v.json"]


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the contents would leave an empty file after a power cut."""
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append("rename"), rename(a, b)))
    write_text(tmp_path / "t", "x")
    write_shard(tmp_path / "0.parquet", Player, [])
    assert seen == ["fsync", "rename"] * 2


@needs_proc
def test_a_training_log_is_on_disk_before_its_player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = synced(monkeypatch)
    stage = Stage("round_000/player", "player", {}, {})
    run = RunDir(tmp_path)

    def make(folder: Path) -> dict[str, Any]:
        run.states(stage).begin()
        run.states(stage).log({"step": 1})
        return {}

    run.once(stage, make)
    log, record = (seen.index(name) for name in ("log.jsonl", ".stage.json.tmp"))
    begun, last = (i for i, name in enumerate(seen) if name == ".stage.json.tmp")
    assert begun == record < log < last and "train" in seen[log:last]


@needs_proc
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_training_log_is_on_disk_before_a_state_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = synced(monkeypatch)
    team: Any = SimpleNamespace(first=True, wait=lambda: None)
    states = ShardedStates(TrainStates(tmp_path / "train", "key"), team, {})
    assert states.load() is None
    states.log({"step": 1})
    states.save(1, {"model/w": torch.ones(2), "backoffs": torch.tensor(0)})
    assert seen.index("log.jsonl") < seen.index("writing") < seen.index("state")


def test_a_shared_file_is_replaced_and_never_changed(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    os.link(tmp_path / "a", tmp_path / "b")
    write_text(tmp_path / "b", "new")
    assert (tmp_path / "a").read_text() == "old"
