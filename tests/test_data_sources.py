"""Where rows come from: containers, splits of a folder, the Hub, and text that must come through unchanged."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from datasets.exceptions import DatasetGenerationError

from data_rows import failure, jsonl, qa, read
from sparring import data
from sparring.config import DataConfig
from sparring.errors import InputError
from sparring.types import Message

ROWS = [{"prompt": f"p{i}", "completion": f'line "one"\nline {i}, اهلا 🤖'} for i in range(3)]


def write_json(path: Path) -> list[str]:
    path.write_text(json.dumps(ROWS, indent=1))
    return ["[0]", "[1]", "[2]"]


def write_json_object(path: Path) -> list[str]:
    path.write_text(json.dumps({"version": "1", "rows": ROWS, "meta": {"a": 1}}, ensure_ascii=False), encoding="utf-8")
    return ["[0]", "[1]", "[2]"]


def write_json_data(path: Path) -> list[str]:
    path.write_text(json.dumps({"authors": ["x"], "data": ROWS}))
    return ["[0]", "[1]", "[2]"]


def write_json_lines(path: Path) -> list[str]:
    jsonl(path, *ROWS)
    return [":1", ":2", ":3"]


def write_bom_lines(path: Path) -> list[str]:
    path.write_bytes(
        b"\xef\xbb\xbf"
        + b"\r\n".join(json.dumps(r).encode() for r in ROWS[:2])
        + b"\r\n\r\n \n"
        + json.dumps(ROWS[2]).encode()
    )
    return [":1", ":2", ":5"]


def write_bom_json(path: Path) -> list[str]:
    path.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    return ["[0]", "[1]", "[2]"]


def write_csv(path: Path) -> list[str]:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(ROWS[:2])
        file.write("\n")
        writer.writerow(ROWS[2])
    return [":2", ":4", ":7"]


def write_parquet(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    return ["[0]", "[1]", "[2]"]


def write_saved(path: Path) -> list[str]:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return ["[0]", "[1]", "[2]"]


@pytest.fixture(autouse=True, scope="module")
def quiet_datasets() -> None:
    import datasets

    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.json", write_json),
        ("object.json", write_json_object),
        ("data.json", write_json_data),
        ("lines.json", write_json_lines),
        ("a.jsonl", write_json_lines),
        ("a.NDJSON", write_json_lines),
        ("bom.jsonl", write_bom_lines),
        ("bom.json", write_bom_json),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
        ("saved", write_saved),
    ],
)
def test_containers(tmp_path: Path, name: str, write: Any) -> None:
    places = write(tmp_path / name)
    examples = read(tmp_path / name)
    assert [e.source for e in examples] == [f"{tmp_path / name}{place}" for place in places]
    assert [(e.messages, e.gold) for e in examples] == [
        ((Message("user", r["prompt"]),), r["completion"]) for r in ROWS
    ]
    assert len({e.id for e in examples}) == 3


def test_a_saved_dict_has_splits(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "both"
    splits = {"train": qa(4), "test": [*qa(1), *qa(1, 10)]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(str(folder))
    loaded = data.load(DataConfig(path=str(folder), heldout_split="test"), seed=0)
    assert sorted(e.gold or "" for e in loaded.train) == ["a0", "a1", "a2", "a3"]
    assert {e.source: e.gold for e in loaded.heldout} == {f"{folder}/test[0]": "a0", f"{folder}/test[1]": "a10"}
    assert loaded.counts["overlap"] == 1
    assert (
        failure(folder, split="dev")
        == f"{folder}: no split `dev`; it has train, test; set data.split or data.heldout_split"
    )
    assert "held out and trained on at once" in failure(folder, heldout_split="train")
    assert failure(folder / "train", split="test").startswith(
        f"{folder / 'train'}: no split `test` in one saved data set"
    )
    config = DataConfig(path=str(folder), heldout_split="test")
    arrow = "data-00000-of-00001.arrow"
    assert data.fingerprint(config) == {
        f"{part} {arrow}": hashlib.sha256((folder / split / arrow).read_bytes()).hexdigest()
        for part, split in (("train", "train"), ("heldout", "test"))
    }
    (folder / "train" / arrow).write_bytes(b"no arrow")
    assert failure(folder).startswith(f"{folder}/train: this `datasets` folder cannot be loaded: ")
    (folder / "dataset_dict.json").write_text("[")
    assert "dataset_dict.json: not a readable `datasets` folder" in failure(folder)


@pytest.mark.parametrize(
    "files, split, chosen",
    [
        (["train.jsonl", "test.jsonl", "solutions.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl", "test_socratic.jsonl"], "test", ["test.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-0.jsonl"], "train", None),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["ARC-Train.jsonl", "ARC-Test.jsonl"], "train", ["ARC-Train.jsonl"]),
        (["train_sft-0.jsonl", "train_gen-0.jsonl"], "train_sft", ["train_sft-0.jsonl"]),
        (["one.jsonl", "two.jsonl", ".cache/three.jsonl"], "train", ["one.jsonl", "two.jsonl"]),
        (["2023/one.jsonl", "2024/two.jsonl"], "train", None),
        (["train/algebra/1.jsonl", "train/geometry/2.jsonl", "test/algebra/3.jsonl"], "train", None),
        (["default/train/0000.jsonl", "default/train/0001.jsonl", "default/test/0000.jsonl"], "train", None),
    ],
)
def test_folders_of_files(tmp_path: Path, files: list[str], split: str, chosen: list[str] | None) -> None:
    for number, name in enumerate(files):
        jsonl(tmp_path / name, *qa(1, number))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_info.json").write_text("{}")
    found = {e.source for e in read(tmp_path, split=split)}
    assert found == {f"{tmp_path / name}:1" for name in chosen or files[:2]}


def test_a_folder_does_not_train_on_another_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "test.jsonl", *qa(1))
    assert failure(tmp_path) == f"{tmp_path}: no file of split `train`; it has test; name the file itself"
    assert failure(tmp_path / "test.jsonl", split="dev").endswith(
        "one file has no split `dev`; name that split's own file instead"
    )


def test_a_clone_of_several_configurations_is_read_by_name(tmp_path: Path) -> None:
    """GSM8K's two hold the same questions; read together, every question would come twice."""
    for number, name in enumerate(["main/train-0", "main/test-0", "socratic/train-0", "wordy/en/train_sft"]):
        jsonl(tmp_path / f"{name}.jsonl", *qa(1, number))
    (tmp_path / ".git").mkdir()
    assert [e.gold for e in read(tmp_path, name="main")] == ["a0"]
    assert [e.gold for e in read(tmp_path, name="wordy/en")] == ["a3"]
    heldout = data.load(DataConfig(path=str(tmp_path), name="main", heldout_split="test"), seed=0).heldout
    assert [e.gold for e in heldout] == ["a1"]
    both = "split `train` lies in main and socratic; choose one by data.name or by its own path, or all by data.name=."
    assert failure(tmp_path) == f"{tmp_path}: {both}"
    assert sorted(str(e.gold) for e in read(tmp_path, name=".")) == ["a0", "a2"]
    # What was read before stays what it was: nothing is refused, and files have the names they had
    names = {name: list(data.fingerprint(DataConfig(path=str(tmp_path), name=name))) for name in (None, "main", "mian")}
    every = ["train main/train-0.jsonl", "train socratic/train-0.jsonl"]
    assert names == {None: every, "main": every[:1], "mian": every}
    assert failure(tmp_path, name=str(tmp_path.parent)).startswith("data.name: ")
    away = DataConfig(path=str(tmp_path / "main"), heldout=str(tmp_path), heldout_split="train", name=".", split="test")
    assert sorted(str(e.gold) for e in data.load(away, seed=0).heldout) == ["a0", "a2"]
    it_has = "it has main, socratic, wordy; set data.name=null to read it as it is"
    assert failure(tmp_path, name="mian") == f"data.name: {tmp_path} has no folder `mian`; {it_has}"
    jsonl(tmp_path / "wordy" / "train_sft.jsonl", *qa(1))
    assert "split `train` lies in . and en; " in failure(tmp_path / "wordy")


