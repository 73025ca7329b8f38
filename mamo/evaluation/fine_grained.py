"""Published fine-grained sets: files, protocols, rules of their metrics, and published numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamo.config.schema import ItemScore

Numbers = Mapping[str, float]
"""Percent by metric."""
PAIR_SCORES: tuple[ItemScore, ...] = ("itm", "itc", "itm+itc")
SCORE_STATES: Mapping[ItemScore, str] = {
    "itm": "probability of the match (ITM)",
    "itc": "cosine of the two encoders (ITC)",
    "itm+itc": "match logit plus cosine",
    "text": "cosine of two texts, without the image",
}
TEXT_IMAGE_GROUP = ("text", "image", "group")


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """One published set.

    `builder` is its name for `mamo data build`, `metrics` are those its papers print, `n_items` is the verified number
    of items, `scores` are defined for it. `published` has the numbers of other networks by (network, score).
    """

    states: str
    builder: str
    source: str
    metrics: tuple[str, ...] = ("accuracy",)
    n_items: int | None = None
    scores: tuple[ItemScore, ...] = PAIR_SCORES
    least_in_group: int = 1
    published: Mapping[tuple[str, str], Numbers] | None = None
    crop: str = "none"


def _three(text: float, image: float, group: float) -> Numbers:
    return {"text": text, "image": image, "group": group}


_ONE = "accuracy"
_COCO = "COCO val2017"
SETS: Mapping[str, PublishedSet] = {
    "sugarcrepe": PublishedSet(
        "SugarCrepe: a caption above its hard negative, of all items together",
        "sugarcrepe",
        f"github.com/RAIVNLab/sugar-crepe, data/; images: {_COCO}",
        (_ONE, "macro"),
        7511,
        published={("CLIP B/32", "itc"): {_ONE: 76.6}, ("BLIP base, COCO", "itc"): {_ONE: 91.3}},
    ),
    "sugarcrepe-pp": PublishedSet(
        "SugarCrepe++: both of two captions above the hard negative",
        "sugarcrepe-pp",
        f"github.com/Sri-Harsha/scpp, data/; images: {_COCO}",
        (_ONE, "macro"),
        4757,
        (*PAIR_SCORES, "text"),
    ),
    "aro-relation": PublishedSet(
        "ARO relations, mean over the relations that its notebook keeps, cropped",
        "aro",
        "github.com/mertyg/vision-language-models-are-bows: two JSON files, vgr_vga_images.zip, and the list of "
        "relations in its notebook as dropped_relations.txt",
        ("macro", _ONE),
        crop="boxes of the file",
    ),
    "aro-relation-all": PublishedSet(
        "ARO relations without the notebook's list, all relations, cropped",
        "aro",
        "github.com/mertyg/vision-language-models-are-bows: two JSON files, vgr_vga_images.zip",
        (_ONE, "macro"),
        23_937,
        published={("CLIP B/32", "itc"): {_ONE: 51.8}, ("BLIP base, COCO", "itc"): {_ONE: 52.1}},
        crop="boxes of the file",
    ),
    "aro-attribution": PublishedSet(
        "ARO attributes, mean over the attribute pairs of 25 items or more, cropped",
        "aro",
        "github.com/mertyg/vision-language-models-are-bows: two JSON files, vgr_vga_images.zip",
        ("macro", _ONE),
        28_748,
        least_in_group=25,
        published={("CLIP B/32", "itc"): {_ONE: 61.4}, ("BLIP base, COCO", "itc"): {_ONE: 76.9}},
        crop="boxes of the file",
    ),
    "aro-coco-order": PublishedSet(
        "ARO order of words, COCO captions, the frozen wrong orders",
        "aro-coco-order",
        "huggingface.co/datasets/mteb/ARO-COCO-order, the parquet files of the test split",
        n_items=25_010,
        published={("CLIP B/32", "itc"): {_ONE: 46.4}, ("BLIP base, COCO", "itc"): {_ONE: 21.6}},
    ),
    "aro-flickr30k-order": PublishedSet(
        "ARO order of words, Flickr30k captions, the frozen wrong orders",
        "aro-flickr30k-order",
        "the counterpart of mteb/ARO-COCO-order for Flickr30k, the parquet files of the test split",
        n_items=5000,
        published={("CLIP B/32", "itc"): {_ONE: 56.6}, ("BLIP base, COCO", "itc"): {_ONE: 26.0}},
    ),
    "winoground": PublishedSet(
        "Winoground: text, image and group score",
        "winoground",
        "huggingface.co/datasets/facebook/winoground (gated): examples.jsonl, images.zip",
        TEXT_IMAGE_GROUP,
        400,
        published={
            ("CLIP B/32", "itc"): _three(30.75, 10.5, 8.0),
            ("ALBEF 4M", "itm"): _three(29.25, 15.5, 11.0),
            ("BLIP 14M", "itm"): _three(36.5, 18.5, 14.5),
            ("X-VLM 4M", "itm"): _three(44.0, 26.75, 21.5),
        },
    ),
    "valse": PublishedSet(
        "VALSE: a caption above its foil, of the valid items of eleven instruments together",
        "valse",
        "github.com/Heidelberg-NLP/VALSE, data/; images: Visual7W, COCO 2014 and 2017, SWiG, VisDial",
        (_ONE, "macro"),
        7702,
        published={
            ("ALBEF 4M", "itm"): {_ONE: 69.1, "macro": 67.8},
            ("BLIP 14M", "itm"): {_ONE: 67.8},
            ("X-VLM 4M", "itm"): {_ONE: 72.4, "macro": 70.5},
        },
    ),
    "vsr-random-test": PublishedSet(
        "VSR random split, test: a sentence is true or false, at a probability of 0.5; published on 2,024 older items",
        "vsr",
        "github.com/cambridgeltl/visual-spatial-reasoning, data/splits/; images: COCO train2017 and val2017",
        n_items=2195,
        scores=("itm",),
        published={
            ("ALBEF 4M", "itm"): {_ONE: 57.3},
            ("BLIP 14M", "itm"): {_ONE: 49.7},
            ("X-VLM 4M", "itm"): {_ONE: 63.0},
        },
    ),
    "vsr-zeroshot-test": PublishedSet(
        "VSR zero-shot split, test: a sentence is true or false, at a probability of 0.5",
        "vsr",
        "github.com/cambridgeltl/visual-spatial-reasoning, data/splits/; images: COCO train2017 and val2017",
        n_items=1222,
        scores=("itm",),
    ),
    "whatsup": PublishedSet(
        "What'sUp, own photos: one relation of four; pairs and sets of four photos",
        "whatsup",
        "github.com/amitakamath/whatsup_vlms: JSON files, controlled_images and controlled_clevr",
        (_ONE, "set/pair", "set/four"),
        published={
            ("CLIP B/32", "itc"): {_ONE: 31.0},
            ("BLIP 14M", "itm"): {_ONE: 38.5},
            ("X-VLM 4M", "itm"): {_ONE: 31.5},
        },
    ),
    "whatsup-coco": PublishedSet(
        "What'sUp, COCO: the right preposition above the wrong one",
        "whatsup",
        f"github.com/amitakamath/whatsup_vlms: JSON files; images: {_COCO}",
        published={
            ("CLIP B/32", "itc"): {_ONE: 47.4},
            ("BLIP 14M", "itm"): {_ONE: 54.0},
            ("X-VLM 4M", "itm"): {_ONE: 61.7},
        },
    ),
    "whatsup-gqa": PublishedSet(
        "What'sUp, GQA: the right preposition above the wrong one",
        "whatsup",
        "github.com/amitakamath/whatsup_vlms: JSON files; images of GQA in vg_images/",
        published={
            ("CLIP B/32", "itc"): {_ONE: 46.9},
            ("BLIP 14M", "itm"): {_ONE: 49.8},
            ("X-VLM 4M", "itm"): {_ONE: 58.7},
        },
    ),
    "svo-probes": PublishedSet(
        "SVO-Probes: an image of the sentence above one with another subject, verb or object",
        "svo-probes",
        "github.com/google-deepmind/svo_probes: svo_probes.csv; images must be fetched one by one, many are gone",
        published={
            ("CLIP B/32", "itc"): {_ONE: 81.6},
            ("ALBEF 4M", "itm"): {_ONE: 87.6},
            ("X-VLM 4M", "itm"): {_ONE: 89.3},
        },
    ),
    "bivlc": PublishedSet(
        "BiVLC: text, image and group score of SugarCrepe's captions with made negative images",
        "bivlc",
        "huggingface.co/datasets/imirandam/BiVLC, the parquet files of the test split",
        TEXT_IMAGE_GROUP,
        2933,
        published={("CLIP B/32", "itc"): _three(75.83, 52.40, 49.06)},
    ),
    "colorswap": PublishedSet(
        "ColorSwap, test: text, image and group score",
        "colorswap",
        "huggingface.co/datasets/stanfordnlp/colorswap (gated), the parquet files of the test split",
        TEXT_IMAGE_GROUP,
    ),
    "mmvp-vlm": PublishedSet(
        "MMVP-VLM: both statements of a pair choose their image",
        "mmvp-vlm",
        "huggingface.co/datasets/MMVP/MMVP_VLM: Questions.csv and a folder a pattern",
        ("set/pair",),
        270,
    ),
    "cola": PublishedSet(
        "Cola, multiple objects: both captions of a row choose their image",
        "cola",
        "github.com/arijitray1993/COLA: data/; images: Visual Genome",
        ("set/pair",),
        420,
    ),
}
"""The sets by the stem of the file that `mamo data build` writes."""
RULES = "a tie is wrong, fp32; the share of the items that was scored is in the facts"


def describe_scores(scores: Sequence[ItemScore]) -> str:
    """Say in words how an item is scored."""
    return "; ".join(SCORE_STATES[score] for score in scores)


def is_official(path: Path) -> bool:
    """Say whether a file has the name of a published set, as `mamo data build` writes it."""
    return path.stem in SETS


def places(root: Path, name: str) -> list[Path]:
    """Return where the file of a set may lie below a folder of data sets."""
    folders = dict.fromkeys((name, SETS[name].builder, ""))
    return [root / folder / f"{name}.jsonl" for folder in folders]


def find_set(root: Path, name: str) -> Path | None:
    """Return the file of a set below a folder of data sets; None if it does not lie there."""
    return next((file for file in places(root, name) if file.is_file()), None)


def how_to_get(root: Path, name: str) -> str:
    """Return a line with the source of a set and the command that builds it."""
    builder = SETS[name].builder
    return f"{name}: {SETS[name].source}; then mamo data build {builder} --from RELEASE --to {root / builder}"


NETWORKS = ("ALBEF 4M", "BLIP 14M", "X-VLM 4M", "CLIP B/32", "BLIP base, COCO")
"""Columns of published numbers in the table."""
_HEADER = ("set", "score", "metric", "this", "95 % interval", "chance", "scored", "ties", *NETWORKS)


def table_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format entries of `results.json` as an aligned table, with chance, interval and published numbers.

    A published number is in the row of the score that it was published for.
    """
    rows = [row for entry in entries for name, score in [set_and_score(entry)] for row in _rows(entry, name, score)]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows)]
    return [
        "  ".join(cell.ljust(width) if k < 3 else cell.rjust(width) for k, (cell, width) in enumerate(zip(row, widths)))
        for row in (_HEADER, *rows)
    ]


