"""ExSPIN on real text-to-SQL: GeoQuery's questions and database, a Llama of 0.8M parameters made from a configuration.

    python benchmarks/geography_sql.py --data DIR              # seeds 0 1 2
    python benchmarks/geography_sql.py --data DIR --seeds 0    # the figures of docs/real_runs.md
    python benchmarks/geography_sql.py --data DIR --split dev --seeds 100 --out runs/tuning

DIR holds `questions.jsonl` (question, sql, question_split) and `geography.sqlite`. Per seed: SFT, then two rounds each of
ExSPIN and of SPIN, and continued SFT with as many gradient steps. Rounds are watched on the dev split; the figures are on the
split named. A killed script continues with the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparring import api, players, preview
from sparring.config import DataConfig, EvaluateConfig
from sparring.data import load
from sparring.evaluate import evaluate
from sparring.judge.sql import QueryError, execute
from sparring.judge.verify import load_verifier
from sparring.prompts import render
from sparring.rundir.store import read_json, write_json
from sparring.rundir.view import RoundView, RunView
from sparring.types import Sample, Score

COLUMNS = {"prompt": "question", "completion": "sql"}
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
CONTEXT, LONGEST = 256, 200
ROUNDS, STEPS = 2, 30
SFT = {
    "lr": 2e-3,
    "betas": [0.9, 0.99],
    "weight_decay": 0.01,
    "epochs": 20,
    "warmup": 20,
    "schedule": "cosine",
    "floor": 0.05,
}
PLAYS = {"temperature": 1.0, "samples": 4}
SELF_PLAY = {"repeat": ROUNDS, "beta": 2.0, "play": PLAYS, "train": {"lr": 5e-4, "epochs": 1000, "max_steps": STEPS}}
SLOW = SELF_PLAY | {"train": {"lr": 1e-4, "epochs": 1000, "max_steps": STEPS}}
CONTINUED = {"betas": [0.9, 0.99], "weight_decay": 0.01, "epochs": 1000, "max_steps": ROUNDS * STEPS}
METHODS: dict[str, dict[str, Any]] = {
    "exspin": {"method": "exspin", "verifier": "sql", **SELF_PLAY},
    "spin": {"method": "spin", **SELF_PLAY},
    "exspin, lr 0.0001": {"method": "exspin", "verifier": "sql", **SLOW},
    "spin, lr 0.0001": {"method": "spin", **SLOW},
    "continued SFT, lr 0.0005": {"method": "sft", "train": {"lr": 5e-4, **CONTINUED}},
    "continued SFT, lr 0.002": {"method": "sft", "train": {"lr": 2e-3, **CONTINUED}},
}
COLDER = (0.7, 0.5)
TEST_SAMPLES = 2


def write_data(source: Path, folder: Path) -> None:
    """The splits as files beside the database; what does not run or gives no rows is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    database = Path(shutil.copy(source / "geography.sqlite", folder))
    splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    left_out: Counter[str] = Counter()
    for line in (source / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        try:
            useful = bool(execute(database, row["sql"].rstrip(" ;")).rows)
        except QueryError:
            useful = False
        if useful:
            splits[row["question_split"]].append(json.dumps({name: row[name] for name in COLUMNS.values()}))
        else:
            left_out[row["question_split"]] += 1
    for name, lines in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print({name: len(lines) for name, lines in splits.items()}, "left out:", dict(left_out), flush=True)


def build(data: Path, folder: Path, seed: int) -> None:
    """Save an untrained model and a BPE tokenizer of the training split."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    core = ByteLevelBPETokenizer()
    texts = [row[name] for row in rows for name in COLUMNS.values()]
    core.train_from_iterator(texts, vocab_size=1024, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=CONTEXT
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(run: Path, data: Path, model: str, seed: int, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An ordinary recipe; the runs of a seed differ in model and rounds only."""
    return {
        "run": str(run),
        "seed": seed,
        "model": {"path": model, "threads": 1},
        "data": {"path": str(data / "train.jsonl"), "heldout": str(data / "dev.jsonl"), "columns": COLUMNS},
        "play": {"max_new_tokens": LONGEST, "batch_size": 256, "chunk": 128},
        "train": {"optimizer": "adamw", "micro_batch": 8, "batch_size": 32, "save_every": 10},
        "evaluate": {"verifier": "sql", "samples": 4},
        "rounds": list(rounds),
    }


def one_seed(out: Path, data: Path, seed: int, split: str, names: Sequence[str]) -> dict[str, Any]:
    """Figures of every player of one seed, and what became of the samples."""
    if not (out / "model").exists():
        build(data, out / "model.partial", seed)
        (out / "model.partial").rename(out / "model")
    start = api.run(recipe(out / "sft", data, str(out / "model"), seed, [{"method": "sft", "train": SFT}]))
    sft = max(start.players)
    rows = {"sft": figures(start, sft, data, split)}
    rows |= {f"sft sampled at T = {t:g}": figures(start, sft, data, split, temperature=t) for t in COLDER}
    counts, best, controls = {}, {}, {}
    for name in names:
        folder = out / name.replace(",", "").replace(" ", "_")
        view = api.run(recipe(folder, data, start.players[sft].path, seed, [METHODS[name]]))
        made = [r for r in view.rounds if r.stages["player"] == "done"]
        for r in made:
            label = f"{name}, round {r.t}" if r.t >= 0 and r.stages["samples"] == "done" else name
            rows[label] = figures(view, r.t + 1, data, split)
            if r.stages["samples"] == "done":
                counts[label] = fates(view, r)
        best[name] = view.best
        controls[name] = view.control_lines()
    return {"seed": seed, "rows": rows, "counts": counts, "best": best, "controls": controls}


def figures(view: RunView, number: int, data: Path, split: str, temperature: float = 1.0) -> dict[str, Any]:
    """A player's evaluation on a split, kept beside the run so that it is made once."""
    player = view.players[number]
    file = view.path / split / f"player_{number}_at_{temperature:g}.json"
    if file.exists() and read_json(file)["sha"] == player.sha:
        return dict(read_json(file)["figures"])
    config = DataConfig(path=str(data / f"{split}.jsonl"), columns=COLUMNS, heldout_size=0)
    examples = load(config, view.config.seed).train
    renderer, play = preview.make_renderer(view), view.config.evaluation_play
    rows = render(examples, renderer, config, context=CONTEXT, max_new_tokens=LONGEST).rows
    settings = EvaluateConfig(verifier="sql", limit=len(rows), samples=TEST_SAMPLES, temperature=temperature)
    model = players.load_model(player.path, view.config.model)
    verifier = load_verifier("sql")
    got = evaluate(model, player, examples, rows, settings, play, renderer, verifier, seed=view.config.seed).summary
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"sha": player.sha, "figures": got})
    return got


