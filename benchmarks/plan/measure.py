"""What `sparring plan` says of small runs, beside what their stages take: peak memory and seconds, stage by stage.

    python benchmarks/plan/measure.py --out benchmarks/plan/results/cpu.jsonl
    python benchmarks/plan/measure.py --cases "8M float32" --repeats 1

A case is a model with random weights, ragged texts and a recipe. For memory its stages are done by processes of their own
(`api.run_stage`), whose ru_maxrss is the stage's peak, Python and torch included. For time the round is done once more
by one process (`api.run`), as users do; libraries are imported before, since the plan counts no start-up. The plan is
made by `sparring.cost` in another process, of the same recipe and data, calibrated on this machine. Medians of
`--repeats`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "speed"))

import record

record.quiet()

import shapes  # noqa: E402

STAGES = {"play": "samples", "freeze": "frozen", "hold": "held", "train": "player"}
PROMPTS, HELDOUT, MAX_NEW = 96, 24, 64
SHAPES = shapes.MODELS | {
    "22M": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 16384,
    }
}
"""Llamas; those of the speed benchmarks share input and output embeddings."""
CASES: dict[str, dict[str, Any]] = {
    "8M float32": {"model": "8M", "compute": "float32", "train": {}},
    "60M bfloat16 adamw": {"model": "60M", "compute": "bfloat16", "train": {"optimizer": "adamw"}},
    "60M float32 long": {"model": "60M", "compute": "float32", "train": {"micro_tokens": 4096}},
    "22M float32 checkpointing": {
        "model": "22M",
        "compute": "float32",
        "train": {"gradient_checkpointing": True, "micro_tokens": 4096},
    },
    "60M float32 LoRA": {"model": "60M", "compute": "float32", "lora": 8, "train": {}},
}


def save_model(name: str, folder: Path) -> None:
    """Write a case's model, which ends no answer, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[name],
        tie_word_embeddings=name in shapes.MODELS,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=shapes.END,
        pad_token_id=shapes.PAD,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shapes.tokenizer(config.vocab_size).save_pretrained(folder)


def load(folder: Path) -> None:
    """Load a model once, for what is imported with its class."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder)


def recipe(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "run": str(folder / "first"),
        "model": {
            "path": str(folder / "model"),
            "compute": case["compute"],
            "device": "cpu",
            "threads": record.THREADS,
            "lora_rank": case.get("lora", 0),
        },
        "data": {"path": str(folder / "data.jsonl"), "heldout_size": HELDOUT},
        "controls": {"checks": 2, "prompts": HELDOUT},
        "play": {"max_new_tokens": MAX_NEW, "batch_size": 32},
        "train": {"epochs": 1, "batch_size": 16, "micro_tokens": 2048} | case["train"],
        "evaluate": {"limit": 4, "samples": 0},
        "rounds": [{"method": "spin", "limit": 2}],
    }


def work(given: dict[str, Any]) -> dict[str, Any]:
    """One step of a case, in this process: make its run, do a stage, or plan it."""
    from sparring import api, cost
    from sparring.rundir.store import read_json

    folder, case = Path(given["folder"]), CASES[given["case"]]
    command = given["command"]
    if command == "prepare":
        save_model(case["model"], folder / "model")
        rows = shapes.pairs("ragged", PROMPTS + HELDOUT, SHAPES[case["model"]]["vocab_size"])
        shapes.write_jsonl(rows, folder / "data.jsonl")
        api.run(recipe(case, folder))
        return {}
    if command == "plan":
        whole = recipe(case, folder) | {"rounds": [{"method": "spin"}]}
        found = cost.plan(whole, calibrate=True, sample_tokens=MAX_NEW).estimate
        stages = {c.name: {"seconds": c.seconds, "peak_mb": c.peak / 2**20} for c in found.costs}
        return {"rates": vars(found.rates), "stages": stages}
    run = folder / given["run"]
    if command == "whole":
        load(folder / "model")
        api.run(run)
        return {c: read_json(run / "round_000" / s / "stage.json")["seconds"] for c, s in STAGES.items()}
    api.run_stage(run, command, 0)
    return {"peak_mb": record.peak_mb()}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """All stages of a case, planned and done."""
    from sparring import api

    with tempfile.TemporaryDirectory(prefix="plan_") as folder:

        def step(command: str, run: str = "") -> dict[str, Any]:
            got = record.child(__file__, {"folder": folder, "case": name, "command": command, "run": run})
            if "error" in got:
                raise SystemExit(f"{name}, {command}: {got['error']}")
            return got

        step("prepare")
        planned = step("plan")
        done: dict[str, list[dict[str, Any]]] = {command: [] for command in STAGES}
        for repeat in range(repeats):
            run = f"run_{repeat}"
            # From round 0 on nothing is shared, so that every stage is done
            api.fork(f"{folder}/first", f"{folder}/{run}", ["rounds.0.limit=null"], t=0)
            for command in STAGES:
                if command == "freeze":
                    step("pair", run)
                done[command].append(step(command, run))
            shutil.rmtree(f"{folder}/{run}")
            api.fork(f"{folder}/first", f"{folder}/{run}", ["rounds.0.limit=null"], t=0)
            for command, seconds in step("whole", run).items():
                done[command][-1]["seconds"] = seconds
            shutil.rmtree(f"{folder}/{run}")
    stages = {command: compared(planned["stages"][stage], done[command]) for command, stage in STAGES.items()}
    return {"benchmark": "plan", "case": name, "repeats": repeats, "stages": stages, "rates": planned["rates"]}


def compared(said: dict[str, float], done: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted and measured (medians), and their ratio."""
    row: dict[str, Any] = {}
    for key in ("peak_mb", "seconds"):
        found = median(one[key] for one in done)
        row[key] = {"predicted": round(said[key], 1), "measured": round(found, 1), "ratio": round(said[key] / found, 3)}
    return row


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    if given.child:
        print(json.dumps(work(json.loads(given.child))))
        return
    for name in given.cases:
        record.emit(measure(name, given.repeats), given.out)


if __name__ == "__main__":
    main()
