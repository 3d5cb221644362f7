"""Samples, gold answers and what judges say of them to groups: pure functions.

`gold`: gold answers against samples. `preference`: preference data and verdicts. `wins`: win rates.
"""

from sparring.pair.gold import gold_against_samples, gold_alone, gold_with_samples, replayed, same_answer

__all__ = ["gold_against_samples", "gold_alone", "gold_with_samples", "replayed", "same_answer"]
