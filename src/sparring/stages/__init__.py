"""The stages: each reads the folders of earlier ones, fills its own, and returns what it counted."""

from sparring.stages.evaluation import (
    answer_shards,
    evaluation,
    gold_shards,
    played_shards,
    task,
    task_played,
    task_scored,
    wins,
)
from sparring.stages.pair import frozen, frozen_shards, groups
from sparring.stages.play import data, engine_gap, play_shards, samples, scores
from sparring.stages.train import held, held_played, held_scored, player

MAKE = {
    "samples": samples,  # the opponent answers every prompt
    "scores": scores,  # only methods that judge: what a verifier or scorer says of the answers
    "groups": groups,  # gold answers and samples become what the loss compares
    "frozen": frozen,  # the reference's log-probs of it, once
    "held": held,  # held-out answers of the round's start, by which the guard sees how far training moves
    "player": player,  # groups + frozen + loss → the next player
}
"""Of a round, in order; those that measure a player are `evaluation`, `task` and `wins`."""

__all__ = [
    "MAKE",
    "answer_shards",
    "data",
    "engine_gap",
    "evaluation",
    "frozen",
    "frozen_shards",
    "gold_shards",
    "groups",
    "held",
    "held_played",
    "held_scored",
    "play_shards",
    "played_shards",
    "player",
    "samples",
    "scores",
    "task",
    "task_played",
    "task_scored",
    "wins",
]
