"""How good a player is on held-out prompts."""

from sparring.evaluate.core import Evaluation, Item, evaluate, mean_se

__all__ = ["Evaluation", "Item", "evaluate", "mean_se"]
