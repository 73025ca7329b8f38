"""Releases of another shape, and output over the user's files: one error with the place, and nothing is written."""

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mamo.commands.data import BUILDERS, main
from mamo.data.audit import find_overlap
from mamo.data.builders import refcoco
from mamo.data.builders.captions import build_karpathy
from mamo.data.builders.nlvr2 import build_nlvr2
from mamo.data.builders.refcoco import build_refcoco
from mamo.data.builders.web import build_cc3m
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import read_pairs
from mamo.data.records import ReasoningRecord, VqaRecord, read_task_records
from mamo.data.tokenizer import train_tokenizer
from mamo.world.export import LAYOUTS, Layout, export_scenes
from mamo.world.scene import SceneWorld

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
REF = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "val", "sentences": [{"sent_id": 1, "sent": "x"}]}
Files = dict[str, Any]


def release_of(name: str) -> Files:
    """A release of one entry; documents of JSON, rows of JSON Lines as text."""
    sentence = {"raw": "a kite"}
    image = {"filename": "a.jpg", "split": "train", "sentences": [sentence]}
    nlvr2 = {"identifier": "dev-1-0-0", "sentence": "x", "label": "True"}
    releases: dict[str, Files] = {
        "coco": {"dataset_coco.json": {"images": [{**image, "filepath": "train2014", "cocoid": 1}]}},
        "flickr30k": {"dataset_flickr30k.json": {"images": [image]}},
        "vg": {"region_descriptions.json": [{"id": 1, "regions": [{"phrase": "a door"}]}]},
        "vgqa": {"question_answers.json": [
            {"qas": [{"image_id": 1, "qa_id": 1, "question": "what?", "answer": "red"}]}
        ]},
        "vqa2": {
            QUESTIONS: {"questions": [{"image_id": 1, "question_id": 1, "question": "what?"}]},
            ANNOTATIONS: {"annotations": [{
                "question_id": 1, "answers": [{"answer": "x"}], "answer_type": "other", "question_type": "what",
                "multiple_choice_answer": "x",
            }]},
        },
        "refcoco": {
            "refs(unc).p": [REF],
            "instances.json": {
                "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}], "images": [{"id": 1, "file_name": "a.jpg"}]
            },
            "dets.json": {"1": [[0, 0, 1, 1]]},
        },
        "emoji": {
            "emojibase-data/en/data.json": [
                {"label": "a face", "hexcode": "1F600", "order": 1, "group": 0, "tags": ["x"]}
            ],
            **{f"emoji-datasource-{name}/img/{name}/64/1f600.png": "" for name in ("google", "twitter")},
        },
        "sbu": {"sbu-captions-all.json": {"image_urls": ["http://x"], "captions": ["a kite"]}},
        "nlvr2": {"dev.json": nlvr2},
        "snli_ve": {
            "snli_ve_dev.jsonl": {"Flickr30K_ID": "1", "gold_label": "neutral", "pairID": "a", "sentence2": "x"}
        },
        "nlvr": {"dev.json": {"identifier": "1-0", "directory": "1", "label": "true", "sentence": "x"}},
        **fine_grained_releases(),
    }  # fmt: skip
    return releases[name]


