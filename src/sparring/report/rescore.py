"""`sparring report --tokens`: every player's log-probs of the answers that the page shows, computed once and kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sparring.report.examples import gather, known_logps
from sparring.report.tokens import Rescored, duels
from sparring.rundir import COLOURS

if TYPE_CHECKING:
    from sparring.rundir.view import RunView

log = logging.getLogger("sparring")


def rescore(run: RunView) -> int:
    """Score the shown answers under the learner and the opponent of every round; returns how many were not known yet.

    The figures of an evaluation hold a player's log-probs of its own answers only. Players are loaded one after the
    other; at most `MOST_EXAMPLES` prompts' answers are scored. Raises InputError where a player does not load.
    """
    from sparring import players
    from sparring.logps import score
    from sparring.preview import load_tokenizer, make_renderer
    from sparring.rundir.store import write_shard
    from sparring.workshop import fitted

    ids = {example.id for example in gather(run).shown}
    known = known_logps(run, ids)
    involved = dict.fromkeys(sha for duel in duels(run) for sha in (duel.opponent, duel.learner))
    by_sha = {player.sha: player for player in run.players.values()}
    answers = [
        (item, player.sha)
        for player in run.players.values()
        for item in run.items(player.round or 0)
        if player.sha in involved and item.kind != "gold" and item.index == 0 and item.example_id in ids and item.tokens
    ]
    missing = {
        sha: [(item, by) for item, by in answers if sha not in known[item.example_id, item.kind, by]]
        for sha in involved
    }
    if not any(missing.values()):
        return 0
    settings, model, start = run.config.evaluation_play, run.config.model, run.players[min(run.players)]
    rendering = fitted(
        [run.heldout[name] for name in ids],
        run.config,
        players.model_config(model.path, model),
        load_tokenizer(run.config),
        make_renderer(run),
        settings.max_new_tokens,
    )
    prompts = {row.example_id: row.prompt for row in rendering.rows}
    rows = [
        Rescored(*key, sha, tuple(logps))
        for key, table in known.items()
        for sha, logps in table.items()
        if key[1] != "gold"
    ]
    for sha, wanted in missing.items():
        if not wanted:
            continue
        log.info("scoring %d answers under player %s", len(wanted), by_sha[sha].round)
        logps = score(
            players.load_model(by_sha[sha].path, players.settings_of(by_sha[sha], start, model)),
            [prompts[item.example_id] for item, _ in wanted],
            [item.tokens for item, _ in wanted],
            batch_size=settings.batch_size,
            compute=players.compute_dtype(model),
        )
        rows += [
            Rescored(item.example_id, item.kind, by, sha, line) for (item, by), line in zip(wanted, logps, strict=True)
        ]
    folder = Path(run.path) / COLOURS
    folder.mkdir(exist_ok=True)
    write_shard(folder / "00000.parquet", Rescored, rows)
    return sum(map(len, missing.values()))
