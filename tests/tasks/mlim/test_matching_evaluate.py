"""PR AUC against closed forms and a plain loop over ranks."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from mamo.tasks.mlim.matching_evaluate import pr_auc


def test_closed_forms() -> None:
    """Bug: the trapezoid, the wrong class, scores read upside down."""
    is_match = torch.tensor([True, True, False, False])
    assert pr_auc(torch.tensor([4.0, 3.0, 2.0, 1.0]), is_match) == 100.0
    assert pr_auc(torch.tensor([1.0, 2.0, 3.0, 4.0]), is_match) == pytest.approx(100 * (1 / 3 + 2 / 4) / 2)
    assert pr_auc(torch.zeros(4), is_match) == 50.0  # all tied: the share of matches
    assert pr_auc(torch.tensor([2.0, 1.0, 1.5, 0.0]), is_match) == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_it_is_the_sum_over_ranks_and_scikit_learn_s_value() -> None:
    """Bug: another definition of the area. The loop knows nothing of scikit-learn."""
    rng = np.random.default_rng(0)
    score, is_match = rng.permutation(200).astype(float), rng.random(200) < 0.3
    precisions, found = [], 0
    for rank, row in enumerate(np.argsort(-score), start=1):
        if is_match[row]:
            found += 1
            precisions.append(found / rank)
    ours = pr_auc(torch.from_numpy(score), torch.from_numpy(is_match))
    assert ours == pytest.approx(100 * np.mean(precisions))
    assert ours == pytest.approx(100 * average_precision_score(is_match, score))


def test_no_match_is_refused_by_name() -> None:
    """Bug: NaN or 0 in the results, with a warning that scrolls by."""
    with pytest.raises(ValueError, match=r"none of the 3 pairs.*evaluation\.probe_items"):
        pr_auc(torch.arange(3.0), torch.zeros(3, dtype=torch.bool))
