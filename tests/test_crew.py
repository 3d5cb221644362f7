"""A run on several processes: the rows are those of one, a lost process ends it cleanly, and it goes on with any number."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sparring
from helpers import recipe, write_recipe
from rundirs import records
from sparring import api
from sparring.config import TrackConfig
from sparring.crew import FOLDER, SAID, Claims, Crew, Rank, of_environment
from sparring.errors import SparringError
from sparring.evaluate import Item
from sparring.member import opened
from sparring.progress import Live, Progress, combined
from sparring.rundir.store import Rows, write_shards
from sparring.rundir.view import RunView
from sparring.sharing import PARTS, PLAY, SCORE
from sparring.types import Frozen, Group, Player, Sample

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by /proc")
ROWS = {"samples": Sample, "groups": Group, "frozen": Frozen, "eval": Item}
ROUNDS = [{"method": "spin", "repeat": 2}]


def tree(run: Path, model: Path, data: Path, processes: int, **train: Any) -> dict[str, Any]:
    """Two rounds in float64, so that what several processes compute can be held against one's to many digits."""
    given = recipe(run, model, data, rounds=ROUNDS, cluster={"processes": processes})
    given["model"] |= {"compute": "float64"}
    given["train"] |= train
    return given


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Path:
    """The run by one process. Read only."""
    place = tmp_path_factory.mktemp("alone")
    return sparring.run(tree(place / "run", tiny_model, tiny_data, 1)).path


class Program:
    """`sparring run` as a user starts it."""

    def __init__(self, given: dict[str, Any], place: Path) -> None:
        self.run = Path(given["run"])
        self._errors = place / "stderr"
        file = write_recipe(place / "recipe.yaml", given)
        command = [sys.executable, "-m", "sparring", "--quiet", "run", str(file)]
        with self._errors.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream)

    @property
    def members(self) -> list[int]:
        """The process ids of its crew, in order."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(int(pid) for pid in found if b"sparring.member" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def wait_for(self, seen: Callable[[], Any], seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not seen():
            assert self.process.poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.005)

    def said(self) -> str:
        return self._errors.read_text()

    def end(self) -> int:
        try:
            return self.process.wait(300)
        finally:
            self.process.kill()
            self.process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(left: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while left():
        assert time.monotonic() < until, "a process outlived its run"
        time.sleep(0.05)


def everywhere(run: Path) -> list[int]:
    """The process ids of all members of a run, whoever started them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if words[1:5] == [b"-P", b"-m", b"sparring.member", str(run).encode()]:
                found.append(int(folder.name))
    return [pid for pid in sorted(found) if alive(pid)]


def grown(run: Path, done: int) -> bool:
    return len(records(run)) > done


def check_same(run: Path, other: Path) -> None:
    """Round 0's rows bit for bit; of every round the figures of training and evaluation to rounding in float64."""
    one, two = RunView(run), RunView(other)
    first, second = one.rounds[0].path, two.rounds[0].path
    for name, row_type in ROWS.items():
        if name != "eval":
            assert list(Rows(first / name, row_type)) == list(Rows(second / name, row_type)), name  # type: ignore[var-annotated]
    assert list(Rows(run / "start" / "eval", Item)) == list(Rows(other / "start" / "eval", Item))
    for a, b in zip(one.rounds, two.rounds, strict=True):
        assert [s.tokens for s in Rows(a.path / "samples", Sample)] == [
            s.tokens for s in Rows(b.path / "samples", Sample)
        ]
        assert [row["step"] for row in a.log] == [row["step"] for row in b.log]
        for mine, theirs in zip(a.log, b.log, strict=True):
            for key in mine.keys() - {"seconds"}:
                # Stored log-probs are float32: later rounds start from their rounding
                assert mine[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-6), key
        assert a.counts["player"]["steps"] == b.counts["player"]["steps"]
    assert not (run / "crew").exists()


