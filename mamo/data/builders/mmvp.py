"""Builder of MMVP-VLM (Tong et al. 2024): pairs of images that CLIP cannot tell apart, in nine visual patterns."""

from pathlib import Path

from mamo.data.builders.item_sets import ItemSet, csv_entries, require, write_sets
from mamo.data.builders.report import BuildReport, Count, ReleaseImages

_PROMPT = "a photo of "
_STATEMENTS = 270


def build_mmvp(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `mmvp-vlm.jsonl`, grouped by pattern: each statement chooses among the two images of its pair.

    Consecutive rows of `Questions.csv` (id, type, statement) are a pair, which is a set: both must be right. The images
    are `PATTERN/ID.jpg`, in `source`, in `MLLM_VLM Images/` or in `images/`.

    Raises:
        ValueError: no such file, rows of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    built = ItemSet("mmvp-vlm", images)
    rows = list(csv_entries(require(source, "Questions.csv"), ("id", "type", "statement"), by_position=True))
    if len(rows) % 2:
        raise ValueError(f"{source / 'Questions.csv'}: has {len(rows)} rows, but rows come in pairs; fetch it again")
    for number, pair in enumerate(zip(rows[::2], rows[1::2])):
        patterns = [entry.words("type") for entry in pair]
        if patterns[0] != patterns[1]:
            raise pair[1].error("type", f"{patterns[1]!r} is not that of the row before, {patterns[0]!r}")
        folders = [f"{folder}{patterns[0]}" for folder in ("", "MLLM_VLM Images/", "images/")]
        names = [entry.words("id") for entry in pair]
        both = [images.relative_path(*(f"{folder}/{name}.jpg" for folder in folders)) for name in names]
        for side, entry in enumerate(pair):
            built.add(
                entry,
                images=both,
                texts=[f"{_PROMPT}{entry.words('statement')}"],
                right=[(side, 0)],
                group=patterns[0],
                id=f"{number}/{side}",
                set={"pair": str(number)},
            )
    return write_sets([built], [Count("statements", len(rows), _STATEMENTS), *built.counts()], to, overwrite)
