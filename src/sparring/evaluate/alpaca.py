"""AlpacaEval's row format, and a length-controlled win rate computed here from nothing but the judgements: LC-min."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring.data.files import BadRow, file_rows
from sparring.errors import InputError
from sparring.evaluate.asking import Asked, answers, described, judgements, judgements_line, shown
from sparring.evaluate.ledger import Ledger, key_of
from sparring.evaluate.stats import Figure, mean_se
from sparring.judge.replies import Judge, agreed, identity, verdict
from sparring.play.chat import Chat
from sparring.rundir.store import write_json
from sparring.types import Message

if TYPE_CHECKING:
    import numpy as np

SYSTEM = (
    "You compare two answers to the same instruction. Prefer the one that a careful reader who gave the instruction "
    "would rather have: correct, following what was asked, and clear. Neither the order of the answers nor their "
    "length is a reason. Say in a sentence or two what decides, and end with one of [[A]] (the first answer is better), [[B]] "
    "(the second is better) and [[C]] (they are equally good)."
)
USER = "# Instruction\n{instruction}\n\n# Answer A\n{first}\n\n# Answer B\n{second}\n\n# Which is better?"


@dataclass(frozen=True)
class Output:
    """One row of AlpacaEval's format."""

    instruction: str
    output: str
    generator: str
    """Who wrote the output."""
    dataset: str = ""
    """Where the instruction comes from."""


@dataclass(frozen=True)
class LcMin:
    """A length-controlled win rate; not AlpacaEval's, whose regression has terms that need its own data."""

    value: float | None
    """σ(θ0): the win rate that the fit gives at equal lengths; None where there is no such fit."""
    se: float | None
    """Its standard error, by the sandwich covariance of the fit (HC0) and the delta method."""
    n: int
    theta: tuple[float, float] | None
    """Intercept and length coefficient, in nats of odds."""
    reason: str = ""
    """Why there is no value."""


def lc_min(wins: Sequence[float], deltas: Sequence[float]) -> LcMin:
    """Maximum likelihood of logit P(win) = θ0 + θ1 · tanh(Δ / sd(Δ)), and σ(θ0).

    wins: in [0, 1], soft labels count as such; deltas: the reference's length less the player's, in characters; sd is
    the sample's (n − 1). Nothing is regularised, so exchanging player and reference gives 1 − value. There is no value
    where the likelihood has no maximum: all won, all lost, one length difference throughout, or wins and losses
    separated by length. Source: the length term of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) alone;
    separation by Albert and Anderson 1984. Raises ValueError for lists of different lengths and for numbers out of
    range.
    """
    import numpy as np

    y, delta = np.asarray(wins, dtype=np.float64), np.asarray(deltas, dtype=np.float64)
    if y.shape != delta.shape or not np.isfinite(delta).all() or not ((y >= 0) & (y <= 1)).all():
        raise ValueError("wins must be numbers in [0, 1], and deltas as many finite ones")
    n = len(y)
    if n < 2:
        return LcMin(None, None, n, None, "it takes two comparisons at least")
    sd = float(delta.std(ddof=1))
    if sd == 0 and delta[0] != 0:
        return LcMin(None, None, n, None, "the length difference is the same everywhere")
    x = np.tanh(delta / sd) if sd else np.zeros(n)
    won, lost = x[y > 0], x[y < 1]
    if not len(won) or not len(lost):
        return LcMin(None, None, n, None, "every comparison was " + ("lost" if not len(won) else "won"))
    if sd and (lost.max() <= won.min() or won.max() <= lost.min()):
        return LcMin(None, None, n, None, "the length difference alone tells wins from losses")
    design = np.stack([np.ones(n), x], axis=1) if sd else np.ones((n, 1))
    theta = _logistic_fit(design, y)
    if theta is None:
        return LcMin(None, None, n, None, "wins and losses are all but separated by length")
    p = _sigmoid(design @ theta)
    bread = np.linalg.inv((design * (p * (1 - p))[:, None]).T @ design)
    scores = design * (y - p)[:, None]
    covariance = bread @ (scores.T @ scores) @ bread
    value = float(_sigmoid(theta[0]))
    se = value * (1 - value) * math.sqrt(covariance[0, 0])
    return LcMin(value, se, n, (float(theta[0]), float(theta[1]) if sd else 0.0))


