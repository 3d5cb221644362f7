"""Every pairwise and unary loss that TRL has: the same loss and gradient norm through TRL's own code.

Two-layer random models, pairs of unequal lengths; TRL's trainers are built once and their loss is switched.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils import get_total_norm

from helpers import character_tokenizer
from sparring import methods
from sparring.gradient import gradient
from sparring.pair.preference import with_mismatched
from sparring.types import Frozen, Group, Paired, Played, Rendered
from test_train import frozen_under, llama, pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

GROUPS = pairs(6, seed=3)


def options(folder: Path, **extra: Any) -> dict[str, Any]:
    plain = {
        "output_dir": str(folder), "per_device_train_batch_size": 6, "max_length": None, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return plain | extra


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt_ids": list(g.prompt), "chosen_ids": list(g.completions[0]), "rejected_ids": list(g.completions[1])}
        for g in GROUPS
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPOTrainer, "_prepare_dataset", lambda self, dataset, *a, **k: dataset)
        trainer = DPOTrainer(
            model=llama(0), ref_model=llama(7), args=DPOConfig(**options(tmp_path_factory.mktemp("dpo"))),
            train_dataset=Dataset.from_list(rows), processing_class=character_tokenizer(),
        )  # fmt: skip
    trainer.inputs = trainer.data_collator(rows)
    return trainer


def trls(trainer: Any) -> tuple[float, float]:
    """TRL's loss and gradient norm for its current settings."""
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, trainer.inputs, False)
    loss.backward()
    return loss.item(), float(get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None]))


def ours(
    method: Any, groups: list[Group] = GROUPS, frozen: dict[str, list[Frozen]] | None = None
) -> tuple[float, float]:
    model = llama(0)
    held = frozen or frozen_under(llama(7), groups)
    got = gradient(model, groups, held if method.frozen else {}, method, micro_batch=4)
    return got.loss, float(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


@pytest.mark.parametrize(
    ("trl", "hyper"),
    [
        ({"loss_types": ["sigmoid"]}, {"loss": "logistic"}),
        ({"loss_types": ["hinge"]}, {"loss": "hinge"}),
        ({"loss_types": ["ipo"]}, {"loss": "ipo"}),
        ({"loss_types": ["sigmoid_norm"]}, {"loss": "sigmoid_norm", "beta": 0.1}),
        ({"loss_types": ["robust"], "label_smoothing": 0.2}, {"loss": "robust", "label_smoothing": 0.2}),
        ({"loss_types": ["exo_pair"], "label_smoothing": 1e-3}, {"loss": "exo_pair"}),
        ({"loss_types": ["nca_pair"]}, {"loss": "nca_pair"}),
        ({"loss_types": ["bco_pair"]}, {"loss": "bco_pair"}),
        ({"loss_types": ["sppo_hard"], "beta": 0.001}, {"loss": "sppo_hard"}),
        ({"loss_types": ["aot"]}, {"loss": "aot"}),
        ({"loss_types": ["aot"], "label_smoothing": 0.2}, {"loss": "aot", "label_smoothing": 0.2}),
        ({"loss_types": ["aot_unpaired"]}, {"loss": "aot_unpaired"}),
        (
            {"loss_types": ["aot_unpaired"], "label_smoothing": 0.2},
            {"loss": "aot_unpaired", "label_smoothing": 0.2},
        ),
        ({"loss_types": ["apo_zero"]}, {"loss": "apo_zero"}),
        ({"loss_types": ["apo_down"]}, {"loss": "apo_down"}),
        ({"loss_types": ["discopop"]}, {"loss": "discopop"}),
        ({"loss_types": ["sigmoid"], "beta": 0.5, "ld_alpha": 0.3}, {"beta": 0.5, "ld_alpha": 0.3}),
        ({"loss_types": ["ipo"], "ld_alpha": 0.3}, {"loss": "ipo", "ld_alpha": 0.3}),
        ({"loss_types": ["apo_zero"], "ld_alpha": 0.3}, {"loss": "apo_zero", "ld_alpha": 0.3}),
    ],
)
def test_dpo_losses(dpo_trainer: Any, trl: dict[str, Any], hyper: dict[str, Any]) -> None:
    settings = {"beta": 0.1, "label_smoothing": 0.0, "loss_weights": [1.0], "ld_alpha": None} | trl
    for name, value in settings.items():
        setattr(dpo_trainer, name, value)
    assert ours(methods.make("dpo", hyper)) == pytest.approx(trls(dpo_trainer), rel=1e-5)


def test_irpo_is_sigmoid_and_sft_where_chosen_answers_are_equally_long(dpo_trainer: Any) -> None:
    """TRL's `sft` averages over the batch's tokens, IRPO over each answer's: preference.md §2.6."""
    groups = [g for g in pairs(60, seed=5) if len(g.completions[0]) == 6]
    assert len(groups) > 2
    rows = [
        {"prompt_ids": list(g.prompt), "chosen_ids": list(g.completions[0]), "rejected_ids": list(g.completions[1])}
        for g in groups
    ]
    settings = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1, "ld_alpha": None}
    before = dpo_trainer.inputs
    for name, value in (settings | {"inputs": dpo_trainer.data_collator(rows)}).items():
        setattr(dpo_trainer, name, value)
    assert ours(methods.make("dpo", {"loss": "irpo", "nll": 0.7}), groups) == pytest.approx(trls(dpo_trainer), rel=1e-5)
    dpo_trainer.inputs = before


