"""Exports: TRL trains on the pairs with our reference log-probs to the same loss, our reader reads them back, groups too."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset

import sparring
from helpers import character_tokenizer, cli, recipe, rows, write_jsonl, write_model
from sparring import data, export, methods, players, preview
from sparring.config import DataConfig, ModelConfig
from sparring.errors import InputError
from sparring.gradient import gradient
from sparring.rundir.store import Rows
from sparring.rundir.view import RunView
from sparring.types import Frozen, Group, Message

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\\nA: ' }}"
    "{% else %}{{ m['content'] + '<eos>' }}{% endif %}{% endfor %}"
)
"""Ends an answer with the end token and nothing behind it, so that TRL makes the very token ids."""


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a model with a chat template: two rounds of SPIN, the second with the first one's pairs in memory.

    The first round's answers came with the data, whole and as text: those of a random model hardly ever end.
    """
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = write_model(folder / "model", tokenizer=tokenizer, context=128)
    rounds = [{"method": "spin", "repeat": 2, "memory": 1, "memory_weight": 0.5}]
    given = [row | {"generated": f"{row['answer'][:-1]}{'x' * i}"} for i, row in enumerate(rows(12))]
    tree = recipe(folder / "run", model, write_jsonl(folder / "rows.jsonl", given), rounds=rounds)
    sparring.run(tree | {"evaluate": {"limit": 2}})
    return folder / "run"


def our_loss(run: Path, t: int, model: Any) -> float:
    """The loss of round t's groups as one batch."""
    r = next(r for r in RunView(run).rounds if r.t == t)
    groups = list(r.rows("groups", Group))
    held = {"reference": list(Rows(r.path / "frozen" / "reference", Frozen))}
    return gradient(model, groups, held, methods.make("spin", {}), micro_batch=4).loss