def fates(view: RunView, r: RoundView) -> dict[str, Any]:
    """What the samples of a round are, and which right ones differ from the gold answer (the first five of them).

    A round of SPIN has no verdicts: the verifier is asked here.
    """
    verifier = load_verifier("sql")
    samples = r.rows("samples", Sample)
    if r.stages["scores"] == "done":
        scores = r.rows("scores", Score)
        verdicts = {i: value for s in scores for i, value in zip(s.samples, s.values, strict=True)}
    else:
        verdicts = {s.id: _number(verifier(view.examples[s.example_id], s.text)) for s in samples}
    fate: Counter[str] = Counter()
    shown: list[dict[str, str | None]] = []
    for s in samples:
        example = view.examples[s.example_id]
        same = s.text == example.gold and s.finish == "stop"
        right = verdicts[s.id] == 1
        fate["gold" if same else "right, but different" if right else "wrong"] += 1
        if right and not same and len(shown) < 5:
            shown.append({"question": example.messages[-1].content, "gold": example.gold, "sample": s.text})
    return {"samples": len(samples), **fate, "groups": r.counts["groups"], "shown": shown}


def _number(verdict: bool | None) -> float | None:
    return None if verdict is None else float(verdict)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean ± standard error over seeds, of a single seed over questions; accuracies in percent."""
    lines = ["| | seeds | sampled, T = 1 | greedy | gold_nll (nats) |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(name for r in results for name in r["rows"]):
        having = [r["rows"][name] for r in results if name in r["rows"]]
        cells = []
        for key, scale, digits in (("sampled", 100, 1), ("greedy", 100, 1), ("gold_nll", 1, 2)):
            values = [scale * row[key]["mean"] for row in having]
            several = len(values) > 1
            error = statistics.stdev(values) / math.sqrt(len(values)) if several else scale * having[0][key]["se"]
            cells.append(f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| {name} | {len(having)} | {' | '.join(cells)} |")
    fates = ("samples", "gold", "right, but different", "wrong")
    lines += ["", f"| samples of all seeds | {' | '.join(fates)} |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(name for r in results for name in r["counts"]):
        each = [r["counts"][name] for r in results if name in r["counts"]]
        lines.append(f"| {name} | {' | '.join(str(sum(c.get(f, 0) for c in each)) for f in fates)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/geography"))
    options = parser.parse_args()
    data = options.out / "data"
    if not data.exists():
        write_data(options.data, options.out / "data.partial")
        (options.out / "data.partial").rename(data)
    results = [one_seed(options.out / str(seed), data, seed, options.split, options.methods) for seed in options.seeds]
    write_json(options.out / f"results_{options.split}.json", results)
    print(table(results))
    print(json.dumps([{k: r[k] for k in ("seed", "best", "controls", "counts")} for r in results], indent=1))


if __name__ == "__main__":
    main()
