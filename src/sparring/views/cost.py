"""What the terminal shows of a plan: stage by stage, round by round, what holds memory, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sparring.cost.estimate import Cost, Estimate
from sparring.cost.planning import Planned
from sparring.formatting import NONE, seconds

_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")


def plan(found: Planned) -> Renderables:
    """A row per stage, equal rounds together; peak memory is one device's, time and work all devices'."""
    e = found.estimate
    room, misfits = e.hardware.device.usable, e.misfits
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("round", "stage", "tokens", "FLOP", "bytes moved", "peak memory", "time", "disk"):
        table.add_column(name, justify="left" if name in ("round", "stage") else "right", no_wrap=True)
    for name, costs in _rounds(e.costs):
        for i, cost in enumerate(costs):
            style, mark = ("bold red", " ✗") if cost in misfits else ("", "")
            peak = f"{amount(cost.peak, 'B')}{mark}" if cost.peak else NONE
            work = (amount(cost.tokens), amount(cost.flops), amount(cost.moved, "B"))
            cells = (*work, Text(peak, style=style), seconds(cost.seconds), amount(cost.disk, "B"))
            table.add_row("" if i else name, cost.name, *cells)
        table.add_section()
    widest = max(e.costs, key=lambda cost: cost.peak)
    held = ", ".join(f"{name} {amount(size, 'B')}" for name, size in widest.memory.items() if size)
    head = Text.assemble(
        (f"{amount(e.shape.parameters)} parameters on {e.hardware}", "bold"),
        f": {seconds(e.seconds)}, {amount(e.disk, 'B')} of disk at most, {amount(room, 'B')} usable per device",
    )
    lines: list[RenderableType] = [head, Text(), table, Text(f"widest: {widest.folder}: {held}")]
    lines += [Text(note, style="dim") for note in e.notes]
    return Renderables(*lines, *_fit(found))


def _fit(found: Planned) -> list[RenderableType]:
    misfits = list(dict.fromkeys(cost.name for cost in found.estimate.misfits))
    if not misfits:
        return [Text("everything fits", style="green")]
    what = Text(f"does not fit: {', '.join(misfits)}", style="bold red")
    if not found.remedies:
        return [what, Text("no single setting that was tried makes it fit, nor one with other hardware")]
    head = "no single setting is enough; fits with both of:" if found.together else "fits with any one of:"
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    for remedy in found.remedies:
        table.add_row(f"  {remedy.setting}", seconds(remedy.seconds), Text(remedy.note, style="dim"))
    return [what, Text(head), table]


def _rounds(costs: Sequence[Cost]) -> list[tuple[str, list[Cost]]]:
    """Rounds with their stages; consecutive ones that cost the same are one row: `round_001 … round_003`."""
    parted = [(name, list(own)) for name, own in groupby(costs, key=lambda c: c.folder.partition("/")[0])]
    merged = []
    for _, same in groupby(parted, key=lambda item: [_figures(cost) for cost in item[1]]):
        names = list(same)
        first, last = names[0][0], names[-1][0]
        merged.append((first if first == last else f"{first} … {last}", names[0][1]))
    return merged


def _figures(cost: Cost) -> tuple[object, ...]:
    return cost.name, cost.flops, cost.seconds, cost.peak, cost.disk


def amount(value: float, unit: str = "") -> str:
    """Three digits with a decimal prefix: `14.5 GB`, `3.2 E`; a dash for 0."""
    if not value:
        return NONE
    at = 0
    while value >= 999.5 and at < len(_UNITS) - 1:
        value, at = value / 1000, at + 1
    return f"{value:.3g} {_UNITS[at]}{unit}".rstrip()


def as_json(e: Estimate) -> dict[str, object]:
    """The same for programs: bytes, seconds, operations."""
    return {
        "hardware": str(e.hardware),
        "parameters": e.shape.parameters,
        "usable": e.hardware.device.usable,
        "seconds": e.seconds,
        "disk": e.disk,
        "notes": list(e.notes),
        "stages": [
            {
                "folder": c.folder,
                "tokens": c.tokens,
                "flops": c.flops,
                "moved": c.moved,
                "seconds": c.seconds,
                "peak": c.peak,
                "memory": dict(c.memory),
                "disk": c.disk,
            }
            for c in e.costs
        ],
    }
