"""Recall: ranks with ties, several right items, short galleries, chunks and shortlists."""

import pytest
import torch

from mamo.evaluation.metrics.retrieval import (
    complete_ranking,
    rank_by_similarity,
    rank_shortlist,
    recalls,
    union_of_pairs,
)


def naive_ranks(score, positive):
    """Sort each gallery with wrong items before right ones of the same score; where does the first right one stand?"""
    ranks = []
    for q, row in enumerate(score.tolist()):
        right = {g for query, g in positive.tolist() if query == q}
        order = sorted(range(len(row)), key=lambda g: (-row[g], g in right))
        ranks.append(next((place for place, g in enumerate(order) if g in right), len(row)))
    return ranks


def tied_case(n_queries=23, n_items=17):
    """Features of few small whole numbers, so that many similarities are exactly equal."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randint(-1, 2, (n_queries, 2), generator=generator).float()
    gallery = torch.randint(-1, 2, (n_items, 2), generator=generator).float()
    positive = (torch.rand(n_queries, n_items, generator=generator) < 0.12).nonzero()  # none, one or several a query
    return query, gallery, positive


@pytest.mark.parametrize("chunk_size", [1, 4, 23, 1000])
def test_ranks_equal_a_sorted_gallery_for_every_chunk_size(chunk_size):
    """Would catch ties that favour the truth, a worst instead of best right item, and rows shifted between chunks."""
    query, gallery, positive = tied_case()
    ranks, shortlist = rank_by_similarity(query, gallery, positive, 5, chunk_size)
    score = query @ gallery.T
    assert ranks.tolist() == naive_ranks(score, positive)
    assert torch.equal(score.gather(1, shortlist), score.sort(dim=1, descending=True).values[:, :5])


def test_recall_of_a_hand_made_ranking():
    """Would catch an off-by-one in K, and i2t exchanged with t2i: a tie at the first place is a miss at 1."""
    image = torch.tensor([[3.0, 2.0, 2.0], [1.0, 0.0, 5.0]])  # similarities themselves: the gallery is the unit matrix
    texts = torch.eye(3)
    positive = torch.tensor([[0, 1], [0, 2], [1, 2]])  # image 0 has captions 1 and 2; caption 2 belongs to both
    to_text, _ = rank_by_similarity(image, texts, positive, 2)
    to_image, _ = rank_by_similarity(texts, image, positive.flip(1), 2)
    assert to_text.tolist() == [1, 0]
    assert to_image.tolist() == [2, 0, 0]  # caption 0 has no image: a miss at any depth
    metrics = recalls(to_text, to_image, "itc")
    assert metrics["itc/i2t_r1"] == 50
    assert metrics["itc/i2t_r5"] == 100
    assert metrics["itc/t2i_r1"] == pytest.approx(200 / 3)
    assert metrics["itc/rsum"] == pytest.approx(sum(value for name, value in metrics.items() if "_r" in name))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_constant_scorer_finds_nothing(value):
    """Would catch a collapsed or broken network that is reported as perfect because all its scores are equal."""
    positive = torch.arange(40)[:, None].expand(-1, 2)
    ranks, _ = rank_by_similarity(torch.full((40, 1), value), torch.ones(40, 1), positive, 4)
    assert ranks.tolist() == [39] * 40
    assert recalls(ranks, ranks, "itc")["itc/rsum"] == 0


def test_gallery_smaller_than_the_shortlist():
    """Would catch a crash, or recall at 10 below 100, where there are fewer items than K."""
    feature = torch.eye(3)
    positive = torch.arange(3)[:, None].expand(-1, 2)
    ranks, shortlist = rank_by_similarity(feature, feature, positive, 16)
    assert shortlist.shape == (3, 3)
    assert set(recalls(ranks, ranks, "x").values()) == {100.0, 600.0}


def test_shortlisted_items_come_before_all_others():
    """Would catch a right item outside the shortlist that climbs, or the first ranking kept within the shortlist."""
    query, gallery, positive = tied_case()
    score = torch.randint(0, 3, (23, 17), generator=torch.Generator().manual_seed(1)).float()
    similarity = query @ gallery.T
    for length in (1, 4, 17):
        first, shortlist = rank_by_similarity(query, gallery, positive, length)
        ranks = rank_shortlist(score.gather(1, shortlist), shortlist, positive, 17, first)
        joined = similarity - 100  # all below any score
        joined.scatter_(1, shortlist, score.gather(1, shortlist))
        assert ranks.tolist() == naive_ranks(joined, positive)


def test_union_scores_each_pair_once():
    """Would catch a pair scored twice, lost, or looked up transposed."""
    to_text = torch.tensor([[0, 2], [2, 1]])  # 2 images
    to_image = torch.tensor([[1], [1], [0]])  # 3 texts
    pairs, at_text, at_image = union_of_pairs(to_text, to_image)
    assert sorted(map(tuple, pairs.tolist())) == [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert pairs[at_text].tolist() == [[[0, 0], [0, 2]], [[1, 2], [1, 1]]]
    assert pairs[at_image].tolist() == [[[1, 0]], [[1, 1]], [[0, 2]]]


def test_a_complete_ranking_begins_with_the_shortlist_by_its_scores():
    """Bug: a shortlisted item occurs again among the rest, or the rest is in another order than the similarity's."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(5, 4, generator=generator), torch.randn(9, 4, generator=generator)
    similarity = query @ gallery.T
    shortlist = similarity.topk(3, dim=1).indices
    score = torch.randn(5, 3, generator=generator)
    for depth in (2, 3, 6, 9, 20):
        found = complete_ranking(query, gallery, shortlist, score, depth, chunk_size=2)
        plain = complete_ranking(query, gallery, shortlist, None, depth, chunk_size=2)
        assert torch.equal(plain, similarity.argsort(dim=1, descending=True)[:, : min(depth, 9)])
        for q in range(5):
            first = sorted(range(3), key=lambda k: -score[q, k])
            rest = [g for g in similarity[q].argsort(descending=True).tolist() if g not in shortlist[q]]
            expected = [int(shortlist[q, k]) for k in first] + rest
            assert found[q].tolist() == expected[:depth]