def set_and_score(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return the set and the score of an entry that `evaluate_fine_grained` made."""
    (name,) = entry["items"]
    score = next(key for key in entry["metrics"]).split("/")[2]
    return name, score


def _rows(entry: Mapping[str, Any], name: str, score: str) -> list[tuple[str, ...]]:
    fixed, facts = SETS[name], entry["facts"]
    own = {key.split("/", 3)[3]: value for key, value in entry["metrics"].items()}
    fact = {key.removeprefix(f"items/{name}/"): value for key, value in facts.items()}
    rows = []
    for metric in fixed.metrics if score != "text" else ("accuracy",):
        if metric not in own:
            continue
        interval = f"{own[f'{metric}_low']:.1f} to {own[f'{metric}_high']:.1f}" if f"{metric}_low" in own else "-"
        chance = 100 / 3 if score == "text" else fact.get(f"chance/{'accuracy' if metric == 'macro' else metric}")
        scored = f"{fact['scored']:.0f}/{fact['items']:.0f}"
        ties = fact.get(f"ties/{score}")
        published = [((fixed.published or {}).get((network, score)) or {}).get(metric) for network in NETWORKS]
        numbers = (f"{own[metric]:.2f}", interval, _cell(chance, ".1f"), scored, _cell(ties, ".0f"))
        rows.append((name, score, metric, *numbers, *(_cell(number, ".2f") for number in published)))
    return rows


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def absent_lines(root: Path) -> list[str]:
    """Return a line for each set that does not lie below a folder: its source and the command that builds it."""
    absent = [name for name in SETS if find_set(root, name) is None]
    if "aro-relation" in absent and "aro-relation-all" not in absent:
        absent.remove("aro-relation")
    elif "aro-relation-all" in absent:
        absent.remove("aro-relation-all")
    return [how_to_get(root, name) for name in absent]
