"""ITM against foils.

Legend: B batch, L text tokens.
"""

import math

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mamo.models.vlm import Mamo
from mamo.tasks.grounding.batch import ExpressionBatch
from mamo.tasks.grounding.config import GroundingConfig
from mamo.tasks.objective import Stage, Views
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.losses import Itm


class FoilItm(Itm):
    """Match each image with its expression and with its foil.

    A short expression ("a red circle") is true of many images. Negatives drawn from other samples are then often true,
    and the more often the harder they are; against them ITM stays at its class prior, and Grad-CAM shows nothing. A
    foil is false for certain, and differs from the truth by one word about one object.
    """

    def __init__(self, config: GroundingConfig, settings: None = None) -> None:
        super().__init__(config)
        self.unit = 1

    def stages(self) -> tuple[Stage, ...]:
        """Fuse 2 B pairs, one match and one mismatch a sample."""
        return (Stage(("itm_cls", "itm_is_valid"), self._fuse, needs=("whole", "clean_words")),)

    def _fuse(self, network: Mamo, batch: ExpressionBatch, views: Views, wanted: frozenset[str]) -> Views:  # type: ignore[override]
        fusion, n = network.backbone.fusion, len(batch)
        # what the first layer makes of an expression is not shared: `fusion` embeds expressions and foils together
        text = views["clean_words"]
        foil = network.backbone.text_encoder(batch.foil_input_ids, batch.foil_is_valid)
        longest = max(text.shape[1], foil.shape[1])
        both = torch.cat([functional.pad(value, (0, 0, 0, longest - value.shape[1])) for value in (text, foil)])
        valid = (batch.is_valid, batch.foil_is_valid)
        is_valid = torch.cat([functional.pad(value, (0, longest - value.shape[1])) for value in valid])
        cls = fusion.text_positions(torch.zeros(2 * n, 1, dtype=torch.int64, device=text.device))
        fused = fusion(torch.cat([views["whole"], views["whole"]]), both, is_valid, output_positions=cls)
        return {"itm_cls": fused[:, 0], "itm_is_valid": torch.ones(2 * n, dtype=torch.bool, device=text.device)}

    def count(self, batch: PairBatch) -> int:
        """Count two pairs a sample."""
        return 2 * len(batch)

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: PairBatch) -> float:
        """Return log 2."""
        return math.log(2)
