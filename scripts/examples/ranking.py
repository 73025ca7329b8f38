"""A task: rank captions of an image by a scalar head, each true caption above another image's."""

import torch
from torch import nn
from torch.nn import functional

from mamo.config.objective import MaskingConfig
from mamo.config.schema import MamoConfig, Section
from mamo.data.loader import collate_range
from mamo.evaluation.scorer import eval_mode
from mamo.models.build import build_backbone
from mamo.models.vlm import Mamo
from mamo.tasks.base import Task
from mamo.tasks.pretrain.batch import PairCollator
from mamo.tasks.sources import pair_dataset
from mamo.world.datasets import ScenePairs


class RankingSettings(Section):
    margin: float = 0.0


class RankingConfig(MamoConfig):
    ranking: RankingSettings = RankingSettings()


class CaptionRanking(Task):
    """The one loss is `rank`."""

    config_type = RankingConfig

    def __init__(self, config, tokenizer, stored=None):
        super().__init__(config, tokenizer, stored)
        backbone = build_backbone(config, len(tokenizer), tokenizer.pad_token_id)
        self.network = Mamo(backbone, {"rank": nn.Linear(backbone.fusion.width, 1, bias=False)})
        self.weights, self.unit, self.unit_key = {"rank": 1.0}, 2, "training.micro_batch_size"
        grid, length = backbone.image_encoder.grid, config.data.text_max_tokens
        self.collator = PairCollator(tokenizer, length, MaskingConfig(), grid, 2, config.seed)

    def train_dataset(self):
        return pair_dataset(self.config)

    def gap(self, network, batch):
        """Return score of each pair minus its image's with the neighbour's caption, float32 [B]."""
        body, other = network.backbone, torch.arange(len(batch), device=batch.image.device) ^ 1
        image, text = body.image_encoder(batch.image), body.text_encoder(batch.input_ids, batch.is_valid)
        cls = body.fusion.text_positions(torch.zeros(len(batch), 1, dtype=torch.int64, device=image.device))
        image = body.fusion.embed_image(image)
        true, false = (body.fusion(image, text[k], batch.is_valid[k], cls)[:, 0] for k in (..., other))
        return (network.rank(true) - network.rank(false))[:, 0].float()

    def losses(self, batch, targets, start):
        gap, n = self.gap(self.network, batch), self.config.training.batch_size_global
        return {"rank": functional.softplus(self.config.ranking.margin - gap).sum() / n}, {"acc": (gap > 0).sum() / n}

    def evaluate(self, predictor, folder):
        pairs = ScenePairs(self.config.data, "test", self.config.evaluation.probe_items // 2 * 2)
        batch = collate_range(pairs, self.collator, range(len(pairs))).to(predictor.device)
        with eval_mode(predictor.network):
            return {"ranking/accuracy": 100 * (self.gap(predictor.network, batch) > 0).float().mean().item()}
