"""What is compared: every method with the settings it runs with here, chosen on tuning seeds below 200."""

from __future__ import annotations

from typing import Any

PROMPTS, SAMPLES, STEPS, ROUNDS = 1600, 2, 100, 2
"""Per round: prompts, answers to each, gradient steps of 64 groups; equal for all, but that nash_md's two players both answer."""
LR = 5e-4
SLOW = 1e-4
"""For losses without a reference or on raw logits, which fall apart at LR."""
SFT_RATES = (3e-4, 1e-3, 2e-3)
COLDER = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
TRUTH = "benchmarks/methods/tasks.py:verify"
"""Arithmetic on the prompt, which the noisy gold answer has no say in."""
SCORER = f"verifier:{TRUTH}"

Entry = dict[str, Any]


def entry(method: str, *, temperature: float = 2.0, samples: int = SAMPLES, lr: float = LR, **hyper: Any) -> Entry:
    """One method's rounds: `samples` answers to so many prompts that every method has as many answers played."""
    return {
        "method": method,
        "repeat": ROUNDS,
        "limit": PROMPTS * SAMPLES // samples,
        "play": {"temperature": temperature, "samples": samples},
        "train": {"lr": lr, "epochs": 100, "max_steps": STEPS},
        **hyper,
    }


def on_policy(method: str, *, samples: int = 4, **hyper: Any) -> Entry:
    """A method that learns from its own answers only, as its paper plays: temperature 1 and several to a prompt."""
    return entry(method, temperature=1.0, samples=samples, **hyper)


SELF_PLAY: dict[str, Entry] = {
    "spin": entry("spin", beta=2.0, duplicates="drop"),
    "spin, T = 1": entry("spin", temperature=1.0, beta=2.0, duplicates="drop"),
    "spin, memory": entry("spin", beta=2.0, duplicates="drop", memory=1),
    "spin, greedy": entry("spin", temperature=0.0, samples=1, beta=2.0),
    "spin, beta 0.1": entry("spin", beta=0.1, duplicates="drop"),
    "tpaw": entry("tpaw", beta=2.0),
    "alpha_spin": entry("alpha_spin", beta=2.0, alpha=0.1),
    "fictitious_play": entry("fictitious_play", beta=2.0, history=2),
    "t_spin": entry("t_spin", lr=SLOW),
    "space": entry("space"),
    "gsil": entry("gsil", alpha=1.0, beta=0.0),
    "gsil, brier": entry("gsil", loss="brier", alpha=1.0, beta=0.0),
    "spif": entry("spif", beta=1.0),
    "iris": entry("iris"),
    "sera": entry("sera", beta=2.0),
    "ditto": entry("ditto", beta=2.0),
    "drift": entry("drift", beta=2.0),
    "dpo on SPIN's pairs, fixed base": entry("dpo", beta=2.0, pairs="gold", reference="initial"),
    "ipo on SPIN's pairs": entry("dpo", loss="ipo", beta=1.0, pairs="gold"),
    "cringe": entry("cringe", lr=SLOW),
    "pairwise_cringe": entry("pairwise_cringe", lr=SLOW),
    "upft": on_policy("upft", lr=SLOW),
}
VERIFIED: dict[str, Entry] = {
    "exspin": entry("exspin", beta=2.0, verifier=TRUTH, duplicates="drop"),
    "exspin, T = 1": entry("exspin", temperature=1.0, beta=2.0, verifier=TRUTH, duplicates="drop"),
    "dnpo": entry("dnpo", beta=2.0, verifier=TRUTH),
    "dpo on verified pairs": on_policy(
        "dpo", beta=0.5, pairs="verified", verifier=TRUTH, with_gold=False, per_prompt=4
    ),
    "irpo": on_policy("dpo", beta=0.5, pairs="verified", verifier=TRUTH, nll=1.0, per_prompt=4),
    "kto": on_policy("kto", beta=0.5, answers="verified", verifier=TRUTH),
    "sppo": on_policy("sppo", scorer=SCORER, eta=10.0),
    "inpo": on_policy("inpo", scorer=SCORER, eta=0.1),
    "mnpo": on_policy("mnpo", scorer=SCORER, eta=0.1, log_probs="sum"),
    "nash_md": on_policy("nash_md", samples=2, scorer=SCORER),
    "spo": on_policy("spo", scorer=SCORER),
}
METHODS = SELF_PLAY | VERIFIED
MAP: dict[str, Entry] = {
    f"spin, beta {beta:g}, T {t:g}": entry("spin", temperature=t, beta=beta, duplicates="drop")
    for beta in (0.1, 0.5, 2.0, 5.0)
    for t in (0.7, 1.0, 1.5, 2.0, 3.0)
}
"""λ and the opponent's temperature."""


def spin(**changes: Any) -> Entry:
    """SPIN as in the comparison but for some keys of its entry."""
    plain = entry("spin", beta=2.0, duplicates="drop")
    return plain | changes | {"train": plain["train"] | changes.get("train", {})}


QUESTIONS: dict[str, Entry] = {
    "one round": spin(repeat=1),
    "one round, twice the steps": spin(repeat=1, train={"max_steps": 2 * STEPS}),
    "four rounds": spin(repeat=4),
    "1 sample, 3200 prompts": spin(limit=2 * PROMPTS, play={"temperature": 2.0, "samples": 1}),
    "8 samples, 400 prompts": spin(limit=PROMPTS // 4, play={"temperature": 2.0, "samples": 8}),
    "400 prompts": spin(limit=PROMPTS // 4),
    "800 prompts": spin(limit=PROMPTS // 2),
    "6400 prompts": spin(limit=4 * PROMPTS),
}
"""The paper's own claims, and how many samples and prompts."""
RATE: dict[str, Entry] = {
    f"spin, rate x {x:g}": entry("spin", beta=2.0, duplicates="drop", lr=LR * x) for x in (3, 10, 30)
}
"""Rates at which plain SPIN collapses: what the controls are for (docs/controls.md)."""
ALL = METHODS | RATE | MAP | QUESTIONS
