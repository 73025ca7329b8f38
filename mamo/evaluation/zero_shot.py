"""Zero-shot evaluation of a pre-trained network: retrieval, probes, masked words, statements; all numbers in percent.

A head that the network does not have leaves its metrics out.

Legend: I images, T texts, N right (image, text) pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamo.config import Config
from mamo.data.grammar import identifying_caption
from mamo.data.images import BadSample, BadSamplePolicy
from mamo.data.loader import WORLD_SEED
from mamo.data.pairs import load_image
from mamo.data.probes import PROBES, probe_items
from mamo.data.records import PairRecord, clean_caption, read_pairs
from mamo.data.rendering import render
from mamo.data.scenes import SceneWorld
from mamo.data.transforms import eval_transform
from mamo.evaluation.probes import masked_word_accuracy, masked_words, probe_accuracy
from mamo.evaluation.retrieval import rank_by_similarity, rank_shortlist, recalls, union_of_pairs
from mamo.evaluation.scoring import EncodedImages, EncodedTexts, Scorer
from mamo.evaluation.statements import read_statements, statement_metrics
from mamo.models.vlm import Mamo


def zero_shot(
    network: Mamo, config: Config, tokenizer: Any, normalise: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, float]:
    """Evaluate on the test scenes, or on `data.eval_file` and `data.statements_file`.

    Args:
        network: evaluated in eval mode; its modules' modes are restored.
        config: `data` and `evaluation` are read.
        tokenizer: a fast Hugging Face tokenizer.
        normalise: uint8 [B, 3, H, W] on `device` -> float [B, 3, H, W].
        device: where the network is. The caller sets the precision with `torch.autocast`.

    Returns:
        Percentages: `itc/i2t_r1` .. `itc/t2i_r10` and `itc/rsum`, the same under `rerank/`, `probe/NAME/itc|itm`,
        `masked_word/CLASS`, `statements/accuracy|majority|interval_low|interval_high`.

    Raises:
        ValueError: for an evaluation file that cannot be read, BadSample for an image beyond `data.bad_samples`.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    settings = (config.data.text_max_tokens, config.evaluation.batch_size)
    try:
        with torch.inference_mode():
            scorer = Scorer(network, tokenizer, normalise, device, *settings)
            return _on_scenes(scorer, config) if config.data.source == "scenes" else _on_pairs(scorer, config)
    finally:
        for module, mode in modes:
            module.training = mode


def _on_scenes(scorer: Scorer, config: Config) -> dict[str, float]:
    network, n_items = scorer.network, config.evaluation.probe_items
    has_itc, has_itm, has_mlm = network.temperature is not None, network.itm is not None, network.mlm is not None
    world = SceneWorld(config.data.difficulty, WORLD_SEED)
    gallery = range(config.evaluation.retrieval_items)
    captions = [identifying_caption(world.scene("test", index)).text for index in gallery]
    probes = {name: probe_items(world, name, n_items) for name in PROBES} if has_itc or has_itm else {}
    masked = masked_words(world, n_items) if has_mlm else []
    shown = {item.scene_index for items in (*probes.values(), masked) for item in items} | set(gallery)
    scenes = sorted(shown)
    images = scorer.encode_images(_rendered(world, scenes, config))
    image_row = {scene: row for row, scene in enumerate(scenes)}
    metrics: dict[str, float] = {}
    if has_itc or has_itm:
        sides = [text for items in probes.values() for item in items for text in (item.caption, item.foil)]
        distinct = list(dict.fromkeys([*captions, *sides]))
        text_row = {text: row for row, text in enumerate(distinct)}
        texts = scorer.encode_texts(*scorer.tokenize(distinct))
        # The gallery's scenes and captions are the first rows of both.
        positive = torch.tensor([(image_row[index], text_row[text]) for index, text in zip(gallery, captions)])
        sizes = len(gallery), len(set(captions))
        metrics |= retrieval_metrics(scorer, images, texts, positive, sizes, config.evaluation.rerank_k)
        for name, items in probes.items():
            accuracy = probe_accuracy(scorer, images, texts, items, image_row, text_row)
            metrics |= {f"probe/{name}/{by}": value for by, value in accuracy.items()}
    if masked:
        accuracy = masked_word_accuracy(scorer, images, masked, image_row)
        metrics |= {f"masked_word/{name}": value for name, value in accuracy.items()}
    return metrics


