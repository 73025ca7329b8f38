"""Export of the embedded world: JPEG files with JSON Lines, or the official file layout of four public data sets.

The official layouts exercise the readers and builders of public data without a download.
"""

import json
import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mamo.config.values import Values
from mamo.data.items import as_row
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import write_json_lines
from mamo.world.captions import all_captions
from mamo.world.entailment import entailment_items, render_covered
from mamo.world.probes import PROBES, probe_items
from mamo.world.questions import question
from mamo.world.referring import expressions
from mamo.world.rendering import render
from mamo.world.scene import SceneWorld, Split
from mamo.world.statements import pair_statements

Layout = Literal["pairs", "items", "vqa2", "nlvr2", "refcoco", "snli_ve"]
LAYOUTS: tuple[Layout, ...] = ("pairs", "items", "vqa2", "nlvr2", "refcoco", "snli_ve")
_JPEG_QUALITY = 95
_VQA_SPLITS = {"train": "train2014", "val": "val2014", "test": "test2015"}
_NLVR2_SPLITS = {"train": "train", "val": "dev", "test": "test1"}
_SNLI_VE_SPLITS = {"train": "train", "val": "dev", "test": "test"}
_REFCOCO_SPLITS = {"train": "train", "val": "val", "test": "testA"}


def export_scenes(
    world: SceneWorld,
    split: Split,
    n: int,
    image_size_px: tuple[int, int],
    to: Path,
    layout: Layout = "pairs",
    overwrite: bool = False,
) -> Path:
    """Write the first `n` records of a split and their images into the folder `to`.

    A record is a scene (layout `pairs`), an item of each probe (`items`), a question (`vqa2`), a statement (`nlvr2`,
    `snli_ve`) or an expression (`refcoco`).

    Returns:
        The path to use next: `pairs.jsonl`, `items.jsonl`, or the folder for `mamo data build LAYOUT --from`.

    Raises:
        ValueError: `n` or a side of the image is below 1, or a file exists and `overwrite` is False.
    """
    if n < 1 or min(image_size_px) < 1:
        raise ValueError(f"count and image size must be at least 1, got {n} and {image_size_px}")
    writers = {
        "pairs": _pairs,
        "items": _items,
        "vqa2": _vqa2,
        "nlvr2": _nlvr2,
        "refcoco": _refcoco,
        "snli_ve": _snli_ve,
    }
    with OutputFolder(to, overwrite) as output:
        writers[layout](world, split, n, image_size_px, output)
    return to / f"{layout}.jsonl" if layout in ("pairs", "items") else to


def _pairs(world: SceneWorld, split: Split, n: int, size: tuple[int, int], to: OutputFolder) -> None:
    """Write JSON Lines with the five captions of each scene, and one JPEG file a scene."""
    rows = []
    for index in range(n):
        name = f"images/{split}-{index:07d}.jpg"
        _save(world, split, index, size, to.path(name))
        texts = [caption.text for caption in all_captions(world.scene(split, index))]
        image_id = f"scenes-{world.difficulty}-{world.seed}-{split}-{index}"
        rows.append({"image": name, "caption": texts, "image_id": image_id})
    write_json_lines(to.path("pairs.jsonl"), rows)


def _items(world: SceneWorld, split: Split, n: int, size: tuple[int, int], to: OutputFolder) -> None:
    """Write JSON Lines with `n` items of each probe, and one PNG file a scene, whose pixels are the scene's."""
    rows = []
    for probe in PROBES:
        for own in probe_items(world, probe, n, split):
            name = f"images/{split}-{own.scene_index:07d}.png"
            if not to.path(name).exists():
                _save(world, split, own.scene_index, size, to.path(name))
            rows.append(as_row(own.as_item(probe).model_copy(update={"images": [name]})))
    write_json_lines(to.path("items.jsonl"), rows)