def trainer(code: str, folder: Path, model: str, data: Any, tmp_path: Path) -> Any:
    """The trainer that the exported README describes, with what a test's machine needs."""
    from trl import DPOConfig

    plain = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": len(data), "max_length": None, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "precompute_ref_log_probs": True, "beta": 0.1,
    }  # fmt: skip
    scope: dict[str, Any] = {}
    exec(code.split("data = load_dataset")[0], scope)
    return scope["Trainer"](
        model=model, args=DPOConfig(**plain), train_dataset=data, processing_class=character_tokenizer()
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_trls_first_loss_is_ours(chat_run: Path, tmp_path: Path) -> None:
    """Round 1: the learner is player 1, the reference of the log-probs too; then another learner, so that it is no log 2."""
    out = tmp_path / "pairs"
    code, said, _ = cli("export", chat_run, "--format", "trl", "--round", 0, "--out", out)
    groups = RunView(chat_run).rounds[0].rows("groups", Group)
    n = len(groups)
    assert (code, said) == (0, f"{out}: {n} pairs; TRL gives {n} of the first {n} the same token ids\n")
    pairs = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    readme = (out / "README.md").read_text()
    script = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    for number, is_start in ((0, True), (2, False)):
        player = RunView(chat_run).players[number]
        model = players.load_model(player.path, ModelConfig(path=player.path, device="cpu"))
        expected = our_loss(chat_run, 0, model)
        made = trainer(script, out, player.path, pairs, tmp_path)
        batch = made.data_collator([made.train_dataset[i] for i in range(n)])
        assert made.precompute_ref_logps and made.train_dataset[0]["prompt_ids"] == list(groups[0].prompt)
        loss = made._compute_loss(made.model, batch, False).item()
        assert loss == pytest.approx(expected, abs=1e-5)
        assert (abs(loss - 0.693147) < 1e-5) == is_start


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("standard", [False, True])
def test_trl_makes_the_same_token_ids_from_the_texts(chat_run: Path, tmp_path: Path, standard: bool) -> None:
    """TRL's own preparation and its own precomputed log-probs, on texts alone: ids equal, log-probs to 1e-4 nats."""
    from trl import DPOConfig, DPOTrainer

    made = export.trl(RunView(chat_run), 0, tmp_path / "pairs", standard=standard)
    assert made.same == made.probed == made.rows
    pairs = load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    texts = pairs.select_columns(["prompt", "chosen", "rejected"])
    start = RunView(chat_run).players[0].path
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    plain = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_length": None, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "precompute_ref_log_probs": True,
    }  # fmt: skip
    theirs = DPOTrainer(
        model=start, args=DPOConfig(**plain), train_dataset=texts, processing_class=tokenizer
    ).train_dataset
    for mine, their in zip(pairs, theirs, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert mine[name] == their[name]
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert mine[name] == pytest.approx(their[name], abs=1e-4)


def test_our_reader_reads_the_pairs_back(chat_run: Path, tmp_path: Path) -> None:
    """Text for text, and through the renderer id for id; so a run on the export trains on the same pairs."""
    view = RunView(chat_run)
    export.trl(view, 0, tmp_path / "pairs")
    loaded = data.load(DataConfig(path=str(tmp_path / "pairs"), heldout_size=0), 0)
    renderer = preview.make_renderer(view)
    groups = {tuple(g.completions): g for g in view.rounds[0].rows("groups", Group)}
    assert len(loaded.train) == len(groups) > 4
    for example in loaded.train:
        own = view.examples[example.meta["example_id"]]
        assert (example.messages, example.gold) == (own.messages, own.gold)
        answers = [example.gold, example.generated]
        ids = [(*renderer.completion(example.messages, str(a)), renderer.end_id) for a in answers]
        group = groups[tuple(ids)]
        assert tuple(renderer.prompt(example.messages)) == group.prompt
        assert [tuple(example.meta[name]) for name in ("chosen_ids", "rejected_ids")] == ids


def test_replayed_pairs_keep_weight_round_and_reference(chat_run: Path, tmp_path: Path) -> None:
    view = RunView(chat_run)
    made = export.trl(view, None, tmp_path / "pairs")  # the last round
    table = pq.read_table(tmp_path / "pairs" / "train.parquet").to_pylist()
    groups = view.rounds[1].rows("groups", Group)
    frozen = list(Rows(view.rounds[1].path / "frozen" / "reference", Frozen))
    assert made.rows == len(table) == len(groups)
    assert {(row["origin_round"], row["weight"]) for row in table} == {(1, 1.0), (0, 0.5)}
    for row, group, line in zip(table, groups, frozen, strict=True):
        assert row["weight"] == group.weight
        assert row["ref_rejected_logps"] == pytest.approx(sum(line.logps[1]), abs=1e-9)
        assert row["rejected"][0]["content"] == preview.make_renderer(view).decode(group.completions[1])


def test_the_plain_format_is_exact_as_texts(finished_run: Path, tmp_path: Path) -> None:
    """Without a chat template of its own a conversation ends without an end token in TRL: that is told."""
    view = RunView(finished_run)
    counts = [export.trl(view, 0, tmp_path / str(standard), standard=standard) for standard in (False, True)]
    ended = sum(
        all(c[-1] == 1 for c in group.completions) for group in view.rounds[1].rows("groups", Group)
    )  # both answers with an end token
    assert [c.same for c in counts] == [0, ended]
    row = pq.read_table(tmp_path / "True" / "train.parquet").to_pylist()[0]
    assert row["prompt"].startswith("### Instruction:\nwhat is ")


def test_a_pair_is_the_best_and_each_lower_one() -> None:
    def group(targets: tuple[float, ...], sources: tuple[str, ...] | None = None) -> Group:
        names = sources or tuple(f"s{i}" for i in range(len(targets)))
        return Group("x", (1,), tuple((i,) for i in range(len(targets))), targets, 1.0, names, 0)

    assert list(export._pairs(group((0.0, 1.0, 0.5)))) == [(1, 0), (1, 2)]
    assert list(export._pairs(group((1.0, 1.0, 0.0)))) == [(0, 2)]
    assert list(export._pairs(group((0.5, 0.5)))) == list(export._pairs(group((1.0,)))) == []
    assert list(export._pairs(group((1.0, 0.0), ("gold", "mismatched, of y")))) == []


def test_what_a_method_selects_is_what_leaves(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """SeRA's ranked pairs have no targets before it selects, and it drops pairs of gold."""
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "sera", "repeat": 2, "keep": 0.7}])
    view = sparring.run(tree | {"play": tree["play"] | {"samples": 2, "temperature": 1.5}})
    stored, trained = (view.rounds[1].counts[stage]["groups"] for stage in ("groups", "player"))
    assert (stored, trained) == (36, 26)  # of 24 pairs with gold and 12 of samples: the nearest to 0.7 of each
    assert export.parquet(view, 1, tmp_path / "groups").rows == trained
    table = pq.read_table(tmp_path / "groups" / "groups.parquet").to_pylist()
    assert all(sorted(row["targets"]) == [0.0, 1.0] for row in table)
    assert sum("gold" not in row["sources"] for row in table) == 9
    frozen = {f.group: f.logps for f in Rows(view.rounds[1].path / "frozen" / "earlier", Frozen)}
    assert all(tuple(map(tuple, row["logps_earlier"])) == frozen[row["group"]] for row in table)
    made = export.trl(view, 1, tmp_path / "pairs")
    assert (made.rows, made.skipped) == (trained, 0)
    pairs = pq.read_table(tmp_path / "pairs" / "train.parquet").to_pylist()
    best = [row["completion_ids"][row["targets"].index(1.0)] for row in table]
    assert [row["chosen_ids"] for row in pairs] == best
    shutil.rmtree(view.rounds[1].path / "frozen")
    with pytest.raises(InputError, match=r"round_001/frozen: is not done, and sera chooses by it what is trained on"):
        export.parquet(view, 1, tmp_path / "more")