def fine_grained_releases() -> dict[str, Files]:
    """Releases of fine-grained sets with one entry; a CSV file as rows, a parquet file as rows by column."""
    texts = {"caption": "a", "negative_caption": "b"}
    image = {"bytes": b"x", "path": None}
    aro = {"image_path": "5.jpg", "bbox_x": 1, "bbox_y": 2, "bbox_w": 3, "bbox_h": 4, "true_caption": "a",
           "false_caption": "b"}  # fmt: skip
    valse = {"dataset": "visual7w", "image_file": "v.jpg", "caption": "a", "foil": "b", "mturk": {"caption": 3}}
    order = {f"hard_text_{k}": f"w{k}" for k in range(1, 5)}
    vsr = {"image": "1.jpg", "image_link": "u/val2017/1.jpg", "caption": "a", "label": 1, "relation": "on"}
    winoground = {"id": 0, "image_0": "a", "image_1": "b", "caption_0": "a", "caption_1": "b", "collapsed_tag": "Both"}
    order_file = {"0.parquet": [{"images": image, "correct_caption": "a", **order}]}
    return {
        "sugarcrepe": {"add_att.json": {"0": {"filename": "1.jpg", **texts}}},
        "sugarcrepe-pp": {"swap_obj.json": [{"id": 1, "filename": "1.jpg", "caption2": "c", **texts}]},
        "valse": {"plurals.json": {"x": valse}},
        "vsr": {"random_test.jsonl": vsr},
        "winoground": {"examples.jsonl": winoground},
        "aro": {
            "visual_genome_relation.json": [{**aro, "relation_name": "on"}],
            "visual_genome_attribution.json": [{**aro, "attributes": ["red", "wet"]}],
        },
        "aro-coco-order": order_file,
        "aro-flickr30k-order": order_file,
        "whatsup": {
            "controlled_images_dataset.json": [{"image_path": "a_on_b.jpeg", "caption_options": ["a", "b", "c", "d"]}],
            "coco_qa_one_obj.json": [[1, "a", "b"]],
        },
        "svo-probes": {"svo_probes.csv": [
            {"sentence": "a", "pos_image_id": 1, "neg_image_id": 2, "subj_neg": 1, "verb_neg": 0, "obj_neg": 0}
        ]},
        "bivlc": {"0.parquet": [{"image": image, "negative_image": {"bytes": b"y", "path": None}, "type": "swap",
                                 "subtype": "obj", **texts}]},
        "colorswap": {"test.parquet": [{"id": 1, "image_1": image, "image_2": {"bytes": b"y", "path": None},
                                        "caption_1": "a", "caption_2": "b"}]},
        "mmvp-vlm": {"Questions.csv": [{"id": k, "type": "Color", "statement": "a"} for k in (1, 2)]},
        "cola": {"COLA_multiobjects_matching_benchmark.json": [["u/1.jpg", "a", "u/2.jpg", "b"]]},
    }  # fmt: skip


def put(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".p"):
            (folder / name).write_bytes(pickle.dumps(document))
        elif name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(document), folder / name)
        elif name.endswith(".csv"):
            lines = [",".join(document[0]), *(",".join(map(str, row.values())) for row in document)]
            (folder / name).write_text("\n".join(lines) + "\n")
        else:
            (folder / name).write_text(json.dumps(document))
    return folder


