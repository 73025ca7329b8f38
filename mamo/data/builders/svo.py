"""Builder of SVO-Probes (Hendricks, Nematzadeh 2021): an image of a sentence, and one that differs in a word."""

from pathlib import Path

from mamo.data.builders.item_sets import ItemSet, csv_entries, require, write_sets
from mamo.data.builders.report import BuildReport, ReleaseImages

_KINDS = {"subj_neg": "subject", "verb_neg": "verb", "obj_neg": "object"}
_FIELDS = ("sentence", "pos_image_id", "neg_image_id", *_KINDS)


def build_svo(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `svo-probes.jsonl`, grouped by the word that differs.

    `source` contains `svo_probes.csv` and the images that could be fetched, as `images/ID.jpg` with the table's ids.
    Many addresses are dead, so two copies of the images give numbers of different items.

    Raises:
        ValueError: no such file, a row of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    built = ItemSet("svo-probes", images)
    for number, entry in enumerate(csv_entries(require(source, "svo_probes.csv"), _FIELDS)):
        kinds = [kind for field, kind in _KINDS.items() if entry.text(field).strip().lower() in ("true", "1")]
        if not kinds:
            raise entry.error("subj_neg", "none of subj_neg, verb_neg, obj_neg is true")
        places = [f"images/{entry.words(field)}.jpg" for field in ("pos_image_id", "neg_image_id")]
        built.add(
            entry,
            images=[images.relative_path(place) for place in places],
            texts=[entry.words("sentence")],
            right=[(0, 0)],
            group=kinds[0],
            id=str(number),
        )
    return write_sets([built], built.counts(note="about 36,000, unverified"), to, overwrite)
