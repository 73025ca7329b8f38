"""The builders on releases of a few rows made here in the official layouts."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mamo.data.builders import captions, nlvr2, questions, snli_ve
from mamo.data.builders.captions import build_karpathy, build_vg
from mamo.data.builders.nlvr2 import build_nlvr2
from mamo.data.builders.questions import build_vgqa, build_vqa2
from mamo.data.builders.refcoco import build_refcoco
from mamo.data.builders.snli_ve import build_snli_ve
from mamo.data.pairs_reader import read_pairs
from mamo.data.records import (
    EntailmentRecord,
    GroundingRecord,
    ReasoningRecord,
    VqaRecord,
    image_path,
    read_task_records,
)


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Writes a release: JSON for what is not bytes or text."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def karpathy(split: str, number: int, folder: str | None = "val2014") -> dict[str, Any]:
    place = {} if folder is None else {"filepath": folder, "cocoid": number}
    sentences = [{"tokens": ["a"], "raw": f" A kite {number}, {k}. ", "imgid": 0, "sentid": k} for k in range(2)]
    return {"filename": f"{number}.jpg", "split": split, "sentences": sentences, **place}


def test_coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: restval lost, captions as tokens, images that are found only from the release's folder."""
    monkeypatch.setitem(captions._EXPECTED_IMAGES, "coco", {"train": 2, "val": 1, "test": 2})
    monkeypatch.setitem(captions._EXPECTED_CAPTIONS, "coco", {"train": 4, "val": 2, "test": 3})
    entries = [
        karpathy("train", 1, "train2014"), karpathy("restval", 2), karpathy("val", 3), karpathy("test", 4)
    ]  # fmt: skip
    files = {f"{e['filepath']}/{e['filename']}": b"x" for e in entries[:3]}
    release = put(tmp_path / "release", {"dataset_coco.json": {"dataset": "coco", "images": entries}, **files})
    report = build_karpathy("coco", release, tmp_path / "out")
    train = read_pairs(tmp_path / "out/train.jsonl")
    assert [(r.image_id, r.captions) for r in train] == [
        (f"coco/{k}", (f"A kite {k}, 0.", f"A kite {k}, 1.")) for k in (1, 2)
    ]
    assert all(Path(str(r.image)).is_file() for r in train)
    assert [r.caption_ids for r in train] == [("0", "1")] * 2
    assert report.lines() == [
        "train images: found 2, expected 2",
        "train captions: found 4, expected 4",
        "val images: found 1, expected 1",
        "val captions: found 2, expected 2",
        "test images: found 1, expected 2",
        "test captions: found 2, expected 3",
        "image files: found 3, expected 4",
    ]
    assert not report.is_complete


def test_flickr30k_and_mistakes(tmp_path: Path) -> None:
    """Bug: COCO's keys are asked of Flickr30k, or a split nobody knows is dropped in silence."""
    entries = [karpathy("test", 7, None)]
    release = put(tmp_path / "a", {"dataset_flickr30k.json": {"images": entries}, "flickr30k-images/7.jpg": b"x"})
    report = build_karpathy("flickr30k", release, tmp_path / "out")
    (record,) = read_pairs(tmp_path / "out/test.jsonl")
    assert record.image_id == "flickr30k/7.jpg"
    assert Path(str(record.image)).is_file()
    assert "train images: found 0, expected 29000" in report.lines()
    for content, message in (
        ({"images": [karpathy("tset", 7, None)]}, "unknown split 'tset'"),
        ({"images": [{"filename": "x"}]}, r"flickr30k\.json: entry 0: split: missing"),
        ({"annotations": []}, "contains no list 'images'"),
        ("{", "not valid JSON"),
    ):
        put(release, {"dataset_flickr30k.json": content})
        with pytest.raises(ValueError, match=message):
            build_karpathy("flickr30k", release, tmp_path / "out")
    with pytest.raises(ValueError, match="must be a folder that contains it"):
        build_karpathy("coco", release, tmp_path / "out")