def changed(document: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy with the value at `path` changed; None in a path is the last key, "drop" removes it."""
    if not path:
        return change(document)
    copy = dict(document) if isinstance(document, dict) else list(document)
    result = changed(copy[path[0]], path[1:], change)
    if result is DROP:
        del copy[path[0]]
    else:
        copy[path[0]] = result
    return copy


DROP = object()
PLACES: list[tuple[str, str, tuple[Any, ...], str]] = [
    ("coco", "dataset_coco.json", ("images", 0), "images"),
    *[("coco", "dataset_coco.json", ("images", 0, key), key)
      for key in ("filename", "split", "filepath", "cocoid", "sentences")],
    ("coco", "dataset_coco.json", ("images", 0, "sentences", 0), "sentences"),
    ("coco", "dataset_coco.json", ("images", 0, "sentences", 0, "raw"), "raw"),
    ("flickr30k", "dataset_flickr30k.json", ("images", 0, "filename"), "filename"),
    ("vg", "region_descriptions.json", (0, "id"), "id"),
    ("vg", "region_descriptions.json", (0, "regions"), "regions"),
    ("vg", "region_descriptions.json", (0, "regions", 0), "regions"),
    ("vg", "region_descriptions.json", (0, "regions", 0, "phrase"), "phrase"),
    *[("vgqa", "question_answers.json", (0, "qas", 0, key), key)
      for key in ("image_id", "qa_id", "question", "answer")],
    ("vgqa", "question_answers.json", (0, "qas"), "qas"),
    *[("vqa2", QUESTIONS, ("questions", 0, key), key) for key in ("image_id", "question_id", "question")],
    *[("vqa2", ANNOTATIONS, ("annotations", 0, key), key)
      for key in ("question_id", "answers", "answer_type", "question_type")],
    ("vqa2", ANNOTATIONS, ("annotations", 0, "answers", 0), "answers"),
    ("vqa2", ANNOTATIONS, ("annotations", 0, "answers", 0, "answer"), "answer"),
    *[("refcoco", "refs(unc).p", (0, key), key) for key in ("ann_id", "image_id", "split", "sentences")],
    ("refcoco", "refs(unc).p", (0, "sentences", 0), "sentences"),
    ("refcoco", "refs(unc).p", (0, "sentences", 0, "sent_id"), "sent_id"),
    ("refcoco", "refs(unc).p", (0, "sentences", 0, "sent"), "sent"),
    ("refcoco", "instances.json", ("annotations", 0, "id"), "id"),
    ("refcoco", "instances.json", ("annotations", 0, "bbox"), "bbox"),
    ("refcoco", "instances.json", ("annotations", 0, "bbox", 2), "bbox"),
    ("refcoco", "instances.json", ("images", 0, "id"), "id"),
    ("refcoco", "instances.json", ("images", 0, "file_name"), "file_name"),
    ("refcoco", "dets.json", ("1",), "1"),
    ("refcoco", "dets.json", ("1", 0), "1"),
    ("refcoco", "dets.json", ("1", 0, 0), "1"),
    *[("emoji", "emojibase-data/en/data.json", (0, key), key) for key in ("label", "hexcode", "order")],
    ("sbu", "sbu-captions-all.json", ("captions", 0), "captions"),
    ("sbu", "sbu-captions-all.json", ("image_urls", 0), "image_urls"),
    *[("nlvr2", "dev.json", (key,), key) for key in ("identifier", "sentence", "label")],
    *[("snli_ve", "snli_ve_dev.jsonl", (key,), key) for key in ("Flickr30K_ID", "gold_label", "pairID", "sentence2")],
    *[("nlvr", "dev.json", (key,), key) for key in ("identifier", "directory", "sentence", "label")],
    *[("sugarcrepe", "add_att.json", ("0", key), key) for key in ("filename", "caption", "negative_caption")],
    *[("sugarcrepe-pp", "swap_obj.json", (0, key), key) for key in ("id", "filename", "caption", "caption2")],
    *[("valse", "plurals.json", ("x", key), key) for key in ("dataset", "image_file", "caption", "foil", "mturk")],
    ("valse", "plurals.json", ("x", "mturk", "caption"), "caption"),
    *[("vsr", "random_test.jsonl", (key,), key) for key in ("image", "image_link", "caption", "label", "relation")],
    *[("winoground", "examples.jsonl", (key,), key) for key in ("id", "image_0", "caption_1", "collapsed_tag")],
    *[("aro", "visual_genome_relation.json", (0, key), key)
      for key in ("image_path", "bbox_w", "true_caption", "relation_name")],
    ("aro", "visual_genome_attribution.json", (0, "attributes"), "attributes"),
    ("whatsup", "controlled_images_dataset.json", (0, "image_path"), "image_path"),
    ("whatsup", "controlled_images_dataset.json", (0, "caption_options"), "caption_options"),
    ("whatsup", "coco_qa_one_obj.json", (0,), "entry 0"),
    ("cola", "COLA_multiobjects_matching_benchmark.json", (0,), "row"),
    ("cola", "COLA_multiobjects_matching_benchmark.json", (0, 1), "row"),
]  # fmt: skip
VALUES: dict[str, Any] = {
    "null": None, "number": 1.5, "text": "", "list": [None], "object": {"a": 1}, "true": True, "missing": DROP,
    "huge": [10**400] * 4, "blank": " \n",
}  # fmt: skip
FINE = {  # what is not wrong
    ("text", "answer"), ("text", "answer_type"), ("text", "question_type"), ("text", "phrase"), ("text", "filepath"),
    ("blank", "answer"), ("blank", "answer_type"), ("blank", "question_type"), ("blank", "phrase"),
    ("blank", "filepath"), ("text", "captions"), ("blank", "captions"), ("text", "image_urls"),
    ("blank", "image_urls"), ("number", "bbox_w"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "file", "path", "field"), PLACES)
def test_every_field_of_another_type_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str, path: tuple[Any, ...], field: str
) -> None:
    """Bug: KeyError, TypeError or pydantic's text for an official file of another shape; or a record that the reader
    refuses later."""
    good = release_of(name)
    for kind, value in VALUES.items():
        is_fine = (kind, field) in FINE
        files = {**good, file: changed(good[file], path, lambda _, value=value: value)}
        release = put(tmp_path / kind, files)
        (release / "images").mkdir()
        try:
            BUILDERS[name](release, tmp_path / f"{kind}-out", False)
        except ValueError as error:
            text = str(error)
            assert not is_fine, (kind, text)
            assert file in text, text
            assert "\n" not in text, text
            assert len(text) < 500
            assert "pydantic" not in text
            assert field in text or path[-1] == 0 or "no list" in text or "image_urls" in text, text
            assert not (tmp_path / f"{kind}-out").exists()
        else:
            may_be_missing = kind == "missing" and path[-1] in (0, "1")
            is_number = kind == "number" and field in ("bbox", "1") and isinstance(path[-1], int)
            assert is_fine or may_be_missing or is_number, (kind, field)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in ("cc3m",)])
def test_a_byte_order_mark_is_read(tmp_path: Path, name: str) -> None:
    """Bug: a release that a Windows editor saved is "not valid JSON"."""
    release = put(tmp_path / "release", release_of(name))
    for file in release.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    (release / "images").mkdir()
    BUILDERS[name](release, tmp_path / "out", False)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x80\x04", b"P1\n.", b"\x80\x05\x97.", b"I" + b"1" * 5000 + b"\n.", b"\x80\x04r\xff\xff\xff\xff.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", pickle.dumps([1]), pickle.dumps({1: 2}), pickle.dumps([[1]]),
        b"cposix\nsystem\n(S'touch executed'\ntR.", b"\x80\x04]\x94h\x00a.",
    ],
)  # fmt: skip
def test_a_damaged_pickle_is_one_line(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the pickle library's text of several lines, or an error without the file."""
    monkeypatch.chdir(tmp_path)
    release = put(tmp_path / "release", release_of("refcoco"))
    (release / "refs(unc).p").write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: ") as caught:
        build_refcoco(release, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def twice(name: str) -> tuple[Files, str, str]:
    """A release in which one id occurs twice, the file, and the field of the id."""
    files = release_of(name)
    if name == "refcoco":
        files["refs(unc).p"] *= 2
        return files, "refs(unc).p", "sent_id: 1 occurs twice"
    if name == "vqa2":
        files = {QUESTIONS.replace("val2014", "test2015"): files[QUESTIONS]}
    (file, document), *_ = files.items()
    if isinstance(document, list):
        files[file] = document * 2
    else:
        for key, rows in document.items():
            document[key] = rows * 2
    field = {"coco": "cocoid", "flickr30k": "filename", "vg": "id", "vgqa": "qa_id", "vqa2": "question_id"}[name]
    return files, file, f"{field}: "


@pytest.mark.parametrize("name", ["coco", "flickr30k", "vg", "vgqa", "vqa2", "refcoco"])
def test_ids_that_occur_twice_are_found(tmp_path: Path, name: str) -> None:
    """Bug: two entries of one id are written, and are refused by the reader or share one picture in the evaluation."""
    files, file, message = twice(name)
    with pytest.raises(ValueError, match="occurs twice, first in ") as caught:
        BUILDERS[name](put(tmp_path / "release", files), tmp_path / "out", False)
    assert f"{file}: entry 1" in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_nlvr2_identifier_that_occurs_twice_is_found(tmp_path: Path) -> None:
    """Bug: a repeated identifier is written, and the reader refuses the file."""
    row = json.dumps(release_of("nlvr2")["dev.json"])
    tmp_path.joinpath("dev.json").write_text(f"{row}\n\n{row}\n")
    with pytest.raises(ValueError, match=r"dev\.json:3: identifier: .* occurs twice, first in dev\.json:1"):
        build_nlvr2(tmp_path, tmp_path / "out")


def test_an_image_without_captions_is_named(tmp_path: Path) -> None:
    """Bug: `caption: []` is written, and refused by the reader."""
    files = release_of("coco")
    files["dataset_coco.json"]["images"][0]["sentences"] = []
    with pytest.raises(ValueError, match=r"dataset_coco\.json: entry 0: sentences: is empty"):
        build_karpathy("coco", put(tmp_path / "release", files), tmp_path / "out")


# ---- nothing outside of --to, nothing of the user's ------------------------------------------------------------------


@pytest.mark.parametrize("split", ["../ESCAPED", "/tmp/ESCAPED", "a/b", "..", ".", "", "val\0", "a" * 300, "val\n"])
def test_no_file_is_written_outside(tmp_path: Path, split: str) -> None:
    """Bug: the split of a downloaded pickle is the name of the file that is written."""
    release = put(tmp_path / "release", {**release_of("refcoco"), "refs(unc).p": [{**REF, "split": split}]})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: entry 0: split: .* is not the name of a split"):
        build_refcoco(release, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/ESCAPED.jsonl").exists()
    with OutputFolder(tmp_path / "other") as output:
        for name in ("../a", "/a", "a/../../b", ""):
            with pytest.raises(ValueError, match="not a name inside of"):
                output.path(name)


def outputs(tmp_path: Path) -> list[tuple[str, list[str], str]]:
    """(first file that is written, words of the command, its --to) of each command that writes a folder."""
    (tmp_path / "captions.txt").write_text("a red kite\n")
    commands = [
        ({"pairs": "pairs.jsonl"}.get(layout, ""), ["export", "scenes", "--count", "2", "--layout", layout])
        for layout in LAYOUTS
    ]
    commands.append(("tokenizer.json", ["tokenizer", str(tmp_path / "captions.txt"), "--size", "250"]))
    for name in BUILDERS:
        if name != "cc3m":
            release = put(tmp_path / f"release-{name}", release_of(name))
            (release / "images").mkdir()
            commands.append(("", ["build", name, "--from", str(release)]))
    return [(first, words, str(tmp_path / f"to-{number}")) for number, (first, words) in enumerate(commands)]


def test_the_users_files_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a user's `pairs.jsonl`, tokenizer or records of the same name are replaced in silence."""
    for first, words, to in outputs(tmp_path):
        main([*words, "--to", to])
        written = {file: file.read_bytes() for file in Path(to).rglob("*") if file.is_file()}
        assert written
        assert not [file for file in written if ".writing" in str(file)]
        main([*words, "--to", to])  # the same again changes nothing
        assert {file: file.read_bytes() for file in Path(to).rglob("*") if file.is_file()} == written
        own = Path(to) / first if first else next(iter(written))
        own.write_text("mine")
        with pytest.raises(ValueError, match="exists; choose another folder, or replace it with --overwrite"):
            main([*words, "--to", to])
        assert own.read_text() == "mine"
        assert {file for file in Path(to).rglob("*") if file.is_file()} == set(written)
        main([*words, "--to", to, "--overwrite"])
        assert own.read_bytes() == written[own]
    capsys.readouterr()


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    """Bug: a link in the output folder leads the writer to a file outside of it."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "to").mkdir()
    (tmp_path / "to/pairs.jsonl").symlink_to(tmp_path / "mine")
    for overwrite in (False, True):
        try:
            export_scenes(SceneWorld("easy", 0), "train", 1, (8, 8), tmp_path / "to", overwrite=overwrite)
        except ValueError as error:
            assert "exists" in str(error)  # noqa: PT017
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "to/pairs.jsonl").is_symlink()


def test_a_file_as_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: `tokenizer --to FILE` says "193 tokens", and writes nothing."""
    for _, words, to in outputs(tmp_path):
        Path(to).write_text("mine")
        with pytest.raises(ValueError, match=f"{to}: not a folder"):
            main([*words, "--to", to])
        assert Path(to).read_text() == "mine"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_names_the_folder_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    """Bug: "[Errno 28] No space left on device" without a path, and half of the files."""

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        export_scenes(SceneWorld("easy", 0), "train", 1, (8, 8), tmp_path / "to", layout)
    assert caught.value.filename == str(tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_full_disk_leaves_no_half_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the tokenizers library's bare Exception is a traceback, and half a tokenizer stays."""

    def full(self: object, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text("{}")
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    (tmp_path / "captions.txt").write_text("a red kite\n")
    with pytest.raises(OSError, match="No space left") as caught:
        train_tokenizer([tmp_path / "captions.txt"], 250, tmp_path / "to")
    assert caught.value.filename == str(tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("text", ["", "\n \n", "\u200b\n", "\ufeff"])
def test_a_tokenizer_needs_captions(tmp_path: Path, text: str) -> None:
    """Bug: an empty file gives a tokenizer of 193 tokens."""
    (tmp_path / "captions.txt").write_text(text)
    with pytest.raises(ValueError, match=r"captions\.txt: no caption that is not blank"):
        train_tokenizer([tmp_path / "captions.txt"], 250, tmp_path / "to")
    assert not (tmp_path / "to").exists()


# ---- conventions of the releases ------------------------------------------------------------------------------------


def test_refcoco_has_several_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the folder as it is released, with two `refs(*).p`, is refused."""
    google = [{**REF, "split": "val", "sentences": [{"sent_id": 5, "sent": "google's"}]}]
    release = put(tmp_path / "refcoco", {**release_of("refcoco"), "refs(google).p": google})

    def built(*words: str) -> str:
        main(["build", "refcoco", "--from", str(release), "--to", str(tmp_path / "out"), "--overwrite", *words])
        return (tmp_path / "out/val.jsonl").read_text()

    assert "google's" not in built()
    assert built("--split-by", "unc") == built()
    assert "google's" in built("--split-by", "google")
    with pytest.raises(
        ValueError, match=r"needs refs\(umd\)\.p, found refs\(google\)\.p, refs\(unc\)\.p; choose one wi"
    ):
        built("--split-by", "umd")
    (release / "refs(unc).p").rename(release / "refs(umd).p")
    with pytest.raises(ValueError, match=r"choose one with --split-by google or umd"):
        built()
    (release / "refs(google).p").unlink()
    assert "google's" not in built()
    with pytest.raises(ValueError, match="--split-by: vqa2 has one way to split; remove it"):
        main(["build", "vqa2", "--from", str(release), "--to", str(tmp_path / "o"), "--split-by", "unc"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("folder", "split_by", "expected"),
    [
        ("refcoco+", "unc", {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889}),
        ("RefCOCO", "unc", {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095}),
        ("refcocog", "umd", {"train": 80_512, "val": 4_896, "test": 9_602}),
        ("refcocog", "google", {"train": 85_474, "val": 9_536}),
    ],
)
def test_refcoco_expects_the_published_counts(
    folder: str, split_by: str, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a cut release has exit code 0, because no count is expected."""
    assert refcoco._expected(Path("x", folder), split_by, {}) == expected
    assert refcoco._expected(Path("x", "release"), split_by, {**expected, "val": 3}) == expected


def test_nlvr2_reads_the_repository_as_it_is(tmp_path: Path) -> None:
    """Bug: `balanced/`, `unbalanced/` and test2 are skipped in silence."""
    row = release_of("nlvr2")["dev.json"]
    files = {
        "train": ("data/train.json", "train-1-0-0"),
        "dev": ("data/dev.json", "dev-1-0-0"),
        "test-p": ("data/test1.json", "test1-1-0-0"),
        "test-u": ("data/test2.json", "test2-1-0-0"),
        "balanced-dev": ("data/balanced/balanced_dev.json", "dev-1-0-0"),
        "balanced-test-p": ("data/balanced/balanced_test1.json", "test1-1-0-0"),
        "unbalanced-test-u": ("data/unbalanced/unbalanced_test2.json", "test2-1-0-0"),
    }
    for name, identifier in files.values():
        (tmp_path / "nlvr2" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nlvr2" / name).write_text(json.dumps({**row, "identifier": identifier}))
    for release, out in ((tmp_path / "nlvr2", "a"), (tmp_path, "b")):
        report = build_nlvr2(release, tmp_path / out)
        for split, (_, identifier) in files.items():
            (record,) = read_task_records(tmp_path / out / f"{split}.jsonl", ReasoningRecord)
            assert record.identifier == identifier
        assert report.lines()[-1] == (
            "not found, so not built: unbalanced_dev.json, unbalanced_test1.json, balanced_test2.json"
        )
    assert "test-u statements: found 1, expected 6970" in report.lines()


def test_rows_of_one_link_are_one_picture(tmp_path: Path) -> None:
    """Bug: two rows of one link have different image ids, so that a picture is its own negative."""
    (tmp_path / "images").mkdir()
    for key, link in (("0", "http://x/a"), ("1", "http://x/b")):
        (tmp_path / f"images/{key}.json").write_text(json.dumps({"url": link}))
        (tmp_path / f"images/{key}.jpg").write_bytes(b"x")
    (tmp_path / "Train_GCC-training.tsv").write_text("one\thttp://x/a\ntwo\thttp://x/b\nthree\thttp://x/a\n")
    (tmp_path / "Validation_GCC-1.1.0-Validation.tsv").write_text("four\thttp://x/a\n")
    build_cc3m(tmp_path, tmp_path / "out")
    one, two, three = read_pairs(tmp_path / "out/train.jsonl")
    assert one.image_id == three.image_id != two.image_id
    assert len(find_overlap(tmp_path / "out/train.jsonl", tmp_path / "out/val.jsonl").by_id) == 1


def test_vqa2_keeps_the_chosen_answer(tmp_path: Path) -> None:
    """Bug: the official commonest answer, which answer lists are counted by, is dropped."""
    BUILDERS["vqa2"](put(tmp_path / "v", release_of("vqa2")), tmp_path / "out", False)
    (record,) = read_task_records(tmp_path / "out/val.jsonl", VqaRecord)
    assert record.multiple_choice_answer == "x"
