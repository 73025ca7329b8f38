"""Measure re-ranking: pairs scored per second, against the floor, the peers, and encoding the image for every pair."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mamo.benchmark.cases import Case, has_peer_shapes, synthetic_captions
from mamo.benchmark.products import Products
from mamo.benchmark.timing import Rounds, seconds, square_rate, synchronise
from mamo.evaluation.metrics.retrieval import rank_by_similarity
from mamo.evaluation.scorer import EncodedImages, Scorer
from mamo.trainer import TrainingRun
from mamo.training.precision import Precision, cast_parameters

PEER_MFLOP = {"tiny": 152.0, "small": 1900.0}
"""ALBEF's own evaluation loop, per pair, in the measure of `step.PEER_GFLOP` but units of 1e6 operations."""
SHORTLIST = 16
"""Texts scored with each image."""


def measure_reranking(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure pairs per second of `Scorer.itm_scores`, with every image and text encoded once before.

    `reranking/PRESET/albef` is the same with cross-attention fusion, at the shapes where ALBEF's own loop was measured.
    """
    found = _rerank(case, folder, device, precision).summary(f"reranking/{case.preset}")
    if has_peer_shapes(case):
        albef = _rerank(replace(case, method="albef"), folder, device, precision)
        found |= albef.summary(f"reranking/{case.preset}/albef")
    return found


def _rerank(case: Case, folder: Path, device: torch.device, precision: Precision) -> Rounds:
    run, scorer, images = _ready(case, folder, device, precision)
    network = run.task.network
    captions = synthetic_captions(SHORTLIST, case.text_tokens - 2, case.vocabulary_size)
    image_indices = torch.arange(case.pairs) // SHORTLIST
    text_rows = torch.arange(case.pairs) % SHORTLIST
    rounds = Rounds()
    with cast_parameters(precision, [network]), torch.inference_mode():
        encoded, texts = (
            scorer.encode_images(torch.split(images, scorer.batch_size)),
            scorer.encode_texts(*scorer.tokenize(captions)),
        )
        products = Products(lambda: scorer.itm_scores(encoded, texts, image_indices, text_rows), device)
        again = slice(0, scorer.batch_size)

        def encode_again() -> None:
            repeated = scorer.encode_images([images[image_indices[again]]])
            scorer.itm_scores(repeated, texts, torch.arange(len(image_indices[again])), text_rows[again])

        for number in range(case.rounds + 1):
            before, rate = products.seconds(), square_rate(device, "fp32", case.square_side)
            match_s = seconds(lambda: scorer.itm_scores(encoded, texts, image_indices, text_rows), device) / case.pairs
            again_s = seconds(encode_again, device) / len(image_indices[again])
            if number == 0:
                continue
            floor_s = (before + products.seconds()) / 2 / case.pairs
            equivalent = match_s * rate / 1e6
            rounds.add(
                pairs_per_s=1 / match_s,
                share_of_matrix_rate=floor_s / match_s,
                mflop_per_pair=products.operations / case.pairs / 1e6,
                mflop_equivalents_per_pair=equivalent,
                speedup_over_encoding_again=again_s / match_s,
            )
            if case.preset in PEER_MFLOP and has_peer_shapes(case):
                rounds.add(over_albef=equivalent / PEER_MFLOP[case.preset])
    return rounds


def _ready(case: Case, folder: Path, device: torch.device, precision: Precision) -> tuple[TrainingRun, Scorer, Tensor]:
    """Build a run in eval mode, its scorer and images uint8 [pairs / SHORTLIST, 3, H, W]."""
    run = TrainingRun(case.config(folder, device.type, precision))
    run.task.network.eval()
    batch_size = run.config.evaluation.batch_size
    with cast_parameters(precision, [run.task.network]):  # the scorer keeps tokens in the weights' precision
        scorer = Scorer(run.predictor, batch_size)
    size = (-(-case.pairs // SHORTLIST), 3, case.image_size_px, case.image_size_px)
    return run, scorer, torch.randint(256, size, dtype=torch.uint8)


def measure_galleries(
    case: Case, device: torch.device, sizes: tuple[int, ...] = (1_000, 5_000, 25_000)
) -> dict[str, float]:
    """Measure the seconds to rank 1,000 queries by similarity in galleries of several sizes."""
    found: dict[str, float] = {}
    width = 256
    query = torch.nn.functional.normalize(torch.randn(1_000, width, device=device), dim=1)
    for size in sizes:
        gallery = torch.nn.functional.normalize(torch.randn(size, width, device=device), dim=1)
        right = torch.arange(1_000, device=device)[:, None].expand(-1, 2) % size
        rounds = Rounds()
        for _ in range(case.rounds):
            rounds.add(rank_s=seconds(lambda: rank_by_similarity(query, gallery, right, 128), device))  # noqa: B023
        found |= rounds.summary(f"growth/{case.preset}/gallery_{size}")
    return found


def measure_gallery_memory(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure the peak GPU memory of scoring the same pairs in a gallery and in one of four times the images."""
    run, scorer, images = _ready(case, folder, device, precision)
    found: dict[str, float] = {}
    with cast_parameters(precision, [run.task.network]), torch.inference_mode():
        texts = scorer.encode_texts(*scorer.tokenize(synthetic_captions(SHORTLIST, 8, case.vocabulary_size)))
        one = scorer.encode_images(torch.split(images, scorer.batch_size))
        for factor in (1, 4):
            gallery = EncodedImages(one.tokens.repeat(factor, 1, 1), one.feature.repeat(factor, 1))
            rows = torch.arange(min(case.pairs, len(gallery.tokens)))
            synchronise(device)
            torch.cuda.reset_peak_memory_stats(device)
            scorer.itm_scores(gallery, texts, rows, rows % SHORTLIST)
            peak = torch.cuda.max_memory_allocated(device) / 2**20
            found[f"growth/{case.preset}/gallery_{len(gallery.tokens)}/device_peak_mib"] = peak
    return found
