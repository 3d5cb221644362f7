"""The command line; heavy libraries load inside the commands that need them.

Exit codes: 0 done, 1 failed, 2 bad input (one line, no traceback), 130 interrupted and resumable.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparring.errors import InputError, Interrupted, told

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from sparring.judge.replies import Judge
    from sparring.rundir.view import RunView

app = typer.Typer(
    name="sparring",
    help="Self-play fine-tuning of language models: a model grows stronger on its own SFT data by playing itself.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings, e.g. train.lr=1e-6")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]
RoundNumber = Annotated[int, typer.Option("--round", help="The round, from 0 (preparation rounds are −1, −2 …).")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = app(given or ["--help"], standalone_mode=False, obj=shlex.join(["sparring", *given]))
        return result if isinstance(result, int) else 0
    except Exception as error:
        line = told(error)
        if line is None:
            raise
        message, code = line
    sys.stderr.write(f"sparring: {message}\n")
    return code


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors and results.")] = False,
) -> None:
    if version:
        from sparring import __version__

        typer.echo(f"sparring {__version__}")
        raise typer.Exit
    logger = logging.getLogger("sparring")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seeds task, model, training and sampling.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs/demo"),
) -> None:
    """SFT, three rounds of SPIN and the honest controls on a built-in task: minutes on a CPU, no downloads."""
    from sparring.demo import demo as play_demo

    with _resumable(f"sparring demo --seed {seed} --out {out}"):
        table = play_demo(out, seed)
    _print(table)
    typer.echo(f"report: {out / 'report.html'}")


@app.command()
def run(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE|RUN]", help="A YAML recipe, or a run to continue.")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="model.path: a Hugging Face folder or Hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="data.path: a file, folder or Hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="The method of every round.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many rounds.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Do stages again that changed settings touch.")] = False,
) -> None:
    """Start a run, or continue it: the same command does both."""
    from sparring import api, report, views

    source, settings = _recipe(recipe, overrides or [], model, data, method, rounds)
    with _resumable(context.obj):
        view = api.run(source, settings, out=out, redo=redo)
    page = report.refresh_report(view, view.path / "report.html")
    _print(views.results(view))
    typer.echo(f"report: {page}")


def _stage_command(name: str, text: str) -> None:
    def command(path: Run, t: RoundNumber) -> None:
        from sparring import api, views

        with _resumable(f"sparring {name} {path} --round {t}"):
            view = api.run_stage(path, name, t)
        _print(views.status(view))

    command.__doc__ = text
    app.command(name)(command)


_stage_command("play", "One stage: this round's opponent answers the prompts.")
_stage_command("judge", "One stage: what the method's verifier or scorer says of the answers.")
_stage_command("pair", "One stage: samples and gold answers become groups.")
_stage_command("freeze", "One stage: the frozen players' log-probs of the groups.")
_stage_command("hold", "One stage: held-out answers of the round's start, which its guard reads.")
_stage_command("train", "One stage: groups to the next player.")


@app.command("eval")
def evaluate(
    context: typer.Context,
    path: Run,
    t: Annotated[int | None, typer.Option("--round", help="The player that this round made.")] = None,
    player: Annotated[str | None, typer.Option(help="A player by number, or `best`, instead of --round.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="The recipe's tasks by name, JSONL files or suites, with commas.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare with this player, N or RUN:N, by stored answers; evaluates nothing.")
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="With --against: who judges the win rate.")] = None,
    verifier: Annotated[str | None, typer.Option(help="Of tasks: who checks the answers.")] = None,
    samples: Annotated[int | None, typer.Option(min=0, help="Of tasks: sampled answers per prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of tasks: the first so many items.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Of suites: the folder of their local files.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Do again what was done with other options.")] = False,
) -> None:
    """Evaluate a player: on held-out prompts, on tasks, or against another player by stored answers."""
    from sparring import api, preview, views
    from sparring.rundir.view import RunView

    if (t is None) == (player is None):
        raise InputError("eval: give one of --round t (the player that it made) and --player N")
    named = [name for name in (tasks or "").split(",") if name]
    of_tasks: dict[str, object] = {
        "--verifier": verifier,
        "--samples": samples,
        "--limit": limit,
        "--data-dir": data_dir,
        "--redo": redo,
    }
    idle = of_tasks if against is not None or not named else {}
    idle = idle | ({"--scorer": scorer} if against is None else {})
    if given := [name for name, value in idle.items() if value is not None and value is not False]:
        what = "with --against" if against is not None else "with --tasks" if named else "without --tasks"
        raise InputError(f"eval: {given[0]} says nothing {what}; leave it out")
    if against is None and not named:
        if t is None:
            raise InputError("eval: --player goes with --tasks or --against; a round's own evaluation is --round t")
        with _resumable(context.obj):
            view = api.run_stage(path, "eval", t)
        _print(views.status(view))
        return
    view = RunView(path)
    number = preview.chosen_number(view, str(t + 1) if t is not None else player or "")
    if against is not None:
        run, _, name = against.rpartition(":")
        other = RunView(run) if run else view
        _print(_versus(view, number, other, preview.chosen_number(other, name), named, scorer))
        return
    with _resumable(context.obj):
        view = api.evaluate_tasks(
            path, named, number, verifier=verifier, samples=samples, limit=limit, data_dir=data_dir, redo=redo
        )
    _print(views.tasks(view, number))


def _versus(
    view: RunView, number: int, other: RunView, against: int, tasks: Sequence[str], scorer: str | None
) -> RenderableType:
    from sparring import views
    from sparring.config import TaskConfig
    from sparring.evaluate import versus_players
    from sparring.judge.score import load_scorer

    judge = load_scorer(scorer) if scorer else None
    labels = [TaskConfig(path=name).label for name in tasks] or [""]
    found = {task: versus_players(view, number, other, against, task=task or None, scorer=judge) for task in labels}
    same = view.path == other.path
    names = [f"player {n}" if same else f"{run.name}: player {n}" for run, n in ((view, number), (other, against))]
    return views.versus(names[0], names[1], found)


@app.command()
def status(
    path: Run,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until the run is finished.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs: one JSON object; with --watch a line each.")
    ] = False,
) -> None:
    """What is done and what is being done: stage, progress, tokens/s, time left, margin, alarms, figures."""
    from sparring import views
    from sparring.rundir.view import RunView
    from sparring.views import live

    if watch:
        # Who looks on and stops looking has interrupted nothing: 0, not 130
        with contextlib.suppress(KeyboardInterrupt):
            live.watch(path, None if as_json else _console())
    elif as_json:
        typer.echo(json.dumps(live.report(RunView(path)), ensure_ascii=False))
    else:
        _print(views.status(RunView(path)))


@app.command()
def show(
    path: Run,
    what: Annotated[str, typer.Argument(help="`samples` or `groups`.")] = "groups",
    t: RoundNumber = 0,
    number: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 5,
) -> None:
    """Samples, or pairs side by side with what differs marked."""
    from sparring import views
    from sparring.rundir.view import RunView

    views_by_name = {"samples": views.show_samples, "groups": views.show_groups}
    if what not in views_by_name:
        raise InputError(f"show: `{what}` is unknown; write samples or groups")
    _print(views_by_name[what](RunView(path), t, number))


@app.command()
def report(
    path: Run,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Load the players and score the shown answers, to colour their tokens.")
    ] = False,
) -> None:
    """Write the run's report.html."""
    from sparring.report import write_report
    from sparring.rundir.view import RunView

    view = RunView(path)
    if tokens:
        from sparring.report.rescore import rescore

        rescore(view)
    typer.echo(f"report: {write_report(view, path / 'report.html')}")


