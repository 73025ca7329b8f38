"""The head over one image or a pair: what must be symmetric is, and nothing else."""

import pytest
import torch
from torch import Tensor

from mamo.models.fusion import Fusion
from mamo.tasks.reasoning.head import ReasoningHead

B, L, D = 4, 5, 32


def head(layers: int = 1, num_prefix_tokens: int = 1) -> tuple[ReasoningHead, Tensor, Tensor]:
    """A head with large weights, fused tokens [B, 2, S, D] and which words are valid."""
    torch.manual_seed(0)
    fusion = Fusion(D, 2, 4, 48, image_width=D, grid=(2, 3), num_prefix_tokens=num_prefix_tokens, text_width=D)
    made = ReasoningHead(fusion, layers).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fused = torch.randn(B, 2, fusion.num_image_positions + L, D, dtype=torch.float64)
    return made, fused, torch.arange(L) < torch.tensor([5, 3, 4, 5])[:, None]


@pytest.mark.parametrize("layers", [1, 2])
def test_exchanging_the_images_changes_ordered_sentences_alone(layers: int) -> None:
    """Bug: "both images show a dog" depends on which image is left; "the left image shows ..." does not."""
    made, fused, is_valid = head(layers)
    for is_ordered in (False, True):
        flag = torch.full((B,), is_ordered)
        difference = (made(fused, is_valid, flag) - made(fused.flip(1), is_valid, flag)).abs()
        assert (difference > 1e-3).all() if is_ordered else (difference < 1e-5).all()


def test_both_images_count_and_padding_does_not() -> None:
    """Bug: the second image, the patches, or the sentence of one image is not read; a padded word is."""
    made, fused, is_valid = head(num_prefix_tokens=0)
    flag = torch.zeros(B, dtype=torch.bool)
    before = made(fused, is_valid, flag)
    for image in (0, 1):
        for place in (0, 6):  # a patch, [CLS]
            changed = fused.clone()
            changed[:, image, place] += 1
            assert (made(changed, is_valid, flag) - before).abs().min() > 1e-4, (image, place)
    changed = fused.clone()
    changed[1, :, -1] += 1  # row 1 has three words
    torch.testing.assert_close(made(changed, is_valid, flag), before)


def test_one_image_is_a_pair_of_itself_without_sides() -> None:
    """Bug: a statement about one image needs another head, or is read as the difference of two."""
    made, fused, is_valid = head()
    flag = torch.tensor([False, True, False, True])
    one = made(fused[:, :1], is_valid, flag)
    assert one.shape == (B,)
    twice = made(fused[:, :1].expand(-1, 2, -1, -1), is_valid, flag)
    torch.testing.assert_close(one[~flag], twice[~flag])


def test_new_layers_begin_where_the_fusion_stands() -> None:
    """Bug: a random layer over pre-trained tokens."""
    torch.manual_seed(0)
    fusion = Fusion(D, 2, 4, 48, image_width=D, grid=(2, 3), num_prefix_tokens=1, text_width=D)
    made = ReasoningHead(fusion, 2)
    made.init_from(fusion)
    for layer in made.layers:
        for name, value in fusion.layers[-1].state_dict().items():
            assert torch.equal(layer.state_dict()[name], value)
