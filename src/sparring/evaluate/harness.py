"""Standard suites through lm-evaluation-harness, on a model in memory: nothing is saved and loaded again.

    python -m sparring.evaluate.harness MODEL --suite openllm-v1 --data-dir DATA --limit 100

The harness writes prompts and judges answers; scoring and playing are ours (`bridge.py`). Its library is an extra,
`pip install 'sparring[eval]'`, and is imported when a suite is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring.errors import InputError
from sparring.evaluate.suites import SUITES, Figure, Suite, column_figure, figure_of, files, leaderboard, mean
from sparring.evaluate.suites.files import LocalTask
from sparring.nearest import nearest
from sparring.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger("sparring")

SHOTS_SEED = 1234
"""Seed of the shots' draw: the harness's own, so that prompts are those of published figures."""
TASKS_SEED = 0
"""Seed of what tasks draw themselves (the order of GPQA's choices): the harness's own."""
_LOCAL = {"openllm-v1": files.local_task, "leaderboard-v2": leaderboard.local_task}
_CHANCE = {
    "leaderboard_gpqa": 1 / 4,
    "leaderboard_mmlu_pro": 1 / 10,
    "leaderboard_musr_murder_mysteries": 1 / 2,
    "leaderboard_musr_object_placements": 1 / 5,
    "leaderboard_musr_team_allocation": 1 / 3,
}
"""Share of right answers by guessing, by the beginning of a task's name; BBH's is one in its number of choices."""


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """One figure of a suite."""

    task: str
    metric: str
    value: float
    """Share of right answers, 0 to 1; of a normalised suite's columns, rescaled so that guessing counts 0."""
    se: float | None
    n: int
    """Items."""
    shots: int
    shots_from: str
    """The split that shots came from; empty where the harness chose."""
    version: str
    """The harness's version of the task."""
    hash: str
    """sha256 of the task's items, prompts and targets: equal for the same questions asked in the same way."""
    leaves: tuple[str, ...] = ()
    """The harness's tasks that it is of: a group's need not begin with its name."""


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """What the model said to one item."""

    task: str
    index: int
    """Place in the task's evaluated split."""
    item: str
    """sha256 of the item, the same in every run: players are compared on equal ones."""
    prompt: str
    """sha256 of the prompt."""
    target: str
    logps: tuple[float, ...]
    """Log-prob of each choice, in nats; empty for answers."""
    greedy: tuple[bool, ...]
    """Whether greedy decoding gives that choice."""
    answer: str
    """The answer that was played; empty for choices."""
    metrics: Mapping[str, float]
    """`metric,filter` to this item's value."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    suite: str
    mean: Figure | None
    """Plain mean of the suite's columns; None where only some were run."""
    columns: list[SuiteRow]
    tasks: list[SuiteRow]
    """Every task and every metric the harness gives of it, unscaled."""
    items: list[SuiteItem]
    about: Mapping[str, Any]
    """Versions, settings, files with their hashes, items cut to the context, seconds."""

    def summary(self) -> dict[str, Any]:
        """All but the items, for JSON."""
        rows = {"columns": [asdict(r) for r in self.columns], "tasks": [asdict(r) for r in self.tasks]}
        whole = asdict(self.mean) if self.mean else None
        return {"suite": self.suite, "mean": whole, **rows, "about": dict(self.about)}


def available() -> bool:
    """Whether lm-evaluation-harness is installed."""
    return importlib.util.find_spec("lm_eval") is not None


def run_suite(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, suite: str = "openllm-v1", *, data_dir: str | Path | None = None,
    limit: int | None = None, columns: Sequence[str] | None = None, chat_template: bool | str = False,
    multiturn: bool = True, batch_tokens: int | None = None, context: int | None = None,
    stop_ids: Sequence[int] | None = None, compute: torch.dtype | None = None, seed: int = 0,
    progress: Progress | None = None,
) -> SuiteResult:  # fmt: skip
    """Run a suite's tasks, with their own numbers of shots, on a model in memory.

    data_dir: folder with the data (docs/suites.md); None takes it from the Hub or its cache.
    limit: items of each column, the first ones; tasks of one column (MMLU's subjects) share them evenly, rounded up. None
        takes all.
    columns: some of the suite's columns, by name.
    chat_template: True writes prompts with the tokenizer's template, a Jinja text with that one; `multiturn` makes each
        shot a turn of its own.
    batch_tokens: tokens of a batch; lower it where memory runs out. `logps.pass_tokens` by default.
    context: longest row in tokens; the model's own by default. Longer prompts lose their beginning, as in HFLM.
    stop_ids: end tokens beside the tokenizer's EOS; those of the model's generation configuration by default.
    seed: of sampled answers; the suites' own are greedy.
    progress: is told how far it is; the terminal by default.

    Raises InputError where the harness is not installed, the data is not there, or a setting does not fit.
    """
    from sparring.logps import pass_tokens

    chosen = checked_suite(suite, columns=columns, data_dir=data_dir, limit=limit)
    batch_tokens = pass_tokens(model, compute) if batch_tokens is None else batch_tokens
    if batch_tokens < 1 or (context is not None and context < 2):
        raise InputError("batch_tokens and context count tokens: at least 1 and at least 2")
    if chat_template is True and not tokenizer.chat_template:
        raise InputError("chat_template: the tokenizer has none; give one as Jinja text, or run the suite without")
    from sparring.evaluate.bridge import MAX_GEN_TOKS, Bridge

    started, told = time.monotonic(), progress or Progress()
    if stop_ids is None:
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        stop_ids = [] if own is None else [own] if isinstance(own, int) else own
    lm = Bridge(
        model, tokenizer, batch_tokens=batch_tokens, context=context, stop_ids=stop_ids, compute=compute, seed=seed,
        chat_template=chat_template if isinstance(chat_template, str) else None, progress=told,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    try:
        with contextlib.nullcontext() if progress else told.stage(suite), _quiet():
            loaded = load_tasks(chosen, data_dir)
            for task in loaded.tasks.values():
                if task.OUTPUT_TYPE == "generate_until":
                    lm.room_for(int(task.config.generation_kwargs.get("max_gen_toks", MAX_GEN_TOKS)))
            found = evaluated(lm, loaded, limit=limit, chat=bool(chat_template), multiturn=multiturn)
    finally:
        model.train(was_training)
    if lm.cut:
        log.info(
            "%s: %d requests were longer than the context of %d and lost their beginning", suite, lm.cut, lm.max_length
        )
    about = {
        "versions": {name: _version(name) for name in ("lm_eval", "transformers", "torch", "datasets", "sparring")},
        "data_dir": None if data_dir is None else str(data_dir),
        "files": {str(path): _sha(path) for task in loaded.local.values() for path in task.files},
        "limit": limit,
        "chat_template": hashlib.sha256((_template(chat_template, tokenizer) or "").encode()).hexdigest()
        if chat_template
        else None,
        "multiturn": bool(chat_template) and multiturn,
        "context": lm.max_length,
        "cut": lm.cut,
        "shots_seed": SHOTS_SEED,
        "seconds": round(time.monotonic() - started, 2),
    }
    return _result(chosen, columns is None, found, loaded, about)


def checked_suite(
    name: str, *, columns: Sequence[str] | None = None, data_dir: str | Path | None = None, limit: int | None = None
) -> Suite:
    """The suite that `run_suite` would run. Raises InputError as that does, by what can be told without reading data."""
    if not available():
        raise InputError(f"{name}: lm-evaluation-harness is not installed; pip install 'sparring[eval]'")
    chosen = _suite(name, columns, data_dir, limit)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise InputError(f"{name}: data_dir: {data_dir}: no such folder; docs/suites.md says what is in it")
    for column in chosen.columns:
        if missing := [module for module in column.needs if importlib.util.find_spec(module) is None]:
            raise InputError(f"{column.task}: {', '.join(missing)} not installed; pip install 'sparring[eval]'")
        if "nltk" in column.needs:
            _find_punkt(column.task, folder)
    return chosen


def _find_punkt(task: str, folder: Path | None) -> None:
    """IFEval counts sentences with data of NLTK: told before anything is played, as the harness asks for it at the end.

    It is looked for in `nltk_data` of the local files too; without these it is loaded from NLTK's server, as the harness
    does it.
    """
    import nltk

    own = folder and str(folder / "nltk_data")
    if own and own not in nltk.data.path:
        nltk.data.path.append(own)
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        if folder is None and nltk.download("punkt_tab", quiet=True):
            return
        where = f"{own or '~/nltk_data'}/tokenizers/punkt_tab"
        raise InputError(
            f"{task}: its checker reads NLTK's `punkt_tab`, which is not here; run `python -m nltk.downloader punkt_tab` "
            f"where there is a network, and put the folder that it makes at {where}"
        ) from None


def _suite(name: str, columns: Sequence[str] | None, data_dir: str | Path | None, limit: int | None) -> Suite:
    """The suite that is asked for, with the columns that are."""
    if name not in SUITES:
        raise InputError(f"`{name}` is no suite; there are {', '.join(SUITES)}")
    suite = SUITES[name]
    if limit is not None and limit < 1:
        raise InputError(f"limit counts items of a column, at least 1; not {limit}")
    known = {column.task: column for column in suite.columns}
    for column in columns or ():
        if column not in known:
            raise InputError(f"{name}: has no column `{column}`; did you mean `{nearest(column, known)}`?")
    kept = suite.columns if columns is None else tuple(known[column] for column in dict.fromkeys(columns))
    return Suite(suite.name, kept, suite.normalised)


@dataclass(frozen=True)
class Loaded:
    """A suite's tasks as the harness's own objects."""

    tasks: Mapping[str, Any]
    leaves: Mapping[str, list[str]]
    """Column to the tasks it is made of."""
    local: Mapping[str, LocalTask]
    """What came from local files."""


def load_tasks(suite: Suite, data_dir: str | Path | None) -> Loaded:
    """The harness's own tasks, with the suite's shots and, for `data_dir`, rows from local files.

    Raises InputError for data that is not there.
    """
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict

    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / c.folder for c in suite.columns])
    leaves = {column.task: _leaves(manager, column.task) for column in suite.columns}
    local: dict[str, LocalTask] = {}
    entries: list[dict[str, Any]] = []
    for column in suite.columns:
        for name in leaves[column.task]:
            entry: dict[str, Any] = {"task": name, "num_fewshot": column.shots}
            if data_dir is not None:
                local[name] = found = _LOCAL[suite.name](name, Path(data_dir).expanduser())
                made = DatasetDict({split: Dataset.from_list(rows) for split, rows in found.rows.items()})
                entry |= {"custom_dataset": _given(made), **found.config}
            entries.append(entry)
    try:
        with _seeded():
            tasks = manager.load([{"group": suite.name, "task": entries}])["tasks"]
    except Exception as error:  # a data set that cannot be reached surfaces as many types
        first = str(error).strip().split("\n")[0]
        how = "is its data complete?" if data_dir else "connect to the Hub, or give data_dir with local files"
        raise InputError(f"{suite.name}: the harness cannot load its tasks: {first}; {how}") from error
    for task in tasks.values():
        task.set_fewshot_seed(seed=SHOTS_SEED)
        _process_once(task)
    if "leaderboard_ifeval" in local:
        _can_be_judged(tasks["leaderboard_ifeval"], local["leaderboard_ifeval"].files[0])
    return Loaded(tasks, leaves, local)