def _rendered(world: SceneWorld, scenes: Sequence[int], config: Config) -> Iterator[Tensor]:
    """Test scenes as batches uint8 [B, 3, H, W]."""
    step = config.evaluation.batch_size
    for start in range(0, len(scenes), step):
        pictures = [render(world.scene("test", k), config.data.image_size) for k in scenes[start : start + step]]
        yield torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def retrieval_metrics(
    scorer: Scorer, images: EncodedImages, texts: EncodedTexts, positive: Tensor, sizes: tuple[int, int], rerank_k: int
) -> dict[str, float]:
    """Recalls of the ITC ranking and of its `rerank_k` best re-ranked by ITM, among the first `sizes` images and texts.

    Args:
        positive: int64 [N, 2], the right (image row, text row) pairs.
        sizes: numbers of images and of texts in the galleries.
    """
    network, (n_images, n_texts) = scorer.network, sizes
    if network.temperature is None:
        return {}
    right = positive.to(scorer.device)
    image, text = images.feature[:n_images], texts.feature[:n_texts]
    with torch.autocast(scorer.device.type, enabled=False):
        to_text_rank, to_text = rank_by_similarity(image, text, right, rerank_k)
        to_image_rank, to_image = rank_by_similarity(text, image, right.flip(1), rerank_k)
    metrics = recalls(to_text_rank, to_image_rank, "itc")
    if network.itm is None:
        return metrics
    pairs, at_text, at_image = union_of_pairs(to_text.cpu(), to_image.cpu())
    score = scorer.match(images, texts, pairs[:, 0], pairs[:, 1])
    to_text_rank = rank_shortlist(score[at_text], to_text.cpu(), positive, n_texts, to_text_rank.cpu())
    to_image_rank = rank_shortlist(score[at_image], to_image.cpu(), positive.flip(1), n_images, to_image_rank.cpu())
    return metrics | recalls(to_text_rank, to_image_rank, "rerank")


def _on_pairs(scorer: Scorer, config: Config) -> dict[str, float]:
    """Retrieval on all pairs of the evaluation file. Galleries hold each image (by id) and each caption (by text) once.

    All images that the file pairs with a caption are right for it, and all its captions for an image, so a caption that
    several images share is never a false negative.
    """
    data, network = config.data, scorer.network
    metrics: dict[str, float] = {}
    if data.eval_file is not None and network.temperature is not None:
        records = read_pairs(Path(data.eval_file), data.eval_split)
        captions: dict[str, dict[str, None]] = {}  # of each image, without repetition
        for record in records:
            found = [clean_caption(text).lower() for text in record.captions]
            captions.setdefault(record.image_id, {}).update(dict.fromkeys(text for text in found if text))
        paths = {record.image_id: record.image for record in reversed(records) if captions[record.image_id]}
        shown: list[str] = []
        images = scorer.encode_images(_loaded(paths, shown, config))
        distinct = list(dict.fromkeys(text for image_id in shown for text in captions[image_id]))
        text_row = {text: row for row, text in enumerate(distinct)}
        texts = scorer.encode_texts(*scorer.tokenize(distinct))
        right = [(row, text_row[text]) for row, image_id in enumerate(shown) for text in captions[image_id]]
        sizes = len(shown), len(distinct)
        metrics |= retrieval_metrics(scorer, images, texts, torch.tensor(right), sizes, config.evaluation.rerank_k)
    if data.statements_file is not None and network.itm is not None:
        metrics |= _on_statements(scorer, Path(data.statements_file), config)
    return metrics


def _on_statements(scorer: Scorer, path: Path, config: Config) -> dict[str, float]:
    records = read_statements(path)
    shown: list[str] = []
    images = scorer.encode_images(_loaded({record.image: record.image for record in records}, shown, config))
    image_row = {image: row for row, image in enumerate(shown)}
    records = [record for record in records if record.image in image_row]
    distinct = list(dict.fromkeys(record.sentence for record in records))
    text_row = {text: row for row, text in enumerate(distinct)}
    texts = scorer.encode_texts(*scorer.tokenize([clean_caption(text) for text in distinct]))
    image_rows = torch.tensor([image_row[record.image] for record in records])
    text_rows = torch.tensor([text_row[record.sentence] for record in records])
    score = scorer.match(images, texts, image_rows, text_rows)
    return {f"statements/{name}": value for name, value in statement_metrics(score.double().numpy(), records).items()}


def _loaded(paths: dict[str, Any], shown: list[str], config: Config) -> Iterator[Tensor]:
    """Images by name as batches uint8 [B, 3, H, W]; the names that could be loaded are appended to `shown`.

    Raises BadSample as `data.bad_samples` says.
    """
    policy = BadSamplePolicy(config.data.bad_samples.policy, config.data.bad_samples.budget)
    batch: list[Tensor] = []
    for name, path in paths.items():
        try:
            batch.append(eval_transform(load_image(path), config.data.image_size))
        except BadSample as error:
            policy.record(1, [str(error)])
            continue
        policy.record(1, [])
        shown.append(name)
        if len(batch) == config.evaluation.batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)
