"""One typed, frozen tree per run, with every default and what it means; `recipe.py` makes it from YAML and flags.

Fields marked `execution` say how, not what: they are recorded in the run but not part of any stage's identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict

Tree = dict[str, Any]


def _doc(default: Any, description: str, *, execution: bool = False, **limits: Any) -> Any:
    extra: JsonDict | None = {"execution": True} if execution else None
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, which would pass as 1.
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a number or text is wanted")
        return value

    def identity(self) -> Tree:
        """The fields that change results, for a stage's hash."""
        return {
            name: getattr(self, name)
            for name, spec in type(self).model_fields.items()
            if not (isinstance(spec.json_schema_extra, dict) and spec.json_schema_extra.get("execution"))
        }


class ModelConfig(Section):
    """The model that self-play starts from, and how it computes."""

    path: str = _doc("", "Where self-play starts: a local Hugging Face folder or a Hub id. Required.")
    revision: str | None = _doc(None, "Hub revision; pin it, published checkpoints have been replaced.")
    chat_template: str | None = _doc(
        None, "A Jinja file that replaces the tokenizer's chat template, or `plain` for the format without one."
    )
    compute: Literal["auto", "float32", "bfloat16", "float64"] = _doc(
        "auto",
        "Precision of forward passes; weights stay float32 masters. "
        "auto: bfloat16 on CUDA, else float32, settled when the run is made.",
    )
    attention: str | None = _doc(
        None, "transformers' attn_implementation where the plain path runs; None leaves its choice.", execution=True
    )
    logps: Literal["auto", "plain"] = _doc(
        "auto", "auto: log-probs without padding where the model allows it; plain: a padded row each.", execution=True
    )
    compile: Literal["auto", "always", "never"] = _doc(
        "auto",
        "torch.compile in one process: of the layers in training on the fast path of log-probs, of the decoder in play on a "
        "CPU. auto: where that takes five minutes or more and a timed trial says that it pays, kept in the run's "
        "compile.json; always: without a trial.",
        execution=True,
    )
    device: str = _doc("auto", "`auto`, `cpu`, `cuda` or `cuda:N`.", execution=True)
    threads: int | Literal["auto"] | None = _doc(
        "auto",
        "CPU threads of torch; auto: as many as are fastest, timed once and written to the run's threads.json; "
        "None leaves torch's choice.",
        execution=True,
    )
    trust_remote_code: bool = _doc(False, "Let a model repository run its own Python. Off unless you trust it.")
    lora_rank: int = _doc(
        0, "Train low-rank adapters on the frozen start player; 0 trains all weights. Dropout is always off.", ge=0
    )
    lora_alpha: float | None = _doc(None, "Adapters are scaled by alpha / rank; None: twice the rank.", gt=0)
    lora_targets: Literal["all-linear"] | tuple[str, ...] = _doc(
        "all-linear", "Names of the layers that get one, for example [q_proj, v_proj]; all-linear: all but the output."
    )
    use_rslora: bool = _doc(
        False, "Scale adapters by alpha / sqrt(rank) instead (rsLoRA); lora_alpha must then be given."
    )
    quantize: Literal["nf4", "fp4"] | None = _doc(
        None,
        "Hold the base of adapters in 4 bits per weight (QLoRA), in the format nf4 or fp4; None: in float32. "
        "Needs bitsandbytes.",
    )

    @field_validator("use_rslora")
    @classmethod
    def _rslora_has_its_alpha(cls, use_rslora: bool, info: ValidationInfo) -> bool:
        if use_rslora and not (info.data.get("lora_rank") and info.data.get("lora_alpha")):
            raise ValueError(
                "needs model.lora_rank above 0 and a model.lora_alpha, which is divided by the rank's root"
            )
        return use_rslora

    @field_validator("threads", mode="before")
    @classmethod
    def _threads_are_some(cls, threads: Any) -> Any:
        # A union's own errors name its branches
        if threads in (None, "auto") or (isinstance(threads, int) and threads > 0):
            return threads
        raise ValueError("must be auto, null or a number greater than 0")

    @field_validator("quantize")
    @classmethod
    def _only_bases_are_quantised(cls, quantize: str | None, info: ValidationInfo) -> str | None:
        if quantize and not info.data.get("lora_rank"):
            raise ValueError("needs model.lora_rank above 0: only a frozen base is quantised")
        if quantize and info.data.get("compute") == "float64":
            raise ValueError("computes in float32 or bfloat16; set model.compute")
        return quantize


