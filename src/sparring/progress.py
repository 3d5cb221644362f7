"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(description: str, total: int, unit: str = "rows") -> Iterator[Callable[[float], None]]:
    """Yields `advance_to(done)`; on a terminal it shows rate and time left for work of more than a few seconds."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, rate="")

        def advance_to(done: float) -> None:
            rate = done / max(1e-9, time.monotonic() - started)
            progress.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s")

        yield advance_to