def test_simpo_and_orpo_terms() -> None:
    """TRL's CPO and ORPO loss functions on the learner's mean log-probs; ORPO's NLL is TRL's own affair (its prompt too)."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    model = llama(0)
    lines = frozen_under(model, GROUPS)["reference"]
    means = [torch.tensor([sum(row.logps[i]) / len(row.logps[i]) for row in lines]) for i in (0, 1)]
    place = SimpleNamespace(device=torch.device("cpu"))
    cpo = SimpleNamespace(
        alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.1, accelerator=place
    )
    expected = CPOTrainer.cpo_loss(cpo, *means)[0].mean().item()
    simpo = methods.make("dpo", {"loss": "simpo", "label_smoothing": 0.1})
    assert ours(simpo)[0] == pytest.approx(expected, rel=1e-5)
    term = -ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.1, accelerator=place), *means)[0].mean().item()
    assert ours(methods.make("dpo", {"loss": "orpo", "nll": 0.0}))[0] == pytest.approx(term, rel=1e-5)
    assert ours(methods.make("dpo", {"loss": "orpo"}))[0] == pytest.approx(term - means[0].mean().item(), rel=1e-5)


# --- KTO -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers() -> list[Group]:
    """Four desirable answers and two that are not, each with another prompt's answer."""
    rows = [Rendered(g.example_id, g.prompt, g.completions[0], "", g.completions[1]) for g in GROUPS]
    alone = methods.make("kto", {"z0": "zero"}).groups(Played(0, rows)).groups
    return with_mismatched(Paired([alone[i] for i in (0, 1, 2, 5, 7, 8)], {})).groups


@pytest.fixture(scope="module")
def kto_trainer(tmp_path_factory: pytest.TempPathFactory, answers: list[Group]) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [
        {
            "prompt_ids": list(g.prompt),
            "completion_ids": list(g.completions[0]),
            "KL_completion_ids": list(g.completions[1]),
            "label": g.targets[0] == 1.0,
        }
        for g in answers
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KTOTrainer, "_prepare_dataset", lambda self, dataset, *a, **k: dataset)
        trainer = KTOTrainer(
            model=llama(0), ref_model=llama(7), args=KTOConfig(**options(tmp_path_factory.mktemp("kto"))),
            train_dataset=Dataset.from_list(rows), processing_class=character_tokenizer(),
        )  # fmt: skip
    trainer.inputs = trainer.data_collator(rows)
    return trainer


@pytest.mark.parametrize(("raised", "above"), [(0.0, True), (3.0, False)])
def test_kto(kto_trainer: Any, answers: list[Group], raised: float, above: bool) -> None:
    """z0 above its floor of 0, and at it under a reference that finds every answer likelier by `raised` nats."""
    for name, value in {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.7, "loss_type": "kto"}.items():
        setattr(kto_trainer, name, value)
    kto_trainer.precompute_ref_logps, kto_trainer.calculate_KL = raised != 0, True
    reference = [
        Frozen(row.group, row.role, row.player, tuple((line[0] + raised, *line[1:]) for line in row.logps))
        for row in frozen_under(llama(7), answers)["reference"]
    ]
    sums = [torch.tensor([sum(row.logps[i]) for row in reference]) for i in (0, 1)]
    kto_trainer.inputs |= {"ref_logps": sums[0], "ref_KL_logps": sums[1]}
    expected = trls(kto_trainer)
    assert (kto_trainer._metrics["eval"]["kl"][-1] > 0) == above
    method = methods.make("kto", {"beta": 0.2, "desirable": 1.5, "undesirable": 0.7})
    assert ours(method, answers, {"reference": reference}) == pytest.approx(expected, rel=1e-5)


def test_apo_zero_unpaired(kto_trainer: Any, answers: list[Group]) -> None:
    settings = {"beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 1.0, "loss_type": "apo_zero_unpaired"}
    for name, value in (settings | {"precompute_ref_logps": False, "calculate_KL": False}).items():
        setattr(kto_trainer, name, value)
    assert ours(methods.make("kto", {"beta": 0.2, "z0": "zero"}), answers) == pytest.approx(trls(kto_trainer), rel=1e-5)
