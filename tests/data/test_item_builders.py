"""Builders of fine-grained sets: published files with exact counts, and the layouts of the others, made here."""

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mamo.commands.data import BUILDERS, main
from mamo.data.builders import bivlc, cola, mmvp, winoground
from mamo.data.items import Item, read_items
from tests.data.test_official_builders import put

CUT = Path(__file__).parents[1] / "fixtures" / "fine_grained"
WHOLE = Path(os.environ.get("MAMO_TEST_DATA", "absent")) / "fine-grained"
needs_whole = pytest.mark.skipif(not WHOLE.is_dir(), reason="MAMO_TEST_DATA names no folder with fine-grained")
PNG = b"\x89PNG"


def build(name: str, release: Path, to: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Run the command; returns its exit code and lines."""
    capsys.readouterr()
    code = main(["build", name, "--from", str(release), "--to", str(to), "--overwrite"])
    return code, capsys.readouterr().out.splitlines()


def items_of(file: Path) -> list[Item]:
    return read_items(file, is_official=True).items


def relative(item: Item, folder: Path) -> list[str]:
    return [os.path.relpath(name, folder) for name in item.images]


@needs_whole
def test_sugarcrepe_has_its_published_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: entries are taken by place instead of by key (one is missing), caption and negative exchanged."""
    images = tmp_path / "release" / "val2017"
    images.mkdir(parents=True)
    release = images.parent
    (release / "data").symlink_to(WHOLE / "sugarcrepe")
    documents = {file.stem: json.loads(file.read_text()) for file in (WHOLE / "sugarcrepe").glob("*.json")}
    for name in {entry["filename"] for document in documents.values() for entry in document.values()}:
        (images / name).write_bytes(b"x")
    code, lines = build("sugarcrepe", release, tmp_path / "out", capsys)
    assert code == 0
    assert lines[0] == "sugarcrepe items: found 7511, expected 7511"
    assert lines[-1] == "image files: found 1560, expected 1560"
    items = items_of(tmp_path / "out/sugarcrepe.jsonl")
    assert Counter(item.group for item in items) == {
        "add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652, "replace_rel": 1406,
        "swap_att": 666, "swap_obj": 245,
    }  # fmt: skip
    for item in items:
        entry = documents[item.group][item.id.partition("/")[2]]
        assert (item.texts, item.right) == ([entry["caption"].strip(), entry["negative_caption"].strip()], [(0, 0)])
    next(images.iterdir()).unlink()
    code, lines = build("sugarcrepe", release, tmp_path / "out", capsys)
    found = next(line for line in lines if "have their images" in line)
    assert code == 1
    assert found.startswith("sugarcrepe items that have their images: found 7")
    assert found.endswith("expected 7511")
    assert "found 7511" not in found


@needs_whole
def test_valse_and_vsr_have_their_published_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: items that the judges rejected, a false statement built as a true one, images of one folder only."""
    folders = {"visual7w": "visual7w", "SWiG": "SWiG", "coco2017": "val2017", "coco_2017": "val2017",
               "FOIL dataset": "val2014", "VisDial_v1.0": "train2014"}  # fmt: skip
    release = tmp_path / "valse"
    release.mkdir()
    (release / "data").symlink_to(WHOLE / "valse")
    for file in (WHOLE / "valse").glob("*.json"):
        for entry in json.loads(file.read_text()).values():
            is_val = entry["image_file"].startswith("VisualDialog")
            image = release / ("VisualDialog_val2018" if is_val else folders[entry["dataset"]]) / entry["image_file"]
            image.parent.mkdir(exist_ok=True)
            image.write_bytes(b"x")
    code, lines = build("valse", release, tmp_path / "out", capsys)
    assert (code, lines[:2]) == (0, [
        "items of the files: found 8782, expected 8782", "valse items: found 7702, expected 7702"
    ])  # fmt: skip
    assert "valse items of counting-adversarial: found 691, expected 691" in lines
    assert len(items_of(tmp_path / "out/valse.jsonl")) == 7702
    rows = [json.loads(line) for line in (WHOLE / "vsr/random_test.jsonl").read_text().splitlines()]
    for row in rows:
        image = tmp_path / "vsr" / row["image_link"].split("/")[-2] / row["image"]
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"x")
    (tmp_path / "vsr/random_test.jsonl").symlink_to(WHOLE / "vsr/random_test.jsonl")
    code, lines = build("vsr", tmp_path / "vsr", tmp_path / "out", capsys)
    assert (code, lines[0]) == (0, "vsr-random-test items: found 2195, expected 2195")
    items = items_of(tmp_path / "out/vsr-random-test.jsonl")
    assert [bool(item.right) for item in items] == [row["label"] == 1 for row in rows]
    assert [item.group for item in items] == [row["relation"] for row in rows]


def test_cuts_of_published_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: what the whole files show, on the cuts that lie here; counts that differ end with exit code 1."""
    code, lines = build("sugarcrepe", CUT / "sugarcrepe", tmp_path, capsys)
    assert (code, lines[0]) == (1, "sugarcrepe items: found 28, expected 7511")
    code, lines = build("valse", CUT / "valse", tmp_path, capsys)
    documents = {file.stem: json.loads(file.read_text()) for file in (CUT / "valse").glob("*.json")}
    valid = {f"{name}/{key}" for name, d in documents.items() for key, e in d.items() if e["mturk"]["caption"] >= 2}
    assert {item.id for item in items_of(tmp_path / "valse.jsonl")} == valid
    assert len(valid) < sum(map(len, documents.values()))
    release = put(tmp_path / "vsr", {"data/splits/random/test.jsonl": (CUT / "vsr_test.jsonl").read_text()})
    assert build("vsr", release, tmp_path, capsys)[1][0] == "vsr-random-test items: found 8, expected 2195"


def test_sugarcrepe_pp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the second caption built as a wrong one."""
    entry = {"id": 7, "filename": "1.jpg", "caption": "a", "caption2": "b", "negative_caption": "c"}
    release = put(tmp_path / "r", {"data/swap_obj.json": [entry], "val2017/1.jpg": b"x"})
    code, lines = build("sugarcrepe-pp", release, tmp_path / "out", capsys)
    assert (code, lines[0]) == (1, "sugarcrepe-pp items: found 1, expected 4757")
    (item,) = items_of(tmp_path / "out/sugarcrepe-pp.jsonl")
    assert (item.texts, item.right, item.group, item.id) == (
        ["a", "b", "c"],
        [(0, 0), (0, 1)],
        "swap_obj",
        "swap_obj/7",
    )
    assert relative(item, tmp_path) == ["r/val2017/1.jpg"]


def test_winoground(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an image without its .png, captions exchanged."""
    monkeypatch.setattr(winoground, "_ITEMS", {"Object": 1, "Relation": 0})
    row = {"id": 3, "image_0": "ex_3_img_0", "image_1": "ex_3_img_1", "caption_0": "a", "caption_1": "b",
           "collapsed_tag": "Object", "num_main_preds": 1}  # fmt: skip
    files = {"data/examples.jsonl": json.dumps(row), "images/ex_3_img_0.png": b"x", "images/ex_3_img_1.png": b"x"}
    code, _ = build("winoground", put(tmp_path / "r", files), tmp_path / "out", capsys)
    (item,) = items_of(tmp_path / "out/winoground.jsonl")
    assert (code, item.id, item.texts, item.right, item.group) == (0, "3", ["a", "b"], [(0, 0), (1, 1)], "Object")
    assert relative(item, tmp_path) == ["r/images/ex_3_img_0.png", "r/images/ex_3_img_1.png"]


def aro_entry(**over: Any) -> dict[str, Any]:
    box = {"bbox_x": 1, "bbox_y": 2, "bbox_w": 30, "bbox_h": 40}
    texts = {"true_caption": "the cat is on the mat", "false_caption": "the mat is on the cat"}
    return {"image_id": "5", "image_path": "5.jpg", **box, **texts, **over}


def test_aro(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the box is lost; relations that the paper leaves out are counted under its name."""
    files = {
        "visual_genome_relation.json": [aro_entry(relation_name="on"), aro_entry(relation_name="near")],
        "visual_genome_attribution.json": [aro_entry(attributes=["red", "wet"])],
        "images/5.jpg": b"x",
    }
    release = put(tmp_path / "r", files)
    code, lines = build("aro", release, tmp_path / "out", capsys)
    assert (code, lines[0]) == (1, "relations of the file: found 2, expected 23937")
    assert "dropped_relations.txt (all relations are kept)" in lines[-1]
    assert [item.group for item in items_of(tmp_path / "out/aro-relation-all.jsonl")] == ["on", "near"]
    (item,) = items_of(tmp_path / "out/aro-attribution.jsonl")
    assert (item.boxes, item.group, item.texts[0]) == ({0: (1, 2, 30, 40)}, "red wet", "the cat is on the mat")
    put(release, {"dropped_relations.txt": "near\n"})
    build("aro", release, tmp_path / "out2", capsys)
    assert [item.group for item in items_of(tmp_path / "out2/aro-relation.jsonl")] == ["on"]


def test_tables_with_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: images are written once a row, a null image ends the build, image and negative image exchanged."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(bivlc, "_ITEMS", {"swap-att": 2})

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        (tmp_path / name).mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name / "test-0.parquet")
        return tmp_path / name

    image = {"bytes": PNG + b"1", "path": None}
    order = {f"hard_text_{k}": f"w{k}" for k in range(1, 5)}
    rows = [{"images": image, "correct_caption": f"c{k}", **order} for k in range(2)]
    code, lines = build("aro-coco-order", write("order", rows), tmp_path / "out", capsys)
    assert (code, lines[0]) == (1, "aro-coco-order items: found 2, expected 25010")
    items = items_of(tmp_path / "out/aro-coco-order.jsonl")
    assert [item.texts for item in items] == [[f"c{k}", "w1", "w2", "w3", "w4"] for k in range(2)]
    assert len({Path(item.images[0]).read_bytes() for item in items}) == 1
    assert len(list((tmp_path / "out/images").iterdir())) == 1
    texts = {"caption": "a", "negative_caption": "b", "type": "swap", "subtype": "att"}
    rows = [{**texts, "image": image, "negative_image": {"bytes": b"2", "path": None}}]
    rows.append({**texts, "image": image, "negative_image": {"bytes": None, "path": "gone.jpg"}})
    code, lines = build("bivlc", write("bivlc", rows), tmp_path / "out", capsys)
    assert (code, lines) == (1, [
        "bivlc items: found 2, expected 2", "bivlc items of swap-att: found 2, expected 2",
        "bivlc items that have their images: found 1, expected 2", "image files: found 2, expected 3",
    ])  # fmt: skip
    first, _ = items_of(tmp_path / "out/bivlc.jsonl")
    assert [Path(name).read_bytes() for name in first.images] == [PNG + b"1", b"2"]
    assert (first.right, first.group) == ([(0, 0), (1, 1)], "swap-att")
    rows = [{"id": 4, "image_1": image, "image_2": {"bytes": b"2", "path": None}, "caption_1": "a", "caption_2": "b"}]
    code, lines = build("colorswap", write("colorswap", rows), tmp_path / "out", capsys)
    assert (code, lines[0]) == (0, "colorswap items (300, unverified): found 1")
    assert items_of(tmp_path / "out/colorswap.jsonl")[0].texts == ["a", "b"]


def test_whatsup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the four photos of two objects are no set, or opposite relations are no pair."""
    names = ("left_of", "right_of", "on", "under")
    photos = [{"image_path": f"data/controlled_images/mug_{name}_table.jpeg", "caption_options": list("abcd")}
              for name in names]  # fmt: skip
    block = {"image_path": "data/controlled_clevr/mug_in-front_of_plate.jpeg", "caption_options": list("abcd")}
    files: dict[str, Any] = {
        "controlled_images_dataset.json": photos,
        "controlled_clevr_dataset.json": [block],
        "coco_qa_one_obj.json": [[397133, "a dog on the left", "a dog on the right"]],
        "vg_qa_two_obj.json": [[2331, "a dog", "a cat"]],
        "val2017/000000397133.jpg": b"x",
        **{f"controlled_images/mug_{name}_table.jpeg": b"x" for name in names},
    }
    code, lines = build("whatsup", put(tmp_path / "r", files), tmp_path / "out", capsys)
    assert code == 1
    assert "whatsup A items (412 unverified): found 4" in lines
    assert "whatsup-coco items (2,687 images, unverified): found 1" in lines
    items = items_of(tmp_path / "out/whatsup.jsonl")
    assert [item.set["pair"] for item in items] == [
        "A mug table left-right", "A mug table left-right", "A mug table on-under", "A mug table on-under",
        "B mug plate front-behind",
    ]  # fmt: skip
    assert {item.set["four"] for item in items} == {"A mug table", "B mug plate"}
    (item,) = items_of(tmp_path / "out/whatsup-coco.jsonl")
    assert relative(item, tmp_path) == ["r/val2017/000000397133.jpg"]
    assert items_of(tmp_path / "out/whatsup-gqa.jsonl")[0].group == "two objects"


def test_pairs_in_which_a_text_chooses_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: both statements choose the first image; a row counts as right where one of its two texts is."""
    monkeypatch.setattr(mmvp, "_STATEMENTS", 2)
    monkeypatch.setattr(cola, "_ROWS", 1)
    table = 'Question ID,Type,Statement\n1,Color,a red cup\n2,Color,"a cup, blue"\n'
    files = {"Questions.csv": table, "Color/1.jpg": b"x", "Color/2.jpg": b"x"}
    code, _ = build("mmvp-vlm", put(tmp_path / "mmvp", files), tmp_path / "out", capsys)
    items = items_of(tmp_path / "out/mmvp-vlm.jsonl")
    assert code == 0
    assert [(item.texts, item.right, item.set) for item in items] == [
        (["a photo of a red cup"], [(0, 0)], {"pair": "0"}), (["a photo of a cup, blue"], [(1, 0)], {"pair": "0"})
    ]  # fmt: skip
    assert relative(items[0], tmp_path) == ["mmvp/Color/1.jpg", "mmvp/Color/2.jpg"]
    row = ["https://x.org/VG_100K/1.jpg", "red square", "https://x.org/VG_100K_2/2.jpg", "blue square"]
    files = {"data/COLA_multiobjects_matching_benchmark.json": [row], "VG_100K/1.jpg": b"x", "VG_100K_2/2.jpg": b"x"}
    code, _ = build("cola", put(tmp_path / "cola", files), tmp_path / "out", capsys)
    items = items_of(tmp_path / "out/cola.jsonl")
    assert code == 0
    assert [(item.texts, item.right) for item in items] == [(["red square"], [(0, 0)]), (["blue square"], [(1, 0)])]
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(
        ["sentence", "pos_url", "neg_url", "pos_image_id", "neg_image_id", "subj_neg", "verb_neg", "obj_neg"]
    )
    writer.writerow(["a girl stands", "u", "v", "10", "11", "False", "True", "False"])
    release = put(tmp_path / "svo", {"svo_probes.csv": table.getvalue(), "images/10.jpg": b"x"})
    code, lines = build("svo-probes", release, tmp_path / "out", capsys)
    assert (code, lines[:2]) == (1, [
        "svo-probes items (about 36,000, unverified): found 1",
        "svo-probes items that have their images: found 0, expected 1",
    ])  # fmt: skip
    (item,) = items_of(tmp_path / "out/svo-probes.jsonl")
    assert (item.right, item.group, item.texts) == ([(0, 0)], "verb", ["a girl stands"])


MISTAKES = [
    ("sugarcrepe", {"add_att.json": []}, r"add_att\.json: must be an object of objects, got \[\]"),
    ("sugarcrepe", {"add_att.json": {"0": {"filename": "a"}}}, r'add_att\.json: entry "0": caption: missing'),
    ("sugarcrepe", {}, "contains none of add_att.json"),
    ("sugarcrepe-pp", {"swap_obj.json": {}}, "contains no list"),
    ("valse", {"plurals.json": {"a": {"mturk": 3}}}, "mturk: must be an object, got 3"),
    ("vsr", {"random_test.jsonl": '{"image": "a", "label": 2}'}, r"random_test\.jsonl:1: label: must be 0 or 1, got 2"),
    ("vsr", {"random_test.jsonl": "x"}, r"random_test\.jsonl:1: not valid JSON"),
    ("winoground", {"examples.jsonl": "[]"}, r"examples\.jsonl:1: must be an object"),
    ("aro", {"visual_genome_relation.json": [{**aro_entry(relation_name="on"), "bbox_w": "x"}]}, "bbox_x.*must be"),
    ("whatsup", {"vg_qa_one_obj.json": [[1, "a"]]}, r"entry 0: must be \[image id, right text, wrong text\], got"),
    ("mmvp-vlm", {"Questions.csv": "id,type,statement\n1,a,b\n"}, r"\.csv: has 1 rows, but rows come in pairs"),
    ("mmvp-vlm", {"Questions.csv": "id,type,statement\n1,a\n"}, r"Questions\.csv:2: has 2 values, the header has 3"),
    ("svo-probes", {"svo_probes.csv": "a,b\n"}, r"svo_probes\.csv:1: has no column 'sentence'"),
    ("cola", {"COLA_multiobjects_matching_benchmark.json": [["a"]]}, "entry 0: row: must be"),
    ("bivlc", {}, r"contains no file \*\.parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_one_line(tmp_path: Path, name: str, files: dict[str, Any], message: str) -> None:
    """Bug: a traceback for a file of another form, or a message without the file."""
    (tmp_path / "r").mkdir()
    release = put(tmp_path / "r", files)
    with pytest.raises(ValueError, match=message) as caught:
        BUILDERS[name](release, tmp_path / "out", False)
    assert "\n" not in str(caught.value)
    assert str(release) in str(caught.value)
