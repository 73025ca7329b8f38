"""A loss with a head: contrast of words and patches (FILIP, Yao et al. 2022), next to the losses of MAMO."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.config.schema import Section
from mamo.losses.itc import positives
from mamo.tasks.objective import Loss


class FilipSettings(Section):
    """Settings of the loss, in `losses.extra`."""

    width: int = 32
    group_size: int = 8
    """Consecutive samples that are contrasted with each other."""


class FilipHead(nn.Module):
    """Project patches and words to one space."""

    def __init__(self, image_width: int, text_width: int, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.temperature = nn.Parameter(torch.full((1,), 0.07))

    def forward(self, image: Tensor, text: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, B] of images to texts and of texts to images: mean of the best match of each token."""
        patches = functional.normalize(self.image(image).float(), dim=-1)
        words = functional.normalize(self.text(text).float(), dim=-1)
        similarity = torch.einsum("ipd,tld->itpl", patches, words)  # [B, B, P, L]
        to_text = similarity.masked_fill(~is_valid[None, :, None], -1).amax(dim=3).mean(dim=2)
        best_patch, weight = similarity.amax(dim=2), is_valid.float()
        to_image = (best_patch * weight).sum(dim=2) / weight.sum(dim=1)
        return to_text / self.temperature, to_image.t() / self.temperature


class Filip(Loss):
    """Contrast each image with the texts of its group, word by patch, and each text with the images."""

    name, reads, settings_type = "filip", ("clean_image", "clean_words"), FilipSettings
    unit_key = "losses.extra (filip.group_size)"

    def __init__(self, config, settings):
        self.settings, self.unit = settings, settings.group_size

    def heads(self, backbone):
        return {"filip": FilipHead(backbone.image_encoder.width, backbone.text_encoder.width, self.settings.width)}

    def __call__(self, network, part, n_global, fixed):
        batch, loss = part.batch, torch.zeros((), device=part.batch.image.device)
        for rows in torch.arange(len(batch), device=loss.device).split(self.unit):
            ids = batch.image_id[rows], batch.caption_ids[rows]
            is_other = positives(*ids, *ids) & ~torch.eye(len(rows), dtype=torch.bool, device=loss.device)
            tokens = part.views["clean_image"][rows], part.views["clean_words"][rows], batch.is_valid[rows]
            for logits in network.filip(*tokens):
                target = torch.arange(len(rows), device=loss.device)
                loss = loss + functional.cross_entropy(logits.masked_fill(is_other, -1e9), target, reduction="sum") / 2
        return loss / n_global, {}
