"""Retrieval from encoded images: a shortlist by ITC, re-ranked by ITM.

Legend: T texts, I images.
"""

from collections.abc import Callable, Sequence

import torch

from mamo.evaluation.scoring import EncodedImages, EncodedTexts, Scorer


class EmptyGalleryError(ValueError):
    """A gallery to retrieve from has no image.

    >>> import mamo
    >>> mamo.load("runs/scenes").index([])
    Traceback (most recent call last):
    mamo.gallery.EmptyGalleryError: index: the gallery is empty
    """


class Gallery:
    """Encoded images to retrieve from; `Model.index` makes it.

    >>> import mamo
    >>> gallery = mamo.load("runs/scenes").index(["a.jpg", "b.jpg"])
    >>> len(gallery)
    2
    >>> (best,) = gallery.retrieve(["a red circle"], k=2)
    >>> sorted(index for index, score in best)
    [0, 1]
    """

    def __init__(self, scorer: Scorer, texts: Callable[[Sequence[str]], EncodedTexts], images: EncodedImages) -> None:
        self._scorer, self._texts, self._images = scorer, texts, images

    def __len__(self) -> int:
        return len(self._images.feature)

    def retrieve(self, texts: Sequence[str], k: int = 5, rerank_k: int = 32) -> list[list[tuple[int, float]]]:
        """The best `k` images of each text: (index in the gallery, score), best first.

        The `rerank_k` most similar by ITC are scored again by ITM, if the model has that head, as in the evaluation;
        the score is then the matching logit, else the cosine similarity.

        Raises ValueError for `k` above `rerank_k` or below 1.
        """
        if not 1 <= k <= rerank_k:
            raise ValueError(f"retrieve: k = {k} must lie between 1 and rerank_k = {rerank_k}")
        with torch.inference_mode():
            encoded = self._texts(texts)
            similarity = encoded.feature @ self._images.feature.T  # [T, I]
            score, shortlist = (found.cpu() for found in similarity.topk(min(rerank_k, len(self)), dim=1))
            if self._scorer.network.itm is not None:
                rows = torch.arange(len(texts)).repeat_interleave(shortlist.shape[1])
                score = self._scorer.match(self._images, encoded, shortlist.flatten(), rows).view(shortlist.shape)
            best, order = score.topk(min(k, shortlist.shape[1]), dim=1)
            images = shortlist.gather(1, order)
        return [list(zip(*pair, strict=True)) for pair in zip(images.tolist(), best.tolist())]
