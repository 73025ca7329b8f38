"""MLIM pre-training: L = MLM + RECON (+ ITM) of one modality-aware masked pass (Arici et al. 2021)."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mamo.data.loader import SampleDataset
from mamo.evaluation.predictor import Predictor
from mamo.tasks.mlim.batch import MlimBatch, MlimCollator
from mamo.tasks.mlim.config import MlimConfig
from mamo.tasks.mlim.evaluate import evaluate_mlim, reconstructions
from mamo.tasks.mlim.losses import MlimMlm, RandomItm, Recon, masked_stage
from mamo.tasks.mlim.network import Mlim, PixelEmbedder, build_single_stream, load_published_single_stream
from mamo.tasks.objective import Loss, ObjectiveTask
from mamo.tasks.sources import pair_dataset

LOSSES: tuple[type[Loss], ...] = (MlimMlm, Recon, RandomItm)
"""In the order of their passes."""


class MlimTask(ObjectiveTask[MlimBatch]):
    """One masked pass for MLM and RECON and, where ITM is on, a clean one of twice the samples."""

    config_type = MlimConfig
    config: MlimConfig
    method = "MLIM"
    has_api = False
    network: Mlim
    collator: MlimCollator

    def __init__(self, config: MlimConfig, tokenizer: PreTrainedTokenizerFast, stored: Path | None = None) -> None:
        super().__init__(config, tokenizer, stored)
        self.masking, self.masking_mode = config.masking, config.masking.mode
        weights = dict(config.losses.weights)
        losses = [kind(config) for kind in LOSSES if weights[kind.name] > 0]
        stream = build_single_stream(config, tokenizer)
        self.network = Mlim(stream, {name: head for loss in losses for name, head in loss.heads(stream).items()})
        load_published_single_stream(config, self.network)
        own = [stage for loss in losses for stage in loss.stages()]
        self.use_losses(losses, {name: w for name, w in weights.items() if w > 0}, [masked_stage(), *own])
        pool_size, grid = config.losses.itm_pool_size, stream.embedder.grid
        self.collator = MlimCollator(
            tokenizer, config.data.text_max_tokens, config.masking, grid, pool_size, config.seed
        )

    def train_dataset(self) -> SampleDataset:
        """Open the training pairs; samples are compared by all captions of their records from now on."""
        pairs = pair_dataset(self.config)
        self.collator.n_caption_ids = pairs.n_caption_ids
        return pairs

    def evaluate(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Evaluate masked words by class and the error of rebuilt images."""
        return evaluate_mlim(self.config, predictor)

    def report(self, predictor: Predictor, rows: int, folder: Path) -> list[tuple[str, str]]:
        """Show rebuilt images."""
        return reconstructions(self.config, predictor, rows)

    @property
    def image_encoder(self) -> PixelEmbedder:
        """The convolutions."""
        return self.network.backbone.embedder

    def describe_image_encoder(self) -> str:
        """See `Task`."""
        return f"{len(self.image_encoder.convolutions)} convolutions"

    scenes_protocol = "mlim"
    metric_patterns = ("masked_word/*", "recon/error", "recon/error_of_mean")

    def describe_scorer(self) -> str:
        """Name the two read-outs."""
        return "the likeliest word, the decoder's pixels"