def write_outputs(path: Path, rows: Sequence[Output]) -> None:
    """A JSON list of rows, as `alpaca_eval --model_outputs` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(row) for row in rows])


def read_outputs(path: Path, *, complete: bool = True) -> list[Output]:
    """Rows of a JSON list or JSONL (Parquet and CSV as well); columns that the format has not are ignored.

    complete: False lets `output` and `generator` be missing, for a file of instructions. Raises InputError, naming the
    row, for a column that is missing or no text, for an empty instruction and for a second generator.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give one of rows with instruction, output and generator")
    rows: list[Output] = []
    for where, row in file_rows(path):
        if isinstance(row, BadRow):
            raise InputError(f"{where}: {row}")
        found = {}
        for name, needed in (("instruction", True), ("output", complete), ("generator", complete), ("dataset", False)):
            value = row.get(name, None if needed else "")
            if not isinstance(value, str):
                problem = f"`{name}` is no text" if name in row else f"no `{name}`; the row has {', '.join(row)}"
                raise InputError(f"{where}: {problem}")
            found[name] = value
        if not found["instruction"].strip():
            raise InputError(f"{where}: `instruction` is empty; take the row out")
        if rows and found["generator"] != rows[0].generator:
            raise InputError(
                f"{where}: generator {found['generator']!r}, but the rows before are of {rows[0].generator!r}; "
                "a file holds one"
            )
        rows.append(Output(**found))
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows


def export(
    chat: Chat, instructions: Sequence[Output], generator: str, ledger: Ledger, *, seed: int = 0,
    temperature: float = 0.7, top_p: float = 0.9, max_new_tokens: int = 2048,
) -> tuple[list[Output], Figure]:  # fmt: skip
    """The player's answers to the rows' instructions as rows of its own, and how these answers are (`described`).

    max_new_tokens: longest answer in tokens. The defaults are SPPO's sampling settings.
    """
    numbered = _numbered(instructions)
    asked = [
        Asked((Message("user", row.instruction),), {"instruction": row.instruction, "nth": nth})
        for (_, nth), row in numbered.items()
    ]
    said = answers(chat, asked, ledger, seed=seed, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    rows = zip(numbered.values(), said, strict=True)
    return [Output(row.instruction, reply.text, generator, row.dataset) for row, reply in rows], described(said)


def compare(outputs: Sequence[Output], references: Sequence[Output], judge: Judge, ledger: Ledger) -> Figure:
    """Win rate of the outputs against the references' on the same instructions, as it is and length-controlled.

    Every pair is judged in both orders; a word that changes with the order is a tie (`flipped`). `unread` counts the
    replies without a verdict, `unanswered` those that the judge could not give: such a pair counts in no figure.
    Raises InputError for an output whose instruction has no reference.
    """
    theirs = _numbered(references)
    pairs = [(row, theirs.get(key)) for key, row in _numbered(outputs).items()]
    lacking = [row.instruction for row, reference in pairs if reference is None]
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(pairs)} instructions have no reference output; the first is {lacking[0][:60]!r}"
        )
    asked = []
    for ours, reference in pairs:
        assert reference is not None
        for first, second in ((ours, reference), (reference, ours)):
            text = USER.format(instruction=ours.instruction, first=first.output, second=second.output)
            about = {"instruction": ours.instruction, "first": first.generator, "second": second.generator}
            asked.append(Asked((Message("system", SYSTEM), Message("user", text)), about))
    replies = judgements(judge, asked, ledger)
    words = [verdict(reply) for reply in replies]
    orders = list(zip(words[::2], words[1::2], strict=True))
    kept = [
        (value, len(reference.output) - len(ours.output))
        for (ours, reference), (one, other) in zip(pairs, orders, strict=True)
        if reference is not None and (value := agreed(one, other)) is not None
    ]
    wins = [value for value, _ in kept]
    controlled = lc_min(wins, [delta for _, delta in kept])
    counts = Counter(wins)
    return {
        "win_rate": mean_se(wins),
        "LC-min": {"mean": controlled.value, "se": controlled.se, "n": controlled.n, "reason": controlled.reason},
        "theta": controlled.theta,
        "wins": counts[1.0],
        "ties": counts[0.5],
        "losses": counts[0.0],
        "flipped": sum(one is not None and other is not None and one != 1 - other for one, other in orders),
        "judgements": len(replies),
        "unread": sum(reply is not None and word is None for reply, word in zip(replies, words, strict=True)),
        "unanswered": replies.count(None),
        "characters": {
            "output": mean_se(len(ours.output) for ours, _ in pairs),
            "reference": mean_se(len(reference.output) for _, reference in pairs if reference is not None),
        },
    }


