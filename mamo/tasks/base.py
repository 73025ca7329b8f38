"""The abstract class of a task: its network, data, losses, evaluation and report."""

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic

from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from typing_extensions import TypeVar

from mamo.config.schema import RunConfig
from mamo.data.collate import Batch
from mamo.data.loader import Collator, SampleDataset
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.results import Metrics, facts_of
from mamo.models.frozen_encoder import FrozenEncoder

BatchT = TypeVar("BatchT", bound=Batch, default=Any)
"""The batch of a task."""
TargetsT = TypeVar("TargetsT", default=Any)
"""Values that its losses are compared with; None without any."""


class Task(ABC, Generic[BatchT, TargetsT]):
    """One task: its network, data, losses, evaluation and report.

    A task lies in its own folder and is named in `mamo.tasks.registry`, or in a config by its import path. The
    constructor builds the network; what only training needs (a teacher, the data set) is built on first use.

    Attributes:
        config: the run's settings.
        network: the trained network; `backbone` is the part that another task can start from, all else are heads.
        collator: [(epoch, sample)] -> batch; runs in the loader's processes and holds the run's `seed`.
        weights: weight of each loss in the sum, by the names that `losses` returns.
        assets: texts by file name that belong to the weights, as an answer list: written to the run's folder, to
            every checkpoint and to exports.
        unit: consecutive samples that must share a forward pass.
        unit_key: the config key that sets `unit`, for messages.
    """

    config_type: ClassVar[type[RunConfig]]
    """The type of the task's config."""
    has_api: ClassVar[bool] = True
    """Whether `mamo.load` and `save_pretrained` take its network."""
    config: RunConfig
    network: Any
    collator: Collator[BatchT]
    weights: dict[str, float]
    assets: Mapping[str, str] = {}
    unit: int = 1
    unit_key: str = ""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerFast, stored: Path | None = None) -> None:
        """Build the network.

        Args:
            config: the run's settings.
            tokenizer: a fast Hugging Face tokenizer.
            stored: the folder of a run, a checkpoint or an export that holds the assets; None makes them anew.
        """
        self.config = config
        self.tokenizer = tokenizer

    def modules(self) -> dict[str, nn.Module]:
        """Return everything that a checkpoint holds, by file name; `student` is the network."""
        return {"student": self.network}

    @property
    def image_encoder(self) -> Any:
        """The part of the network that has a grid of patches."""
        return self.network.backbone.image_encoder

    def parts(self) -> dict[str, nn.Module]:
        """Return the parts of the network that `training.parts` names: `image`, `text` and `fusion`, as far as it has
        them. Everything outside them is `heads`.
        """
        backbone = self.network.backbone
        found = {
            "image": self.image_encoder,
            "text": getattr(backbone, "text_encoder", None),
            "fusion": getattr(backbone, "fusion", None),
        }
        return {name: part for name, part in found.items() if part is not None}

    @property
    def averaged_backbone(self) -> nn.Module | None:
        """The backbone that is evaluated in place of the network's; None for the network's own."""
        return None

    # ---- training ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def train_dataset(self) -> SampleDataset:
        """Open the training samples."""

    def init_new_parameters(self, folder: Path, new: tuple[str, ...]) -> None:
        """Initialise what a checkpoint lacks, once the rest is loaded from it.

        Args:
            folder: the checkpoint.
            new: names of the parameters that it lacks.
        """

    def fix_shapes(self) -> None:
        """Give batches few shapes, for a device on which each new shape costs; losses do not change."""

    def share_frozen(self, parts: Collection[str]) -> None:
        """Compute once what two networks of the task compute alike, as these parts never train.

        Args:
            parts: names of `parts`, and `heads`. The student's weights are in their place.
        """

    def trivial_losses(self, batch: BatchT) -> dict[str, float]:
        """Return `loss/NAME` of a predictor that ignores its input, by name (ITC: log N)."""
        return {}

    def compute_targets(self, batch: BatchT, micro_batch_size: int, step: int) -> tuple[TargetsT, dict[str, Tensor]]:
        """Compute, without gradient, what the losses of one optimizer step are compared with.

        Args:
            batch: this process's samples.
            micro_batch_size: samples of a forward pass.
            step: 0-based optimizer step.

        Returns:
            Targets for `losses`, and metrics.
        """
        return None, {}  # type: ignore[return-value]

    @abstractmethod
    def losses(self, batch: BatchT, targets: TargetsT, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the unweighted losses and metrics of one micro-batch, both as shares of the global batch.

        Args:
            batch: samples `start` to `start + len(batch)` of this process's batch.
            targets: from `compute_targets`.
            start: position of the first sample.
        """

    def on_optimizer_step(self, batch: BatchT, targets: TargetsT, step: int) -> None:
        """Update the state that follows the weights, as a teacher and a queue, once an optimizer step.

        Write into the `followers` in place, and read no value of them: on a GPU a step that is not finite is undone.
        """

    def followers(self) -> list[Tensor]:
        """Return the tensors that `on_optimizer_step` may change: buffers and scalars, as a temperature, of the
        network, and all of the other `modules()` but frozen encoders."""
        modules = [module for module in self.modules().values() if not isinstance(module, FrozenEncoder)]
        found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        moved = {parameter for parameter in self.network.parameters() if parameter.ndim > 0}  # by the optimizer
        return [tensor for tensor in found if tensor not in moved]

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def check_evaluation_files(self) -> None:
        """Read the files that `evaluate` will, before any work is done; raise as it does."""

    def check_held_out(self, train_files: list[str]) -> None:
        """Raise ValueError where `data.eval_file` shares items with the files that the network was trained on."""

    @abstractmethod
    def evaluate(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Evaluate as `data` and `evaluation` of the config say.

        Args:
            predictor: the network, put into eval mode.
            folder: takes further files, such as a submission.

        Returns:
            Metrics in percent.
        """

    def each_eval_file(self) -> Iterator[str]:
        """Set the config to one held-out file after the other; yield its name, empty if there is only one."""
        whole = self.config
        names = whole.data.eval_names or [""]
        try:
            for name, data in zip(names, whole.data.per_eval_file()):
                self.config = whole.model_copy(update={"data": data})
                yield name
        finally:
            self.config = whole

    def evaluate_files(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Evaluate as `evaluate` on each of `data.eval_file`.

        Of several files, the names of metrics and facts begin with that of their file, and so does the folder of what
        else is written; `skipped` is the sum.
        """
        found, n_skipped = Metrics({}), 0.0
        for name in self.each_eval_file():
            if not name:
                return self.evaluate(predictor, folder)
            (folder / name).mkdir(parents=True, exist_ok=True)
            metrics = self.evaluate(predictor, folder / name)
            facts = facts_of(metrics)
            n_skipped += facts.get("skipped", 0.0)
            found.update({f"{name}/{key}": value for key, value in metrics.items()})
            found.facts.update({f"{name}/{key}": value for key, value in facts.items()})
        found.facts["skipped"] = n_skipped
        return found

    def check_files(self) -> None:
        """Call `check_evaluation_files` on each of `data.eval_file`, and check the name of `training.keep_best`."""
        for _ in self.each_eval_file():
            self.check_evaluation_files()
        if self.config.training.keep_best is not None and self.metric_patterns:
            self.check_metric(self.config.training.keep_best)

    def check_metric(self, name: str) -> None:
        """Raise ValueError unless the name fits `metric_patterns`, after that of one of several held-out files."""
        files = self.config.data.eval_names
        file, _, own = name.partition("/")
        patterns = [pattern for pattern in self.metric_patterns if not files or pattern.startswith("items/")]
        fits = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        fits |= file in files and any(fnmatch.fnmatchcase(own, pattern) for pattern in self.metric_patterns)
        if not fits:
            before = f"{'|'.join(files)}/" if files else ""
            raise ValueError(
                f"training.keep_best: task {self.config.task} has no metric {name!r}; its metrics: "
                f"{', '.join(before + pattern for pattern in self.metric_patterns)}"
            )

    def evaluate_items(self, predictor: Predictor, folder: Path) -> Metrics:
        """Score `evaluation.items_files` in fp32; `predictor` has fp32 weights, `folder` takes the scores of each item.

        Returns:
            Metrics in percent; none of a task that scores no items.
        """
        return Metrics({})

    def report(self, predictor: Predictor, rows: int, folder: Path) -> list[tuple[str, str]]:
        """Build the task's sections of the report.

        Args:
            predictor: the network.
            rows: examples of each kind.
            folder: the one that `evaluate` wrote its files to.

        Returns:
            (title, HTML fragment) of each.
        """
        return []

    # ---- names of its numbers ---------------------------------------------------------------------------------------

    metric_patterns: ClassVar[tuple[str, ...]] = ()
    """Globs of the names of its metrics, by which `training.keep_best` is checked before the first step; () of a task
    that does not list them."""
    scenes_protocol: ClassVar[str] = ""
    """Last part of the name of its protocol in the embedded world, `scenes-DIFFICULTY-NAME`."""

    def describe_method(self) -> str:
        """Say in a line how the network is trained, for its card."""
        return f"fine-tuned for {self.config.task}: {self.describe_scorer()}"

    def describe_image_encoder(self) -> str:
        """Name the image encoder, for the network's card."""
        return str(getattr(self.image_encoder, "name", type(self.image_encoder).__name__))

    def describe_scorer(self) -> str:
        """Say in words how an item is scored."""
        return self.config.task
