"""Each loss against a naive loop, its closed form and finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mamo.losses.itc import itc_loss, itc_targets, positives, sigmoid_loss
from mamo.losses.itm import itm_loss
from mamo.losses.mim import mim_loss, patchify
from mamo.losses.mlm import mlm_loss
from mamo.losses.mrm import mrm_loss

Loss = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses compute in fp32; here that cast goes to float64, so that a gradient is compared to ten digits."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.manual_seed(0)


def agree(ours: Loss, naive: Loss, inputs: Tensor) -> None:
    """Same value and gradient, and the gradient equals finite differences."""
    results = []
    for function in (ours, naive):
        leaf = inputs.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-10)
    assert torch.autograd.gradcheck(ours, inputs.clone().requires_grad_())


def log_softmax(row: list[Tensor]) -> list[Tensor]:
    total = sum(value.exp() for value in row)
    return [(value.exp() / total).log() for value in row]


def contrast(n: int = 4, candidates: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(similarity, teacher's similarity, own, is_excluded) with some false negatives."""
    own = torch.tensor([2, 0, 5, 3])[:n]
    is_excluded = torch.rand(n, candidates) < 0.4
    is_excluded[torch.arange(n), own] = False
    return torch.randn(n, candidates).double(), torch.randn(n, candidates).double(), own, is_excluded


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_itc_equals_the_naive_loop(alpha: float) -> None:
    """Bug: excluded candidates in the denominator or the targets, a wrong share of the teacher's opinion."""
    similarity, opinion, own, is_excluded = contrast()

    def naive(scores: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for b in range(4):
            kept = [n for n in range(7) if not is_excluded[b, n]]
            log_probability = log_softmax([scores[b, n] for n in kept])
            teacher = [value.exp() for value in log_softmax([opinion[b, n] for n in kept])]
            for place, n in enumerate(kept):
                target = alpha * teacher[place] + (1 - alpha) * float(n == own[b])
                loss = loss - target * log_probability[place]
        return loss / 9

    def ours(scores: Tensor) -> Tensor:
        return itc_loss(scores, itc_targets(opinion, own, is_excluded, alpha), is_excluded, n_global=9)

    agree(ours, naive, similarity)


def test_sigmoid_contrast_equals_a_double_loop() -> None:
    """Bug: the sign of a pair, an excluded candidate that counts, a mean over pairs (SigLIP, Eq. 1)."""
    logits, _, own, is_excluded = contrast()

    def naive(scores: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for b in range(4):
            for n in range(7):
                z = 1 if n == own[b] else -1
                if not is_excluded[b, n]:
                    loss = loss - torch.log(1 / (1 + torch.exp(-z * scores[b, n])))
        return loss / 9

    agree(lambda scores: sigmoid_loss(scores, own, is_excluded, n_global=9), naive, logits)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_itc_of_identical_features_is_log_n(alpha: float) -> None:
    """Bug: a candidate counted twice or not at all, or excluded ones kept in N."""
    _, _, own, is_excluded = contrast()
    same = torch.full((4, 7), 3.0)
    targets = itc_targets(same, own, is_excluded, alpha)
    expected = sum(math.log(7 - int(row.sum())) for row in is_excluded) / 4
    assert float(itc_loss(same, targets, is_excluded, 4)) == pytest.approx(expected, abs=1e-9)
    nothing = torch.zeros_like(is_excluded)
    assert float(itc_loss(same, itc_targets(same, own, nothing, alpha), nothing, 4)) == pytest.approx(math.log(7))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_itc_targets_are_a_distribution_over_what_is_not_excluded(alpha: float) -> None:
    """Bug: soft targets that do not sum to 1 after exclusion, or lend weight to a false negative."""
    _, opinion, own, is_excluded = contrast()
    targets = itc_targets(opinion, own, is_excluded, alpha)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4).double())
    assert targets[is_excluded].eq(0).all()
    assert targets.ge(0).all()
    if alpha == 0:
        assert targets[torch.arange(4), own].eq(1).all()


def test_an_excluded_candidate_changes_nothing() -> None:
    """Bug: another caption of the same image pushes its image away, even when its feature is huge or not finite."""
    similarity, opinion, own, is_excluded = contrast()
    expected = itc_loss(similarity, itc_targets(opinion, own, is_excluded, 0.4), is_excluded, 4)
    for wrong in (100.0, -1e30, math.inf, math.nan):
        spoilt = torch.where(is_excluded, wrong, similarity).requires_grad_()
        targets = itc_targets(torch.where(is_excluded, wrong, opinion), own, is_excluded, 0.4)
        value = itc_loss(spoilt, targets, is_excluded, 4)
        value.backward()
        assert float(value.detach()) == float(expected)
        assert spoilt.grad[is_excluded].eq(0).all()
        assert spoilt.grad.isfinite().all()


