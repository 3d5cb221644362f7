"""Sampled tokens per second, `sparring.play.hf.sample` against `model.generate`, at temperature 1 with 2 threads.

    python benchmarks/speed/sampler.py --out benchmarks/speed/results/sampler.jsonl      # both models, all cases
    python benchmarks/speed/sampler.py --models 8M --lengths ragged --dtypes bfloat16 --prompts 128

`equal`: no end tokens, 128 new tokens for prompts of 20 to 40. `ragged`: prompts of 12 to 330 tokens and 1 in 72 tokens
ends an answer, so that answers are geometric and cut at 256. sparring samples first; `generate` then makes, by a
stopping criterion, as many tokens for every prompt as sparring did (`theirs.py`), so that both make the same number. It
has sdpa attention and left-padded prompts sorted by length. Both sides have the fastest of the batch sizes given, tried
once each before the clock starts. bfloat16: sparring computes under autocast or as it sees fit over float32 weights; `generate`
has bfloat16 weights. What the process frees it keeps (`sparring.heap`), for both, as a run does from its first training on. `--continuous` times `generate_batch` once as well, with the same end tokens and not the same
lengths; where it fails its error is recorded. `--vllm PYTHON`, the Python of an environment with vllm, takes its engine in
place of `generate`: its start and a first pass over all prompts are outside the clock. `--compiled` has sparring's decoder
compiled as one graph, outside the clock too; the row tells how many seconds that took.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import record

record.quiet()

import shapes  # noqa: E402
import theirs  # noqa: E402
import torch  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from sparring import heap  # noqa: E402
from sparring.play.graph import compiled  # noqa: E402
from sparring.play.hf import Answer, key, sample  # noqa: E402

EQUAL = 128


def continuous(model: Any, prompts: Sequence[list[int]], stops: list[int], most: int) -> dict[str, Any]:
    """Tokens per second of transformers' continuous batching, or why there are none."""
    how = GenerationConfig(
        max_new_tokens=most, do_sample=True, top_k=0, eos_token_id=stops or -1, pad_token_id=shapes.PAD
    )
    try:
        seconds, out = record.clock(lambda: model.generate_batch(inputs=list(prompts), generation_config=how))
    except Exception as error:  # whatever it meets on a machine that it was not written for
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    made = sum(len(answer.generated_tokens) for answer in out.values())
    return {"tokens": made, "tokens_per_second": round(made / seconds, 1)} if made else {"error": "it made no tokens"}


def served(python: str) -> record.Peer:
    """vLLM, to which `served.py` is the way."""
    return record.Peer(
        [python, str(Path(__file__).with_name("served.py"))],
        PYTHONPATH=None,
        OMP_NUM_THREADS=str(record.THREADS),
        VLLM_CPU_OMP_THREADS_BIND=f"0-{record.THREADS - 1}",
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )


def compare(name: str, kind: str, dtype: str, given: Any, stack: contextlib.ExitStack) -> dict[str, Any]:
    """One line: a model, a kind of lengths and a precision; what is compiled lasts as long as `stack`."""
    model = shapes.model(name)
    shape = "short/long" if kind == "equal" else "ragged"
    vocabulary = model.config.vocab_size
    prompts = [pair.prompt for pair in shapes.pairs(shape, given.prompts, vocabulary)]
    keys = [key(0, 0, str(i), 0) for i in range(len(prompts))]
    stops, most = ([], EQUAL) if kind == "equal" else (shapes.stop_ids(shape, vocabulary), shapes.MAX_NEW)
    compute = getattr(torch, dtype)
    compiling, graph = None, None
    if given.compiled:
        compiling, graph = record.clock(lambda: stack.enter_context(compiled(model, compute)))

    def play(size: int) -> list[Answer]:
        gc.collect()
        return sample(
            model,
            prompts,
            keys,
            temperature=1.0,
            max_new_tokens=most,
            stop_ids=stops,
            batch_size=size,
            compute=compute,
            graph=graph,
        )

    lengths = [len(answer.tokens) for answer in play(given.own_sizes[0])]
    tokens = sum(lengths)
    own, tried = theirs.fastest_batch(play, given.own_sizes)

    def sides(other: Callable[[], float]) -> tuple[Any, Any]:
        return record.interleaved(lambda: record.clock(lambda: play(own))[0], other, given.repeats)

    other = copy.deepcopy(model).to(compute)
    if given.vllm:
        with tempfile.TemporaryDirectory(prefix="vllm_") as folder:
            shapes.save(name, Path(folder))
            task = {"folder": folder, "dtype": dtype, "prompts": prompts, "lengths": lengths}
            peer = served(given.vllm)
            first = peer.ask(task)
            seconds = sides(lambda: float(peer.ask()["seconds"]))
            peer.close()
        against, told = "vllm", {"start": first["start"], "versions": first["versions"]}
    else:
        size, sizes = theirs.fastest_batch(
            lambda size: theirs.generate(other, prompts, lengths, size), given.batch_sizes
        )

        def generate() -> None:
            gc.collect()
            theirs.generate(other, prompts, lengths, size)

        seconds = sides(lambda: record.clock(generate)[0])
        against, told = "generate", {"batch_size": size, "trials": sizes}
    rates = [round(tokens / median(side), 1) for side in seconds]
    row = {
        "benchmark": "sampler",
        "model": name,
        "parameters": model.num_parameters(),
        "lengths": kind,
        "dtype": dtype,
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "tokens": tokens,
        "answer_lengths": [min(lengths), round(tokens / len(lengths), 1), max(lengths)],
        "sparring": record.spread(seconds[0])
        | {"tokens_per_second": rates[0], "batch_size": own, "trials": tried}
        | ({} if compiling is None else {"compiling": round(compiling, 1)}),
        against: record.spread(seconds[1]) | {"tokens_per_second": rates[1]} | told,
        "ratio": record.faster(*seconds),
    }
    return row | ({"generate_batch": continuous(other, prompts, stops, most)} if given.continuous else {})


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--models", nargs="+", default=list(shapes.MODELS), choices=list(shapes.MODELS))
    options.add_argument("--lengths", nargs="+", default=["equal", "ragged"], choices=["equal", "ragged"])
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    options.add_argument("--prompts", type=int, default=256)
    options.add_argument("--own-sizes", type=int, nargs="+", default=[32, 64, 128], help="batches tried for sparring")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128], help="tried for generate")
    options.add_argument("--vllm", help="Python of an environment with vllm, to compare with instead of generate")
    options.add_argument("--compiled", action="store_true", help="sparring's decoder compiled as one graph")
    options.add_argument("--continuous", action="store_true", help="time generate_batch too")
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    heap.keep()
    for name in given.models:
        for kind in given.lengths:
            for dtype in given.dtypes:
                with contextlib.ExitStack() as stack:
                    record.emit(compare(name, kind, dtype, given, stack), given.out)


if __name__ == "__main__":
    main()
