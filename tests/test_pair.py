"""Groups from samples: what is paired, dropped, weighted and replayed, by hand."""

from __future__ import annotations

import pytest

from sparring import methods
from sparring.errors import InputError
from sparring.pair import gold_against_samples, gold_alone, replayed
from sparring.types import Finish, Rendered, Sample

END = 9


def rendered(name: str, gold: tuple[int, ...] = (1, 2, END), text: str = "ab", cut: tuple[str, ...] = ()) -> Rendered:
    return Rendered(name, (7, 8), gold, text, cut=cut)


def sample(name: str, tokens: tuple[int, ...], text: str = "?", index: int = 0, finish: Finish = "stop") -> Sample:
    return Sample(name, "p" * 40, index, 0, tokens, text, finish, (-1.0,) * len(tokens), "s")


def test_pairs_in_order_with_targets_and_sources() -> None:
    rows = [rendered("x"), rendered("y", (3, END), "c")]
    samples = [sample("x", (1, END), "a"), sample("x", (2, END), "b", 1), sample("y", (4, END), "d")]
    made = gold_against_samples(rows, samples, 5)
    assert [g.completions for g in made.groups] == [
        ((1, 2, END), (1, END)),
        ((1, 2, END), (2, END)),
        ((3, END), (4, END)),
    ]
    assert {g.targets for g in made.groups} == {(1.0, 0.0)}
    assert [g.weight for g in made.groups] == [1.0, 1.0, 1.0]
    assert [g.origin_round for g in made.groups] == [5, 5, 5]
    assert made.groups[1].sources == ("gold", "x/pppppppppppp/0.1")
    assert made.groups[0].prompt == (7, 8)
    assert made.dropped == {}


def test_a_sample_that_is_the_gold_answer_makes_no_pair() -> None:
    rows = [rendered("x")]
    same_tokens = sample("x", (1, 2, END), "ab")
    same_text = sample("x", (5, END), "ab")  # other token ids that spell the same finished answer
    cut_text = sample("x", (5,), "ab", finish="length")  # did not stop: it is another answer
    made = gold_against_samples(rows, [same_tokens, same_text, cut_text], 0)
    assert [g.completions[1] for g in made.groups] == [(5,)]
    assert made.dropped == {"identical": 2}


def test_a_cut_gold_answer_is_compared_by_tokens_only() -> None:
    rows = [rendered("x", (1, 2), "ab", cut=("gold",))]
    made = gold_against_samples(rows, [sample("x", (1, 2, END), "ab"), sample("x", (1, 2), "ab", finish="length")], 0)
    assert [g.completions[1] for g in made.groups] == [(1, 2, END)]
    assert made.dropped == {"identical": 1}


def test_duplicates_weigh_or_are_dropped() -> None:
    rows = [rendered("x")]
    samples = [sample("x", (4, END), index=i) for i in range(3)] + [sample("x", (5, END), index=3)]
    weighed = gold_against_samples(rows, samples, 0)
    assert [(g.completions[1], g.weight) for g in weighed.groups] == [((4, END), 3.0), ((5, END), 1.0)]
    assert weighed.dropped == {}
    dropped = gold_against_samples(rows, samples, 0, duplicates="drop")
    assert [g.weight for g in dropped.groups] == [1.0, 1.0]
    assert dropped.dropped == {"duplicate": 2}


def test_rows_without_gold_and_empty_samples_are_counted() -> None:
    rows = [rendered("x", (), ""), rendered("y")]
    made = gold_against_samples(rows, [sample("x", (4, END)), sample("y", ()), sample("z", (4, END))], 0)
    assert made.groups == []
    assert made.dropped == {"no_gold": 2, "empty": 1}


def test_replayed_groups_keep_their_origin_and_scale_their_weight() -> None:
    groups = gold_against_samples([rendered("x")], [sample("x", (4, END)), sample("x", (4, END), index=1)], 2).groups
    again = replayed(groups, 0.5)
    assert [(g.weight, g.origin_round, g.completions) for g in again] == [(1.0, 2, ((1, 2, END), (4, END)))]
    assert again[0].sha == groups[0].sha


def test_memory_is_weights_of_the_previous_rounds_newest_first() -> None:
    assert methods.make("spin", {"memory": 2, "memory_weight": 0.5}).memory == (0.5, 0.5)
    assert methods.make("spin", {}).memory == ()


def test_sft_groups_weigh_by_tokens_or_alike() -> None:
    rows = [rendered("x"), rendered("y", (), "")]
    by_token = gold_alone(rows, 0, by_token=True)
    assert [(g.completions, g.weight, g.targets) for g in by_token.groups] == [(((1, 2, END),), 3.0, (1.0,))]
    assert by_token.dropped == {"no_gold": 1}
    assert gold_alone(rows, 0, by_token=False).groups[0].weight == 1.0


@pytest.mark.parametrize("hyper", [{"beta": 0.0}, {"beta": -1.0}, {"memory": -1}, {"memory": 1, "memory_weight": 0.0}])
def test_numbers_that_would_turn_spin_around_are_refused(hyper: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"method `spin`: (beta must be above 0|memory counts rounds)"):
        methods.make("spin", hyper)
