"""Closely matching items: PR AUC with both modalities, and with one of them alone (MLIM).

Legend: N pairs.
"""

from collections.abc import Callable, Iterator

import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from mamo.data.matching import MODALITIES, CataloguePairs, ListingBatch, ListingCollator, Modality
from mamo.models.mlim import Mlim


def pr_auc(score: Tensor, is_match: Tensor) -> float:
    """Area under the precision-recall curve of the class "same item", in percent: scikit-learn's average precision,
    sum over ranks of (R_n - R_(n-1)) P_n. MLIM does not say which area it means; the trapezoid's is optimistic.

    Args:
        score: float [N], higher where the pair looks more alike; equal scores share a rank.
        is_match: bool [N].

    Raises:
        ValueError: no pair matches, so there is no recall.
    """
    if not is_match.any():
        raise ValueError(f"PR AUC: none of the {len(is_match)} pairs is a match; raise evaluation.probe_items")
    return 100.0 * float(average_precision_score(is_match.cpu().numpy(), score.cpu().double().numpy()))


def match_all(
    network: Mlim,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    pairs: CataloguePairs,
    collator: ListingCollator,
    batch_size: int,
) -> tuple[dict[Modality, Tensor], Tensor]:
    """Logits float32 [N] of all pairs by what is given of them, and whether they match, bool [N]; on the CPU.

    Args:
        network: in eval mode.
        collator: one that drops nothing.
    """
    logits: dict[Modality, list[Tensor]] = {modality: [] for modality in MODALITIES}
    labels = []
    for batch in _batches(pairs, collator, batch_size):
        labels.append(batch.is_match)
        moved = batch.to(device)
        image = normalise(moved.image)
        for modality in MODALITIES:
            given = moved.given(modality)
            logits[modality].append(network.match_items(image, moved.input_ids, moved.is_valid, *given).cpu())
    return {modality: torch.cat(parts) for modality, parts in logits.items()}, torch.cat(labels)


def _batches(pairs: CataloguePairs, collator: ListingCollator, batch_size: int) -> Iterator[ListingBatch]:
    for start in range(0, len(pairs), batch_size):
        yield collator([(0, pairs.load(index)) for index in range(start, min(start + batch_size, len(pairs)))])
