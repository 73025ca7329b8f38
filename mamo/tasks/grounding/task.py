"""Weakly-supervised grounding: ITC and ITM on images and expressions without boxes; heat maps locate (ALBEF)."""

from pathlib import Path
from typing import ClassVar

from mamo.data.cleaning import cleaner
from mamo.data.processor import cleaning_of
from mamo.data.records import GroundingRecord
from mamo.evaluation.predictor import Predictor
from mamo.tasks.grounding.batch import ExpressionPairs
from mamo.tasks.grounding.config import GroundingConfig
from mamo.tasks.grounding.evaluate import evaluate_grounding
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.sources import check_records, load_records, record_dataset

SCORERS = {
    "fusion": "Grad-CAM of ITM in fusion",
    "image_encoder": "Grad-CAM of ITM in the image encoder",
    "occlusion": "loss of the ITM logit under occlusion",
}


class GroundingTask(PretrainTask):
    """The losses of pre-training on images and expressions; foils can replace ITM's drawn negatives."""

    config_type: ClassVar[type[GroundingConfig]] = GroundingConfig
    config: GroundingConfig

    def train_dataset(self) -> ExpressionPairs:
        """Open the training expressions; refuse one without the foil that ITM needs."""
        data = self.config.data
        records, load_image = load_records(data, GroundingRecord, "train", data.train_scenes)
        lacking = [record for record in records if self.needs_foils and not record.foil]
        if lacking:
            raise ValueError(
                f"data.train_file: expression_id {lacking[0].expression_id} ({lacking[0].image}) has no foil; "
                "add one to every record, or use losses.itm_negatives: pool"
            )
        return ExpressionPairs(record_dataset(records, load_image, data), cleaner(cleaning_of(self.config)))

    def check_evaluation_files(self) -> None:
        """Judge the evaluation expressions, their boxes and the headers of the images."""
        check_records(self.config.data, GroundingRecord)

    def evaluate(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Locate the evaluation expressions."""
        return evaluate_grounding(self.config, predictor)

    scenes_protocol = "grounding"
    metric_patterns = ("grounding/pointing", "grounding/proposal", "grounding/random_proposal", "grounding/upper_bound")

    def describe_scorer(self) -> str:
        """Name the heat and the score of a box."""
        evaluation = self.config.evaluation
        rule = "" if evaluation.itm_score == "difference" else " by the match logit"
        resized = "" if evaluation.heat_resize == "cut" else ", not cut at 0"
        return f"{SCORERS[evaluation.grounding_heat]}{rule}{resized}, sum in the box / sqrt(area)"
