"""Fine-tuning on sentences about one image or a pair: is the sentence true?

Legend: B statements, I images of each.
"""

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mamo.config import Config
from mamo.data.reasoning import ReasoningBatch, ReasoningCollator, same_number_of_images
from mamo.data.task_records import ReasoningRecord, read_task_records
from mamo.data.task_sources import TaskSource, check_records, records_of
from mamo.distributed import share
from mamo.evaluation.judging import judge_all, judgement_metrics, write_logits
from mamo.evaluation.scoring import evaluating
from mamo.models.fusion import Fusion
from mamo.models.reasoning import PairHead
from mamo.models.vlm import Mamo
from mamo.tasks.build import build_backbone, load_published
from mamo.tasks.parts import Parts, PixelNorm, Trained
from mamo.training.alarms import class_entropy
from mamo.training.run_folder import STATEMENT_SCORES

SUBSETS = ("balanced", "unbalanced")


class ReasoningTask:
    """True or false; `losses` has the one loss, `truth`."""

    def __init__(self, config: Config, network: Mamo, normalise: PixelNorm) -> None:
        self.network = network
        self.normalise = normalise
        self.weights = {"truth": 1.0}
        self.n_global = config.training.batch_size_global

    def modules(self) -> dict[str, nn.Module]:
        """The network alone."""
        return {"student": self.network}

    def prepare(self, batch: ReasoningBatch, micro_batch_size: int, step: int) -> tuple[None, dict[str, Tensor]]:
        """Nothing to prepare."""
        return None, {}

    def losses(self, batch: ReasoningBatch, targets: None, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Two-class cross-entropy and accuracy of one micro-batch, as shares of the global batch."""
        backbone = self.network.backbone
        slots = backbone.fusion.embed_image(backbone.image_encoder(self.normalise(batch.image.flatten(0, 1))))
        slots = slots.view(*batch.image.shape[:2], *slots.shape[1:])  # [B, I, n_prefix + P, D]
        logits = self.network.judge(slots, batch.input_ids, batch.is_valid, batch.is_ordered)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.label.float(), reduction="sum")
        hits = ((logits > 0) == batch.label).sum()
        return {"truth": loss / self.n_global}, {"truth_accuracy": hits / self.n_global}

    def after_step(self, batch: ReasoningBatch, targets: None, step: int) -> None:
        """No further state."""


def reasoning_parts(config: Config, tokenizer: Any, stored: Path | None) -> Parts:
    """Sentences about images in; accuracy, consistency and the majority class out."""
    backbone = build_backbone(config, len(tokenizer), tokenizer.pad_token_id)
    fusion = backbone.fusion
    assert isinstance(fusion, Fusion)  # the config refuses the other
    network = Mamo(backbone, pair=PairHead(fusion, config.reasoning.cross_layers))
    load_published(config, network)

    def source() -> TaskSource[ReasoningRecord]:
        records, load_image = records_of(config.data, ReasoningRecord, "train", config.data.train_scenes)
        same_number_of_images(records, "data.train_file")
        return TaskSource(records, load_image, config.data)

    def begin(folder: Path, new: tuple[str, ...]) -> None:
        if network.pair is not None and "pair.side" in new:
            network.pair.begin_from(fusion)

    return Parts(
        network=network,
        image_encoder=backbone.image_encoder,
        source=source,
        collator=ReasoningCollator(tokenizer, config.data.text_max_tokens, config.seed),
        task=functools.partial(ReasoningTask, config, network),
        evaluate=functools.partial(evaluate_reasoning, config),
        baselines=lambda batch: {"loss/truth": class_entropy(batch.label)},
        begin=begin,
        check=functools.partial(check_records, config.data, ReasoningRecord),
    )


def evaluate_reasoning(config: Config, trained: Trained, folder: Path) -> dict[str, float]:
    """`reasoning/` accuracy, consistency, majority and interval in percent; the logits are written too.

    NLVR2's subsets are those of the files `balanced-NAME` and `unbalanced-NAME` beside `data.eval_file`.
    """
    data = config.data
    records, load_image = records_of(data, ReasoningRecord, "test", config.evaluation.probe_items)
    same_number_of_images(records, "data.eval_file")
    subsets: dict[str, set[str]] = {}
    whole = Path(data.eval_file or ".")
    for name in SUBSETS:
        file = whole.parent / f"{name}-{whole.name}"
        if file.is_file():
            subsets[name] = {record.identifier for record in read_task_records(file, ReasoningRecord)}
    sizes = (data.image_size, config.evaluation.batch_size)
    reading = (trained.tokenizer, trained.normalise, trained.device, data.text_max_tokens)
    with evaluating(trained.network):
        logits = judge_all(trained.network, *reading, records, load_image, *sizes)
    share(lambda file: write_logits(file, logits, records), [folder / STATEMENT_SCORES])  # by the first process alone
    return {f"reasoning/{name}": value for name, value in judgement_metrics(logits, records, subsets).items()}
