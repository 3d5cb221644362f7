"""`python -m sparring.member RUN`: one of the processes of a `Crew`.

It does its part of every stage that it is told to, and ends when its stdin does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from sparring import crew
from sparring.config import Config, TrackConfig
from sparring.crew import Rank
from sparring.errors import InputError, told

if TYPE_CHECKING:
    from sparring.workshop import Workshop


class _Said(logging.Handler):
    """Hands log lines to the supervisor."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([record.levelno, record.getMessage()]) + "\n")


def opened(run: Path, rank: Rank) -> Workshop:
    """A run whose data are there, on this process's own device; trackers are the supervisor's affair."""
    from sparring import api
    from sparring.rundir import RunDir
    from sparring.rundir.store import read_json
    from sparring.workshop import Workshop

    known = read_json(run / "start" / "player.json")["sha"], read_json(run / "data" / "stage.json")["inputs"]
    prepared = api.prepare(run, known=known)
    config = prepared.config.model_copy(update={"track": TrackConfig()})
    if rank.size != config.cluster.processes:
        raise InputError(
            f"cluster.processes: {config.cluster.processes}, but the launcher started {rank.size}; write the same number"
        )
    return Workshop(RunDir(run), _placed(config, rank), prepared.plan, prepared.start, rank)


def _placed(config: Config, rank: Rank) -> Config:
    if config.model.device == "cpu":
        return config
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return config
    if rank.local >= count:
        raise InputError(f"cluster.processes: there are only {count} CUDA devices here, and each process needs one")
    torch.cuda.set_device(rank.local)
    return config.model_copy(update={"model": config.model.model_copy(update={"device": f"cuda:{rank.local}"})})


def main(run: Path) -> None:
    """Do what is ordered until the supervisor ends or something fails."""
    from sparring import sharing

    rank = crew.of_environment(os.environ)
    logger = logging.getLogger("sparring")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Said(run / crew.FOLDER / crew.SAID) if rank.number == 0 else logging.NullHandler())
    _here = crew.present(run).hold(rank.number)
    orders, shop = crew.Orders(run), None
    since = time.monotonic()
    while True:
        for number, members, folder, step in orders.new():
            if rank.number >= members:
                continue
            try:
                shop = shop or opened(run, rank)
                with shop.progress.stage(folder):
                    counts = sharing.part(shop, folder, step)
            except Exception as error:
                line = told(error)
                orders.answer(number, rank.number, {"error": line and [type(error).__name__, line[0]]})
                raise
            orders.answer(number, rank.number, {"counts": counts})
            since = time.monotonic()
        time.sleep(crew.pace(time.monotonic() - since))


def _end_with_supervisor() -> None:
    """Also amid a stage: the other end of stdin closes when the supervisor ends, however it does."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    try:
        main(Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    # Threads of libraries must not hold up the end
    os._exit(1)
