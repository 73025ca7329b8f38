"""Sources of task records: what tells one set of data from another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BertConfig

from mamo.config.schema import DataConfig
from mamo.data.records import EntailmentRecord, GroundingRecord, ReasoningRecord, TaskRecord, VqaRecord
from mamo.data.tokenizer import SPECIAL_TOKENS, build_tokenizer
from mamo.tasks.grounding.task import ExpressionPairs
from mamo.tasks.sources import load_records, pair_dataset, record_dataset, refuse_training_files, tokenizer_of
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of

ROWS: list[tuple[type[TaskRecord], dict[str, Any]]] = [
    (VqaRecord, {"image": "{}/1.jpg", "question_id": 1, "question": "what?"}),
    (ReasoningRecord, {"images": ["{}/1.jpg", "{}/2.jpg"], "sentence": "s", "label": True, "identifier": "a"}),
    (EntailmentRecord, {"image": "{}/1.jpg", "sentence": "s", "label": "neutral", "pair_id": "a"}),
    (GroundingRecord, {"image": "{}/1.jpg", "expression_id": 1, "expression": "e"}),
]


def identity_of(root: Path, kind: type[TaskRecord], row: dict[str, Any], images: str) -> str:
    """Of two files in two folders below `root`, whose rows have this folder for `{}`."""
    files = [root / "first/train.jsonl", root / "second/train.jsonl"]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        filled = json.loads(json.dumps({**row, kind.key: row[kind.key] * (number + 1)}).replace("{}", images))
        file.write_text(json.dumps(filled) + "\n")
    data = DataConfig(source="records", train_file=[str(file) for file in files])
    records, load_image = load_records(data, kind, "train", 0)
    source: Any = record_dataset(records, load_image, data)
    return "".join((ExpressionPairs(source) if kind is GroundingRecord else source).fingerprint_items())


@pytest.mark.parametrize(("kind", "row"), ROWS)
def test_identity_stays_where_the_data_moved(tmp_path: Path, kind: type[TaskRecord], row: dict[str, Any]) -> None:
    """Bug: absolute paths in the fingerprint: a run cannot go on after its data folder was moved or mounted elsewhere;
    or other images pass for the same.
    """
    found = {identity_of(tmp_path / name, kind, row, "images") for name in ("here", "there")}
    assert len(found) == 1
    assert str(tmp_path) not in next(iter(found))
    absolute = {identity_of(tmp_path / name, kind, row, str(tmp_path / name / "images")) for name in ("here", "there")}
    assert len(absolute) == 1
    assert identity_of(tmp_path / "here", kind, row, "photos") not in found


def bert_folder(folder: Path, words: list[str] | None, vocab_size: int) -> str:
    """A folder with BERT's config and, with `words`, its tokenizer."""
    BertConfig(vocab_size=vocab_size).save_pretrained(folder)
    if words is not None:
        build_tokenizer(words).save_pretrained(folder)
    return str(folder)


def test_the_tokenizer_is_that_of_the_bert(tmp_path: Path) -> None:
    """Bug: a published BERT with the default tokenizer: its ids read rows of other words."""
    scenes = sorted(scenes_tokenizer().get_vocab(), key=scenes_tokenizer().get_vocab().__getitem__)
    n = len(scenes)
    several = [
        ("own", scenes, n, None),
        ("other", [*SPECIAL_TOKENS, *(f"word{k}" for k in range(2 * n))], 2 * n + 5, "is not the tokenizer of"),
        ("more", [*scenes, "zebra"], n + 1, "'zebra' has id None here"),
        ("order", [*scenes[:-2], scenes[-1], scenes[-2]], n, "is not the tokenizer of"),
        ("equally many, no tokenizer", None, n, None),
        ("no tokenizer", None, 30_522, f"scenes has {n} words, .* has 30522"),
    ]
    for name, words, vocab_size, message in several:
        text = {"bert": bert_folder(tmp_path / name, words, vocab_size), "weights": "bert"}
        config = config_of(model={"text": text})
        if message is None:
            assert len(tokenizer_of(config)) == n
        else:
            with pytest.raises(ValueError, match=message):
                tokenizer_of(config)
            assert len(tokenizer_of(config_of(model={"text": {**text, "weights": "random"}}))) == n


def test_a_training_file_is_known_by_any_path(tmp_path: Path) -> None:
    """Bug: a link, a copy or one shard of the training data counts as held out, or another split does not."""
    (tmp_path / "shards").mkdir()
    for name in ("a.jsonl", "b.jsonl", "shards/0.tar", "shards/1.tar"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    (tmp_path / "copy.jsonl").write_text("a.jsonl")

    def is_refused(
        train_file: str | list[str], eval_file: str, train: str | None = None, held: str | None = None
    ) -> bool:
        listed = [str(tmp_path / name) for name in ([train_file] if isinstance(train_file, str) else train_file)]
        data = DataConfig(source="pairs", train_file="x", eval_file=str(tmp_path / eval_file), eval_split=held)
        earlier = {"train_file": listed, "train_split": train}
        try:
            refuse_training_files(data, [{"train_file": None}, earlier])
        except ValueError as error:
            return "name a held-out one" in str(error)
        return False

    for name in ("a.jsonl", "link.jsonl", "copy.jsonl", "shards/../a.jsonl"):
        assert is_refused(["b.jsonl", "a.jsonl"], name)
        assert is_refused("a.jsonl", name, "train", "restval")
        assert not is_refused("a.jsonl", name, "train", "test")
        assert not is_refused("b.jsonl", name)
    for train_file in ("shards", "shards/*.tar", "shards/1.tar"):
        assert all(is_refused(train_file, name) for name in ("shards", "shards/[1-9].tar", "shards/1.tar"))
    assert not is_refused("shards/0.tar", "shards/1.tar")
    assert not is_refused("gone.jsonl", "gone.jsonl")  # its reader says so


def test_mirrored_pictures_are_refused_where_texts_name_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: "the left cup" is grounded in a mirrored picture; or a warning for a flip that is off."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    texts = ["the left cup", *["a red cup"] * 9]

    def decode(_: str) -> torch.Tensor:
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    rows = [GroundingRecord(image="a.png", expression_id=k, expression=text) for k, text in enumerate(texts)]
    data = {"source": "records", "train_file": str(tmp_path / "x.jsonl"), "augmentation": {"horizontal_flip": True}}
    with pytest.raises(
        ValueError, match=r"horizontal_flip: 1 of 10 texts .* say left or right.*'the left cup'; set it"
    ):
        record_dataset(rows, decode, DataConfig(**data))
    assert len(record_dataset(rows[1:], decode, DataConfig(**data))) == 9
    assert len(record_dataset(rows, decode, DataConfig(**{**data, "augmentation": {}}))) == 10
    lines = [json.dumps({"image": "a.png", "caption": text}) for text in texts]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    for is_flipped in (False, True):
        caplog.clear()
        more = {"source": "pairs", "train_file": str(tmp_path / "pairs.jsonl")}
        more["augmentation"] = {"horizontal_flip": is_flipped, "tag_subsets": True}
        dataset = pair_dataset(config_of(data=more, evaluation={"enabled": False}))
        assert ("1 of 10 captions say left or right" in caplog.text) == is_flipped
        assert dataset.change is not None