def _vqa2(world: SceneWorld, split: Split, n: int, size: tuple[int, int], to: OutputFolder) -> None:
    """Write questions and annotations as two JSON files. As in the release, the test split has no annotations."""
    name = _VQA_SPLITS[split]
    questions, annotations = [], []
    for index in range(n):
        item = question(world, split, index)
        _save(world, split, index, size, to.path(f"{name}/COCO_{name}_{index:012d}.jpg"))
        ids = {"image_id": index, "question_id": 1000 * index}
        questions.append({**ids, "question": item.text})
        answers = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": k} for k, answer in enumerate(item.answers, 1)
        ]
        types = {"question_type": item.kind, "answer_type": item.answer_type}
        annotations.append({**ids, **types, "multiple_choice_answer": item.answer, "answers": answers})
    _write_json(to.path(f"v2_OpenEnded_mscoco_{name}_questions.json"), {"questions": questions})
    if split != "test":
        _write_json(to.path(f"v2_mscoco_{name}_annotations.json"), {"annotations": annotations})


def _nlvr2(world: SceneWorld, split: Split, n: int, size: tuple[int, int], to: OutputFolder) -> None:
    """Write JSON Lines, and two PNG files a pair of images."""
    name = _NLVR2_SPLITS[split]
    rows = []
    for item in pair_statements(world, split, n):
        identifier = item.identifier.replace(split, name, 1)
        pair = identifier.rsplit("-", 1)[0]
        place = {"directory": 0} if split == "train" else {}
        folder = f"images/{name}/0" if place else name
        for side, index in enumerate((item.left, item.right)):
            _save(world, split, index, size, to.path(f"{folder}/{pair}-img{side}.png"))
        rows.append({"identifier": identifier, "sentence": item.sentence, "label": str(item.label), **place})
    write_json_lines(to.path(f"{name}.json"), rows)


def _refcoco(world: SceneWorld, split: Split, n: int, size: tuple[int, int], to: OutputFolder) -> None:
    """Write references as a pickle of plain values, boxes as COCO instances, proposals in ALBEF's detection format."""
    refs, images, annotations, proposals = [], [], [], {}
    for number, item in enumerate(expressions(world, n, size, split)):
        file = f"COCO_train2014_{item.scene_index:012d}.jpg"
        _save(world, split, item.scene_index, size, to.path(f"train2014/{file}"))
        sentence = {"tokens": item.text.split(), "raw": item.text, "sent_id": number, "sent": item.text}
        shared = {"ann_id": number, "category_id": 1, "image_id": item.scene_index}
        place = {"split": _REFCOCO_SPLITS[split], "file_name": file, "sent_ids": [number]}
        refs.append({"ref_id": number, **shared, **place, "sentences": [sentence]})
        images.append({"id": item.scene_index, "file_name": file, "height": size[0], "width": size[1]})
        annotations.append({"id": number, "image_id": item.scene_index, "bbox": list(item.box), "category_id": 1})
        proposals[str(item.scene_index)] = [list(box) for box in item.proposals]
    to.path("refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    _write_json(to.path("instances.json"), {"images": images, "annotations": annotations, "categories": []})
    _write_json(to.path("dets.json"), proposals)


def _snli_ve(world: SceneWorld, split: Split, n: int, size: tuple[int, int], to: OutputFolder) -> None:
    """Write JSON Lines, and one JPEG file a picture with its covered cell."""
    rows = []
    for item in entailment_items(world, split, n):
        name = f"{item.scene_index}{item.covered}"
        picture = render_covered(world.scene(split, item.scene_index), item.covered, size)
        _save_picture(picture, to.path(f"flickr30k_images/{name}.jpg"))
        texts = {"sentence1": "a scene", "sentence2": item.sentence}
        rows.append({"Flickr30K_ID": name, "gold_label": item.label, "pairID": item.identifier, **texts})
    write_json_lines(to.path(f"snli_ve_{_SNLI_VE_SPLITS[split]}.jsonl"), rows)


def _save(world: SceneWorld, split: Split, index: int, size: tuple[int, int], file: Path) -> None:
    _save_picture(render(world.scene(split, index), size), file)


def _save_picture(pixels: npt.NDArray[np.uint8], file: Path) -> None:
    picture = Image.fromarray(pixels)
    if file.suffix == ".png":
        picture.save(file)
    else:  # 4:4:4, because chroma subsampling would blur small objects
        picture.save(file, quality=_JPEG_QUALITY, subsampling=0)


def _write_json(file: Path, document: Values) -> None:
    file.write_text(json.dumps(document), "utf-8")
