"""Labels of sentences about images: in any batches, with and without the picture, and what is written."""

import json
from pathlib import Path

import pytest
import torch

from mamo.data.records import ENTAILMENT_LABELS, EntailmentRecord
from mamo.evaluation.scorer import eval_mode
from mamo.tasks.entailment.config import EntailmentConfig
from mamo.tasks.entailment.evaluate import (
    confusion_table,
    likeliest,
    predict_entailment,
    refuse_training_images,
    write_predictions,
)
from mamo.tasks.entailment.network import EntailmentNetwork
from tests.tiny import make_backbone, predictor_of, spread_weights, values_of


def network() -> EntailmentNetwork:
    made = EntailmentNetwork(make_backbone(width=32, fusion_layers=1))
    spread_weights(made.backbone.fusion, made.entailment)
    return made.eval()


def picture(name: str) -> torch.Tensor:
    return torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(int(name)))


RECORDS = [
    EntailmentRecord(image=image, sentence=text, label="neutral", pair_id=str(k))
    for k, (image, text) in enumerate(
        [("1", "there is a red circle"), ("0", "there is a ring"), ("1", "a ring is above a cross"), ("2", "a square")]
    )
]


def test_labels_do_not_depend_on_batches_and_read_picture_and_sentence() -> None:
    """Bug: the sentence of another record, the picture of the batch's first one, or a score of the text only."""
    predictor = predictor_of(network(), text_max_tokens=20)
    with eval_mode(predictor.network):
        single = predict_entailment(predictor, RECORDS, picture, 1)
        together = predict_entailment(predictor, RECORDS[::-1], picture, 4)
        blank = predict_entailment(predictor, RECORDS, picture, 4, is_blank=True)
        moved = [record.model_copy(update={"image": "5"}) for record in RECORDS]
        elsewhere = predict_entailment(predictor, moved, picture, 4)
        elsewhere_blank = predict_entailment(predictor, moved, picture, 4, is_blank=True)
    for key, values in single.items():
        assert values == pytest.approx(together[key], abs=1e-4)
        assert sum(values) == pytest.approx(1)
        assert max(abs(a - b) for a, b in zip(values, elsewhere[key], strict=True)) > 1e-3
        assert blank[key] == pytest.approx(elsewhere_blank[key], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(single["0"], single["2"], strict=True)) > 1e-3


def test_predictions_are_written_and_tabulated(tmp_path: Path) -> None:
    """Bug: probabilities in another order than the labels', or a table of columns by row."""
    found = {"0": (0.7, 0.2, 0.1), "1": (0.1, 0.8, 0.1), "2": (0.0, 0.4, 0.6), "3": (0.2, 0.5, 0.3)}
    assert likeliest(found) == {"0": "contradiction", "1": "neutral", "2": "entailment", "3": "neutral"}
    write_predictions(tmp_path / "p.jsonl", found, RECORDS)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows[2] == {"pair_id": "2", "label": "neutral", "contradiction": 0.0, "neutral": 0.4, "entailment": 0.6}
    table = confusion_table(tmp_path / "p.jsonl")
    assert "<th>neutral</th><td class=n>4</td><td class=n>25.0</td><td class=n>50.0</td><td class=n>25.0</td>" in table
    assert ENTAILMENT_LABELS == ("contradiction", "neutral", "entailment")


def test_training_images_are_refused(tmp_path: Path) -> None:
    """Bug: an accuracy on the pictures of the training, under another pair_id or through a link."""
    row = {"image": "a.jpg", "sentence": "s", "label": "neutral", "pair_id": "1"}
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "c.jpg").write_bytes(b"x")
    for name, image in (("train", "a.jpg"), ("same", "b.jpg"), ("other", "c.jpg")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row, "image": image, "pair_id": name}) + "\n")

    def config(name: str) -> EntailmentConfig:
        data = {"source": "records", "train_file": "x", "eval_file": str(tmp_path / f"{name}.jsonl")}
        return EntailmentConfig.model_validate(values_of("entailment", data=data))

    train = [str(tmp_path / "train.jsonl"), str(tmp_path / "gone.jsonl")]
    refuse_training_images(config("other"), train)
    with pytest.raises(ValueError, match=r"same\.jsonl: 1 sentences are about images of .* pair_id same \(.*b\.jpg\)"):
        refuse_training_images(config("same"), train)
