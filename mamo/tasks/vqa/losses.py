"""VQA losses. Legend: B questions, K distinct answers of one, N answers of the list."""

import torch
from torch import Tensor
from torch.nn import functional


def decoder_loss(likelihood: Tensor, weight: Tensor, n_global: int) -> Tensor:
    """Return ALBEF's: negative log-likelihood of each answer times the share of people who gave it, sum / questions.

    Args:
        likelihood: float32 [B, K], of each answer.
        weight: float32 [B, K], 0 for no answer.
        n_global: questions of the global batch.
    """
    return -(likelihood * weight).sum() / n_global


def classifier_loss(logits: Tensor, score: Tensor, n_global: int) -> Tensor:
    """Return binary cross-entropy of every answer of the list with its soft score, summed over the list (METER, ViLT).

    Args:
        logits: float [B, N].
        score: float32 [B, N], from 0 to 1.
        n_global: questions of the global batch.
    """
    return functional.binary_cross_entropy_with_logits(logits.float(), score, reduction="sum") / n_global


def list_scores(row: Tensor, score: Tensor, n_answers: int) -> Tensor:
    """Spread scores float32 [B, K] to the rows int64 [B, K] of the list (-1: not on it) -> float32 [B, N]."""
    whole = torch.zeros(len(row), n_answers + 1, device=score.device)
    return whole.scatter(1, row.remainder(n_answers + 1), score)[:, :-1]  # -1 becomes the last column, cut off
