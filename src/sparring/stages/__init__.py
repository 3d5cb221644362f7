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

__all__ = [
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