@app.command()
def export(
    path: Run,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[
        str, typer.Option("--format", help="hub: a player; trl: a round's pairs for DPOTrainer; parquet: its groups.")
    ] = "hub",
    player: Annotated[str | None, typer.Option(help="hub: a player's number, or `best` (the default).")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="hub: an adapter player as a whole model.")] = False,
    license: Annotated[str | None, typer.Option(help="hub: for the card, e.g. apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="hub: for the card, the start's Hub id.")] = None,
    t: Annotated[int | None, typer.Option("--round", help="trl, parquet: the round; default the last.")] = None,
    standard: Annotated[bool, typer.Option("--standard", help="trl: texts instead of messages.")] = False,
) -> None:
    """Take something out of a run: a player for the Hub, a round's pairs for TRL, or its groups as Parquet."""
    from sparring import export as exporting
    from sparring.rundir.view import RunView

    hub_only: dict[str, object] = {
        "--player": player,
        "--merge": merge,
        "--license": license,
        "--base-model": base_model,
    }
    others: dict[str, dict[str, object]] = {
        "hub": {"--round": t, "--standard": standard},
        "trl": hub_only,
        "parquet": hub_only | {"--standard": standard},
    }
    if form not in others:
        raise InputError(f"export: `{form}` is no format; write hub, trl or parquet")
    if idle := [name for name, value in others[form].items() if value is not None and value is not False]:
        raise InputError(f"export: {idle[0]} says nothing with --format {form}; leave it out")
    view = RunView(path)
    if form == "hub":
        chosen = player or "best"
        number = exporting.hub(view, chosen, out, merge=merge, license=license, base_model=base_model)
        typer.echo(f"{out}: player {number} of {path}")
    elif form == "trl":
        made = exporting.trl(view, t, out, standard=standard)
        skipped = f", {made.skipped} groups are none" if made.skipped else ""
        typer.echo(
            f"{out}: {made.rows} pairs{skipped}; TRL gives {made.same} of the first {made.probed} the same token ids"
        )
    else:
        typer.echo(f"{out}: {exporting.parquet(view, t, out).rows} groups")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Runs' directories.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write  [default: compare.html in the first run]")
    ] = None,
) -> None:
    """Runs side by side: best players, paired differences, cost; as a table and as a page with overlaid curves."""
    from sparring import compare as side_by_side
    from sparring import report, views
    from sparring.rundir.view import RunView

    key, rows = side_by_side.compare([RunView(path) for path in runs])
    page = report.write_comparison(key, rows, out or runs[0] / "compare.html")
    _print(views.compare(key, rows))
    typer.echo(f"page: {page}")


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="A method's name, or ./file.py:name.")] = None) -> None:
    """Every method: objective, paper, defaults; or one in full."""
    from sparring import methods as known
    from sparring import views

    _print(views.method(name) if name else views.methods(known.names()))


