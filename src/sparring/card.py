"""Model cards: what a player is, how it was made, how good it is and how to load it, as the README.md beside it.

A card says what the run's stages say up to the player's own evaluation, and nothing of when or where: the same stages
give the same card. It is no part of a player's identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparring import players
from sparring.evaluate.core import is_share
from sparring.formatting import NONE, figure, visible
from sparring.plugins import is_file_reference
from sparring.rundir.store import read_json, write_text

if TYPE_CHECKING:
    from sparring.config import ModelConfig
    from sparring.rundir.view import RoundView, RunView

FILE = "README.md"
_SHARES = ("sampled", "greedy")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_cards(run: RunView) -> None:
    """Bring the card beside every player that the run made up to date."""
    for number, player in run.players.items():
        if number != run.rounds[0].t:
            file, text = Path(player.path) / FILE, model_card(run, number)
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                write_text(file, text)


def model_card(
    run: RunView,
    number: int,
    *,
    license: str | None = None,
    base_model: str | None = None,
    merged: bool = False,
    adapter: bool | None = None,
) -> str:
    """The card of player `number`, of which nothing but its rounds' settings need be there yet.

    `license` and `base_model` (a Hub id) are those of the start player's own card where they are not given. `merged`: the
    player is an adapter that comes as a whole model. `adapter`: whether it is one; None: by the run's settings.
    """
    made = [r for r in run.rounds if r.t < number]
    is_adapter = (bool(made) and run.config.model.lora_rank > 0) if adapter is None else adapter
    is_adapter = is_adapter and not merged
    front = _front(run, number, made, license, base_model, is_adapter)
    parts = [
        f"# Player {number} of {visible(run.name)}",
        _what(run, number, made),
        *([_rounds(made)] if made else []),
        _data(run),
        _results(run, number),
        _use(run.config.model, is_adapter),
        _versions(run),
    ]
    return "\n\n".join(["---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---", *parts]) + "\n"


def front_matter(file: Path) -> dict[str, Any]:
    """The YAML at the head of a card; empty where there is no card, or none that can be read."""
    try:
        found = re.match(r"---\s*\n(.*?)\n---", file.read_text(encoding="utf-8"), re.DOTALL)
        tree = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _front(
    run: RunView,
    number: int,
    made: Sequence[RoundView],
    license: str | None,
    base_model: str | None,
    is_adapter: bool,
) -> dict[str, Any]:
    start, data = run.config.model.path, run.config.data.path
    local = players.looks_local(start)
    theirs = front_matter(Path(start).expanduser() / FILE) if local else {"base_model": start}
    base = base_model or theirs.get("base_model")
    front: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": license or theirs.get("license"),
        "base_model": base,
        "base_model_relation": ("adapter" if is_adapter else "finetune") if base and made else None,
        "datasets": [data] if _HUB_ID.fullmatch(data) and not players.looks_local(data) else None,
        "tags": ["sparring", "self-play", *dict.fromkeys(r.method for r in made)],
    }
    metrics = [
        {"type": "accuracy", "name": f"{kind} accuracy, held out", "value": round(value["mean"], 6)}
        for kind in _SHARES
        if (value := (run.evaluation(number) or {}).get(kind))
    ]
    if metrics:
        name = Path(data).name
        known = {"name": name, "type": front["datasets"][0] if front["datasets"] else _slug(name)}
        results = [{"task": {"type": "text-generation"}, "dataset": known, "metrics": metrics}]
        front["model-index"] = [{"name": f"{_slug(run.name)}-player-{number}", "results": results}]
    return {name: value for name, value in front.items() if value is not None}


def _what(run: RunView, number: int, made: Sequence[RoundView]) -> str:
    start = run.config.model.path
    name = Path(start).name if players.looks_local(start) else start
    given = run.players.get(run.rounds[0].t)
    origin = f"`{_code(name)}`" + (f" (content hash `{given.sha[:16]}`)" if given else "")
    if not made:
        return f"The model that a run of `sparring` was given: {origin}, unchanged."
    from sparring import methods

    last = made[-1]
    settings = run.config.rounds[len(made) - 1]
    paper = methods.make(settings.method, settings.hyper).paper
    parts = [
        f"Made by round {last.t} of self-play fine-tuning with `sparring`, method `{last.method}` ({paper}), from player "
        f"{_numbered(last, 'start')}. The run began with {origin}."
    ]
    values = {**settings.hyper, **settings.train.identity()}
    parts.append("Settings:\n\n" + "\n".join(f"- {name}: {_placeless(value)}" for name, value in values.items()))
    return "\n\n".join(parts)


def _placeless(value: Any) -> Any:
    """A setting without the folder of the file that it names."""
    named = isinstance(value, str) and is_file_reference(value)
    return re.sub(r"^(verifier:)?.*/", r"\1", value) if named else value


def _numbered(r: RoundView, role: str) -> str:
    player = r.roles.get(role)
    if player is None:
        return NONE
    who = str(player.round) if player.round is not None else f"`{_code(Path(player.path).name)}`"
    return f"{who} (content hash `{player.sha[:16]}`)"


def _rounds(made: Sequence[RoundView]) -> str:
    lines = ["## Rounds", "", "| round | method | roles | groups | steps | alarms |", "|---|---|---|---|---|---|"]
    for r in made:
        roles = ", ".join(
            f"{role} = {player.round if player.round is not None else _code(Path(player.path).name)}"
            for role, player in r.roles.items()
        )
        counts = r.counts
        groups = sum(counts.get("groups", {}).get(name, 0) for name in ("groups", "replayed"))
        last = max((int(row["step"]) for row in r.log), default=0)
        steps, alarms = counts.get("player", {}).get("steps", last), len(r.alarms)
        ended = ", ended early" if counts.get("player", {}).get("ended_early") else ""
        lines.append(f"| {r.t} | {r.method} | {roles or NONE} | {groups:,} | {steps:,} | {alarms}{ended} |")
    lines += ["", "Roles name players by number. An alarm: held-out figures crossed a limit and training went back."]
    return "\n".join(lines)


def _data(run: RunView) -> str:
    file = run.path / "data" / "stage.json"
    record: dict[str, Any] = read_json(file) if file.exists() else {"inputs": {}, "counts": {}}
    counts = record["counts"]
    path = run.config.data.path
    name = Path(path).name if players.looks_local(path) else path
    lines = [
        "## Data",
        "",
        f"`{_code(name)}`: {counts.get('train', 0):,} rows trained on, {counts.get('heldout', 0):,} held out.",
        "",
        *(f"- {_code(what)}: sha256 `{sha}`" for what, sha in record["inputs"].items()),
    ]
    return "\n".join(lines)


def _results(run: RunView, number: int) -> str:
    found = {n: run.evaluation(n) for n in sorted(run.players) if n <= number}
    tables = {n: dict(_means(summary)) for n, summary in found.items() if summary}
    if number not in tables or not any(tables.values()):
        return "## Results\n\nNot evaluated yet."
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    lines = ["| player | made by | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for n, table in tables.items():
        mark = "**" if n == number else ""
        cells = [table.get(name, NONE) for name in names]
        lines.append(f"| {mark}{n}{mark} | {_code(run.made_by(n))} | " + " | ".join(cells) + " |")
    note = (
        "On held-out rows, or on the task that is named, ± one standard error; shares in percent; gold_nll: nats, lower is "
        "better."
    )
    return "\n".join(["## Results", "", *lines, "", note])


def _means(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in summary.items():
        # `task:NAME` is one of the figures `task:NAME:FIGURE`
        if isinstance(value, Mapping) and "mean" in value and not (name.startswith("task:") and name.count(":") == 1):
            yield name.removeprefix("task:").replace(":", " "), figure(value, percent=is_share(name))


def _use(trained: ModelConfig, is_adapter: bool) -> str:
    library, name = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    imports = [f"from {library} import {name}", "from transformers import AutoTokenizer"]
    if not is_adapter:
        imports = [f"from transformers import {name}, AutoTokenizer"]
    load = [f"model = {name}.from_pretrained(path)"]
    if is_adapter and trained.quantize:
        imports = ["import torch", imports[0], "from transformers import AutoTokenizer, BitsAndBytesConfig"]
        load = [
            "bits = BitsAndBytesConfig(  # of the base, as it was in training; without it the base is whole",
            f'    load_in_4bit=True, bnb_4bit_quant_type="{trained.quantize}", bnb_4bit_use_double_quant=True,',
            f"    bnb_4bit_compute_dtype=torch.{trained.compute},",
            ")",
            f"model = {name}.from_pretrained(path, quantization_config=bits, dtype=torch.float32)",
        ]
    lines = [
        "## Use",
        "",
        "```python",
        *imports,
        "",
        'path = "PATH"  # this folder, or its name on the Hub',
        *load,
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        'turns = [{"role": "user", "content": "…"}]',
        'inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        "answer = model.generate(**inputs, do_sample=False, max_new_tokens=256)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]
    return "\n".join(lines)


def _versions(run: RunView) -> str:
    versions = run.env.get("versions", {})
    told = ", ".join(f"{name} {versions[name]}" for name in ("sparring", "torch", "transformers") if versions.get(name))
    return f"## Versions\n\n{told or NONE}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "run"


def _code(text: str) -> str:
    """Text within a table or backticks, which it cannot close."""
    return visible(text).replace("`", "'").replace("|", "\\|").replace("\n", " ")
