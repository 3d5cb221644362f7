"""UPFT: unsupervised fine-tuning on the first tokens of own answers; no labels, no negatives, no gold."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from sparring.methods import choice, sft
from sparring.types import Group, Method, Paired, Played, Turn

TEMPLATE = (
    "{question} Please provide the initial step towards resolving the question. This step may serve as a foundation but "
    "might not encompass the entire solution."
)


def method(
    *,
    prefix_tokens: int = 8,
    full_share: float = 0.1,
    template: str = TEMPLATE,
    end_token: bool = False,
    weigh: str = "token",
) -> Method:
    """−log p_θ of the first tokens of own answers under the template, and of a few whole answers under the question.

    prefix_tokens: t; the paper's are 8 (Llama-3.1-8B), 32 (Qwen2.5-Math-7B) and 128 (R1-Distill-Qwen-7B).
    full_share: p, the share of examples with whole answers; the paper: 0.1, and 0.3 on LIMO. Which ones is a hash of the
        example, the same in every round (this library's choice; the paper splits at random).
    template: the paper's T(x), around the last user turn. Prefixes are played on the plain prompt.
    end_token: end every prefix with the end token, as the released code does and the paper does not.
    weigh: `token` or `answer`, as for `sft`; `token` is the paper's sum over tokens.
    """
    if prefix_tokens < 1 or not 0 <= full_share <= 1:
        raise ValueError("prefix_tokens counts tokens (1, 2, …) and full_share lies between 0 and 1")
    if "{question}" not in template:
        raise ValueError("template must contain {question}")
    by_token = choice("weigh", weigh, {"token": True, "answer": False})

    def roles(t: int) -> Mapping[str, int]:
        return {"opponent": t, "start": t}

    def groups(played: Played) -> Paired:
        rows = {row.example_id: row for row in played.rows}
        made: list[Group] = []
        dropped: Counter[str] = Counter()
        for sample in played.samples:
            row = rows[sample.example_id]
            full = in_full(sample.example_id, full_share)
            prompt = row.prompt if full else row.retold
            answer = sample.tokens if full else sample.tokens[:prefix_tokens]
            if end_token and not full and played.end is not None and answer[-1:] != (played.end,):
                answer = (*answer, played.end)
            if not sample.tokens or not prompt:
                dropped["no_template" if sample.tokens else "empty"] += 1
                continue
            weight = float(len(answer)) if by_token else 1.0
            made.append(Group(sample.example_id, prompt, (answer,), (1.0,), weight, (sample.id,), played.t))
        return Paired(made, dict(dropped))

    def answer_tokens(example_id: str) -> int | None:
        return None if in_full(example_id, full_share) else prefix_tokens

    return replace(
        sft.method(weigh=weigh),
        name="upft",
        paper="Ji et al. 2025, arXiv 2503.02875, the objective with D_p and D_f; template and defaults from its text",
        roles=roles,
        groups=groups,
        plays=(Turn(),),
        takes_given=False,
        metrics=lambda policy, batch: {"logp_sample": policy.sum_BG[:, 0].detach()},
        template=template,
        answer_tokens=answer_tokens,
        pairing={"prefix_tokens": prefix_tokens, "full_share": full_share, "end_token": end_token, "weigh": weigh},
    )


def in_full(example_id: str, share: float) -> bool:
    """Whether an example is among the `share` that keeps whole answers: a hash, so the same in every round and run."""
    digest = hashlib.sha256(f"upft {example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