def test_positives_by_image_and_by_caption() -> None:
    """Bug: only one of the two ids counts, or both are demanded at once."""
    image_id, caption_id = torch.tensor([1, 2, 3]), torch.tensor([10, 20, 10])
    other_image, other_caption = torch.tensor([1, 9, 3, 8]), torch.tensor([30, 20, 30, 40])
    expected = [
        [a == c or b == d for c, d in zip([1, 9, 3, 8], [30, 20, 30, 40])] for a, b in [(1, 10), (2, 20), (3, 10)]
    ]
    assert positives(image_id, caption_id, other_image, other_caption).tolist() == expected


def test_itm_equals_the_naive_loop() -> None:
    """Bug: a mean over the wrong count, invalid rows counted, or the classes exchanged."""
    logits = torch.randn(6, 2).double()
    is_match, is_valid = torch.tensor([1, 1, 0, 0, 0, 0]).bool(), torch.tensor([1, 1, 1, 0, 1, 0]).bool()

    def naive(values: Tensor) -> Tensor:
        terms = [-log_softmax(list(values[m]))[int(is_match[m])] for m in range(6) if is_valid[m]]
        return sum(terms, torch.zeros((), dtype=torch.float64)) / 11

    agree(lambda values: itm_loss(values, is_match, is_valid, 11), naive, logits)


def test_itm_closed_forms() -> None:
    """Bug: the class order (mismatch, match) reversed, or a count that is not that of the valid pairs."""
    is_match, valid = torch.tensor([True, False, False]), torch.ones(3, dtype=torch.bool)
    assert float(itm_loss(torch.zeros(3, 2), is_match, valid, 3)) == pytest.approx(math.log(2))
    prior = torch.tensor([[math.log(2 / 3), math.log(1 / 3)]]).expand(3, 2)
    expected = math.log(3) - 2 / 3 * math.log(2)
    assert float(itm_loss(prior, is_match, valid, 3)) == pytest.approx(expected)
    sure = torch.tensor([[-50.0, 50.0], [50.0, -50.0], [50.0, -50.0]])
    assert float(itm_loss(sure, is_match, valid, 3)) == pytest.approx(0, abs=1e-9)


def test_mlm_equals_the_naive_loop() -> None:
    """Bug: a local mean in place of the sum over the global count."""
    logits, labels = torch.randn(5, 6).double(), torch.tensor([0, 5, 2, 2, 1])

    def naive(values: Tensor) -> Tensor:
        terms = [-log_softmax(list(values[m]))[int(labels[m])] for m in range(5)]
        return sum(terms, torch.zeros((), dtype=torch.float64)) / 8

    agree(lambda values: mlm_loss(values, labels, 8), naive, logits)


def test_distilled_mlm_closed_forms() -> None:
    """Bug: alpha and its complement exchanged, logits for probabilities, a mean over words within a mean."""
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]]).double(), torch.tensor([0, 1])
    log_p = torch.stack([row - row.exp().sum().log() for row in logits])
    guess = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]).double()
    hard = -(log_p[0, 0] + log_p[1, 1]) / 2
    soft = -(0.5 * log_p[0, 0] + 0.25 * log_p[0, 1] + 0.25 * log_p[0, 2] + log_p[1, 2]) / 2
    for alpha in (0.0, 0.4, 1.0):
        torch.testing.assert_close(mlm_loss(logits, labels, 2, guess, alpha), (1 - alpha) * hard + alpha * soft)
    one_hot = torch.nn.functional.one_hot(labels, 3).float()  # a teacher that is sure changes nothing
    torch.testing.assert_close(mlm_loss(logits, labels, 2, one_hot, 0.4), mlm_loss(logits, labels, 2))
    leaf = logits.clone().requires_grad_()
    mlm_loss(leaf, labels, 2, leaf.detach().softmax(dim=1), 1.0).backward()
    torch.testing.assert_close(
        leaf.grad, torch.zeros(2, 3).double(), atol=1e-7, rtol=0
    )  # in agreement, nothing to learn


def test_mlm_closed_forms() -> None:
    """Bug: uniform logits do not cost log V, or a micro-batch without masked words gives NaN."""
    assert float(mlm_loss(torch.full((5, 37), 2.5), torch.arange(5), 5)) == pytest.approx(math.log(37))
    assert float(mlm_loss(torch.zeros(0, 37), torch.zeros(0, dtype=torch.int64), 5)) == 0