def test_visual_genome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: images of the second folder are missed, or a phrase said twice counts twice."""
    region = {"image_id": 5, "region_id": 1, "x": 0, "y": 0, "width": 1, "height": 1}
    phrases = ["a blue door", "a blue door", " ", "a knob "]
    entries = [{"id": 5, "regions": [{**region, "phrase": phrase} for phrase in phrases]}, {"id": 6, "regions": []}]
    qas = [{"id": 5, "qas": [{"image_id": 5, "qa_id": 9, "question": "What color?", "answer": "Blue."}]}]
    release = put(
        tmp_path / "vg", {"region_descriptions.json": entries, "question_answers.json": qas, "VG_100K_2/5.jpg": b"x"}
    )
    monkeypatch.setattr(captions, "_VG_IMAGES", 2)
    assert build_vg(release, tmp_path / "out").is_complete
    (record,) = read_pairs(tmp_path / "out/pairs.jsonl")
    assert record.captions == ("a blue door", "a knob")
    assert Path(str(record.image)).is_file()
    assert build_vgqa(release, tmp_path / "out").lines() == [
        "questions: found 1, expected 1445322", "image files: found 1, expected 1"
    ]  # fmt: skip
    (question,) = read_task_records(tmp_path / "out/questions.jsonl", VqaRecord)
    assert (question.question_id, question.answers) == (9, ["blue"])


def vqa_release(folder: Path, n_annotated: int = 2, extra: int | None = None) -> Path:
    asked = [{"image_id": 42, "question": f"q {k}?", "question_id": 42000 + k} for k in range(2)]
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": k + 1} for k in range(10)]
    annotated = [
        {"question_type": "what", "multiple_choice_answer": "red", "answers": answers, "image_id": 42,
         "answer_type": "other", "question_id": number}
        for number in [42000, 42001][:n_annotated] + ([extra] if extra else [])
    ]  # fmt: skip
    return put(
        folder,
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {"info": {}, "questions": asked},
            "v2_mscoco_val2014_annotations.json": {"info": {}, "annotations": annotated},
            "v2_OpenEnded_mscoco_test2015_questions.json": {"questions": asked},
            "val2014/COCO_val2014_000000000042.jpg": b"x",
            "test2015/COCO_test2015_000000000042.jpg": b"x",
        },
    )


def test_vqa2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: annotations joined by place instead of by id, a missing answer that becomes an empty list."""
    monkeypatch.setitem(questions._SPLITS, "val", ("val2014", True, 2))
    monkeypatch.setitem(questions._SPLITS, "test", ("test2015", False, 2))
    assert build_vqa2(vqa_release(tmp_path / "a"), tmp_path / "out").is_complete
    val = read_task_records(tmp_path / "out/val.jsonl", VqaRecord)
    assert [(r.question_id, r.answers, r.answer_type) for r in val] == [
        (42000 + k, ["red"] * 10, "other") for k in range(2)
    ]
    assert image_path(tmp_path / "out/val.jsonl", val[0].image).is_file()
    assert read_task_records(tmp_path / "out/test.jsonl", VqaRecord)[0].answers == []
    with pytest.raises(ValueError, match="question_id 42001 has no annotation"):
        build_vqa2(vqa_release(tmp_path / "b", n_annotated=1), tmp_path / "out")
    with pytest.raises(ValueError, match="1 annotations have no question, the first is 7"):
        build_vqa2(vqa_release(tmp_path / "c", extra=7), tmp_path / "out")
    with pytest.raises(ValueError, match="contains none of the official files"):
        build_vqa2(tmp_path, tmp_path / "out")


def test_nlvr2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: left and right exchanged, the sentence's number taken into the image's name, "False" read as true."""
    monkeypatch.setitem(nlvr2._SPLITS, "train", ("train.json", 1))
    monkeypatch.setitem(nlvr2._SPLITS, "dev", ("dev.json", 1))
    row = {"sentence": "Three cups.", "left_url": "l", "right_url": "r", "writer": "7", "validation": {}, "synset": "c"}
    release = put(
        tmp_path / "release",
        {
            "train.json": json.dumps({**row, "identifier": "train-10-0-1", "label": "True", "directory": 3}) + "\n",
            "dev.json": json.dumps({**row, "identifier": "dev-10-2-1", "label": "False"}) + "\n",
            **{f"images/train/3/train-10-0-img{k}.png": b"x" for k in (0, 1)},
            **{f"dev/dev-10-2-img{k}.png": b"x" for k in (0, 1)},
        },
    )
    assert build_nlvr2(release, tmp_path / "out").is_complete
    for split, label, folder in (("train", True, "images/train/3/train-10-0"), ("dev", False, "dev/dev-10-2")):
        (record,) = read_task_records(tmp_path / f"out/{split}.jsonl", ReasoningRecord)
        assert record.label is label
        paths = [image_path(tmp_path / f"out/{split}.jsonl", name).resolve() for name in record.images]
        assert paths == [release / f"{folder}-img{k}.png" for k in (0, 1)]
    for text, message in (
        ("{", r"dev\.json:1: not valid JSON"),
        (json.dumps(row), r"dev\.json:1: identifier: missing"),
    ):
        put(release, {"dev.json": text + "\n"})
        (release / "train.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=message):
            build_nlvr2(release, tmp_path / "out")
    with pytest.raises(ValueError, match=r"contains none of train\.json"):
        build_nlvr2(tmp_path, tmp_path / "out")


def test_snli_ve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the caption of the picture in place of the sentence, or the picture of another folder."""
    monkeypatch.setitem(snli_ve._SPLITS, "dev", ("snli_ve_dev.jsonl", 2))
    row = {
        "annotator_labels": ["neutral"], "captionID": "7.jpg#4", "gold_label": "neutral", "pairID": "7.jpg#4r1n",
        "sentence1": "A caption.", "sentence1_parse": "(ROOT)", "sentence2": "Someone waits.", "Flickr30K_ID": "7",
    }  # fmt: skip
    rows = [row, {**row, "pairID": "7.jpg#4r1c", "gold_label": "contradiction", "sentence2": "Nobody is there."}]
    release = put(
        tmp_path / "release",
        {"snli_ve_dev.jsonl": "".join(json.dumps(each) + "\n" for each in rows), "flickr30k-images/7.jpg": b"x"},
    )
    report = build_snli_ve(release, tmp_path / "out")
    assert report.is_complete
    assert report.absent == ("snli_ve_train.jsonl", "snli_ve_test.jsonl")
    first, second = read_task_records(tmp_path / "out/dev.jsonl", EntailmentRecord)
    assert (first.sentence, first.label, first.pair_id) == ("Someone waits.", "neutral", "7.jpg#4r1n")
    assert (second.sentence, second.label) == ("Nobody is there.", "contradiction")
    assert image_path(tmp_path / "out/dev.jsonl", first.image).resolve() == release / "flickr30k-images/7.jpg"
    for text, message in (
        ("{", r"dev\.jsonl:1: not valid JSON"),
        (json.dumps({**row, "gold_label": "-"}), r"dev\.jsonl:1: gold_label: must be one of .*, got '-'"),
        (f"{json.dumps(row)}\n{json.dumps(row)}", r"dev\.jsonl:2: pairID: .* occurs twice"),
    ):
        put(release, {"snli_ve_dev.jsonl": text + "\n"})
        with pytest.raises(ValueError, match=message):
            build_snli_ve(release, tmp_path / "out")
    with pytest.raises(ValueError, match=r"contains none of snli_ve_train\.jsonl"):
        build_snli_ve(tmp_path, tmp_path / "out")


