"""A frozen image encoder whose features another network predicts (EVA, MaskDistill).

Legend: B batch, P patches, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.models.towers import ImageTower


class FrozenEncoder(nn.Module):
    """An image encoder that never trains, on pictures resized so that it has as many patches as another.

    ``width`` is D, ``image_size_px`` the height and width of the pictures that it encodes.
    """

    def __init__(self, encoder: ImageTower, image_size_px: tuple[int, int]) -> None:
        super().__init__()
        self.encoder, self.image_size_px, self.width = encoder, image_size_px, encoder.width
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Encode whole images uint8 [B, 3, H, W] to the features of their patches, float [B, P, D], row-major."""
        pixels = self.encoder.normalize(image)
        if tuple(pixels.shape[-2:]) != self.image_size_px:
            pixels = functional.interpolate(pixels, self.image_size_px, mode="bicubic", antialias=True)
        features: Tensor = self.encoder(pixels)[:, self.encoder.num_prefix_tokens :]
        return features


def check_grid(encoder: ImageTower, student: ImageTower, name: str) -> None:
    """Raise ValueError unless two encoders have the same rows and columns of patches; `name` is the frozen one."""
    if tuple(encoder.grid) != tuple(student.grid):
        own, theirs = (" x ".join(map(str, tower.grid)) for tower in (student, encoder))
        raise ValueError(
            f"losses.mim_encoder: {name} has {theirs} patches, the network's image encoder {own}; choose one with as "
            "many, or another data.image_size_px"
        )