class DataConfig(Section):
    """What to train on and what to hold out."""

    path: str = _doc("", "JSONL, JSON, Parquet or CSV file, `datasets` folder, or Hub id. Required.")
    name: str | None = _doc(None, "Configuration of a Hub data set; of a local folder, the folder in it.")
    split: str = _doc("train", "Split to train on, for sources that have splits.")
    format: Literal[
        "auto", "messages", "prompt_completion", "question_answer", "alpaca", "sharegpt", "spin", "preference"
    ] = _doc("auto", "Row format; auto tells it from the column names.")
    columns: dict[str, str] = _doc(
        {},
        "For other column names, ours to yours: prompt, completion, system, messages, generated; "
        "in format preference, completion is the chosen answer and generated the rejected one.",
    )
    turns: Literal["last", "first"] = _doc(
        "last",
        "Which answer of a conversation is trained on, all before it being the prompt: its last, or its first, as the "
        "released SPIN takes UltraChat.",
    )
    limit: int | None = _doc(None, "Use at most this many training examples, the first after a seeded shuffle.", gt=0)
    heldout: str | None = _doc(None, "File of held-out examples; otherwise they are taken from the training data.")
    heldout_split: str | None = _doc(None, "Split that holds them, in `heldout` or else in `path`.")
    heldout_size: int | float = _doc(
        0.05, "Without a given split: how many prompts (int) or which share (float) to hold out, chosen by seed.", ge=0
    )
    gold_only: bool = _doc(False, "Ignore a `generated` column instead of taking it as round 0's samples.")
    on_bad_row: Literal["fail", "skip"] = _doc("fail", "Stop at a bad row, or skip and count it.")
    max_prompt_tokens: int | None = _doc(
        None, "Longest prompt; None: the model's context less the longest answer.", gt=0
    )
    max_answer_tokens: int | None = _doc(
        None, "Longest trained answer; None: what the context leaves after the prompt.", gt=0
    )
    long_prompt: Literal["fail", "drop", "keep_end"] = _doc(
        "fail", "A prompt over the limit: stop, drop the row, or keep its end; counted and reported."
    )
    long_answer: Literal["cut", "drop"] = _doc(
        "cut", "A gold answer over the limit: cut it (it then gets no end token) or drop the row; counted and reported."
    )


class Sampling(Section):
    """A section whose `engine` says who samples."""

    if TYPE_CHECKING:
        engine: str

    @field_validator("engine", check_fields=False)
    @classmethod
    def _engine_is_known(cls, engine: str) -> str:
        if engine in ("hf", "vllm") or engine.startswith(("http://", "https://")):
            return engine
        raise ValueError("must be hf, vllm, or a server's address (http://host:port/v1)")

    @property
    def engine_kind(self) -> Literal["hf", "vllm", "server"]:
        """The engine without its address."""
        return "hf" if self.engine == "hf" else "vllm" if self.engine == "vllm" else "server"

    def identity(self) -> Tree:
        """The fields that change results: the kind of engine where it is not the built-in one, and no address."""
        fields = {name: value for name, value in super().identity().items() if name != "engine"}
        return fields if self.engine_kind == "hf" else fields | {"engine": self.engine_kind}


class PlayConfig(Sampling):
    """How the opponent answers."""

    samples: int = _doc(1, "Answers per prompt.", gt=0)
    temperature: float = _doc(1.0, "Sampling temperature; 0 is greedy. The paper gives none.", ge=0)
    top_p: float = _doc(1.0, "Nucleus sampling; 1 is off. The paper gives none.", gt=0, le=1)
    top_k: int = _doc(0, "Keep the k likeliest tokens; 0 is off.", ge=0)
    max_new_tokens: int = _doc(256, "Longest answer, in tokens; a longer one is cut and gets no end token.", gt=0)
    batch_size: int = _doc(64, "Prompts decoded together.", execution=True, gt=0)
    chunk: int = _doc(512, "Prompts per written shard: what a killed run can lose.", gt=0)
    engine: str = _doc(
        "hf",
        "Who samples: hf (built in), vllm (started and ended by the stage), or the address of an OpenAI-compatible server, "
        "http://host:port/v1 (docs/engines.md).",
    )