@pytest.mark.cluster
def test_a_lost_process_ends_a_run_that_one_goes_on_with(
    alone: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    program = Program(tree(tmp_path / "run", tiny_model, tiny_data, 2), tmp_path)
    state = tmp_path / "run" / "round_000" / "train" / "state"
    program.wait_for(lambda: list(state.glob("0*")))
    members = program.members
    assert len(members) == 2
    done = records(tmp_path / "run")
    assert {"start/eval", "round_000/samples", "round_000/frozen", "round_000/held"} <= done.keys()
    os.kill(members[1], signal.SIGKILL)
    assert program.end() == 1
    (line,) = program.said().splitlines()
    assert "round_000/player: process 1 of 2 was killed (SIGKILL); nothing written is lost" in line
    assert not any(map(alive, members))
    assert (tmp_path / "run" / "crew" / "1.log").exists()
    sparring.run(tree(tmp_path / "run", tiny_model, tiny_data, 1))
    after = records(tmp_path / "run")
    assert {folder: after[folder] for folder in done} == done
    check_same(tmp_path / "run", alone)


@pytest.mark.cluster
def test_nothing_is_held_out_and_a_launcher_misses_nobody(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """A member that is killed under a launcher that goes on ends the run; again, it comes to its end."""
    (tmp_path / "launch.py").write_text(CARELESS)
    given = tree(tmp_path / "run", tiny_model, tiny_data, 2)
    given |= {"rounds": [{"method": "spin"}], "data": given["data"] | {"heldout_size": 0}}
    given["cluster"] |= {"launcher": f"{sys.executable} {tmp_path / 'launch.py'}"}
    program = Program(given, tmp_path)
    program.wait_for(lambda: list((tmp_path / "run" / "round_000" / "train" / "state").glob("0*")))
    os.kill(everywhere(tmp_path / "run")[1], signal.SIGKILL)
    assert program.end() == 1
    (line,) = [line for line in program.said().splitlines() if "nothing written is lost" in line]
    assert "round_000/player: process " in line and " of 2 was lost" in line
    all_end(lambda: everywhere(tmp_path / "run"))
    program = Program(given, tmp_path)
    assert program.end() == 0, program.said()
    assert RunView(tmp_path / "run").evaluation(1) == {"n": 0}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_run_of_several_processes_is_that_of_one(
    size: int, alone: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    program = Program(tree(tmp_path / "run", tiny_model, tiny_data, size), tmp_path)
    assert program.end() == 0, program.said()
    check_same(tmp_path / "run", alone)


CARELESS = """
import os, subprocess, sys
for n in ("0", "1"):
    own = {"RANK": n, "WORLD_SIZE": "2", "LOCAL_RANK": n, "LOCAL_WORLD_SIZE": "2"}
    subprocess.Popen(sys.argv[1:], env=os.environ | own)
sys.stdin.read()
"""
"""A launcher that does not look after its processes."""
NODES = """
import socket, subprocess, sys
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0"]
torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}", "--no-python"]
nodes = [subprocess.Popen([*torchrun, f"--node-rank={n}", *sys.argv[1:]]) for n in (0, 1)]
sys.exit(max(abs(node.wait()) for node in nodes))
"""
"""Two machines' torchruns, both on this one."""


@pytest.mark.slow
def test_torchrun_on_two_nodes_is_a_launcher(alone: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    (tmp_path / "nodes.py").write_text(NODES)
    given = tree(tmp_path / "run", tiny_model, tiny_data, 2)
    given["cluster"] |= {"launcher": f"{sys.executable} {tmp_path / 'nodes.py'}"}
    program = Program(given, tmp_path)
    state = tmp_path / "run" / "round_000" / "train" / "state"
    program.wait_for(lambda: list(state.glob("0*")))
    os.kill(everywhere(tmp_path / "run")[0], signal.SIGKILL)
    assert program.end() == 1
    (line,) = program.said().splitlines()
    assert "round_000/player: `" in line and "nodes.py` failed; nothing written is lost" in line
    all_end(lambda: everywhere(tmp_path / "run"))
    program = Program(given, tmp_path)
    assert program.end() == 0, program.said()
    check_same(tmp_path / "run", alone)


def test_a_launcher_that_starts_another_number_is_refused(alone: Path) -> None:
    with pytest.raises(sparring.InputError, match=r"cluster\.processes: 1, but the launcher started 2"):
        opened(alone, Rank(1, 2, 1))


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(3, 8, 1)),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, Rank(9, 16, 1)),
    ],
)
def test_a_process_knows_which_one_it_is(variables: dict[str, str], rank: Rank) -> None:
    assert of_environment(variables) == rank
    with pytest.raises(sparring.InputError, match="neither torchrun's variables"):
        of_environment({name: value for name, value in variables.items() if "LOCAL" not in name})


