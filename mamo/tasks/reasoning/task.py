"""Fine-tuning on sentences about one image or a pair: is the sentence true?

Legend: B statements, I images of each.
"""

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mamo.data.record_dataset import RecordDataset
from mamo.data.records import ReasoningRecord, read_task_records
from mamo.distributed import map_over_ranks
from mamo.evaluation.scorer import eval_mode
from mamo.models.build import build_backbone, load_published
from mamo.models.fusion import Fusion
from mamo.models.vlm import Mamo
from mamo.tasks.base import Parts, PixelNorm, Trained
from mamo.tasks.reasoning.batch import ReasoningBatch, ReasoningCollator, same_number_of_images
from mamo.tasks.reasoning.config import ReasoningConfig
from mamo.tasks.reasoning.evaluate import judgement_metrics, predict_reasoning, write_logits
from mamo.tasks.reasoning.head import ReasoningHead
from mamo.tasks.sources import check_records, load_records, record_dataset
from mamo.training.monitors import class_entropy
from mamo.training.run_dir import STATEMENT_SCORES

SUBSETS = ("balanced", "unbalanced")


class ReasoningTask:
    """True or false; `losses` has the one loss, `truth`."""

    def __init__(self, config: ReasoningConfig, network: Mamo, normalise: PixelNorm) -> None:
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
        slots = slots.view(*batch.image.shape[:2], *slots.shape[1:])  # [B, I, num_prefix_tokens + P, D]
        logits = self.network.judge(slots, batch.input_ids, batch.is_valid, batch.is_ordered)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.label.float(), reduction="sum")
        hits = ((logits > 0) == batch.label).sum()
        return {"truth": loss / self.n_global}, {"truth_accuracy": hits / self.n_global}

    def after_step(self, batch: ReasoningBatch, targets: None, step: int) -> None:
        """No further state."""


def reasoning_parts(config: ReasoningConfig, tokenizer: Any, stored: Path | None) -> Parts:
    """Sentences about images in; accuracy, consistency and the majority class out."""
    backbone = build_backbone(config, len(tokenizer), tokenizer.pad_token_id)
    fusion = backbone.fusion
    assert isinstance(fusion, Fusion)  # the config refuses the other
    network = Mamo(backbone, pair=ReasoningHead(fusion, config.reasoning.cross_layers))
    load_published(config, network)

    def source() -> RecordDataset[ReasoningRecord]:
        records, load_image = load_records(config.data, ReasoningRecord, "train", config.data.train_scenes)
        same_number_of_images(records, "data.train_file")
        return record_dataset(records, load_image, config.data)

    def begin(folder: Path, new: tuple[str, ...]) -> None:
        if network.pair is not None and "pair.side" in new:
            network.pair.init_from(fusion)

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


def evaluate_reasoning(config: ReasoningConfig, trained: Trained, folder: Path) -> dict[str, float]:
    """`reasoning/` accuracy, consistency, majority and interval in percent; the logits are written too.

    NLVR2's subsets are those of the files `balanced-NAME` and `unbalanced-NAME` beside `data.eval_file`.
    """
    data = config.data
    records, load_image = load_records(data, ReasoningRecord, "test", config.evaluation.probe_items)
    same_number_of_images(records, "data.eval_file")
    subsets: dict[str, set[str]] = {}
    whole = Path(data.eval_file or ".")
    for name in SUBSETS:
        file = whole.parent / f"{name}-{whole.name}"
        if file.is_file():
            subsets[name] = {record.identifier for record in read_task_records(file, ReasoningRecord)}
    sizes = (data.image_size, config.evaluation.batch_size)
    reading = (trained.tokenizer, trained.normalise, trained.device, data.text_max_tokens)
    with eval_mode(trained.network):
        logits = predict_reasoning(trained.network, *reading, records, load_image, *sizes)
    map_over_ranks(
        lambda file: write_logits(file, logits, records), [folder / STATEMENT_SCORES]
    )  # by the first process alone
    return {f"reasoning/{name}": value for name, value in judgement_metrics(logits, records, subsets).items()}
