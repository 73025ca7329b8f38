"""Rankings of retrieval by the ids of images and captions: a file of them, and metrics by corrected labels."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mamo.data.pair_record import PairRecord
from mamo.data.pairs_reader import write_json_lines
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.corrected import corrected_metrics
from mamo.evaluation.metrics.retrieval import complete_ranking

RANKINGS = "rankings.jsonl"
Keep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]
"""Takes image and text features, shortlists of texts and of images, and their ITM scores; see `Rankings.keep`."""


class Rankings:
    """Takes the rankings of one gallery and names their items by id.

    Captions without ids in the file are named `IMAGE_ID#NUMBER`, counted from 0.
    """

    def __init__(self, records: Sequence[PairRecord], shown: Sequence[str], depth: int) -> None:
        """Store the ids.

        Args:
            records: of the evaluation file.
            shown: ids of the gallery's images, in order.
            depth: items of each query; 0 keeps nothing.
        """
        self.depth, self.shown = depth, shown
        self.ids: dict[str, list[str]] = {}
        for record in records:
            own = self.ids.setdefault(record.image_id, [])
            own += record.caption_ids or [f"{record.image_id}#{len(own) + k}" for k in range(len(record.captions))]
        self.by_image: dict[str, list[str]] = {}
        self.by_caption: dict[str, list[str]] = {}

    def keep(
        self,
        image: Tensor,
        text: Tensor,
        to_text: Tensor,
        to_image: Tensor,
        text_score: Tensor | None,
        image_score: Tensor | None,
    ) -> None:
        """Rank texts for each image and images for each text, to `depth`; see `complete_ranking`."""
        captions = [own for name in self.shown for own in self.ids[name]]
        texts = complete_ranking(image, text, to_text, text_score, self.depth).tolist()
        images = complete_ranking(text, image, to_image, image_score, self.depth).tolist()
        self.by_image = {name: [captions[item] for item in row] for name, row in zip(self.shown, texts, strict=True)}
        self.by_caption = {
            caption: [self.shown[item] for item in row] for caption, row in zip(captions, images, strict=True)
        }

    def write(self, file: Path) -> None:
        """Write a row a query, on rank 0."""
        map_over_ranks(lambda to: write_json_lines(to, self._rows()), [file])

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        for kind, rankings in (("image", self.by_image), ("caption", self.by_caption)):
            for query, ranking in rankings.items():
                yield {"kind": kind, "query": query, "ranking": ranking}

    def corrected(self) -> dict[str, float]:
        """Return the metrics of `corrected_metrics`. Raises ValueError for ids that are not COCO's."""
        return corrected_metrics(
            {coco_id(query): list(map(coco_id, items)) for query, items in self.by_image.items()},
            {coco_id(query): list(map(coco_id, items)) for query, items in self.by_caption.items()},
        )


def coco_id(name: str) -> int:
    """Return the number of `coco/12`, `coco_12` or `12`. Raises ValueError for other ids."""
    found = re.fullmatch(r"(?:coco[/_])?(\d+)", name)
    if found is None:
        raise ValueError(
            f"evaluation.corrected: {name!r} is not COCO's id of an image or caption; build data.eval_file with "
            "`mamo data build coco`, which keeps them"
        )
    return int(found[1])
