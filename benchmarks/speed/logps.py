"""Seconds and peak memory of completions' log-probs, forward and backward, of the path the library takes and the plain one.

    python benchmarks/speed/logps.py --out benchmarks/speed/results/logps.jsonl          # the whole grid
    python benchmarks/speed/logps.py --vocabulary 8192 --groups 2 --share 0.5 --rows 8 --tokens 256
    python benchmarks/speed/logps.py --vocabulary 151936 --groups 2 --share 0.5 --rows 8 --tokens 1024 --dtypes bfloat16

A point of the grid is a vocabulary (8k to 152k), the completions of a group G, and the prompt's share of a row; a batch
has ROWS completions of TOKENS tokens each, prompt included, in ROWS / G groups. The model has hidden size 512 and
`--layers` layers of the 60M shape: with few layers the logits dominate, as they do in small models with the
vocabularies of today. Every measurement is a process of its own: peak is its ru_maxrss, `base` that before the first
step (weights, gradients not yet made), seconds the median of `--repeats` steps after one for warming up. A process that
runs out of memory is recorded as an error; it is the first that the system ends.

`library` is `sparring.logps.token_logps`, `plain` the oracle that it is tested against.
"""

from __future__ import annotations

import json
import random
from itertools import product
from statistics import median
from typing import Any

import record

record.quiet()

import shapes  # noqa: E402
import torch  # noqa: E402

from sparring.logps import plain_token_logps, token_logps  # noqa: E402

PATHS = {"library": token_logps, "plain": plain_token_logps}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One path at one point of the grid, in this process."""
    record.first_to_die()
    rng = random.Random(0)
    model = shapes.model("60M", vocab_size=task["vocabulary"], num_hidden_layers=task["layers"])
    size = round(task["tokens"] * task["share"])

    def words(length: int) -> list[int]:
        return [rng.randrange(shapes.WORDS, task["vocabulary"]) for _ in range(length)]

    prompts = [p for p in [words(size) for _ in range(task["rows"] // task["group"])] for _ in range(task["group"])]
    completions = [words(task["tokens"] - size) for _ in prompts]
    compute, seconds, base = getattr(torch, task["dtype"]), [], record.peak_mb()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        total = PATHS[task["path"]](model, prompts, completions, compute=compute).sum()
        (total / (len(prompts) * task["tokens"])).backward()
        return float(total)

    total = step()
    for _ in range(task["repeats"]):
        seconds.append(record.clock(step)[0])
    return {"seconds": round(median(seconds), 4), "peak_mb": record.peak_mb(), "base_mb": base, "total": total}


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 32768, 65536, 151936])
    options.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--share", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    if given.child:
        print(json.dumps(measure(json.loads(given.child))))
        return
    if any(given.rows % group for group in given.groups):
        options.error("--rows must be a multiple of every group size")
    for vocabulary, group, share, dtype in product(given.vocabulary, given.groups, given.share, given.dtypes):
        point = {"vocabulary": vocabulary, "group": group, "share": share, "dtype": dtype}
        task = point | {name: getattr(given, name) for name in ("rows", "tokens", "layers", "repeats")}
        found = {path: record.child(__file__, task | {"path": path}) for path in PATHS}
        row: dict[str, Any] = {"benchmark": "logps", **task, **found}
        if not any("error" in side for side in found.values()):
            ours, plain = found["library"], found["plain"]
            row |= {
                "ratio": round(plain["seconds"] / ours["seconds"], 2),
                "peak_share": round(ours["peak_mb"] / plain["peak_mb"], 3),
                "peak_share_above_base": round(
                    (ours["peak_mb"] - ours["base_mb"]) / (plain["peak_mb"] - plain["base_mb"]), 3
                ),
                "relative_gap": abs(ours["total"] - plain["total"]) / abs(plain["total"]),
            }
        record.emit(row, given.out)


if __name__ == "__main__":
    main()
