"""Closely matching items: PR AUC with both modalities, and with only one of them (MLIM).

Legend: N pairs.
"""

import torch
from torch import Tensor

from mamo.distributed import map_over_ranks
from mamo.evaluation.predictor import Predictor
from mamo.tasks.mlim.matching_batch import MODALITIES, CataloguePairs, ListingCollator, Modality
from mamo.tasks.mlim.network import Mlim


def pr_auc(score: Tensor, is_match: Tensor) -> float:
    """Compute the area under the precision-recall curve of the class "same item", in percent.

    It is scikit-learn's average precision, the sum over ranks of (R_n - R_(n-1)) P_n. MLIM does not state its area; the
    trapezoid's is optimistic.

    Args:
        score: float [N], higher where the pair looks more alike; equal scores share a rank.
        is_match: bool [N].

    Raises:
        ValueError: no pair matches, so there is no recall.
    """
    from sklearn.metrics import average_precision_score  # here, as it takes a tenth of a command's start

    if not is_match.any():
        raise ValueError(f"PR AUC: none of the {len(is_match)} pairs is a match; raise evaluation.probe_items")
    return 100.0 * float(average_precision_score(is_match.cpu().numpy(), score.cpu().double().numpy()))


def predict_matching(
    predictor: Predictor, pairs: CataloguePairs, collator: ListingCollator, batch_size: int
) -> tuple[dict[Modality, Tensor], Tensor]:
    """Return logits float32 [N] of all pairs by the modalities that are kept, and bool [N] whether they match.

    Both lie on the CPU. Ranks share the work.

    Args:
        predictor: its network is in eval mode.
        pairs: the pairs.
        collator: one that drops nothing.
        batch_size: pairs of a forward pass.
    """
    network: Mlim = predictor.network

    def match(start: int) -> tuple[dict[Modality, Tensor], Tensor]:
        rows = range(start, min(start + batch_size, len(pairs)))
        batch = collator([(0, pairs.load(index)) for index in rows]).to(predictor.device)
        reading = (batch.image, batch.input_ids, batch.is_valid)
        logits = {modality: network.match_items(*reading, *batch.given(modality)).cpu() for modality in MODALITIES}
        return logits, batch.is_match.cpu()

    logits, labels = zip(*map_over_ranks(match, range(0, len(pairs), batch_size)), strict=True)
    return {modality: torch.cat([part[modality] for part in logits]) for modality in MODALITIES}, torch.cat(labels)