def run_alpaca(
    player: Chat | Path, data: Path, out: Path, *, judge: Judge | None = None, generator: str = "player",
    limit: int | None = None, seed: int = 0, temperature: float = 0.7, top_p: float = 0.9, max_new_tokens: int = 2048,
) -> Figure:  # fmt: skip
    """Answer the instructions of `data`, export the answers, and with a judge compare them with the outputs of `data`.

    player: a player, or a file of outputs that were made before, of which with a limit those are taken whose instruction
    is left; `missing` counts the instructions without one. limit: the first so many instructions. `out` gets
    answers.jsonl and judgements.jsonl, row by row as they come (a second run asks nothing again), outputs.json in
    AlpacaEval's format, and result.json, which is returned.
    """
    rows = read_outputs(data, complete=judge is not None)[:limit]
    result: Figure = {"benchmark": "alpaca"}
    if isinstance(player, Chat):
        settings: dict[str, Any] = {
            "seed": seed,
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
        }
        heard = Ledger(out / "answers.jsonl")
        outputs, about = export(player, rows, generator, heard, **settings)
        result |= {"player": player.identity, **settings, "answers": about}
    else:
        made, wanted = _numbered(read_outputs(player)), _numbered(rows)
        outputs = [row for key, row in made.items() if limit is None or key in wanted]
        if not outputs:
            raise InputError(f"{player}: has no output for the first {limit} instructions of {data}; raise the limit")
        result |= {"player": outputs[0].generator, "missing": len(wanted.keys() - made.keys())}
    write_outputs(out / "outputs.json", outputs)
    result |= {"outputs": len(outputs), "empty": sum(not row.output.strip() for row in outputs)}
    if judge is not None:
        result |= {"reference": rows[0].generator, "judge": identity(judge), "judge_prompts": key_of(SYSTEM, USER)[:16]}
        result |= compare(outputs, rows, judge, Ledger(out / "judgements.jsonl"))
    write_json(out / "result.json", result)
    return result


def summary_lines(result: Figure) -> list[str]:
    """A result in words, for the terminal."""
    missing = f"; {result['missing']} instructions have none" if result.get("missing") else ""
    lines = [f"outputs: {result['outputs']}, of which {result['empty']} empty{missing}"]
    if "LC-min" not in result:
        return lines
    controlled = result["LC-min"]
    return [
        *lines,
        f"% won against {result['reference']}; ± one standard error",
        f"  win rate  {shown(result['win_rate'], 100)}",
        f"  LC-min    {shown(controlled, 100)}{controlled['reason'] and ': ' + controlled['reason']}",
        f"{judgements_line(result)}; {result['flipped']} pairs changed with the order",
    ]


def _numbered(rows: Sequence[Output]) -> dict[tuple[str, int], Output]:
    """Rows by instruction and by how often it stood before: some sets have one twice."""
    seen: Counter[str] = Counter()
    numbered = {}
    for row in rows:
        numbered[row.instruction, seen[row.instruction]] = row
        seen[row.instruction] += 1
    return numbered


def _sigmoid(x: Any) -> Any:
    import numpy as np

    return np.exp(-np.logaddexp(0, -x))


def _logistic_fit(design: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """Newton's method with halved steps on a likelihood that has a maximum; `design` [n, k], `y` [n] in [0, 1].

    None where it does not get there in floating point.
    """
    import numpy as np

    def loss(theta: np.ndarray[Any, Any]) -> float:
        z = design @ theta
        return float((np.logaddexp(0, z) - y * z).sum())

    theta = np.zeros(design.shape[1])
    for _ in range(200):
        p = _sigmoid(design @ theta)
        gradient = design.T @ (p - y)
        if np.abs(gradient).max() < 1e-9 * len(y):
            return theta
        try:
            step = np.linalg.solve((design * (p * (1 - p))[:, None]).T @ design, gradient)
        except np.linalg.LinAlgError:
            break
        size = 1.0
        while loss(theta - size * step) > loss(theta) and size > 1e-6:
            size /= 2
        theta = theta - size * step
    return None