@app.command()
def fork(
    path: Run,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The new run's directory.")],
    overrides: Overrides = None,
    t: Annotated[int | None, typer.Option("--round", help="Share nothing from this round on.")] = None,
) -> None:
    """A new run with other settings that shares every stage they do not touch."""
    from sparring import api

    shared = api.fork(path, new, overrides or [], t=t)
    typer.echo(f"{new}: shares {', '.join(shared) or 'nothing'}; start it with: sparring run {new}")


@app.command()
def init(path: Annotated[str, typer.Argument(help="File to write; `-` prints it.")] = "recipe.yaml") -> None:
    """Write a recipe with every key, its default and what it means."""
    from sparring.config.init import recipe_text

    if path == "-":
        typer.echo(recipe_text(), nl=False)
        return
    if Path(path).exists():
        raise InputError(f"{path}: exists already; give another name")
    Path(path).write_text(recipe_text(), encoding="utf-8")
    typer.echo(f"wrote {path}; set model.path and data.path, then: sparring check {path}")


@app.command()
def check(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE|RUN]", help="A YAML recipe or a run.")] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="model.path.")] = None,
    data: Annotated[str | None, typer.Option(help="data.path.")] = None,
) -> None:
    """Show what would be trained on: tokens and loss mask, lengths, what is cut, overlap; loads no weights."""
    from sparring import preview, views

    source, settings = _recipe(recipe, overrides or [], model, data, None, None)
    seen = preview.check(source, settings)
    _print(views.check(seen.rendering.rows, seen.renderer, seen.counts, train=seen.train, heldout=seen.heldout))


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE|RUN]", help="A YAML recipe or a run.")] = None,
    overrides: Overrides = None,
    hardware: Annotated[str, typer.Option(help="cpu (this machine), or NUMBERxDEVICE: 8xA100-80G, 1xH200 …")] = "cpu",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's speed at the model's shape, a minute at most.")
    ] = False,
    prompts: Annotated[int | None, typer.Option(min=1, help="Training examples, where the data is not here.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Length of their prompts.")] = None,
    answer_tokens: Annotated[int | None, typer.Option(min=1, help="Length of their gold answers.")] = None,
    sample_tokens: Annotated[int | None, typer.Option(min=1, help="Length of played answers; as gold ones.")] = None,
    model: Annotated[str | None, typer.Option(help="model.path.")] = None,
    data: Annotated[str | None, typer.Option(help="data.path.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """What a run will cost: operations, memory per device, time and disk of every stage, and what makes it fit."""
    from sparring import cost
    from sparring.views import cost as view

    source, settings = _recipe(recipe, overrides or [], model, data, None, None)
    found = cost.plan(
        source, settings, hardware=hardware, calibrate=calibrate, prompts=prompts, prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens, sample_tokens=sample_tokens,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(view.as_json(found.estimate)))
    else:
        _print(view.plan(found))


@app.command("try")
def try_players(
    path: Run,
    players: Annotated[str, typer.Option(help="Players by number or `best`, with commas.")] = "0,best",
    prompt: Annotated[str | None, typer.Option(help="Answer this one prompt and stop.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Fix the randomness.")] = None,
) -> None:
    """Type a prompt, see the players answer side by side; an empty line or Ctrl-D ends it."""
    from sparring import preview, views
    from sparring.rundir.view import RunView

    view = RunView(path)
    chosen = preview.chosen_players(view, [name.strip() for name in players.split(",")])
    bench = preview.Bench(view, list(dict.fromkeys(chosen)))
    for text in [prompt] if prompt is not None else _typed_prompts():
        _print(views.answers(bench.answers(text, temperature=temperature, seed=seed)))


JUDGE_HELP = "A model's folder, http://host:port/v1 with --judge-model, or ./file.py:name."
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="The model's name at an endpoint.")]
KeyVariable = Annotated[str | None, typer.Option("--key-env", help="Environment variable with the endpoint's key.")]
Concurrency = Annotated[int | None, typer.Option("--concurrency", min=1, help="Requests to an endpoint at a time.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds for an endpoint's reply  [default: 120]")]
Retries = Annotated[int | None, typer.Option("--retries", min=0, help="Further tries of a request  [default: 5]")]
PlayerPath = Annotated[str, typer.Argument(metavar="PLAYER", help="A model's folder or Hub id; RUN/best is one.")]


@app.command("mt-bench")
def mt_bench(
    context: typer.Context,
    player: PlayerPath,
    data: Annotated[Path, typer.Option(help="Folder with MT-Bench's questions, references and judge prompts.")],
    judge: Annotated[str, typer.Option(help=JUDGE_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for answers, judgements and result.")] = Path("runs/mt_bench"),
    judge_model: JudgeModel = None,
    key_env: KeyVariable = None,
    concurrency: Concurrency = None,
    timeout: Timeout = None,
    retries: Retries = None,
    baseline: Annotated[str | None, typer.Option(help="Judge pairwise against this player, in both orders.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions of each category.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seeds the answers.")] = 0,
) -> None:
    """MT-Bench: two-turn answers of a player, graded by a judge; nothing is asked twice."""
    from sparring.config import ModelConfig
    from sparring.evaluate.mt_bench import run_mt_bench, summary_lines
    from sparring.play.chat import chat

    with _resumable(context.obj):
        result = run_mt_bench(
            chat(ModelConfig(path=player)),
            _judge(judge, judge_model, key_env, concurrency, timeout, retries),
            data,
            out,
            baseline=chat(ModelConfig(path=baseline)) if baseline else None,
            limit=limit,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
    typer.echo("\n".join([*summary_lines(result), f"result: {out / 'result.json'}"]))


@app.command()
def alpaca(
    context: typer.Context,
    player: Annotated[str, typer.Argument(metavar="PLAYER", help="A model's folder or Hub id, or a file of outputs.")],
    data: Annotated[Path, typer.Option(help="Rows with `instruction`; to compare also `output`, `generator`.")],
    judge: Annotated[str | None, typer.Option(help=JUDGE_HELP)] = None,
    out: Annotated[Path, typer.Option(help="Folder for answers, outputs, judgements and result.")] = Path(
        "runs/alpaca"
    ),
    judge_model: JudgeModel = None,
    key_env: KeyVariable = None,
    concurrency: Concurrency = None,
    timeout: Timeout = None,
    retries: Retries = None,
    generator: Annotated[str | None, typer.Option(help="The player's name in outputs.json; its folder's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many instructions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seeds the answers.")] = 0,
) -> None:
    """AlpacaEval's format: export a player's answers; with a judge the win rate, as it is and length-controlled."""
    from sparring.config import ModelConfig
    from sparring.evaluate.alpaca import run_alpaca, summary_lines
    from sparring.play.chat import chat

    outputs = Path(player).suffix in (".json", ".jsonl")
    with _resumable(context.obj):
        result = run_alpaca(
            Path(player) if outputs else chat(ModelConfig(path=player)),
            data,
            out,
            judge=None if judge is None else _judge(judge, judge_model, key_env, concurrency, timeout, retries),
            generator=generator or Path(player).resolve().name,
            limit=limit,
            seed=seed,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
    typer.echo("\n".join([*summary_lines(result), f"result: {out / 'result.json'}"]))


def _judge(
    name: str, model: str | None, key_env: str | None, concurrency: int | None, timeout: float | None,
    retries: int | None,
) -> Judge:  # fmt: skip
    from sparring.judge.replies import load_judge

    settings = {"api_key_env": key_env, "concurrency": concurrency, "timeout": timeout, "retries": retries}
    return load_judge(name, model=model, **{key: value for key, value in settings.items() if value is not None})


def _typed_prompts() -> Iterator[str]:
    while True:
        try:
            text = input("prompt> ")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _recipe(
    recipe: str | None,
    overrides: Sequence[str],
    model: str | None,
    data: str | None,
    method: str | None,
    rounds: int | None,
) -> tuple[Path | dict[str, Any], list[str]]:
    """Flags and overrides on top of a recipe, a run or nothing."""
    settings = list(overrides)
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        settings, recipe = [recipe, *settings], None
    # JSON is YAML that stays text: a folder named 2024 is no number
    paths = (("model.path", model), ("data.path", data))
    settings += [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in paths if value is not None]
    if recipe is not None and (method is not None or rounds is not None):
        how = "write rounds.0.repeat=… or rounds.0.method=… instead of --rounds and --method"
        raise InputError(f"{recipe}: has rounds of its own; {how}")
    if method is not None or rounds is not None:
        entry = {"method": method or "spin", "repeat": rounds or 3}
        settings.insert(0, f"rounds=[{json.dumps(entry, ensure_ascii=False)}]")
    if recipe is None and model is None and not any(s.startswith("model.path=") for s in settings):
        raise InputError("give a recipe (`sparring init` writes one), a run to continue, or --model and --data")
    return ({} if recipe is None else Path(recipe)), settings


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM leave a run that the same command continues; say so."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; nothing is lost, continue with: {command}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # A pipe has no width; 80 columns would fold every table
    return console if console.is_terminal else Console(width=140)


def _print(what: RenderableType) -> None:
    _console().print(what)


if __name__ == "__main__":
    sys.exit(main())
