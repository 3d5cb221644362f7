"""The usual pipeline: `model.generate` and TRL's `DPOTrainer`, each in the best of the settings that are tried."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from datasets import Dataset
from shapes import PAD, preference
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from sparring.train import batch_rows, total_steps
from sparring.types import Group

MICRO = (1, 2, 4, 8, 16) if torch.cuda.is_available() else (1, 2, 4)
"""Pairs a pass; two cores are slower with more, a GPU would idle with few."""
ATTENTION = ("sdpa", "eager")
TRIALS = 2


class Given(DPOTrainer):
    """Takes token ids as they are: TRL's own tokenizing would add an end token to cut answers, and would cost it time."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


@dataclass(frozen=True)
class Choice:
    """What a trial chose for TRL."""

    attention: str
    micro: int
    """per_device_train_batch_size; the rest of a batch is accumulated."""
    trials: dict[str, float]
    """Seconds of one optimizer step by setting."""

    def row(self) -> dict[str, Any]:
        return asdict(self)


def trainer(
    model: Any, tokenizer: PreTrainedTokenizerFast, groups: Sequence[Group], settings: Any, *, micro: int, bf16: bool,
    beta: float,
) -> DPOTrainer:  # fmt: skip
    """A trainer with its reference computed, about to take the steps that `sparring.train.train` takes with seed 0.

    `settings` is sparring's TrainConfig, of which optimizer, rate, epochs, batch and clip are read.
    """
    rows = [preference(group) for group in groups]
    # Else the reference of an earlier repeat would be found in the cache of `datasets`
    stamp = [time.perf_counter_ns()] * len(rows)
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl_"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        num_train_epochs=1,
        optim=settings.optimizer,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        max_grad_norm=settings.clip,
        beta=beta,
        loss_type=["sigmoid"],
        bf16=bf16,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        max_length=None,
        pad_to_multiple_of=None,
        train_sampling_strategy="sequential",
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    made = Given(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows).add_column("made", stamp),
        processing_class=tokenizer,
    )
    made.remove_callback(PrinterCallback)
    # All epochs in one, in the order in which sparring takes the pairs
    steps = total_steps(len(rows), settings)
    order = [i for step in range(steps) for i in batch_rows(step, len(rows), settings.batch_size, 0)]
    made.train_dataset = made.train_dataset.select(order)
    return made


def losses(made: DPOTrainer) -> list[float]:
    """The loss of every optimizer step."""
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def choose(
    model: Any, tokenizer: PreTrainedTokenizerFast, groups: Sequence[Group], settings: Any, *, bf16: bool, beta: float,
    known: str | None = None,
) -> Choice:  # fmt: skip
    """The fastest attention and batch size for one optimizer step; each is tried twice, after a step for warming up.

    `known`, as `sdpa,1`, is what an earlier trial of the same shape found; it alone is tried, as a process that has taken
    steps has memory that it need not ask for again.
    """
    first = groups[: settings.batch_size]
    once = settings.model_copy(update={"epochs": 1})

    def seconds(attention: str, micro: int) -> float:
        learner = copy.deepcopy(model)
        learner.set_attn_implementation(attention)
        made = trainer(learner, tokenizer, first, once, micro=micro, bf16=bf16, beta=beta)
        started = time.perf_counter()
        made.train()
        return time.perf_counter() - started

    seconds(ATTENTION[0], MICRO[-1])
    wanted = [key for key in product(ATTENTION, MICRO) if known in (None, "{},{}".format(*key))]
    trials = {key: min(seconds(*key) for _ in range(TRIALS)) for key in wanted}
    best = min(trials, key=lambda key: trials[key])
    return Choice(*best, {f"{a}, {m}": round(value, 3) for (a, m), value in trials.items()})


class Lengths(StoppingCriteria):
    """Ends every row at its own width."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self.ends <= input_ids.shape[1]


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int], batch_size: int) -> int:
    """Sample at temperature 1 with `model.generate`, as many tokens for each prompt as `lengths` says; returns them all.

    Batches are left-padded and hold prompts of similar length. The lengths are imposed by a stopping criterion, so that
    both sides of a comparison make the same number of tokens for every prompt; it replaces the one that looks for end
    tokens and costs less than that.
    """
    model.generation_config.eos_token_id = None
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    made = 0
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[*[PAD] * (width - len(prompts[i])), *prompts[i]] for i in rows])
        mask = torch.tensor([[*[0] * (width - len(prompts[i])), *[1] * len(prompts[i])] for i in rows])
        how = GenerationConfig(
            max_new_tokens=max(lengths[i] for i in rows),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=PAD,
        )
        ends = torch.tensor([width + lengths[i] for i in rows])
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=how, stopping_criteria=[Lengths(ends)]
        )
        wanted = width + max(lengths[i] for i in rows)
        if out.shape[1] != wanted:
            raise AssertionError(f"generate made rows of {out.shape[1]} tokens instead of {wanted}")
        made += sum(lengths[i] for i in rows)
    return made


def fastest_batch(run: Callable[[int], Any], sizes: Sequence[int]) -> tuple[int, dict[int, float]]:
    """The batch size with which `run` is fastest, and the seconds of each; each is tried once."""
    seconds = {}
    for size in sizes:
        started = time.perf_counter()
        run(size)
        seconds[size] = round(time.perf_counter() - started, 3)
    return min(seconds, key=lambda size: seconds[size]), seconds
