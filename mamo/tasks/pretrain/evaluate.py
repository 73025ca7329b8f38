"""Zero-shot evaluation of a pre-trained network: retrieval, probes, masked words, statements; all numbers in percent.

A head that the network does not have leaves its metrics out. Several processes share the work, image by image where
a gallery is encoded and re-ranked, and all return the same numbers, which are those of one process.

Legend: I images, T texts, N right (image, text) pairs.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mamo.config.schema import EvaluationConfig
from mamo.data.cleaning import Clean, cleaner
from mamo.data.identity import caption_warnings, identity_warnings
from mamo.data.images import BadSampleError
from mamo.data.judge import check_headers
from mamo.data.pair_record import PairRecord
from mamo.data.pairs import load_image
from mamo.data.pairs_reader import read_pairs
from mamo.data.processor import cleaning_of
from mamo.data.shard_index import ShardMember
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.corrected import load_labels
from mamo.evaluation.metrics.grounding import grounding_metrics, to_image_size
from mamo.evaluation.metrics.retrieval import (
    chance_recalls,
    rank_and_count_ties,
    recalls,
    rerank,
    union_of_pairs,
)
from mamo.evaluation.metrics.statements import read_statements, statement_metrics, write_scores
from mamo.evaluation.patch_probes import patch_metrics
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.probes import masked_word_accuracy, probe_accuracy
from mamo.evaluation.results import Metrics, facts_of
from mamo.evaluation.scorer import (
    EncodedImages,
    EncodedTexts,
    ImageTokens,
    ReencodedImages,
    Scorer,
    eval_mode,
    heatmaps,
)
from mamo.explain import ItmScore
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.pretrain.rankings import Keep, Rankings
from mamo.tasks.sources import bad_sample_policy, require_some
from mamo.world.captions import identifying_caption
from mamo.world.masked_words import MaskedWord, cleaned_items, masked_word_items
from mamo.world.probes import PROBES, ProbeItem, probe_items
from mamo.world.referring import Expression, expressions
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, Difficulty, Scene, SceneWorld, near_duplicate

logger = logging.getLogger(__name__)


def evaluate_pretrained(
    predictor: Predictor,
    config: PretrainConfig,
    scores_file: Path | None = None,
    rankings_file: Path | None = None,
) -> Metrics:
    """Evaluate on the test scenes, or on `data.eval_file` and `data.statements_file`.

    Args:
        predictor: its network is evaluated in eval mode; the modes of its modules are restored. The precision is that
            of the weights.
        config: `data` and `evaluation` are read.
        scores_file: file for the score of each statement (`statements.write_scores`); None writes none.
        rankings_file: file for the rankings of `evaluation.rankings_depth`; None writes none.

    Returns:
        Percentages: `itc/i2t_r1` .. `itc/t2i_r10` and `itc/rsum`, the same under `rerank/`, `probe/NAME/itc|itm`,
        `patches/` of `patch_metrics`, `grounding/proposal|pointing|random_proposal|upper_bound`, `masked_word/CLASS`,
        `statements/accuracy|majority|interval_low|interval_high`, `eccv/` and `cxc/` of
        `corrected_metrics`. The facts have the sizes of the galleries, k, chance, ties and skipped images.

    Raises:
        ValueError: an evaluation file cannot be read.
        BadSampleError: an image beyond `data.bad_samples`.
    """
    with eval_mode(predictor.network):
        scorer = Scorer(predictor, config.evaluation.batch_size, config.evaluation.itm_score)
        if config.data.source == "scenes":
            return _on_scenes(scorer, config)
        return _on_pairs(scorer, config, scores_file, rankings_file)


@functools.cache
def _scene_items(difficulty: Difficulty, n_items: int) -> tuple[dict[str, list[ProbeItem]], list[MaskedWord]]:
    """Return probes and masked words of the test scenes; kept, since a run evaluates the same ones again and again."""
    world = SceneWorld(difficulty, WORLD_SEED)
    return {name: probe_items(world, name, n_items) for name in PROBES}, masked_word_items(world, n_items)


def _on_scenes(scorer: Scorer, config: PretrainConfig) -> Metrics:
    network = scorer.network
    has_itc, has_itm = network.get_head("temperature") is not None, network.get_head("itm") is not None
    world = SceneWorld(config.data.difficulty, WORLD_SEED)
    probes, masked = _scene_items(config.data.difficulty, config.evaluation.probe_items)
    masked = cleaned_items(masked, cleaning_of(config))
    gallery = _gallery(world, config)
    probed = {item.scene_index for items in probes.values() for item in items}
    referring = list(expressions(world, config.evaluation.probe_items, config.data.image_size)) if has_itm else []
    probed |= {item.scene_index for item in masked} | {item.scene_index for item in referring}
    rest = probed - {scene.index for scene in gallery}
    scenes = [*gallery, *(world.scene("test", index) for index in sorted(rest))]
    images = scorer.encode_images(_rendered(scenes, config))
    image_row: dict[int, int] = {}
    for row, scene in enumerate(scenes):
        image_row.setdefault(scene.index, row)  # a near duplicate comes later than its original
    metrics = Metrics({})
    if has_itc:
        captions = [[identifying_caption(scene).text] for scene in gallery]
        metrics = _retrieval(scorer, images, captions, config.evaluation.rerank_k)
    parts: list[tuple[str, Callable[[], dict[str, float]]]] = []
    if has_itc or has_itm:
        metrics.facts |= {"probe_items": config.evaluation.probe_items, "chance/probe": 50.0}
        for name, items in probes.items():
            parts.append((f"probe/{name}", functools.partial(probe_accuracy, scorer, images, items, image_row)))
    if has_itm:
        parts.append(("grounding", functools.partial(_grounding, scorer, images, referring, image_row, config)))
    if network.get_head("mlm") is not None:
        parts.append(("masked_word", functools.partial(masked_word_accuracy, scorer, images, masked, image_row)))
    if config.evaluation.patch_scenes:
        metrics.facts |= {"patch_scenes": config.evaluation.patch_scenes}
        sizes = (config.data.difficulty, config.evaluation.patch_scenes)
        parts.append(("patches", functools.partial(patch_metrics, network.backbone, scorer.processor, *sizes)))
    for (prefix, _), found in zip(parts, map_over_ranks(lambda part: part[1](), parts), strict=True):
        metrics |= {f"{prefix}/{name}": value for name, value in found.items()}
    return metrics


def _grounding(
    scorer: Scorer,
    images: EncodedImages,
    items: Sequence[Expression],
    image_row: Mapping[int, int],
    config: PretrainConfig,
) -> dict[str, float]:
    """Ground expressions by the heat of `evaluation.grounding_heat`."""
    texts = scorer.encode_texts(*scorer.tokenize([item.text for item in items]))
    if config.evaluation.grounding_heat == "fusion":
        rows = torch.tensor([image_row[item.scene_index] for item in items])
        heats = scorer.gradcam(images, texts, rows, torch.arange(len(items)))
    else:
        heats = torch.cat(list(_pixel_heats(scorer, texts, items, config)))
    whole = [to_image_size(heat, config.data.image_size) for heat in heats]
    return grounding_metrics(whole, [item.proposals for item in items], [item.box for item in items])


def _pixel_heats(
    scorer: Scorer, texts: EncodedTexts, items: Sequence[Expression], config: PretrainConfig
) -> Iterator[Tensor]:
    """Return heat that needs the pictures themselves, float32 [N, h, w] a batch of expressions; each is drawn again."""
    world, step = SceneWorld(config.data.difficulty, WORLD_SEED), config.evaluation.batch_size
    for start in range(0, len(items), step):
        part = range(start, min(start + step, len(items)))
        scenes = sorted({items[k].scene_index for k in part})
        (pictures,) = _rendered([world.scene("test", index) for index in scenes], config)
        rows = torch.tensor([scenes.index(items[k].scene_index) for k in part])
        yield heatmaps(scorer, pictures, texts, rows, torch.tensor(part), config.evaluation.grounding_heat)


def _gallery(world: SceneWorld, config: PretrainConfig) -> list[Scene]:
    """Return the test scenes to retrieve: the first N, or the first N / 2 and then a near duplicate of each."""
    n = config.evaluation.retrieval_items
    if not config.evaluation.near_duplicates:
        return [world.scene("test", index) for index in range(n)]
    originals = [world.scene("test", index) for index in range((n + 1) // 2)]
    return [*originals, *(near_duplicate(scene) for scene in originals[: n // 2])]


def _rendered(scenes: Sequence[Scene], config: PretrainConfig) -> Iterator[Tensor]:
    """Return scenes as batches uint8 [B, 3, H, W]."""
    step = config.evaluation.batch_size
    for start in range(0, len(scenes), step):
        pictures = [render(scene, config.data.image_size) for scene in scenes[start : start + step]]
        yield torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _retrieval(
    scorer: Scorer,
    images: ImageTokens,
    captions: Sequence[Iterable[str]],
    rerank_k: int,
    first: int = 0,
    is_merged: bool = True,
    keep: Keep | None = None,
) -> Metrics:
    """Return recalls of the ITC ranking and of its `rerank_k` best re-ranked by ITM.

    `captions[i]` are those of image row `first` + i; further images are not in the gallery. With `is_merged` the text
    gallery holds each distinct caption once: all images that have it are right for it, so a shared caption is never a
    false negative. Without, each caption is an item, right for its own image only, as in published numbers. `keep` is
    called with (image features, text features, shortlisted texts and images, their ITM scores or None).
    """
    every = [(row, text) for row, several in enumerate(captions) for text in several]
    gallery = list(dict.fromkeys(text for _, text in every)) if is_merged else [text for _, text in every]
    text_row = {text: row for row, text in enumerate(gallery)}
    ids, lengths = scorer.tokenize(gallery)
    spelled = torch.arange(len(gallery))  # the encoded text of each item
    if not is_merged:  # equal texts get equal scores, to the last bit: ties count against the query
        ids, spelled = torch.unique(ids, dim=0, return_inverse=True)
        lengths = torch.zeros(len(ids), dtype=lengths.dtype).scatter(0, spelled, lengths)
    texts = scorer.encode_texts(ids, lengths)
    text_feature = texts.feature[spelled.to(scorer.device)]
    right = torch.tensor([(row, text_row[text] if is_merged else item) for item, (row, text) in enumerate(every)])
    n_images, n_texts = len(captions), len(gallery)
    image_feature, positive = images.feature[first : first + n_images], right.to(scorer.device)

    def rank(direction: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
        ranks, shortlist, n_ties = rank_and_count_ties(*direction, rerank_k)
        return ranks.cpu(), shortlist.cpu(), n_ties

    directions = [(image_feature, text_feature, positive), (text_feature, image_feature, positive.flip(1))]
    (to_text_rank, to_text, ties_i2t), (to_image_rank, to_image, ties_t2i) = map_over_ranks(rank, directions)
    facts: dict[str, float] = {"gallery_images": n_images, "gallery_texts": n_texts}
    facts |= chance_recalls(right, n_images, n_texts, "chance/i2t")
    facts |= chance_recalls(right.flip(1), n_texts, n_images, "chance/t2i")
    facts |= {"ties/itc/i2t": ties_i2t, "ties/itc/t2i": ties_t2i}
    metrics = recalls(to_text_rank, to_image_rank, "itc")
    if scorer.network.get_head("itm") is None:
        if keep is not None:
            keep(image_feature.cpu(), text_feature.cpu(), to_text, to_image, None, None)
        return Metrics(metrics, facts)
    pairs, at_text, at_image = union_of_pairs(to_text, to_image)
    scored, of_pair = torch.unique(torch.stack([pairs[:, 0], spelled[pairs[:, 1]]], dim=1), dim=0, return_inverse=True)
    score = _match(scorer, images, texts, first + scored[:, 0], scored[:, 1], scorer.itm_score)[of_pair]
    if keep is not None:
        keep(image_feature.cpu(), text_feature.cpu(), to_text, to_image, score[at_text], score[at_image])
    to_text_rank, ties_i2t = rerank(score[at_text], to_text, right, n_texts, to_text_rank)
    to_image_rank, ties_t2i = rerank(score[at_image], to_image, right.flip(1), n_images, to_image_rank)
    facts |= {"rerank_k": rerank_k, "ties/rerank/i2t": ties_i2t, "ties/rerank/t2i": ties_t2i}
    return Metrics(metrics | recalls(to_text_rank, to_image_rank, "rerank"), facts)


def _match(
    scorer: Scorer,
    images: ImageTokens,
    texts: EncodedTexts,
    image_indices: Tensor,
    text_rows: Tensor,
    rule: ItmScore = "difference",
) -> Tensor:
    """Map `scorer.itm_scores` over the ranks, one group of pairs with common images at a time."""
    groups = [pairs for pairs, _, _ in scorer.by_image(image_indices, texts.lengths[text_rows])]
    found = map_over_ranks(
        lambda pairs: scorer.itm_scores(images, texts, image_indices[pairs], text_rows[pairs], rule), groups
    )
    score = torch.empty(len(image_indices))
    for pairs, values in zip(groups, found, strict=True):
        score[pairs] = values
    return score


def _on_pairs(scorer: Scorer, config: PretrainConfig, scores_file: Path | None, rankings_file: Path | None) -> Metrics:
    """Evaluate retrieval on all pairs of the evaluation file, each image (by its id) once, and the statements."""
    data, network = config.data, scorer.network
    metrics = Metrics({})
    if config.evaluation.corrected:
        load_labels()  # a missing package is found now
    if data.eval_path is not None and network.get_head("temperature") is not None:
        records = [*read_pairs(Path(data.eval_path), data.eval_split, data.eval_keys, data.columns)]
        for line in (*identity_warnings([records]), *caption_warnings(records)):
            logger.warning("%s: %s", data.eval_path, line)
        captions = _captions(records, scorer.processor.clean, config.evaluation.repeated_captions == "merged")
        files = {record.image_id: record.image for record in reversed(records) if captions[record.image_id]}
        images, shown = _load_and_encode(scorer, files, config)
        texts = [captions[image_id] for image_id in shown]
        rankings = Rankings(records, shown, config.evaluation.rankings_depth)
        keep = rankings.keep if rankings.depth else None
        metrics = _retrieval_in_folds(scorer, images, texts, config.evaluation, len(files) - len(shown), keep)
        if rankings.depth and rankings_file is not None:
            rankings.write(rankings_file)
        if config.evaluation.corrected:
            metrics |= rankings.corrected()
        metrics.facts["skipped"] = len(files) - len(shown)
    if data.statements_file is not None and network.get_head("itm") is not None:
        judged = _on_statements(scorer, Path(data.statements_file), config, scores_file)
        metrics |= judged
        judged.facts["skipped"] += metrics.facts.get("skipped", 0)
        metrics.facts |= judged.facts
    return metrics


def _captions(records: Sequence[PairRecord], clean: Clean, is_merged: bool) -> dict[str, list[str]]:
    """Return the cleaned captions of each image.

    Merged, an image has each caption once, and captions that differ in capitals are one. Otherwise all are kept, even
    those that cleaning leaves nothing of: as published, the gallery has every caption of the file.
    """
    spelling: dict[str, str] = {}  # how a caption, whatever its capitals, is written first
    captions: dict[str, list[str]] = {}
    for record in records:
        own = captions.setdefault(record.image_id, [])
        for text in map(clean, record.captions):
            if not is_merged:
                own.append(text)
            elif text and (same := spelling.setdefault(text.lower(), text)) not in own:
                own.append(same)
    return captions


def check_files(config: PretrainConfig) -> None:
    """Judge the files of `evaluate_pretrained` and the headers of their images, as it will.

    Raises:
        ValueError: a file cannot be evaluated on.
        BadSampleError: an image cannot be opened, and `data.bad_samples` does not skip it.
    """
    data, n_folds = config.data, config.evaluation.retrieval_folds
    if data.eval_path is not None:
        records = read_pairs(Path(data.eval_path), data.eval_split, data.eval_keys, data.columns)
        is_merged = config.evaluation.repeated_captions == "merged"
        captions = _captions(records, cleaner(cleaning_of(config)), is_merged)
        shown = {record.image_id: record for record in reversed(records) if captions[record.image_id]}
        if len(shown) % n_folds or not shown:
            raise ValueError(f"evaluation.retrieval_folds: {n_folds} does not divide {len(shown)} images")
        check_headers((("", record.image) for record in shown.values()), bad_sample_policy(data))
    if data.statements_file is not None:
        statements = read_statements(Path(data.statements_file))
        check_headers((("", statement.image) for statement in statements), bad_sample_policy(data))


def _retrieval_in_folds(
    scorer: Scorer,
    images: ImageTokens,
    captions: Sequence[Iterable[str]],
    evaluation: EvaluationConfig,
    n_missing: int = 0,
    keep: Keep | None = None,
) -> Metrics:
    """Average `_retrieval` over `retrieval_folds` consecutive galleries of equal size.

    Where images are missing, which were skipped, the sizes differ by one.
    """
    n_folds = evaluation.retrieval_folds
    is_merged = evaluation.repeated_captions == "merged"
    retrieve = _retrieval if is_merged else functools.partial(_retrieval, is_merged=False, keep=keep)
    if (n_missing + len(captions)) % n_folds or len(captions) < n_folds:
        raise ValueError(f"evaluation.retrieval_folds: {n_folds} does not divide {len(captions)} images")
    bounds = [len(captions) * fold // n_folds for fold in range(n_folds + 1)]
    found = [
        retrieve(scorer, images, captions[first:end], evaluation.rerank_k, first)
        for first, end in itertools.pairwise(bounds)
    ]
    facts: dict[str, float] = {"folds": n_folds}
    for name in facts_of(found[0]):
        values = [facts_of(fold)[name] for fold in found]
        facts[name] = sum(values) if name.startswith("ties/") else sum(values) / n_folds
    return Metrics({name: sum(fold[name] for fold in found) / n_folds for name in found[0]}, facts)


def _on_statements(scorer: Scorer, path: Path, config: PretrainConfig, scores_file: Path | None) -> Metrics:
    every = read_statements(path)
    images, shown = _load_and_encode(scorer, {record.image: record.image for record in every}, config)
    image_row = {image: row for row, image in enumerate(shown)}
    records = [record for record in every if record.image in image_row]
    text_row = {text: row for row, text in enumerate(dict.fromkeys(record.sentence for record in records))}
    texts = scorer.encode_texts(*scorer.tokenize([scorer.processor.clean(text) for text in text_row]))
    image_indices = torch.tensor([image_row[record.image] for record in records])
    text_rows = torch.tensor([text_row[record.sentence] for record in records])
    score = _match(scorer, images, texts, image_indices, text_rows).double().numpy()
    if scores_file is not None:
        map_over_ranks(lambda file: write_scores(file, score, records), [scores_file])  # on rank 0
    metrics = {f"statements/{name}": value for name, value in statement_metrics(score, records).items()}
    return Metrics(metrics, {"statements": len(records), "skipped": len(every) - len(records)})


def _load_and_encode(
    scorer: Scorer, files: Mapping[str, str | ShardMember], config: PretrainConfig
) -> tuple[ReencodedImages, list[str]]:
    """Encode images by name; return the names of those that could be loaded, in the order of the rows.

    Raises BadSampleError as `data.bad_samples` says, where each process counts those of its own share of the images.
    """
    bad_samples = bad_sample_policy(config.data)

    def load(file: str | ShardMember) -> Tensor:
        return scorer.processor.resize(load_image(file))

    names, size = list(files), config.evaluation.batch_size

    def features(start: int) -> tuple[list[str], Tensor | None]:
        loaded: dict[str, Tensor] = {}
        for name in names[start : start + size]:
            try:
                loaded[name] = load(files[name])
            except BadSampleError as error:
                bad_samples.record(0, [str(error)])
                continue
            bad_samples.record(1, [])
        return list(loaded), encode(loaded.values()).feature.cpu() if loaded else None

    def encode(images: Iterable[Tensor]) -> EncodedImages:
        return scorer.encode_images([torch.stack(list(images))])

    found = map_over_ranks(features, range(0, len(names), size))
    shown = [name for loaded, _ in found for name in loaded]
    require_some(shown)
    feature = torch.cat([part for _, part in found if part is not None]).to(scorer.device)
    return ReencodedImages(feature, [files[name] for name in shown], lambda again: encode(map(load, again))), shown
