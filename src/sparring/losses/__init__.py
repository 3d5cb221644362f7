"""Losses as pure functions: tensors in, one loss per group out; no model, no reduction, no logging.

`margin`: SPIN and all that compare two completions. `preference`: DPO and its variants. `density`: gold and samples taken
one by one. `cringe`: token by token, on logits.
"""

from sparring.losses.margin import (
    CONVEX,
    correlation,
    exponential,
    hinge,
    log_ratios,
    logistic,
    margin,
    mean_over_answers,
    pair_columns,
    pair_metrics,
)

__all__ = [
    "CONVEX",
    "correlation",
    "exponential",
    "hinge",
    "log_ratios",
    "logistic",
    "margin",
    "mean_over_answers",
    "pair_columns",
    "pair_metrics",
]
