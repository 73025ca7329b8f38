"""Interfaces of the image and text encoders, and pixel normalisation.

Legend: B batch, H and W height and width in pixels, P patches in a grid, L text tokens, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mamo.models.layers import LayeredModule


class PixelNormalizer(nn.Module):
    """A module that standardises uint8 images with the pixel statistics ``mean`` and ``std``.

    The statistics are fp32 buffers outside the state dict. They stay fp32 when the module is cast.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        for name, values in self._statistics().items():
            self.register_buffer(name, values, persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        """Standardise uint8 [..., 3, H, W] to float32. Return float images unchanged: they are normalised already."""
        if image.is_floating_point():
            return image
        return (image.float() - self.pixel_mean) / self.pixel_std

    def use_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Replace the pixel statistics."""
        self.mean, self.std = tuple(mean), tuple(std)
        for name, values in self._statistics().items():
            setattr(self, name, values.to(getattr(self, name).device))

    def _statistics(self) -> dict[str, Tensor]:
        """Return 255 * mean and 255 * std, each float32 [3, 1, 1]."""
        values = {"pixel_mean": self.mean, "pixel_std": self.std}
        return {name: 255 * torch.tensor(value, dtype=torch.float32).view(3, 1, 1) for name, value in values.items()}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast the module; move the statistics, but never round them."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.use_statistics(self.mean, self.std)
        return self


class ImageTower(PixelNormalizer, LayeredModule, ABC):
    """An image encoder: embeds an image once, then encodes all patches or only the visible ones.

    ``width`` is D, ``grid`` the rows and columns of patches, ``patch_size_px`` the height and width of a patch,
    ``num_prefix_tokens`` the class tokens before the patches (0 or 1), ``mean`` and ``std`` the pixel statistics.
    ``num_registers`` counts tokens that the layers have between class token and patches, and that `encode` drops.

    A config names a tower of one's own by its import path (`model.image.name: module:Class`). It is built by
    ``Class(config, image_size_px, settings)``: `model.image`, the height and width of the images, and
    `model.image.settings` as ``settings_type``.
    """

    settings_type: ClassVar[type[BaseModel] | None] = None
    num_registers: int = 0

    def __init__(
        self,
        *,
        width: int,
        grid: tuple[int, int],
        patch_size_px: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(mean, std)
        self.width, self.grid, self.patch_size_px = width, grid, patch_size_px
        self.num_prefix_tokens = num_prefix_tokens

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The transformer layers, in order, each called only through ``forward``. Empty for a tower without any."""

    @abstractmethod
    def embed(self, image: Tensor) -> Any:
        """Compute what `encode` takes, shared by all views of an image.

        Args:
            image: uint8 [B, 3, H, W], to be standardised with `normalize`, or float, normalised already.

        Returns:
            Anything that `encode` takes. Callers pass it on unread.
        """

    @abstractmethod
    def encode(self, embedded: Any, visible: Tensor | None = None) -> Tensor:
        """Encode embedded images, or only their visible patches.

        Args:
            embedded: from `embed`.
            visible: int64 [B, P_visible], patch indices in row-major order. None encodes every patch.

        Returns:
            float [B, num_prefix_tokens + P, D], or [B, num_prefix_tokens + P_visible, D]: the class token first, then
            the patches in the order of ``visible``.
        """

    def forward(self, image: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embed and encode images; arguments as `embed` and `encode`."""
        return self.encode(self.embed(image), visible)

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool tokens [B, num_prefix_tokens + P, D] to [B, D]: the class token, or the mean patch without one."""
        return tokens[:, 0] if self.num_prefix_tokens else tokens.mean(dim=1)

    def position_parameters(self) -> dict[str, int]:
        """Return the names of position embeddings [1, N + P, D] on the grid, each with its number N of prefix tokens.

        They are resampled where a checkpoint has another image size.
        """
        return {}

    def resample_positions(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return functions that fit stored relative positions to this tower's windows, by parameter name.

        They are called where a checkpoint has another image size, and return a tensor that fits unchanged.
        """
        return {}

    def use_fused_attention(self, is_fused: bool) -> None:
        """Choose between fused attention and plain matrix products, where the tower has both."""

    def recording_attention(self) -> AbstractContextManager[list[Tensor]]:
        """Record attention weights: in the context, `encode` appends those of each layer, [B, A, S, S], to the list.

        Raises:
            ValueError: the tower has no attention to record.
        """
        raise ValueError(
            f"{type(self).__name__} records no attention, which Grad-CAM in the image encoder needs; set "
            "evaluation.grounding_heat to fusion or occlusion"
        )


def paint_masked(image: Tensor, visible: Tensor, grid: tuple[int, int], colour: Tensor) -> Tensor:
    """Replace the pixels of masked patches, for towers whose layers mix neighbouring pixels.

    No value of a masked patch can then reach a visible one, whatever the layers mix.

    Args:
        image: float [B, 3, H, W], normalised.
        visible: int64 [B, P_visible], indices of the patches that stay, in row-major order.
        grid: rows and columns of patches.
        colour: float [3], of the masked pixels.

    Returns:
        float [B, 3, H, W].
    """
    is_visible = torch.zeros(len(visible), grid[0] * grid[1], dtype=torch.bool, device=visible.device)
    is_visible = is_visible.scatter(1, visible, True).view(-1, 1, *grid)
    height, width = image.shape[-2] // grid[0], image.shape[-1] // grid[1]
    pixels = is_visible.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)  # [B, 1, H, W]
    return torch.where(pixels, image, colour.view(3, 1, 1).to(image.dtype))


class TextTower(LayeredModule, ABC):
    """A text encoder: embeds tokens, then transforms them. ``width`` is D.

    A config names a tower of one's own by its import path (`model.text.name: module:Class`). It is built by
    ``Class(config, vocabulary_size, text_max_tokens, pad_token_id, settings)``: `model.text`, the size of the
    vocabulary, the longest text, the id of padding, and `model.text.settings` as ``settings_type``.
    """

    settings_type: ClassVar[type[BaseModel] | None] = None

    width: int

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The transformer layers, in order, each called only through ``forward``."""

    @property
    @abstractmethod
    def word_embeddings(self) -> nn.Embedding:
        """The embedding [V, D] of the vocabulary, which the MLM head shares."""

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed words and positions: token ids int64 [..., L] -> float [..., L, D]."""

    @abstractmethod
    def transform(self, embedded: Tensor, is_valid: Tensor) -> Tensor:
        """Run the layers on embedded tokens float [B, L, D]; ``is_valid`` bool [B, L] is False for padding."""

    def forward(self, input_ids: Tensor, is_valid: Tensor) -> Tensor:
        """Encode token ids int64 [B, L], with ``is_valid`` bool [B, L] False for padding -> float [B, L, D]."""
        return self.transform(self.embed(input_ids), is_valid)

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool encoded tokens [B, L, D] to [B, D]: the first one, [CLS]."""
        return tokens[:, 0]