def test_groups_as_parquet_are_the_groups(chat_run: Path, tmp_path: Path) -> None:
    view = RunView(chat_run)
    out = tmp_path / "groups"
    code, said, _ = cli("export", chat_run, "--format", "parquet", "--out", out)
    groups = view.rounds[1].rows("groups", Group)
    assert (code, said) == (0, f"{out}: {len(groups)} groups\n")
    table = pq.read_table(out / "groups.parquet").to_pylist()
    read = [
        Group(
            row["example_id"], tuple(row["prompt_ids"]), tuple(map(tuple, row["completion_ids"])), tuple(row["targets"]),
            row["weight"], tuple(row["sources"]), row["origin_round"], tuple(map(tuple, row["masks"])),
        )
        for row in table
    ]  # fmt: skip
    assert read == list(groups)
    frozen = list(Rows(view.rounds[1].path / "frozen" / "reference", Frozen))
    assert [tuple(map(tuple, row["logps_reference"])) for row in table] == [f.logps for f in frozen]
    assert [row["group"] for row in table] == [f.group for f in frozen]
    for row in table:
        own = view.examples[row["example_id"]]
        assert tuple(Message(**m) for m in row["prompt"]) == own.messages
        assert row["completions"][0] == own.gold
    assert "player 1 (content hash" in (out / "README.md").read_text()


def test_a_hub_folder(finished_run: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    view, out = RunView(finished_run), tmp_path / "sub" / "player"
    given = ["--license", "apache-2.0", "--base-model", "someone/tiny"]
    code, said, _ = cli("export", finished_run, "--out", out, "--player", 1, *given)
    assert (code, said) == (0, f"{out}: player 1 of {finished_run}\n")
    assert players.identify(str(out)) == view.players[1].sha
    names = {f.name for f in out.iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not {n for n in names if n.endswith((".json", ".bin")) and n == "stage.json"}
    found = ModelCard.load(out / "README.md").data
    assert (found.license, found.base_model) == ("apache-2.0", "someone/tiny")
    assert found.to_dict()["base_model_relation"] == "finetune"
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1]


def test_the_given_model_keeps_its_own_card(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    start = Path(shutil.copytree(RunView(run).players[-1].path, tmp_path / "start"))
    (start / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    record = json.loads((run / "start" / "player.json").read_text())
    (run / "start" / "player.json").write_text(json.dumps(record | {"path": str(start)}))
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"]["path"] = str(start)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    export.hub(RunView(run), "-1", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == (start / "README.md").read_text()


def test_an_adapter_merged_is_a_whole_models_card(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, model={"lora_rank": 2}, rounds=[{"method": "spin"}])
    view = sparring.run(tree)
    for merge, library in ((False, "peft"), (True, "transformers")):
        export.hub(view, "1", tmp_path / library, merge=merge)
        front = yaml.safe_load((tmp_path / library / "README.md").read_text().split("---")[1])
        assert front["library_name"] == library


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--format", "gguf"], "export: `gguf` is no format; write hub, trl or parquet"),
        (["--round", 0], "export: --round says nothing with --format hub; leave it out"),
        (["--format", "trl", "--merge"], "export: --merge says nothing with --format trl; leave it out"),
        (["--format", "parquet", "--standard"], "export: --standard says nothing with --format parquet; leave it out"),
        (["--player", 9], "player `9`: not in {run}; there are -1, 0, 1, 2 and best"),
        (
            ["--format", "trl", "--round", 7],
            "{run}: round 7 has no groups; rounds that have: -1, 0, 1; `sparring status` shows them",
        ),
        (
            ["--format", "trl", "--round", -1],
            "{run}: round -1 (sft) has no pairs: its groups are single completions; use --format parquet",
        ),
    ],
)
def test_bad_input(arguments: list[Any], problem: str, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, err = cli("export", finished_run, "--out", out, *arguments)
    assert (code, said, err) == (2, "", f"sparring: {problem.format(run=finished_run)}\n")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(finished_run: Path, tmp_path: Path) -> None:
    for write in (export.trl, export.parquet):
        with pytest.raises(InputError, match="exists already; give a new folder"):
            write(RunView(finished_run), 0, tmp_path)
