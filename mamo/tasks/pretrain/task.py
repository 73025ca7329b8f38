"""MAMO pre-training: L = ITC + ITM + MLM + MIM + MRM (the paper's Eq. 6), which fine-tunes retrieval too.

Passes (`masking.mode: alternate`, the paper's figure):
    target        teacher, clean pair                      -> ITC candidates, MIM features, MRM tokens
                  teacher, clean image + masked caption    -> MLM soft targets (`losses.mlm_soft_target_alpha`)
    matching      online, clean pairs + hard negatives     -> ITC (unimodal), ITM (fused)
    masked image  online, visible patches + clean caption  -> MIM, MRM at masked patches
    masked text   online, clean image + masked caption     -> MLM, MRM at masked words
`joint` replaces the two masked passes by one with both masked. Clean image and clean caption are encoded once.
"""

import functools
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mamo.data.loader import SampleDataset
from mamo.data.pairs import PairDataset
from mamo.distributed import all_gather_no_grad, world_size
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.results import Metrics
from mamo.imports import import_class, import_value, is_import_path, validate_settings
from mamo.models.build import build_backbone, load_published
from mamo.models.frozen_encoder import FrozenEncoder
from mamo.models.vlm import Backbone, Mamo
from mamo.queue import FeatureQueue
from mamo.tasks.objective import Loss, ObjectiveTask, Targets, Views, compute_views, schedule_stages
from mamo.tasks.pretrain.batch import PairBatch, PairCollator, pair_collator
from mamo.tasks.pretrain.config import READ_MASKED_WORDS, PretrainConfig
from mamo.tasks.pretrain.evaluate import check_files, evaluate_pretrained
from mamo.tasks.pretrain.foils import ITM
from mamo.tasks.pretrain.items import evaluate_item_files, item_sections, read_item_files
from mamo.tasks.pretrain.losses import LOSSES, Itc, Itm, Mim, SigmoidItc, sphere_spread
from mamo.tasks.pretrain.mim_encoder import ASSET, make_mim_encoder
from mamo.tasks.pretrain.rankings import RANKINGS
from mamo.tasks.pretrain.samples import sample_pictures
from mamo.tasks.pretrain.views import (
    ENCODINGS,
    PLANS,
    SHORT_TEXT,
    FusedPass,
    encoding_stages,
    masked_stages,
    teacher_stages,
)
from mamo.tasks.sources import pair_dataset
from mamo.teacher import Teacher, momentum_at
from mamo.training.parts import stay_in_eval
from mamo.training.run_dir import STATEMENT_SCORES
from mamo.world.grammar import WORD_CLASSES
from mamo.world.probes import PROBES

logger = logging.getLogger(__name__)

LENGTH_MULTIPLE = 8
"""Tokens, as the fused attention of GPUs wants its keys."""


RECALLS = tuple(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10))
METRICS_OF = {
    "itc": ("/itc/", "/rerank/"),
    "itm": ("/itm/", "/itm+itc/", "/rerank/", "/grounding/", "/statements/"),
    "mlm": ("/masked_word/",),
}
"""Loss -> parts of the names of metrics that need its head."""


