"""Model cards: valid for the Hub, the same for the same stages, outside a player's identity; their code runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparring
from helpers import player_shas, recipe
from sparring import card
from sparring.rundir.view import RunView


def read(folder: Path | str) -> tuple[Any, str]:
    """A card as huggingface_hub reads it, and its text below the front matter."""
    from huggingface_hub import ModelCard

    found = ModelCard.load(Path(folder) / "README.md")
    return found.data, found.text


def snippet(text: str, folder: Path | str) -> str:
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    # The toy tokenizer knows no …
    return str(code.replace('"PATH"', repr(str(folder))).replace("…", "what is 1 + 1?").replace("256", "4"))


def test_the_hub_reads_method_data_and_results(finished_run: Path) -> None:
    view = RunView(finished_run)
    data, text = read(view.players[2].path)
    summary = view.evaluation(2)
    assert summary is not None
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["sparring", "self-play", "sft", "spin"]
    found = {(r.metric_name, r.metric_value, r.dataset_name, r.task_type) for r in data.eval_results}
    assert found == {
        (f"{kind} accuracy, held out", round(summary[kind]["mean"], 6), "rows.jsonl", "text-generation")
        for kind in ("sampled", "greedy")
    }
    for line in (
        "# Player 2 of finished",
        "method `spin` (Chen et al. 2024, arXiv 2401.01335, Eq. 4.7 and Algorithm 1), from player 1",
        f"content hash `{view.players[1].sha[:16]}`",
        "- beta: 0.1",
        "- lr: 0.001",
        "| -1 | sft | start = -1 | 12 | 3 | 0 |",
        "| 1 | spin | opponent = 1, reference = 1, start = 1 | 12 | 3 | 0 |",
        "`rows.jsonl`: 12 rows trained on, 4 held out.",
    ):
        assert line in text, line
    import hashlib

    rows = Path(view.config.data.path).read_bytes()
    assert f"- train rows.jsonl: sha256 `{hashlib.sha256(rows).hexdigest()}`" in text
    nll = summary["gold_nll"]
    (own,) = re.findall(r"^\| \*\*2\*\* \| spin \| (.*) \|$", text, re.MULTILINE)
    assert own.split(" | ")[0] == f"{nll['mean']:.2f} ± {nll['se']:.2f}"
    assert str(finished_run) not in text and str(Path(view.config.model.path).parent) not in text


def test_a_card_says_nothing_of_later_rounds(finished_run: Path) -> None:
    for number in (0, 1):
        _, text = read(RunView(finished_run).players[number].path)
        assert f"| **{number}** |" in text and f"| {number + 1} |" not in text.split("## Results")[1]


def test_the_code_in_a_card_runs(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunView(finished_run).players[2].path
    exec(snippet(read(folder)[1], folder), {})
    assert len(capsys.readouterr().out.rstrip("\n")) <= 4


def test_the_same_stages_give_the_same_card_and_identity(
    finished_run: Path, tmp_path: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cut between evaluation and card, and one that is copied: byte for byte."""
    from sparring import loop

    tree = tiny_recipe | {"run": str(tmp_path / "finished")}

    class Cut(BaseException):
        pass

    def cut(run: RunView) -> None:
        raise Cut

    for _ in range(4):  # after the start's evaluation and each round's
        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(loop, "write_cards", cut)
            sparring.run(tree)
    assert "Not evaluated yet." in (tmp_path / "finished" / "round_001" / "player" / "README.md").read_text()
    shas = player_shas(tmp_path / "finished")
    sparring.run(tree)
    assert player_shas(tmp_path / "finished") == shas == player_shas(finished_run)
    for folder in ("prep_000", "round_000", "round_001"):
        one, two = (run / folder / "player" / "README.md" for run in (finished_run, tmp_path / "finished"))
        assert one.read_bytes() == two.read_bytes()


def test_a_forks_card_leaves_the_shared_one_alone(finished_run: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(finished_run, tmp_path / "source", symlinks=True))
    before = (source / "round_001" / "player" / "README.md").read_bytes()
    sparring.api.fork(source, tmp_path / "fork", ["evaluate.limit=2"])
    sparring.run(tmp_path / "fork")
    assert (source / "round_001" / "player" / "README.md").read_bytes() == before
    assert "Player 2 of fork" in (tmp_path / "fork" / "round_001" / "player" / "README.md").read_text()


def test_license_and_base_are_the_starts_own(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    start = Path(shutil.copytree(RunView(run).config.model.path, tmp_path / "start"))
    (start / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\n# Start\n")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"]["path"] = str(start)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    view = RunView(run)
    front = yaml.safe_load(card.model_card(view, 1).split("---")[1])
    assert (front["license"], front["base_model"], front["base_model_relation"]) == (
        "mit", "someone/tiny", "finetune",
    )  # fmt: skip
    given = card.model_card(view, 1, license="apache-2.0", base_model="other/base", adapter=True)
    front = yaml.safe_load(given.split("---")[1])
    assert (front["license"], front["base_model"], front["base_model_relation"], front["library_name"]) == (
        "apache-2.0", "other/base", "adapter", "peft",
    )  # fmt: skip
    assert yaml.safe_load(card.model_card(view, 1, adapter=True, merged=True).split("---")[1])["library_name"] == (
        "transformers"
    )
    assert "unchanged" in card.model_card(view, -1)
    (start / "README.md").write_text("---\n{broken: [\n---\n")
    assert "license" not in yaml.safe_load(card.model_card(view, 1).split("---")[1])


@pytest.mark.parametrize(
    ("method", "name", "given", "shown"),
    [
        ("exspin", "verifier", "/home/me/my work/judge.py:right", "judge.py:right"),
        ("inpo", "scorer", "verifier:/home/me/judge.py:right", "verifier:judge.py:right"),
        ("inpo", "scorer", "verifier:gsm8k", "verifier:gsm8k"),
    ],
)
def test_a_card_names_no_path(
    method: str, name: str, given: str, shown: str, finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["rounds"] = [{"method": "sft"}, {"method": method, name: given, "repeat": 2}]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    text = card.model_card(RunView(run), 2)
    assert f"\n- {name}: {shown}\n" in text and "/home" not in text


def test_text_cannot_break_a_card() -> None:
    assert card._code("a`b|c\nd\u202e") == "a'b\\|c d\\u202e"
    assert card._slug("ünï run|") == "ünï-run"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's affair
def test_an_adapters_card_loads_it_with_peft(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"lora_rank": 2}
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, model=model, rounds=[{"method": "spin"}])
    view = sparring.run(tree)
    data, text = read(view.players[1].path)
    assert data.library_name == "peft" and "AutoPeftModelForCausalLM" in text
    exec(snippet(text, view.players[1].path), {})
    capsys.readouterr()
