"""Measure re-ranking: pairs scored per second, against the floor, a textbook loop, and encoding each image again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mamo.benchmark.cases import Case, synthetic_captions
from mamo.benchmark.products import Products
from mamo.benchmark.step import precisions_of, without_precision
from mamo.benchmark.textbook import Textbook
from mamo.benchmark.timing import Rounds, seconds, synchronise
from mamo.evaluation.metrics.retrieval import rank_by_similarity
from mamo.evaluation.scorer import EncodedImages, Scorer
from mamo.tasks.pretrain.task import PretrainTask
from mamo.trainer import TrainingRun
from mamo.training.precision import Precision, cast_parameters

SHORTLIST = 16
"""Texts scored with each image."""


def measure_reranking(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure pairs per second of `Scorer.itm_scores`, with every image and text encoded once before.

    `reranking/PRESET/PRECISION/albef` is the same with cross-attention fusion. Keys without a precision are those of
    `precision`. All are divided by the textbook's loop, as ALBEF's evaluation has it: cross-attention in fp32, the
    texts of one image in a batch.
    """
    found: dict[str, float] = {}
    for name in precisions_of(device, precision):
        for prefix, one in ((name, case), (f"{name}/albef", replace(case, method="albef"))):
            found |= _rerank(one, folder, device, name).summary(f"reranking/{case.preset}/{prefix}")
    return found | without_precision(found, f"reranking/{case.preset}", precision)


def _rerank(case: Case, folder: Path, device: torch.device, precision: Precision) -> Rounds:
    run, scorer, images = _ready(case, folder, device, precision)
    network = run.task.network
    captions = synthetic_captions(SHORTLIST, case.text_tokens - 2, case.vocabulary_size)
    image_indices = torch.arange(case.pairs) // SHORTLIST
    text_rows = torch.arange(case.pairs) % SHORTLIST
    book_s = _textbook_loop(case, folder, device, captions)
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
            before = products.seconds()
            match_s = seconds(lambda: scorer.itm_scores(encoded, texts, image_indices, text_rows), device) / case.pairs
            again_s = seconds(encode_again, device) / len(image_indices[again])
            if number == 0:
                continue
            floor_s = (before + products.seconds()) / 2 / case.pairs
            book_pair_s = book_s()
            rounds.add(
                pairs_per_s=1 / match_s,
                share_of_matrix_rate=floor_s / match_s,
                mflop_per_pair=products.operations / case.pairs / 1e6,
                over_textbook=match_s / book_pair_s,
                speedup_over_encoding_again=again_s / match_s,
            )
    return rounds


def _textbook_loop(case: Case, folder: Path, device: torch.device, captions: list[str]) -> Callable[[], float]:
    """Return a function that measures the seconds of a pair in the textbook's loop, over a few images."""
    run, scorer, _ = _ready(replace(case, method="albef"), folder, device, "fp32")
    assert isinstance(run.task, PretrainTask)
    book = Textbook(run.task).student.eval()
    input_ids, lengths = (tensor.to(device) for tensor in scorer.tokenize(captions))
    is_valid = torch.arange(input_ids.shape[1], device=device) < lengths[:, None]
    n_images = max(1, min(case.pairs // SHORTLIST, 8))
    size = (n_images, 3, case.image_size_px, case.image_size_px)
    with torch.inference_mode():
        encoded = book.image(torch.randint(256, size, dtype=torch.uint8, device=device))
        words = book.text(input_ids, is_valid)

    def loop() -> None:
        for image in encoded:
            fused = book.fuse(image.expand(len(words), -1, -1), words, is_valid)
            book.heads["itm"](fused[:, 0])

    return lambda: seconds(loop, device) / (n_images * len(words))


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
