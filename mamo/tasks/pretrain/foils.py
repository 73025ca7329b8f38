"""ITM against foils: texts that are false of an image.

Legend: B batch, L text tokens, D width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mamo.models.vlm import Mamo
from mamo.tasks.objective import Stage, Views
from mamo.tasks.pretrain.batch import FoilBatch, PairBatch
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.pretrain.losses import Itm


def pad_together(*texts: Tensor) -> Tensor:
    """Pad texts [B, L, ...] to the longest and concatenate them: [n B, L, ...]."""
    longest = max(text.shape[1] for text in texts)
    rest = [(0, 0) * (text.ndim - 2) for text in texts]
    return torch.cat([functional.pad(text, (*r, 0, longest - text.shape[1])) for r, text in zip(rest, texts)])


class FoilItm(Itm):
    """Match each image with its text and with its foil.

    A short text ("a red circle") is true of many images. Negatives drawn from other samples are then often true, and
    the more often the harder they are; against them ITM stays at its class prior, and Grad-CAM shows nothing. A foil is
    false for certain, and may differ from the truth by one word about one object.
    """

    def __init__(self, config: PretrainConfig, settings: None = None) -> None:
        super().__init__(config)
        self.unit = 1

    def stages(self) -> tuple[Stage, ...]:
        """Fuse 2 B pairs, one match and one mismatch a sample."""
        return (Stage(("itm_cls", "itm_is_valid"), self._fuse, needs=("whole", "clean_words")),)

    def _fuse(self, network: Mamo, batch: FoilBatch, views: Views, wanted: frozenset[str]) -> Views:  # type: ignore[override]
        fusion, n = network.backbone.fusion, len(batch)
        # what the first layer makes of a text is not shared: `fusion` embeds texts and foils together
        foil = network.backbone.text_encoder(batch.foil_input_ids, batch.foil_is_valid)
        both, is_valid = pad_together(views["clean_words"], foil), pad_together(batch.is_valid, batch.foil_is_valid)
        cls = fusion.text_positions(torch.zeros(2 * n, 1, dtype=torch.int64, device=both.device))
        fused = fusion(torch.cat([views["whole"], views["whole"]]), both, is_valid, output_positions=cls)
        return {"itm_cls": fused[:, 0], "itm_is_valid": torch.cat([torch.ones_like(batch.has_foil), batch.has_foil])}

    def count(self, batch: FoilBatch) -> Tensor:  # type: ignore[override]
        """Count two pairs a sample, one of a sample without a foil."""
        return len(batch) + batch.has_foil.sum()

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: PairBatch) -> float:
        """Return log 2."""
        return math.log(2)


class PoolAndFoilItm(Itm):
    """Match each pair, the pool's hard negatives as `Itm` draws them, and each image with its foil."""

    def _fuse(self, network: Mamo, batch: FoilBatch, views: Views, wanted: frozenset[str]) -> Views:  # type: ignore[override]
        """Return `itm_cls` float [4 B, D] and `itm_is_valid` bool [4 B]: those of `Itm`, then foils."""
        found = super()._fuse(network, batch, views, wanted)
        fusion, is_valid = network.backbone.fusion, batch.foil_is_valid
        cls = fusion.text_positions(torch.zeros(len(batch), 1, dtype=torch.int64, device=is_valid.device))
        foil = network.backbone.text_encoder(batch.foil_input_ids, is_valid)
        fused = fusion(views["whole"], foil, is_valid, output_positions=cls)
        return {
            "itm_cls": torch.cat([found["itm_cls"], fused[:, 0]]),
            "itm_is_valid": torch.cat([found["itm_is_valid"], batch.has_foil]),
        }

    def count(self, batch: FoilBatch) -> Tensor | int:  # type: ignore[override]
        """Count the pairs of `Itm`, and the foils."""
        return super().count(batch) + batch.has_foil.sum()

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: PairBatch) -> float:
        """Return the entropy of the class prior, one match in four."""
        return -(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4


ITM = {"pool": Itm, "foils": FoilItm, "both": PoolAndFoilItm}
"""By `losses.itm_negatives`."""