class PretrainTask(ObjectiveTask[PairBatch]):
    """MAMO: the losses of `losses` on image-text pairs, with a momentum teacher and a queue."""

    config_type = PretrainConfig
    config: PretrainConfig
    collator: PairCollator
    method = "MAMO"

    def __init__(
        self,
        config: PretrainConfig,
        tokenizer: PreTrainedTokenizerFast,
        stored: Path | None = None,
        network: Mamo | None = None,
    ) -> None:
        """Build the network, or take one of one's own.

        Args:
            config, tokenizer, stored: see `Task`.
            network: trained in place of the config's. Sizes are the network's.

        Raises:
            ValueError: the network does not fit the config's losses, images or tokenizer.
        """
        super().__init__(config, tokenizer, stored)
        check_mask_token(config, tokenizer)
        self.stored = stored
        self.was_trained_on_scenes = config.data.source == "scenes"
        self.masking, self.masking_mode = config.masking, config.masking.mode
        losses = self.make_losses()
        self.mim_encoder: FrozenEncoder | None = None
        if network is None:
            network = build_network(config, losses, len(tokenizer), tokenizer.pad_token_id)
        else:
            check_network(network, config, losses, len(tokenizer))
        self.network = network
        own = [stage for loss in losses for stage in loss.stages()]
        stages = [*encoding_stages(), *own, *masked_stages(self.masking_plan())]
        weights = {name: weight for name, weight in config.losses.weights if weight > 0}
        weights |= {loss.name: weight for loss, weight in self.extra_losses}
        self.use_losses(losses, weights, stages)
        self.target_names = tuple(dict.fromkeys(name for loss in losses for name in loss.targets))
        self.teacher_schedule = schedule_stages(teacher_stages(self.mim_encoder), self.target_names)
        self.queue = FeatureQueue(config.losses.queue_size, self.network.backbone.image_projection.out_features)
        if config.losses.queue_start == "random":
            self.queue.fill_at_random(config.seed)
        self.collator = pair_collator(config, tokenizer, self.network.backbone.image_encoder.grid)
        for loss in losses:
            loss.check(world_size())

    def fix_shapes(self) -> None:
        """Pad captions to a multiple of `LENGTH_MULTIPLE` tokens; see `Task.fix_shapes`."""
        self.collator.length_multiple = LENGTH_MULTIPLE

    @property
    def needs_foils(self) -> bool:
        """Whether ITM reads foils."""
        return self.config.losses.itm_negatives != "pool"

    def make_losses(self) -> list[Loss]:
        """Build the losses whose weight is not 0, in the order of their passes."""
        weights = dict(self.config.losses.weights)
        kinds: dict[type, Any] = {Itm: ITM[self.config.losses.itm_negatives]}
        if self.config.losses.itc_contrast == "sigmoid":
            kinds[Itc] = SigmoidItc
        own = [kinds.get(kind, kind)(self.config) for kind in LOSSES if weights[kind.name] > 0]
        for loss in own:
            if isinstance(loss, Mim) and self.config.losses.mim_target == "encoder":
                loss.width_of_encoder = self.open_mim_encoder
        return [*own, *(loss for loss, _ in self.extra_losses)]

    def open_mim_encoder(self, backbone: Backbone) -> int:
        """Build the frozen encoder whose features MIM predicts; return their number."""
        if self.mim_encoder is None:
            self.mim_encoder, text = make_mim_encoder(self.config, backbone.image_encoder, self.stored)
            self.assets = {**self.assets, ASSET: text}
        return self.mim_encoder.width

    @functools.cached_property
    def extra_losses(self) -> list[tuple[Loss, float]]:
        """The losses of `losses.extra`, each with its weight.

        An entry is an import path, or a section with the path as `class`, a `weight` (1 if left out) and the settings
        of the class.
        """
        found: list[tuple[Loss, float]] = []
        for number, entry in enumerate(self.config.losses.extra):
            key = f"losses.extra.{number}"
            values = {"class": entry} if isinstance(entry, str) else dict(entry)
            path, weight = values.pop("class", None), values.pop("weight", 1.0)
            if not isinstance(path, str) or not is_import_path(path):
                raise ValueError(f"{key}: give the class as module:Class (found {path!r})")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise ValueError(f"{key}.weight: give a number above 0 (found {weight!r})")
            kind: Any = import_class(path, Loss, key)
            found.append((kind(self.config, validate_settings(kind.settings_type, values, key)), float(weight)))
        names = [*dict(self.config.losses.weights), *(loss.name for loss, _ in found)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"losses.extra: two losses have the name {name!r}; give each class a name of its own")
        return found

    def masking_plan(self) -> tuple[FusedPass, ...]:
        """Return the plan of `masking.plan`, or of the mode."""
        path = self.config.masking.plan
        if path is None:
            is_short = self.config.masking.text_for_masked_image == "short"
            return SHORT_TEXT if is_short else PLANS[self.config.masking.mode]
        if not is_import_path(path):
            raise ValueError(f"masking.plan: give it as module:NAME (found {path!r})")
        plan = import_value(path, "masking.plan")
        if not isinstance(plan, tuple) or not plan or not all(isinstance(part, FusedPass) for part in plan):
            raise ValueError(f"masking.plan: {path} is no tuple of mamo.tasks.pretrain.views.FusedPass")
        if any(part.text == "short" for part in plan):
            raise ValueError(f"masking.plan: {path} has a pass with text: short; use masking.text_for_masked_image")
        return plan

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The momentum teacher; it starts as the student is when it is first used."""
        is_distilled = "word_probs" in self.target_names
        mlm = self.network.get_head("mlm") if is_distilled else None
        return Teacher(self.network.backbone, mlm, self.config.teacher.dropout)

    @property
    def averaged_backbone(self) -> nn.Module | None:
        """The teacher's, with `evaluation.network: teacher`."""
        return self.teacher.module if self.config.evaluation.network == "teacher" else None

    def modules(self) -> dict[str, nn.Module]:
        """Return student, teacher, queue and, with `losses.mim_target: encoder`, the frozen encoder."""
        frozen = {} if self.mim_encoder is None else {"mim_encoder": self.mim_encoder}
        return {"student": self.network, "teacher": self.teacher, "queue": self.queue, **frozen}

    def share_frozen(self, parts: Collection[str]) -> None:
        """See `Task`: the teacher's part becomes the student's, and what both encode with it the teacher encodes.

        A part that the student never moves is its own moving average.
        """
        mine, its = self.parts(), {"image": "image_encoder", "text": "text_encoder", "fusion": "fusion"}
        for name in sorted(its.keys() & {*parts}):
            part = getattr(self.teacher.backbone, its[name])
            part.load_state_dict(mine[name].state_dict())
            stay_in_eval(part)
        computed = {view for _, wanted in self.teacher_schedule for view in wanted}
        self.shared = tuple(view for name in sorted(parts) for view in ENCODINGS.get(name, ()) if view in computed)
        self.schedule = self.schedule_of(self.active)

    def train_dataset(self) -> SampleDataset:
        """Open the training pairs; samples are compared by all captions of their records from now on.

        Raises ValueError for files without a foil where ITM needs them.
        """
        pairs = pair_dataset(self.config, self.needs_foils)
        if self.needs_foils and isinstance(pairs, PairDataset) and not pairs.has_foils():
            raise ValueError(
                "data.train_file: no pair has foils; add a field 'foils' with texts that are false of the image, or "
                "use losses.itm_negatives: pool"
            )
        self.collator.n_caption_ids = pairs.n_caption_ids
        self.queue.widen(pairs.n_caption_ids)
        return pairs

    @torch.no_grad()
    def compute_targets(self, batch: PairBatch, micro_batch_size: int, step: int) -> tuple[Targets, dict[str, Tensor]]:
        """Run the teacher, a micro-batch at a time; the metrics are the spread of its features (0 is collapsed)."""
        parts = [
            compute_views(self.teacher, batch.part(i, i + micro_batch_size), self.teacher_schedule)
            for i in range(0, len(batch), micro_batch_size)
        ]
        names = (*self.target_names, *self.shared)
        views = {name: torch.cat([part[name] for part in parts]) for name in names}
        return self.prepare_losses(views, batch, step), teacher_spread(views)

    def on_optimizer_step(self, batch: PairBatch, targets: Targets, step: int) -> None:
        """Move the teacher, then the state of the losses (queue, temperature)."""
        momentum = momentum_at(self.config.teacher, step, self.config.training.total_steps)
        self.teacher.update(self.network.backbone, momentum, self.network.get_head("mlm"))
        super().on_optimizer_step(batch, targets, step)

    def check_evaluation_files(self) -> None:
        """Read the evaluation files, but no image."""
        check_files(self.config)
        read_item_files(self.config)

    def check_held_out(self, train_files: list[str]) -> None:
        """Note whether the network was trained on scenes, whose foils follow the rules of the probes."""
        self.was_trained_on_scenes = not train_files

    def evaluate(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Evaluate retrieval, probes, masked words, grounding and statements without fine-tuning.

        The fact `foils_of_same_rule` is 1 where the foils of the probes follow the rules of those of the training.
        """
        metrics = evaluate_pretrained(predictor, self.config, folder / STATEMENT_SCORES, folder / RANKINGS)
        if self.needs_foils and self.was_trained_on_scenes and self.config.data.source == "scenes":
            logger.warning(
                "probe/*: their foils follow the rules of the training's (losses.itm_negatives: %s); the numbers do "
                "not show what the network makes of other foils",
                self.config.losses.itm_negatives,
            )
            metrics.facts["foils_of_same_rule"] = 1
        return metrics

    def evaluate_items(self, predictor: Predictor, folder: Path) -> Metrics:
        """Score the fine-grained sets of the config."""
        return evaluate_item_files(predictor, self.config, folder)

    def report(self, predictor: Predictor, rows: int, folder: Path) -> list[tuple[str, str]]:
        """Show retrieval, heat maps, filled words and rebuilt patches of some samples."""
        return [*sample_pictures(predictor, self.config, rows), *item_sections(self.config, folder)]

    scenes_protocol = "zeroshot"
    metric_patterns: ClassVar[tuple[str, ...]] = (
        *(f"{kind}/{name}" for kind in ("itc", "rerank") for name in ("rsum", *RECALLS)),
        *(f"probe/{name}/{score}" for name in PROBES for score in ("itc", "itm")),
        *(f"masked_word/{name}" for name in WORD_CLASSES),
        *("eccv/*", "cxc/*", "items/*"),
        *("grounding/pointing", "grounding/proposal", "grounding/random_proposal", "grounding/upper_bound"),
        *("statements/accuracy", "statements/majority", "statements/interval_*"),
    )

    def check_metric(self, name: str) -> None:
        """See `Task`; refuse a metric of a loss that is switched off, too."""
        super().check_metric(name)
        for loss, marks in METRICS_OF.items():
            if any(mark in f"/{name}/" for mark in marks) and not getattr(self.config.losses.weights, loss):
                raise ValueError(f"training.keep_best: {name} is not measured with losses.weights.{loss}: 0")

    def describe_scorer(self) -> str:
        """Name the ranking."""
        evaluation = self.config.evaluation
        rule = "ITM" if evaluation.itm_score == "difference" else "ITM's match logit"
        gallery = "" if evaluation.repeated_captions == "merged" else "; each caption is an item"
        return f"ITC shortlist of {evaluation.rerank_k}, then {rule}{gallery}"


def build_network(config: PretrainConfig, losses: Sequence[Loss], vocabulary_size: int, pad_token_id: int) -> Mamo:
    """Build the backbone and the heads of the losses, initialised from `seed` and, where named, published weights.

    Heads are drawn in the order of the config's weights, whatever the order of the passes.
    """
    backbone = build_backbone(config, vocabulary_size, pad_token_id)
    names = [name for name, _ in config.losses.weights]
    heads: dict[str, nn.Module | nn.Parameter] = {}
    for loss in sorted(losses, key=lambda loss: names.index(loss.name) if loss.name in names else len(names)):
        heads |= loss.heads(backbone)
    network = Mamo(backbone, heads)
    load_published(config, network)
    return network


def check_mask_token(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ValueError where a loss reads masked words and the tokenizer has no [MASK]."""
    names = [name for name in READ_MASKED_WORDS if getattr(config.losses.weights, name)]
    if names and tokenizer.mask_token_id is None:
        keys = " and ".join(f"losses.weights.{name}" for name in names)
        raise ValueError(
            f"data.tokenizer: {config.data.tokenizer} has no mask token, with which {' and '.join(names)} hide words; "
            f"set {keys} to 0"
        )


def check_network(network: Mamo, config: PretrainConfig, losses: Sequence[Loss], vocabulary_size: int) -> None:
    """Raise ValueError, naming every disagreement, where a network does not fit the losses, images or tokenizer."""
    backbone = network.backbone
    encoder = backbone.image_encoder
    size = tuple(n * side for n, side in zip(encoder.grid, encoder.patch_size_px))
    problems = [
        f"losses.weights.{loss.name}: the network has no head {name!r}"
        for loss in losses
        for name in loss.heads(backbone)
        if network.get_head(name) is None
    ]
    if size != config.data.image_size:
        problems.append(f"data.image_size_px: {config.data.image_size} in the config, {size} in the network")
    n_words = backbone.text_encoder.word_embeddings.num_embeddings
    if n_words < vocabulary_size:
        problems.append(f"data.tokenizer: {vocabulary_size} tokens, {n_words} in the network")
    if problems:
        raise ValueError("the network does not fit the config:\n  " + "\n  ".join(problems))


def teacher_spread(views: Views) -> dict[str, Tensor]:
    """Measure the spread of the teacher's features and fused tokens over the global batch, by view."""
    metrics = {}
    for name, view in (("image", "image_feature"), ("text", "text_feature")):
        if view in views:
            metrics[f"teacher_spread/{name}"] = sphere_spread(all_gather_no_grad(views[view]))
    for name, view in (("fused_text", "fused_words"), ("fused_image", "fused_patches")):
        if view in views:
            first = functional.normalize(views[view][:, 0].float(), dim=-1)
            metrics[f"teacher_spread/{name}"] = sphere_spread(all_gather_no_grad(first))
    return metrics
