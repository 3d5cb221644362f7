"""Seconds per prompt and peak memory of every stage of a round, from 1k to 100k prompts, with the demo's tiny model.

    python benchmarks/speed/growth.py --out benchmarks/speed/results/growth.jsonl
    python benchmarks/speed/growth.py --sizes 1000 4000

The task is the demo's with three steps instead of two (it has too few problems of two): about 30 tokens per answer. The
model is the demo's, untrained: its answers end by chance. Every size is one run: a process makes its data stage and
a round of a few prompts (`api.run`), then every stage of a round on all prompts is done by a process of its own
(`api.fork`, `api.run_stage`), whose ru_maxrss is that stage's peak memory, Python, torch and the model included.
Seconds are those that the run records for the stage, what a process does once (imports, loading the model) included;
`ms_per_further_prompt` leaves that out: it is what prompts beyond those of the first size took, a prompt. Training takes `--steps` steps,
whatever the size.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import record

record.quiet()

from sparring import api  # noqa: E402
from sparring.demo import build, task  # noqa: E402
from sparring.rundir.store import read_json  # noqa: E402

STAGES = {"play": "samples", "pair": "groups", "freeze": "frozen", "train": "player"}
MAX_NEW = 32


def write_data(file: Path, n: int) -> None:
    """`n` different sums of three steps with their answers."""
    rng, prompts, lines = random.Random(0), set(), []
    while len(lines) < n:
        start, steps = rng.randint(10, 89), [(rng.choice("+-"), rng.randint(2, 9)) for _ in range(3)]
        values = [start]
        for step in steps:
            values.append(task.apply(values[-1], step))
        prompt = f"{start}{''.join(f'{operator}{operand}' for operator, operand in steps)}?"
        if prompt not in prompts and all(10 <= value <= 99 for value in values):
            prompts.add(prompt)
            lines.append(json.dumps({"prompt": prompt, "completion": task.write_answer(start, steps)}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def recipe(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "run": str(folder / "first"),
        "model": {"path": str(folder / "model"), "threads": record.THREADS},
        "data": {"path": str(folder / "data.jsonl"), "heldout_size": 0},
        "controls": {"displacement": None, "trust_region": None, "patience": None},
        "play": {"max_new_tokens": MAX_NEW, "batch_size": 1000},
        "train": {"max_steps": steps},
        "rounds": [{"method": "spin", "limit": 8}],
    }


def work(given: dict[str, Any]) -> dict[str, Any]:
    """One step of a size, in this process: `prepare` makes the run, a command does its stage."""
    folder = Path(given["folder"])
    run = folder / "run"
    if given["command"] == "prepare":
        write_data(folder / "data.jsonl", given["n"])
        build.build(folder / "model", 0)
        api.run(recipe(folder, given["steps"]))
        api.fork(folder / "first", run, ["spin.limit=null"])
        return {"seconds": read_json(run / "data" / "stage.json")["seconds"], "peak_mb": record.peak_mb()}
    api.run_stage(run, given["command"], 0)
    stage = read_json(run / "round_000" / STAGES[given["command"]] / "stage.json")
    return {"seconds": stage["seconds"], "peak_mb": record.peak_mb(), "counts": stage["counts"]}


def measure(n: int, steps: int) -> dict[str, Any]:
    """All stages of a run of `n` prompts."""
    with tempfile.TemporaryDirectory(prefix="growth_") as folder:
        stages = {}
        for command in ("prepare", *STAGES):
            got = record.child(__file__, {"folder": folder, "n": n, "command": command, "steps": steps})
            if "error" in got:
                raise SystemExit(f"{n} prompts, {command}: {got['error']}")
            got["ms_per_prompt"] = round(1000 * got["seconds"] / n, 4)
            stages["data" if command == "prepare" else command] = got
    return {"benchmark": "growth", "prompts": n, "steps": steps, "stages": stages}


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000])
    options.add_argument("--steps", type=int, default=20)
    given = options.parse_args()
    if given.child:
        print(json.dumps(work(json.loads(given.child))))
        return
    first: dict[str, Any] = {}
    for n in given.sizes:
        row = measure(n, given.steps)
        first = first or row
        for name, stage in row["stages"].items() if n > first["prompts"] else ():
            seconds = stage["seconds"] - first["stages"][name]["seconds"]
            stage["ms_per_further_prompt"] = round(1000 * seconds / (n - first["prompts"]), 4)
        record.emit(row, given.out)


if __name__ == "__main__":
    main()
