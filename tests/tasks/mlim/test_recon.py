"""RECON against the double loop over pixels."""

import pytest
import torch

from mamo.tasks.mlim.losses import recon_loss


@pytest.mark.parametrize("area", ["masked", "image"])
def test_recon_is_the_naive_double_loop_in_value_and_gradient(area: str) -> None:
    """Bug: a mean over colours, masks transposed or stretched wrongly, visible pixels counted."""
    torch.manual_seed(0)
    prediction = torch.rand(2, 3, 6, 8, dtype=torch.float64).float().requires_grad_()
    image = torch.rand(2, 3, 6, 8)
    is_masked = torch.rand(2, 3, 2) < 0.5  # patches of 2 x 4 pixels
    n_pixels = int(is_masked.sum()) * 8 if area == "masked" else 2 * 6 * 8

    total, gradient = 0.0, torch.zeros_like(prediction)
    for b in range(2):
        for y in range(6):
            for x in range(8):
                if area == "image" or is_masked[b, y // 2, x // 4]:
                    for colour in range(3):
                        difference = float(prediction[b, colour, y, x].detach() - image[b, colour, y, x])
                        total += difference**2
                        gradient[b, colour, y, x] = 2 * difference / n_pixels

    loss = recon_loss(prediction, image, is_masked if area == "masked" else None, n_pixels)
    assert loss.item() == pytest.approx(total / n_pixels, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(prediction.grad, gradient)


def test_parts_of_a_batch_add_up_and_nothing_masked_is_zero() -> None:
    """Bug: a mean over the micro-batch, whose masked areas differ."""
    torch.manual_seed(0)
    prediction, image = torch.rand(2, 4, 3, 4, 4)
    is_masked = torch.rand(4, 2, 2) < 0.5
    is_masked[3] = False
    n = is_masked.sum() * 4
    parts = [recon_loss(prediction[i : i + 1], image[i : i + 1], is_masked[i : i + 1], n) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).sum(), recon_loss(prediction, image, is_masked, n))
    assert parts[3] == 0