def test_nlvr2_sentence_may_hold_odd_line_ends(tmp_path: Path) -> None:
    """Bug: a row is cut in two at a character that ends a line for Python and not for JSON."""
    row = {"identifier": "dev-10-2-1", "sentence": "Three\u2028cups\u0085here.", "label": "False"}
    release = put(tmp_path / "release", {"dev.json": json.dumps(row, ensure_ascii=False) + "\n"})
    build_nlvr2(release, tmp_path / "out")
    (record,) = read_task_records(tmp_path / "out/dev.jsonl", ReasoningRecord)
    assert record.sentence == row["sentence"]


class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_refcoco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: one row a reference instead of one a sentence, boxes of another annotation, code run from the pickle."""
    monkeypatch.chdir(tmp_path)
    sentences = [{"tokens": ["kite"], "raw": "Kite", "sent_id": k, "sent": f"kite {k}"} for k in (0, 1)]
    ref = {"ref_id": 3, "ann_id": 11, "category_id": 1, "file_name": "COCO_train2014_000000000077_0.jpg",
           "image_id": 77, "split": "testA", "sent_ids": [0, 1], "sentences": sentences}  # fmt: skip
    instances = {
        "images": [{"id": 77, "file_name": "COCO_train2014_000000000077.jpg", "height": 9, "width": 9}],
        "annotations": [
            {"id": 11, "image_id": 77, "bbox": [1, 2, 3, 4.5]},
            {"id": 12, "image_id": 77, "bbox": [0] * 4},
        ],
    }
    release = put(
        tmp_path / "refcoco+",
        {
            "refs(unc).p": pickle.dumps([ref], protocol=2),
            "instances.json": instances,
            "dets.json": {"77": [[1, 2, 3, 4], [0, 0, 9, 9, 0.5]]},
            "train2014/COCO_train2014_000000000077.jpg": b"x",
        },
    )
    assert build_refcoco(release, tmp_path / "out").lines() == [
        "testA expressions: found 2, expected 5726",
        "testB expressions: found 0, expected 4889",
        "train expressions: found 0, expected 120191",
        "val expressions: found 0, expected 10758",
        "image files: found 1, expected 1",
    ]
    records = read_task_records(tmp_path / "out/testA.jsonl", GroundingRecord)
    assert [(r.expression_id, r.expression, r.box_xywh) for r in records] == [
        (k, f"kite {k}", (1.0, 2.0, 3.0, 4.5)) for k in (0, 1)
    ]
    assert records[0].proposals_xywh == [(1.0, 2.0, 3.0, 4.0), (0.0, 0.0, 9.0, 9.0)]
    put(release, {"refs(unc).p": pickle.dumps([{**ref, "ann_id": 5}])})
    with pytest.raises(ValueError, match="ref_id 3 has no annotation or image"):
        build_refcoco(release, tmp_path / "out")
    put(release, {"refs(unc).p": pickle.dumps(Evil())})
    with pytest.raises(ValueError, match=r"unsafe or damaged pickle: it contains "):
        build_refcoco(release, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