def _process_once(task: Any) -> None:
    """Have a task's rows made here, once: the harness makes them again for prompts and for scores.

    GPQA's are shuffled when they are made, so that without this its answers would be judged by another order of choices
    than that of the prompts.
    """
    split = task.config.test_split or task.config.validation_split
    if (process := task.config.process_docs) is not None:
        with _seeded():
            task.dataset[split] = process(task.dataset[split])
        task.config.process_docs = None


def _can_be_judged(ifeval: Any, path: Path) -> None:
    """Judge an empty answer to each item: its checker reads instructions only when all answers were played."""
    with _seeded():
        for number, row in enumerate(ifeval.eval_docs, 1):
            try:
                ifeval.process_results(row, [""])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                why = f"there is no instruction {error}" if isinstance(error, KeyError) else str(error)
                raise InputError(f"{path}: item {number}: IFEval's checker cannot read it: {why}") from None


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Tasks draw from Python's own generator, and IFEval guesses languages at random: the same in every run."""
    state, guesser = random.getstate(), getattr(sys.modules.get("langdetect"), "DetectorFactory", None)
    random.seed(TASKS_SEED)
    if guesser is not None:
        seed, guesser.seed = guesser.seed, TASKS_SEED
    try:
        yield
    finally:
        random.setstate(state)
        if guesser is not None:
            guesser.seed = seed