class EngineConfig(Section):
    """The engine of `play` and `evaluate` where it is not the built-in one; docs/engines.md."""

    model: str | None = _doc(
        None,
        "A server's name of the player; {player} in it stands for the player's number. None: the only model that it lists.",
        execution=True,
        min_length=1,
    )
    api_key_env: str | None = _doc(None, "Environment variable that holds a server's key.", execution=True)
    parallel: int = _doc(64, "Requests at a time to each server.", execution=True, gt=0)
    timeout: float = _doc(600.0, "Seconds without a byte before a request is tried again.", execution=True, gt=0)
    retries: int = _doc(5, "Tries of a request after the first.", execution=True, ge=0)
    max_gap: float | None = _doc(
        0.05,
        "Alarm where the engine's log-probs differ from ours by more on average, in nats per token; null is off.",
        execution=True,
        gt=0,
    )
    python: str | None = _doc(
        None, "The Python of the environment that holds vllm; None: this one. Or a command on the PATH.", execution=True
    )
    tensor_parallel: int = _doc(1, "GPUs that one vllm is spread over.", execution=True, gt=0)
    replicas: int | None = _doc(
        None,
        "How many vllm share the prompts; None: as many as the visible GPUs allow, one without GPU.",
        execution=True,
        gt=0,
    )
    gpu_memory: float = _doc(0.9, "Share of a GPU's memory that vllm takes.", execution=True, gt=0, le=1)
    startup: float = _doc(900.0, "Seconds that vllm may take until it is ready.", execution=True, gt=0)
    arguments: tuple[str, ...] = _doc(
        (), "Further arguments of `vllm serve`, for example [--max-model-len, '4096']; part of the samples' identity."
    )


class TrainConfig(Section):
    """The optimizer and its schedule."""

    optimizer: Literal["rmsprop", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = _doc(
        "rmsprop",
        "rmsprop (the paper), adamw, or bitsandbytes' AdamW: adamw_8bit, paged_adamw_8bit, paged_adamw_32bit.",
    )
    lr: float = _doc(5e-7, "Peak learning rate. The paper: 5e-7, 5e-7, 1e-7, 1e-7.", gt=0)
    betas: tuple[float, float] = _doc((0.9, 0.999), "AdamW's betas.")
    eps: float = _doc(1e-8, "The optimizer's epsilon.", gt=0)
    weight_decay: float = _doc(
        0.0, "Decoupled (AdamW) or L2 (RMSprop) decay of matrices; norms and biases have none.", ge=0
    )
    schedule: Literal["linear", "cosine", "constant"] = _doc("linear", "Learning rate after warm-up.")
    floor: float = _doc(0.0, "Share of the peak at which linear and cosine schedules end.", ge=0, le=1)
    warmup: float = _doc(0.1, "Warm-up: a share of all steps below 1, else a number of steps.", ge=0)
    epochs: int = _doc(2, "Passes over the round's groups. The paper: 2.", gt=0)
    stop_epoch: int | None = _doc(
        None, "Stop after this many epochs of a schedule that spans `epochs`. The released SPIN: 2 of 6.", gt=0
    )
    max_steps: int | None = _doc(None, "Stop after this many steps; the schedule spans them.", gt=0)
    batch_size: int = _doc(64, "Groups per optimizer step. The paper: 64.", gt=0)
    micro_batch: int = _doc(
        64, "At most so many groups per forward pass; does not change the objective.", execution=True, gt=0
    )
    micro_tokens: int = _doc(
        4096,
        "At most so many tokens per forward pass, one group at least; lower it where memory runs out.",
        execution=True,
        gt=0,
    )
    clip: float = _doc(1.0, "Clip the gradient's norm to this; 0 is off.", ge=0)
    gradient_checkpointing: bool = _doc(
        False, "Recompute activations: less memory, about a third more time.", execution=True
    )
    save_every: int = _doc(
        100,
        "Steps between resumable states: what a killed run can lose. A guarded round has one at each of its checks.",
        execution=True,
        gt=0,
    )
    log_every: int = _doc(1, "Steps between log lines.", execution=True, gt=0)

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in betas):
            raise ValueError("both must lie in [0, 1)")
        return betas