def test_mrm_equals_the_naive_loop() -> None:
    """Bug: unnormalised vectors, a mean over D, or a gradient that misses the normalisation."""
    prediction, target = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()

    def naive(values: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for b in range(2):
            for k in range(3):
                p, t = values[b, k], target[b, k]
                cosine = sum(p[d] * t[d] for d in range(4)) / (sum(p**2).sqrt() * sum(t**2).sqrt())
                loss = loss + 2 - 2 * cosine
        return loss / 7

    agree(lambda values: mrm_loss(values, target, 7), naive, prediction)


def test_mrm_closed_forms() -> None:
    """Bug: parallel vectors cost more than 0, opposite ones not 4, orthogonal ones not 2, whatever their length."""
    target = torch.randn(5, 8)
    assert float(mrm_loss(3 * target, target, 5)) == pytest.approx(0, abs=1e-9)
    assert float(mrm_loss(-0.1 * target, target, 5)) == pytest.approx(4)
    basis = torch.eye(8)
    assert float(mrm_loss(basis, basis.roll(1, dims=0), 8)) == pytest.approx(2)


def test_mim_equals_the_naive_loop() -> None:
    """Bug: an unstandardised target, a sum over D, or a mean over the local patches."""
    prediction, target = torch.randn(2, 3, 4).double(), 5 * torch.randn(2, 3, 4).double() + 2

    def naive(values: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for b in range(2):
            for k in range(3):
                row = [float(value) for value in target[b, k]]
                mean = sum(row) / 4
                deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / 4 + 1e-6)
                loss = loss + sum((values[b, k, d] - (row[d] - mean) / deviation) ** 2 for d in range(4)) / 4
        return loss / 10

    agree(lambda values: mim_loss(values, target, 10), naive, prediction)


def test_mim_closed_forms() -> None:
    """Bug: a constant prediction of 0 does not cost the unit variance, or the target's scale weighs the loss."""
    target = torch.randn(2, 3, 64).double()
    assert float(mim_loss(torch.zeros(2, 3, 64), target, 6)) == pytest.approx(1, abs=1e-4)
    prediction = torch.randn(2, 3, 64).double()
    plain, scaled = mim_loss(prediction, target, 6), mim_loss(prediction, 100 * target - 7, 6)
    assert float(plain) == pytest.approx(float(scaled), rel=1e-5)


def test_patchify_cuts_row_major_patches() -> None:
    """Bug: columns before rows on a grid that is not square, or patch height and width exchanged."""
    image = torch.randn(2, 3, 4, 12)
    patches = patchify(image, (2, 3))
    assert patches.shape == (2, 8, 18)
    for b in range(2):
        for row in range(2):
            for column in range(4):
                cut = image[b, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
                assert torch.equal(patches[b, 4 * row + column], cut.reshape(-1))


def test_shares_of_uneven_splits_add_up() -> None:
    """Bug: a per-part mean, which weighs a word in a short micro-batch more than one in a long micro-batch."""
    logits, labels = torch.randn(9, 5).double(), torch.randint(5, (9,))
    vectors, targets = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    valid = torch.rand(9) < 0.7
    whole = [
        mlm_loss(logits, labels, 9),
        mrm_loss(vectors, targets, 9),
        mim_loss(vectors[:, None], targets[:, None], 9),
        itm_loss(logits[:, :2], labels > 2, valid, valid.sum()),
    ]
    parts = torch.zeros(4).double()
    for part in (slice(0, 1), slice(1, 7), slice(7, 7), slice(7, 9)):
        parts += torch.stack(
            [
                mlm_loss(logits[part], labels[part], 9),
                mrm_loss(vectors[part], targets[part], 9),
                mim_loss(vectors[part, None], targets[part, None], 9),
                itm_loss(logits[part, :2], labels[part] > 2, valid[part], valid.sum()),
            ]
        )
    torch.testing.assert_close(parts, torch.stack(whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a sum of thousands of terms in bf16, which stops growing at 256."""
    monkeypatch.undo()
    logits, labels = torch.zeros(4000, 8, dtype=dtype), torch.zeros(4000, dtype=torch.int64)
    assert float(mlm_loss(logits, labels, 4000)) == pytest.approx(math.log(8), rel=1e-5)
    pairs, match = torch.zeros(4000, 2, dtype=dtype), torch.zeros(4000, dtype=torch.bool)
    assert float(itm_loss(pairs, match, ~match, 4000)) == pytest.approx(math.log(2), rel=1e-5)
    vectors = torch.eye(4, dtype=dtype).repeat(1000, 1)
    assert float(mrm_loss(vectors, -vectors, 4000)) == pytest.approx(4, rel=1e-5)