def _given(made: Any) -> Callable[..., Any]:
    return lambda **_: made


def _leaves(manager: Any, name: str) -> list[str]:
    """The tasks below a task, tag or group of the harness."""
    entry = manager.task_index.get(name)
    if entry is None:
        raise InputError(f"lm-evaluation-harness {_version('lm_eval')} has no task `{name}`; install 0.4.13")
    members = (entry.cfg or {}).get("task")
    if isinstance(members, list):
        return [leaf for member in members for leaf in _leaves(manager, member)]
    return sorted(entry.tags) if entry.yaml_path is None else [name]


def evaluated(lm: Any, loaded: Loaded, *, limit: int | None, chat: bool = False, multiturn: bool = True) -> Any:
    """The harness's results of its tasks for one of its models, with what was said to each item."""
    from lm_eval import evaluate

    first = None if limit is None else {
        task: list(range(min(-(-limit // len(leaves)), len(loaded.tasks[task].eval_docs))))
        for leaves in loaded.leaves.values() for task in leaves
    }  # fmt: skip
    with _seeded():
        return evaluate(
            lm=lm,
            task_dict={"tasks": dict(loaded.tasks), "groups": {}},
            samples=first,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=multiturn,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own log is for its own command line, and so are its bars where there is no terminal."""
    from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    logger = logging.getLogger("lm_eval")
    before, bars = logger.level, is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    shown = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with shown:
            yield
    finally:
        logger.setLevel(before)
        if bars:
            enable_progress_bars()


def _result(
    suite: Suite, whole: bool, found: Mapping[str, Any], loaded: Loaded, about: Mapping[str, Any]
) -> SuiteResult:
    results, samples = found["results"], found["samples"]
    hashes = {task: _task_hash(rows) for task, rows in samples.items()}

    def shots_from(tasks: Sequence[str]) -> str:
        return ", ".join(sorted({loaded.local[task].shots_from for task in tasks if task in loaded.local}))

    def row(tasks: Sequence[str], name: str, metric: str, figure: Figure, shots: int) -> SuiteRow:
        own = [hashes[task] for task in tasks]
        digest = own[0] if len(own) == 1 else hashlib.sha256("".join(own).encode()).hexdigest()
        versions = ", ".join(sorted({str(found["versions"][task]) for task in tasks}))
        n = sum(results[task]["sample_len"] for task in tasks)
        return SuiteRow(
            name, metric, figure.value, figure.se, n, shots, shots_from(tasks) if shots else "", versions, digest,
            tuple(tasks),
        )  # fmt: skip

    columns, rows = [], []
    for column in suite.columns:
        leaves = loaded.leaves[column.task]
        chances = {task: chance(task, samples[task]) for task in leaves} if suite.normalised else None
        figure = column_figure(column, {task: results[task] for task in leaves}, chances)
        columns.append(row(leaves, column.task, " + ".join(column.metrics), figure, column.shots))
        for task in leaves:
            rows += [
                row([task], task, metric, figure_of(results[task], metric), column.shots)
                for metric in _metrics(results[task])
            ]
    figures = [Figure(c.value, c.se) for c in columns]
    items = [item for task, rows in samples.items() for item in suite_items(task, rows)]
    return SuiteResult(suite.name, mean(figures) if whole else None, columns, rows, items, about)


def _metrics(values: Mapping[str, Any]) -> list[str]:
    return [key for key in values if "," in key and not key.split(",")[0].endswith("_stderr")]


def chance(task: str, samples: Sequence[Mapping[str, Any]]) -> float:
    """Share of right answers by guessing: of choices one in their number, of played answers none."""
    for start, share in _CHANCE.items():
        if task.startswith(start):
            return share
    choices = len(samples[0]["resps"])
    return 1 / choices if choices > 1 else 0.0


def suite_items(task: str, samples: Sequence[Mapping[str, Any]]) -> list[SuiteItem]:
    """One row per item from the harness's one per item and filter."""
    by_item: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_item.setdefault(sample["doc_id"], []).append(sample)
    items = []
    for index, same in by_item.items():
        first = same[0]
        said = [response[0] for response in first["resps"]]
        played = isinstance(said[0], str)
        metrics = {f"{name},{s['filter']}": _number(s[name]) for s in same for name in s["metrics"]}
        items.append(
            SuiteItem(
                task,
                index,
                first["doc_hash"],
                first["prompt_hash"],
                str(first["target"]),
                () if played else tuple(float(logp) for logp, _ in said),
                () if played else tuple(bool(greedy) for _, greedy in said),
                said[0] if played else "",
                metrics,
            )
        )
    return items


def _number(value: Any) -> float:
    """A metric's value of one item; of a list (one per instruction), its mean."""
    return float(value) if not isinstance(value, list | tuple) else math.fsum(map(float, value)) / len(value)


def _task_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """As the harness's own tracker makes it."""
    parts = (s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _template(chat_template: bool | str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    given: Any = chat_template if isinstance(chat_template, str) else tokenizer.chat_template
    return None if given is None else str(given)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _sha(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def table(result: SuiteResult) -> str:
    """A suite's columns as text, in percent with standard errors."""
    lines = [f"{'task':<22}{'shots':>6}{'items':>7}{'percent':>16}  metric"]
    for row in result.columns:
        lines.append(f"{row.task:<22}{row.shots:>6}{row.n:>7}{_percent(row.value, row.se):>16}  {row.metric}")
    if result.mean is not None:
        lines.append(f"{'mean':<22}{'':>6}{'':>7}{_percent(result.mean.value, result.mean.se):>16}")
    about = result.about
    lines.append(f"context {about['context']}, {about['cut']} requests cut, {about['seconds']:.0f} s")
    return "\n".join(lines)


def _percent(value: float, se: float | None) -> str:
    return f"{100 * value:.2f}" + (f" ± {100 * se:.2f}" if se is not None else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite on a model folder or Hub id, print its table, and write its figures and items where asked to."""
    import argparse

    from sparring import players
    from sparring.config import ModelConfig
    from sparring.errors import told
    from sparring.prompts import load_tokenizer
    from sparring.rundir.store import write_json, write_shard

    parser = argparse.ArgumentParser(prog="python -m sparring.evaluate.harness", description=main.__doc__)
    parser.add_argument("model", help="a Hugging Face folder or a Hub id")
    parser.add_argument("--suite", default="openllm-v1", help=f"one of {', '.join(SUITES)}")
    parser.add_argument("--data-dir", help="local files instead of the Hub")
    parser.add_argument("--limit", type=int, help="items of each column")
    parser.add_argument("--columns", help="some of the suite's columns, with commas")
    parser.add_argument("--chat-template", action="store_true", help="write prompts with the tokenizer's chat template")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a batch")
    parser.add_argument("--context", type=int, help="longest row in tokens, in place of the model's own")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, help="folder for summary.json and the items")
    given = parser.parse_args(arguments)
    config = ModelConfig(path=given.model, threads=given.threads)
    try:
        result = run_suite(
            players.load_model(given.model, config),
            load_tokenizer(given.model),
            given.suite,
            data_dir=given.data_dir,
            limit=given.limit,
            columns=given.columns.split(",") if given.columns else None,
            chat_template=given.chat_template,
            batch_tokens=given.batch_tokens,
            context=given.context,
            stop_ids=players.stop_ids(given.model, config),
            compute=players.compute_dtype(config),
        )
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            write_json(given.out / "summary.json", result.summary())
            write_shard(given.out / "items.parquet", SuiteItem, result.items)
    except Exception as error:
        if (known := told(error)) is None:
            raise
        print(known[0], file=sys.stderr)
        return known[1]
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
