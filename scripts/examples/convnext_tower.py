"""An image tower that is no ViT: timm's ConvNeXt, in which masked cells are painted with a learned colour."""

import timm
import torch
from torch import Tensor, nn

from mamo.config.schema import Section
from mamo.models.towers import ImageTower


class ConvNeXtSettings(Section):
    """Settings of the tower, in `model.image.settings`."""

    model: str = "convnext_atto"
    stage: int = 1
    """Stage whose features are the patches; stage 1 halves the image three times."""


class ConvNeXtTower(ImageTower):
    """Features of one ConvNeXt stage as patches; there is no class token."""

    settings_type = ConvNeXtSettings

    def __init__(self, config, image_size_px: tuple[int, int], settings: ConvNeXtSettings) -> None:
        net = timm.create_model(settings.model, features_only=True, out_indices=[settings.stage])
        side = net.feature_info.reduction()[0]
        if image_size_px[0] % side or image_size_px[1] % side:
            raise ValueError(f"data.image_size_px: {image_size_px} is no multiple of {side}, the stride of the stage")
        super().__init__(
            width=net.feature_info.channels()[0],
            grid=(image_size_px[0] // side, image_size_px[1] // side),
            patch_size_px=(side, side),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )
        self.net = net
        self.colour = nn.Parameter(torch.zeros(3))

    @property
    def layers(self) -> list[nn.Module]:
        """None: convolutional blocks are neither checkpointed nor moved by Muon."""
        return []

    def embed(self, image: Tensor) -> Tensor:
        """Return the normalised image itself: cells are painted before anything is mixed."""
        return self.normalize(image).to(self.colour.dtype)

    def encode(self, embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return features [B, P, D], or those of the visible cells [B, P_visible, D]."""
        if visible is not None:
            is_visible = torch.zeros(len(visible), self.grid[0] * self.grid[1], device=visible.device)
            is_visible = is_visible.scatter(1, visible, 1.0).view(-1, 1, *self.grid)
            is_visible = nn.functional.interpolate(is_visible, size=embedded.shape[-2:]).bool()
            embedded = torch.where(is_visible, embedded, self.colour.view(3, 1, 1))
        features = self.net(embedded)[0].flatten(2).transpose(1, 2)
        if visible is None:
            return features
        return features.gather(1, visible.unsqueeze(-1).expand(-1, -1, self.width))