@pytest.mark.slow
def test_kills_of_any_process_at_random(alone: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """Ten kills, of members and of the supervisor; another number of processes after each."""
    order, kills = random.Random(11), 0
    for number in range(40):
        program = Program(tree(tmp_path / "run", tiny_model, tiny_data, order.choice([2, 3])), tmp_path)
        if kills < 10:
            program.wait_for(partial(getattr, program, "members"))
            # Odd ones wait for a stage to end, so that kills do not all fall into imports
            if number % 2:
                program.wait_for(partial(grown, tmp_path / "run", len(records(tmp_path / "run"))))
            time.sleep(order.uniform(0, 1.5))
            members = program.members
            victim = order.choice([program.process.pid, *members])
            if program.process.poll() is None:
                os.kill(victim, signal.SIGKILL)
        code = program.end()
        if code == 0:
            break
        kills += 1
        assert code == (-9 if victim == program.process.pid else 1), program.said()
        assert "Traceback" not in program.said()
        all_end(lambda pids=members: any(map(alive, pids)))
    assert kills == 10
    check_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_an_error_of_the_data_is_told_in_one_line(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    (tmp_path / "judge.py").write_text("def check(example, answer):\n    raise ValueError('no')\n")
    given = tree(tmp_path / "run", tiny_model, tiny_data, 2)
    given["evaluate"] |= {"verifier": f"{tmp_path / 'judge.py'}:check"}
    program = Program(given, tmp_path)
    assert program.end() == 2
    (line,) = program.said().splitlines()
    assert "verifier: ValueError: no" in line


def test_one_device_is_refused_for_several_processes(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    given = tree(tmp_path / "run", tiny_model, tiny_data, 2)
    given["model"] |= {"device": "cuda:0"}
    with pytest.raises(sparring.InputError, match=r"model\.device: cuda:0 is one device for all processes"):
        sparring.run(given)


def test_a_launcher_for_one_process_is_refused(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    given = tree(tmp_path / "run", tiny_model, tiny_data, 1)
    given["cluster"] |= {"launcher": "srun"}
    told = r"^cluster\.launcher: starts nothing while cluster\.processes is 1; set that, or cluster\.launcher=null$"
    with pytest.raises(sparring.InputError, match=told):
        sparring.run(given)


def test_a_supervisor_without_a_gpu_is_told_the_precision(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run by GPUs would be one in float32."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = tree(tmp_path / "run", tiny_model, tiny_data, 2)
    given["cluster"] |= {"launcher": "srun"}
    for device in ("auto", "cuda"):
        given["model"] |= {"compute": "auto", "device": device}
        with pytest.raises(sparring.InputError, match=r"^model\.compute: auto: there is no GPU here to tell it by"):
            api.prepare(given)
    for known, compute in (({"device": "cpu"}, "float32"), ({"device": "auto", "compute": "bfloat16"}, "bfloat16")):
        given["model"] |= known
        assert api.prepare(given).config.model.compute == compute


@pytest.mark.parametrize("name", ["", PLAY, SCORE])
def test_a_process_has_no_part_in_an_evaluation_of_nothing(
    name: str, tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    given = tree(tmp_path / "run", tiny_model, tiny_data, 1)
    given |= {"rounds": [{"method": "sft"}], "data": given["data"] | {"heldout_size": 0}}
    run = sparring.run(given).path
    assert json.loads((run / "start" / "eval" / "summary.json").read_text()) == {"n": 0}
    place = tmp_path / "eval"
    place.mkdir()
    PARTS["eval"][name](opened(run, Rank(0, 1, 0)), place, number=0)
    assert not list(place.iterdir())


def test_who_claims_a_shard_alone_makes_it(tmp_path: Path) -> None:
    """Two processes' claims on four shards: each is made once, and one that another holds is left out."""
    place = tmp_path / "run" / "rows"
    place.mkdir(parents=True)
    made: list[int] = []

    def shard(n: int) -> list[Player]:
        made.append(n)
        return [Player("p", n, "s")]

    jobs = [lambda n=n: shard(n) for n in range(4)]
    code = (
        "import sys, time; from pathlib import Path; from sparring.crew import Claims\n"
        f"claims = Claims(Path({str(tmp_path / 'run')!r}), Path({str(place)!r}))\n"
        "with claims(2) as ours:\n  print(ours, flush=True)\n  sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    claims = Claims(tmp_path / "run", place)
    assert write_shards(place, Player, jobs, claim=claims) == 3  # type: ignore[arg-type]
    assert made == [0, 1, 3]
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert write_shards(place, Player, jobs, claim=claims) == 4  # type: ignore[arg-type]
    assert made == [0, 1, 3, 2]


FORGETFUL = """
import os, sys, time
from pathlib import Path
from sparring.crew import present
if os.fork() == 0:
    here = [present(Path(sys.argv[-1])).hold(n) for n in (0, 1)]
    Path(sys.argv[1]).touch()
    time.sleep(1)
    os.kill(os.getpid(), 9)
sys.stdin.read()
"""
"""A launcher that goes on when its processes were killed."""


def test_a_process_that_its_launcher_does_not_miss(tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text(FORGETFUL)
    crew = Crew(tmp_path, 2, f"{sys.executable} {tmp_path / 'launch.py'} {tmp_path / 'there'}", None)
    try:
        with pytest.raises(SparringError, match=r"^stage: process 0 of 2 was lost; .*its log is .*launcher\.log$"):
            crew.do("stage", "", 1, Progress(terminal=False))
        assert (tmp_path / "there").exists()
    finally:
        crew.close()


def test_only_who_was_met_is_lost(tmp_path: Path) -> None:
    """Where locks do not reach this machine a process that replies holds nothing here, and is not lost with the next stage."""
    crew = Crew(tmp_path, 2, "srun", None)
    (tmp_path / FOLDER).mkdir()
    assert [crew._lost({0, 1}), crew._lost([])] == [[], []]
    with pytest.raises(SparringError, match=r"^stage: process 1 of 2 was lost;"):
        crew._fail("stage", {0: {"counts": {}}})  # the launcher has started it again since


def test_processes_share_the_cores_that_are_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of a host's 64: three each for two."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    given: list[str] = []
    monkeypatch.setattr(Crew, "_begun", lambda self, command, name, own: given.append(own["OMP_NUM_THREADS"]))
    Crew(tmp_path, 2, None, None)._start()
    assert given == ["3", "3"]


def test_progress_of_several_is_told_as_one() -> None:
    """Of 100, the furthest is at 60; 2 and 3 rows per second together take 8 s for the other 40."""
    one = Live("s", 0.0, 0.0, "rows", 60.0, 100.0, 10.0, 20.0)
    two = Live("s", 0.0, 0.0, "rows", 40.0, 100.0, 5.0, 20.0)
    assert combined([one, two, Live("s", 0.0, 0.0)]) == Live("s", 0.0, 0.0, "rows", 60.0, 100.0, 15.0, 8.0)
    assert combined([]) is None


def test_a_members_run_tells_no_tracker(alone: Path) -> None:
    shop = opened(alone, Rank(0, 1, 0))
    assert shop.config.track == TrackConfig() and shop.config.model.device == "cpu"


def test_a_crew_that_starts_again_reads_its_log_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends for vLLM's sake and comes back; its log is a new file then."""
    caplog.set_level(logging.INFO, "sparring")
    made = Crew(tmp_path, 2, None, None)
    monkeypatch.setattr(Crew, "_begun", lambda *_: None)
    for message in ("a long line of the first", "short"):
        made._start()
        (tmp_path / FOLDER / SAID).write_text(json.dumps([logging.INFO, message]) + "\n")
        made._orders.add(0, 0, "stage", "step")
        made._replies(0, 0, Progress(terminal=False), lambda: None)
    assert [record.getMessage() for record in caplog.records] == ["a long line of the first", "short"]
