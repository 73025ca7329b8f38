"""Recall at K of a ranking by similarity, and of its re-ranked shortlist.

The rank of a query is the number of wrong gallery items that score at least as high as its best right item. Ties count
against the query, and a NaN score is the worst rank, so a constant scorer never beats chance.

Legend: Q queries, G gallery items, D feature width, K shortlist length, N right (query, item) pairs.
"""

import torch
from torch import Tensor

DEPTHS = (1, 5, 10)


def rank_by_similarity(
    query: Tensor, gallery: Tensor, positive: Tensor, shortlist_length: int, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Rank every query's best right item by dot product, `chunk_size` queries at a time.

    Args:
        query: float32 [Q, D].
        gallery: float32 [G, D].
        positive: int64 [N, 2], the (query, item) pairs that are right.
        shortlist_length: K; cut to G.
        chunk_size: rows of the similarity matrix that exist at a time.

    Returns:
        Ranks int64 [Q], 0 the best and G for a query without a right item; the K most similar items int64 [Q, K].
    """
    return rank_and_count_ties(query, gallery, positive, shortlist_length, chunk_size)[:2]


def rank_and_count_ties(
    query: Tensor, gallery: Tensor, positive: Tensor, shortlist_length: int, chunk_size: int = 1024
) -> tuple[Tensor, Tensor, int]:
    """Return `rank_by_similarity` of the arguments, and the number of queries with a tie (`rank_and_ties`)."""
    ranks, shortlists, n_ties = [], [], 0
    for start in range(0, len(query), chunk_size):
        similarity = query[start : start + chunk_size] @ gallery.T  # [chunk, G]
        is_here = (positive[:, 0] >= start) & (positive[:, 0] < start + chunk_size)
        is_positive = torch.zeros_like(similarity, dtype=torch.bool)
        is_positive[positive[is_here, 0] - start, positive[is_here, 1]] = True
        rank, n = rank_and_ties(similarity, is_positive)
        ranks.append(rank)
        n_ties += n
        shortlists.append(similarity.topk(min(shortlist_length, len(gallery)), dim=1).indices)
    return torch.cat(ranks), torch.cat(shortlists), n_ties


def pessimistic_rank(score: Tensor, is_positive: Tensor) -> Tensor:
    """Count the wrong items that are not below the best right one: scores float [Q, G] and bool [Q, G] -> int64 [Q]."""
    return rank_and_ties(score, is_positive)[0]


def rank_and_ties(score: Tensor, is_positive: Tensor) -> tuple[Tensor, int]:
    """Return `pessimistic_rank`, and the number of queries whose best right item has the score of a wrong one.

    A tie counts against the query. Many ties mean that the scores are too coarse to rank by.
    """
    best = score.masked_fill(~is_positive, -torch.inf).amax(dim=1, keepdim=True)
    not_below = ~(score < best) & ~is_positive
    is_tied = (not_below & (score == best)).any(dim=1) & (best[:, 0] > -torch.inf)
    return not_below.sum(dim=1), int(is_tied.sum())


def chance_recalls(positive: Tensor, n_queries: int, n_items: int, prefix: str) -> dict[str, float]:
    """Compute `PREFIX_r1` to `PREFIX_r10` of a random order of the gallery, in percent.

    Args:
        positive: int64 [N, 2], the distinct (query, item) pairs that are right.
        n_queries: Q.
        n_items: G.
        prefix: of the names.
    """
    n_right = torch.bincount(positive[:, 0], minlength=n_queries).double()
    found = {}
    for depth in DEPTHS:
        missed = torch.ones_like(n_right)
        for place in range(min(depth, n_items)):
            missed *= ((n_items - n_right - place) / (n_items - place)).clamp(min=0)
        found[f"{prefix}_r{depth}"] = 100.0 * (1 - missed).mean().item()
    return found


def rank_shortlist(score: Tensor, shortlist: Tensor, positive: Tensor, gallery_size: int, first_rank: Tensor) -> Tensor:
    """Return the ranks of `rerank`."""
    return rerank(score, shortlist, positive, gallery_size, first_rank)[0]


def rerank(
    score: Tensor, shortlist: Tensor, positive: Tensor, gallery_size: int, first_rank: Tensor
) -> tuple[Tensor, int]:
    """Re-rank within the shortlist; items outside of it stay below, in their first order.

    Args:
        score: float [Q, K], of the shortlisted items.
        shortlist: int64 [Q, K].
        positive: int64 [N, 2], the (query, item) pairs that are right.
        gallery_size: G.
        first_rank: int64 [Q], from `rank_by_similarity`; kept where no right item is on the shortlist.

    Returns:
        Ranks int64 [Q], and the number of queries with a tie on the shortlist (`rank_and_ties`).
    """
    queries = torch.arange(len(shortlist), device=shortlist.device)[:, None]
    keys = queries * gallery_size + shortlist  # [Q, K]
    is_positive = torch.isin(keys, positive[:, 0] * gallery_size + positive[:, 1])
    rank, n_ties = rank_and_ties(score, is_positive)
    return torch.where(is_positive.any(dim=1), rank, first_rank), n_ties


def complete_ranking(
    query: Tensor, gallery: Tensor, shortlist: Tensor, score: Tensor | None, depth: int, chunk_size: int = 1024
) -> Tensor:
    """Rank the gallery: the shortlist by its scores, then the other items by dot product.

    Args:
        query: float32 [Q, D].
        gallery: float32 [G, D].
        shortlist: int64 [Q, K], on the device of `query`.
        score: float [Q, K], of the shortlisted items; None keeps their order.
        depth: number of items of each query; cut to G.
        chunk_size: rows of the similarity matrix that exist at a time.

    Returns:
        Items int64 [Q, depth], the best first.
    """
    if score is not None:
        shortlist = shortlist.gather(1, score.argsort(dim=1, descending=True, stable=True))
    depth = min(depth, len(gallery))
    n_rest = max(0, depth - shortlist.shape[1])
    found = []
    for start in range(0, len(query), chunk_size):
        first = shortlist[start : start + chunk_size]
        similarity = query[start : start + chunk_size] @ gallery.T  # [chunk, G]
        rest = similarity.scatter_(1, first, -torch.inf).topk(n_rest, dim=1).indices
        found.append(torch.cat([first, rest], dim=1)[:, :depth])
    return torch.cat(found)


def union_of_pairs(image_to_text: Tensor, text_to_image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct (image, text) pairs of both shortlists, so that each is scored once.

    Args:
        image_to_text: int64 [I, K], texts shortlisted for each image.
        text_to_image: int64 [T, K'], images shortlisted for each text.

    Returns:
        Pairs int64 [n, 2]; the pair index of each shortlist's entries, int64 [I, K] and [T, K'].
    """
    n_images, n_texts = len(image_to_text), len(text_to_image)
    device = image_to_text.device
    forward = torch.arange(n_images, device=device)[:, None] * n_texts + image_to_text
    backward = text_to_image * n_texts + torch.arange(n_texts, device=device)[:, None]
    keys, where = torch.unique(torch.cat([forward.flatten(), backward.flatten()]), return_inverse=True)
    pairs = torch.stack([keys // n_texts, keys % n_texts], dim=1)
    return pairs, where[: forward.numel()].view_as(forward), where[forward.numel() :].view_as(backward)


def recalls(image_to_text_rank: Tensor, text_to_image_rank: Tensor, prefix: str) -> dict[str, float]:
    """Compute `PREFIX/i2t_r1` to `PREFIX/t2i_r10` and their sum `PREFIX/rsum`, in percent; ranks int64 [I] and [T]."""
    metrics = {
        f"{prefix}/{direction}_r{depth}": 100.0 * (rank < depth).double().mean().item()
        for direction, rank in (("i2t", image_to_text_rank), ("t2i", text_to_image_rank))
        for depth in DEPTHS
    }
    return metrics | {f"{prefix}/rsum": sum(metrics.values())}