class TaskConfig(Section):
    """One task that every player does; in a recipe a bare file name stands for `{path: …}`."""

    path: str = Field(min_length=1)
    """A JSONL file (docs/evaluation.md), or the name of a suite."""
    name: str | None = Field(default=None, pattern=r"^[\w.+-]+$")
    """None: the file's name without its ending."""
    verifier: str | None = None
    """Judges answers; None: `evaluate.verifier`, else `text`."""
    samples: int = Field(default=0, ge=0)
    """Sampled answers per prompt beside the greedy one, at `evaluate.temperature`."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first so many items; None: all."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """Longest answer, in tokens; None: that of the held-out evaluation."""
    data_dir: str | None = None
    """Folder of a suite's local files; None: the Hub."""

    @property
    def label(self) -> str:
        """What the task is called in folders and figures."""
        return self.name or PurePath(self.path).name.removesuffix(".jsonl")


FIGURES = ("auto", "sampled", "greedy", "gold_nll", "last")
"""What `best` may be chosen by, beside `task:NAME`."""


class EvaluateConfig(Sampling):
    """What each new player is measured by."""

    verifier: str | None = _doc(
        None,
        "`gsm8k`, `number`, `boxed`, `math`, `text`, `sql`, `sql_ordered`, an entry point's name or `./file.py:name`: checks "
        "answers to held-out prompts.",
    )
    limit: int = _doc(500, "Held-out examples used, the first after the seeded shuffle.", gt=0)
    trained: Literal["drop", "keep"] = _doc(
        "drop", "Held-out prompts that are trained on as well: leave them out, or keep them; told either way."
    )
    samples: int = _doc(1, "Sampled answers per held-out prompt, beside the greedy one.", ge=0)
    temperature: float = _doc(1.0, "Their temperature.", gt=0)
    max_new_tokens: int | None = _doc(None, "Longest answer, in tokens; None: the largest of the rounds'.", gt=0)
    engine: str = _doc(
        "hf",
        "Who samples what players are measured by: the evaluation's answers, the tasks' and the guard's; as play.engine.",
    )
    scorer: str | None = _doc(
        None,
        "`verifier:NAME`, an entry point's name or `./file.py:name`: whether greedy answers beat those of player 0, where "
        "self-play starts. Their share is the task `win_rate`.",
        execution=True,
    )
    tasks: tuple[TaskConfig, ...] = _doc(
        (),
        "Tasks that every player does beside the held-out prompts: JSONL files, or {path: …, name, verifier, samples, limit, "
        "max_new_tokens} (docs/evaluation.md).",
        execution=True,
    )
    best: str = _doc(
        "auto",
        "What `best` is chosen by: auto, sampled, greedy, gold_nll, last, task:NAME or task:NAME:FIGURE. "
        "auto: sampled accuracy where a verifier is given, else the last player.",
        execution=True,
    )

    @property
    def best_task(self) -> str | None:
        """The name of the task that `best` is chosen by, if it is one."""
        kind, _, rest = self.best.partition(":")
        return rest.partition(":")[0] if kind == "task" else None

    @field_validator("tasks", mode="before")
    @classmethod
    def _paths_are_tasks(cls, value: Any) -> Any:
        given = [value] if isinstance(value, (str, dict)) else value or ()
        if not isinstance(given, (list, tuple)):
            raise ValueError("a list of tasks is wanted")
        return [{"path": task} if isinstance(task, str) else task for task in given]

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        names = ["win_rate", *(task.label for task in tasks)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two tasks are called `{min(twice)}`; give one a `name`")
        return tasks

    @field_validator("best")
    @classmethod
    def _best_is_known(cls, best: str, info: ValidationInfo) -> str:
        tasks = [task.label for task in info.data.get("tasks", ())] + ["win_rate"] * bool(info.data.get("scorer"))
        kind, _, rest = best.partition(":")
        if best in FIGURES or (kind == "task" and rest.partition(":")[0] in tasks):
            return best
        known = ", ".join([*map(repr, FIGURES), *(f"'task:{name}'" for name in tasks)])
        raise ValueError(f"must be one of {known}; a task must stand in evaluate.tasks")


class ControlsConfig(Section):
    """What keeps self-play from collapsing; docs/controls.md has the evidence."""

    displacement: float | None = _doc(
        0.05,
        "How far held-out log p(gold) may fall below the round's start, in nats per token, beyond what a hot opponent "
        "aims at; null is off.",
        ge=0,
    )
    trust_region: float | None = _doc(
        0.3,
        "How large KL(start ‖ learner) on held-out answers of the start may become, in nats per token, beyond what a "
        "hot opponent aims at; null is off.",
        gt=0,
    )
    prompts: int = _doc(64, "Held-out prompts on which both are measured.", gt=1)
    checks: int = _doc(
        20, "Measurements per round, evenly spaced, up to twice as many in a short one; one costs a forward pass.", gt=0
    )
    backoff: float = _doc(
        0.3, "When a limit is crossed, go back to the last good step and on with this share of the rate.", gt=0, lt=1
    )
    backoffs: int = _doc(3, "How often, before the round ends at its last good step. 0: at once.", ge=0)
    patience: int | None = _doc(
        2, "Rounds in a row without a new best player after which self-play stops; null never stops.", gt=0
    )

    @property
    def guards(self) -> bool:
        """Whether rounds are watched."""
        return self.displacement is not None or self.trust_region is not None

    def guard_identity(self) -> Tree:
        """What a round's training depends on."""
        return {name: value for name, value in self.identity().items() if name not in ("patience", "prompts")}


class TrackConfig(Section):
    """Where figures go besides `metrics.jsonl`; docs/tracking.md."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = _doc(
        (), "Trackers: any of tensorboard, wandb, trackio; each needs its package (pip install NAME).", execution=True
    )
    project: str = _doc("sparring", "Project of wandb and trackio.", execution=True, min_length=1)


class ClusterConfig(Section):
    """How many processes share the work; docs/cluster.md. No figure depends on it beyond rounding."""

    processes: int = _doc(
        1, "Processes that share the work, one per GPU; 1 works without any child.", execution=True, gt=0
    )
    launcher: str | None = _doc(
        None,
        "Command that starts the processes on several machines, for example `srun --ntasks=16 --kill-on-bad-exit=1`; "
        "torchrun's variables or Slurm's tell each which one it is. None: they are started here.",
        execution=True,
    )
    players: Literal["whole", "sharded"] = _doc(
        "whole",
        "Of players that score, with several processes: whole, on each; sharded, cut over all of them, for players that fit "
        "no device. Who samples must then be an engine (play.engine, evaluate.engine).",
        execution=True,
    )
    cpu_offload: bool = _doc(
        False,
        "With several processes: weights, gradients and optimizer state wait in CPU memory while training.",
        execution=True,
    )

    @property
    def sharded(self) -> bool:
        """Whether players are cut over processes."""
        return self.players == "sharded" and self.processes > 1


class Round(Section):
    """One round, every per-round list resolved."""

    method: str
    hyper: Tree
    roles: dict[str, str] = {}
    """Role to `previous`, `initial`, `best` or a model's path, where the recipe overrides the method's choice."""
    limit: int | None = Field(None, gt=0)
    """Use the first so many training examples only."""
    play: PlayConfig
    train: TrainConfig


class Config(Section):
    """A whole recipe, checked and with every default."""

    run: str = _doc("runs/spin", "The run's directory.", execution=True)
    seed: int = _doc(0, "Seeds data order, held-out split and sampling.", ge=0, lt=2**31)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    play: PlayConfig = PlayConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    controls: ControlsConfig = ControlsConfig()
    track: TrackConfig = TrackConfig()
    cluster: ClusterConfig = ClusterConfig()
    rounds: tuple[Round, ...] = ()
    keep_states: bool = _doc(False, "Keep the optimizer state of finished rounds.", execution=True)

    @property
    def evaluation_play(self) -> PlayConfig:
        """`play` with the length of evaluation's answers: one for all players, so that their figures compare."""
        longest = max((r.play.max_new_tokens for r in self.rounds), default=self.play.max_new_tokens)
        return self.play.model_copy(update={"max_new_tokens": self.evaluate.max_new_tokens or longest})


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "play": PlayConfig,
    "engine": EngineConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "controls": ControlsConfig,
    "track": TrackConfig,
    "cluster": ClusterConfig,
}


def fields(section: type[Section]) -> Iterator[tuple[str, Any, str]]:
    """Name, default and documentation of a section's keys, in order."""
    for name, spec in section.model_fields.items():
        if spec.description:
            yield name, spec.default, spec.description