def test_a_file_and_a_saved_set_have_no_configurations(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *qa(2))
    write_saved(tmp_path / "saved")
    (tmp_path / "saved" / "main").mkdir()
    for place in (path, tmp_path / "saved"):
        says = f"data.name: {place} has no folder `main`; set data.name=null to read it as it is"
        assert failure(place, name="main") == says


# --- Hub -------------------------------------------------------------------


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, name: str | None = None, *, split: str | None = None) -> Any:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(qa(3, 10 if split == "test" else 0))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    config = DataConfig(path="openai/gsm8k", name="main", heldout_split="test")
    loaded = data.load(config, seed=0)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert sorted(e.source for e in loaded.train) == [f"openai/gsm8k:train[{i}]" for i in range(3)]
    assert {e.gold for e in loaded.heldout} == {"a10", "a11", "a12"}
    assert list(data.fingerprint(config)) == ["train openai/gsm8k:train", "heldout openai/gsm8k:test"]


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def load_dataset(path: str, *_: Any, **__: Any) -> Any:
        raise ConnectionError(f"Couldn't reach\n{path!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    expected = "no/such: no such local file; as a Hub data set it cannot be loaded: Couldn't reach 'no/such' on the Hub"
    assert failure("no/such") == expected
    with pytest.raises(InputError, match="cannot be loaded"):
        data.fingerprint(DataConfig(path="no/such"))


@pytest.mark.parametrize("error", [RuntimeError, DatasetGenerationError])
def test_a_hub_data_set_that_cannot_be_made(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise error("Dataset scripts are no longer supported, but found gsm8k.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert failure("no/such").endswith("cannot be loaded: Dataset scripts are no longer supported, but found gsm8k.py")


@pytest.mark.parametrize(
    "spec",
    [
        "./x/y",
        "../x",
        "/nope/x",
        "~/nope/x",
        "x.jsonl",
        "owner/x.jsonl",
        "here/x",
        "gsm8k",
        "a/b/c",
        "own er/x",
        "owner/x.txt",
        "x/",
    ],
)
def test_a_path_is_never_looked_up_on_the_hub(spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise AssertionError("Hub look-up")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert failure(spec).startswith(f"{spec}: no such file; ")
    assert failure(jsonl(tmp_path / "ok.jsonl", *qa(1)), heldout=spec).startswith(f"{spec}: no such file; ")


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", *qa(1))
    assert (
        failure(tmp_path / "trian.jsonl")
        == f"{tmp_path / 'trian.jsonl'}: no such file; the nearest is `{tmp_path / 'train.jsonl'}`"
    )
    gone = tmp_path / "no" / "x.jsonl"
    assert (
        failure(gone) == f"{gone}: no such file; nor is there a folder `{gone.parent}`; a Hub id is written owner/name"
    )


# --- text ------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "🤖👩\u200d🚀 e\u0301",
        "שלום עולם \u202eabc",
        "a\0b",
        "x" * 100_000,
        "a\u2028b\u0085c\x0cd",
        "<|assistant|></s>",
        " kept\n as is\r\n",
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_text_comes_through_unchanged(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    row = {"question": text, "answer": text + "!", "extra": text}
    if suffix == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([row.keys(), row.values()])
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(
            json.dumps(row if suffix == "jsonl" else [row], ensure_ascii=False), encoding="utf-8", newline=""
        )
    (example,) = read(path)
    assert example.messages == (Message("user", text),)
    assert (example.gold, example.meta) == (text + "!", {"extra": text})


def test_a_cell_longer_than_the_csv_default(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"question,answer\nq,{'y' * 300_000}\n")
    assert [len(e.gold or "") for e in read(path)] == [300_000]
