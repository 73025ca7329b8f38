"""COCO retrieval without the false negatives of its captions: ECCV Caption (Chun et al. 2022) and CxC (Parekh et al.
2021), by the package `eccv_caption`, which carries the labels of both."""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

Rankings = Mapping[int, Sequence[int]]
"""Id of a query -> ids of the gallery, the best first; COCO's ids of images and captions."""
DEPTHS = (1, 5, 10)


def corrected_metrics(image_to_text: Rankings, text_to_image: Rankings) -> dict[str, float]:
    """Compute `eccv/WAY_{r1,rprecision,map_at_r}` and `cxc/WAY_r{1,5,10}` in percent; WAY is i2t or t2i.

    Captions without labels, which are the sixth and later ones of an image, are taken out of the rankings.

    Args:
        image_to_text: by image id.
        text_to_image: by caption id.

    Raises:
        ValueError: the package is not installed; an image or caption of the labels has no ranking, or one that is
            shorter than its number of right items.
    """
    labels = load_labels()
    known = set(labels.coco_gts["t2i"])
    found = {
        "i2t": {query: [item for item in items if item in known] for query, items in image_to_text.items()},
        "t2i": {query: list(items) for query, items in text_to_image.items()},
    }
    for way, rankings in found.items():
        for label in (labels.eccv_gts, labels.cxc_gts):
            for query, right in label[way].items():
                needed = len(right) if label is labels.eccv_gts else max(DEPTHS)
                if len(rankings.get(query, ())) < needed:
                    kind = "image" if way == "i2t" else "caption"
                    raise ValueError(
                        f"evaluation.corrected: {kind} {query} of COCO's test split has no ranking of {needed} items; "
                        "build the split with `mamo data build coco` and raise evaluation.rankings_depth"
                    )
    metrics: dict[str, float] = {}
    for name, by_way in labels.eccv_metrics(found, "all").items():
        metrics |= {f"eccv/{way}_{name.removeprefix('eccv_')}": 100 * float(by_way[way]) for way in found}
    for depth in DEPTHS:
        by_way = labels.cxc_recalls(found, "all", K=depth)
        metrics |= {f"cxc/{way}_r{depth}": 100 * float(by_way[way]) for way in found}
    return metrics


def load_labels() -> Any:
    """Return the `Metrics` of `eccv_caption`. Raises ValueError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a faster reader of JSON is not installed
            return importlib.import_module("eccv_caption").Metrics()
    except ImportError:
        raise ValueError(
            "evaluation.corrected: needs the package eccv_caption; install it with `pip install mamo[eccv]`"
        ) from None
