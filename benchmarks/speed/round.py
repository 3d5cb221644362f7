"""A whole SPIN round, sparring against `model.generate` + TRL's DPOTrainer: play, frozen log-probs, training.

    python benchmarks/speed/round.py --out benchmarks/speed/results/round.jsonl          # both models, three shapes
    python benchmarks/speed/round.py --models 8M --shapes ragged --pairs 64 --repeats 5

sparring: `api.run` on an ordinary recipe (bf16 compute, one round, no held-out prompts, so neither controls nor
evaluation), from reading the model and the JSONL file to the saved next player, with everything that a run writes. The
other side: reading model and tokenizer, `generate` (bf16 weights, sdpa, left-padded, prompts sorted by length, the
fastest of three batch sizes), the construction of DPOTrainer with its reference log-probs, training as in `train.py`,
and saving the model. Imports are done before; each side has a process of its own, and 2 threads.

Both sides do the same work. A model with random weights does not end its answers by itself: the model's generation
configuration lists as many end tokens as make answers geometric with a mean of 1000 (short/long), 40 (long/short) or
72 tokens (ragged), cut at 256 (`shapes.py`); sparring samples with these. `generate` makes, by a stopping criterion,
as many tokens for every prompt as sparring did, and its tokens are then put aside: TRL is given sparring's pairs, as
token ids, so that both train on the same tokens in the same order. `end_loss` is the check that both did (`train.py`).
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import record

record.quiet()

import shapes  # noqa: E402
import theirs  # noqa: E402
import torch  # noqa: E402
from train import BETA, TOLERANCE, end_loss, parsed  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from sparring import api  # noqa: E402
from sparring.config import TrainConfig  # noqa: E402
from sparring.rundir.view import RunView  # noqa: E402
from sparring.types import Group, Sample  # noqa: E402

MOST = 128
"""Rows that play together."""
STAGES = {"samples": "play", "groups": "pair", "frozen": "frozen", "player": "train"}


def recipe(folder: Path, run: Path, given: Any) -> dict[str, Any]:
    """One round of SPIN and nothing beside it."""
    train = {"lr": given.lr, "schedule": "constant", "warmup": 0, "epochs": given.epochs, "batch_size": given.batch}
    return {
        "run": str(run),
        "seed": 0,
        "model": {"path": str(folder / "model"), "compute": "bfloat16", "threads": record.THREADS},
        "data": {"path": str(folder / "data.jsonl"), "heldout_size": 0},
        "controls": {"displacement": None, "trust_region": None, "patience": None},
        "play": {"max_new_tokens": shapes.MAX_NEW, "batch_size": MOST},
        "rounds": [{"method": "spin", "beta": BETA, "train": train}],
    }


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def settings(given: Any) -> TrainConfig:
    return TrainConfig(lr=given.lr, schedule="constant", warmup=0, epochs=given.epochs, batch_size=given.batch)


def usual(given: Any) -> None:
    """The usual pipeline, in a process of its own: seconds of each part, and the loss that the trained model ends with."""
    told = record.task()
    folder, groups, lengths = Path(told["folder"]), played(Path(told["folder"])), told["lengths"]
    start = load(folder / "model", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    choice = theirs.choose(start, tokenizer, groups, settings(given), bf16=True, beta=BETA, known=given.trl)
    prompts = [g.prompt for g in groups]
    player = load(folder / "model", torch.bfloat16)
    most = min(MOST, len(prompts))
    widths = sorted({max(1, most // part) for part in (4, 2, 1)})
    size, sizes = theirs.fastest_batch(lambda size: theirs.generate(player, prompts, lengths, size), widths)

    def work() -> dict[str, Any]:
        gc.collect()
        marks = [time.perf_counter()]
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        player = load(folder / "model", torch.bfloat16)
        marks.append(time.perf_counter())
        theirs.generate(player, prompts, lengths, size)
        marks.append(time.perf_counter())
        learner = load(folder / "model", torch.float32)
        learner.set_attn_implementation(choice.attention)
        made = theirs.trainer(learner, tokenizer, groups, settings(given), micro=choice.micro, bf16=True, beta=BETA)
        marks.append(time.perf_counter())
        made.train()
        marks.append(time.perf_counter())
        made.save_model(str(folder / "theirs"))
        marks.append(time.perf_counter())
        spent = [end - begin for begin, end in pairwise(marks)]
        return {
            "seconds": marks[-1] - marks[0],
            "stages": dict(zip(("load", "play", "frozen", "train", "save"), spent, strict=True)),
            "end_loss": end_loss(learner, start, groups),
            "choice": {"generate_batch_size": size, "generate_trials": sizes} | choice.row(),
        }

    record.serve(work)


def played(folder: Path) -> list[Group]:
    """The pairs that a run made."""
    return list(RunView(folder / "run").rounds[0].rows("groups", Group))


def compare(name: str, shape: str, given: Any, folder: Path) -> dict[str, Any]:
    """One line: a model and a shape."""
    vocabulary = shapes.MODELS[name]["vocab_size"]
    shapes.save(name, folder / "model", shapes.stop_ids(shape, vocabulary))
    shapes.write_jsonl(shapes.pairs(shape, given.pairs, vocabulary), folder / "data.jsonl")
    stages: dict[str, list[dict[str, float]]] = {"sparring": [], "usual": []}
    trained = folder

    def run() -> Any:
        shutil.rmtree(folder / "run", ignore_errors=True)
        gc.collect()
        return api.run(recipe(folder, folder / "run", given))

    view = run()
    groups = played(folder)
    length = {tuple(s.tokens): len(s.tokens) for s in view.rounds[0].rows("samples", Sample)}
    lengths = [length[g.completions[1]] for g in groups]
    if len(groups) != given.pairs or [t for g in groups for t in g.targets] != [1.0, 0.0] * given.pairs:
        raise AssertionError("every prompt should have made one pair, its gold answer first")
    peer = record.Peer([sys.executable, *sys.argv, "--child", "usual"])
    told = peer.ask({"folder": str(folder), "lengths": lengths})

    def ours() -> float:
        nonlocal trained
        seconds, view = record.clock(run)
        parts = {STAGES[k]: v for k, v in view.rounds[0].seconds.items() if k in STAGES}
        stages["sparring"].append({**parts, "rest": seconds - sum(parts.values())})
        if [g.sha for g in view.rounds[0].rows("groups", Group)] != [g.sha for g in groups]:
            raise AssertionError("a repeat played other answers")
        trained = Path(view.players[1].path)
        return seconds

    def other() -> float:
        nonlocal told
        told = peer.ask()
        stages["usual"].append(told["stages"])
        return float(told["seconds"])

    seconds = record.interleaved(ours, other, given.repeats)
    peer.close()
    start, learner = load(folder / "model", torch.float32), load(trained, torch.float32)
    ends = {"sparring": end_loss(learner, start, groups), "usual": told["end_loss"]}
    return {
        "benchmark": "round",
        "model": name,
        "parameters": start.num_parameters(),
        "shape": shape,
        "pairs": given.pairs,
        "played_tokens": sum(lengths),
        "played_lengths": [min(lengths), max(lengths)],
        "tokens": sum(len(g.prompt) + len(c) for g in groups for c in g.completions),
        "epochs": given.epochs,
        "batch": given.batch,
        "sparring": record.spread(seconds[0]) | {"stages": medians(stages["sparring"])},
        "usual": record.spread(seconds[1]) | {"stages": medians(stages["usual"])} | told["choice"],
        "ratio": record.faster(*seconds),
        "end_loss": ends,
        "tolerance": TOLERANCE["bfloat16"],
        "same": abs(ends["sparring"] - ends["usual"]) <= TOLERANCE["bfloat16"],
    }


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every part."""
    return {name: record.spread([row[name] for row in rows])["median"] for name in rows[0]}


def main() -> None:
    given = parsed(record.parser(__doc__))
    if given.child:
        usual(given)
        return
    for name in given.models:
        for shape in given.shapes:
            with tempfile.TemporaryDirectory(prefix="round_") as folder:
                record.emit(compare(name, shape, given, Path(folder)), given.out)


if __name__ == "__main__":
    main()
