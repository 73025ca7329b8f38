"""MLIM's network: what masked patches and missing modalities leave untouched; agreement with Hugging Face's BERT."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from mamo.models.init import init_by_fan_in
from mamo.models.text_encoder import TextEncoder, load_bert_weights
from mamo.tasks.mlim.network import ImageDecoder, ItemPairHead, Mlim, PixelEmbedder, SingleStream

SIZE_PX, WIDTH, VOCABULARY, MASK, CLS = (16, 24), 32, 40, 4, 2
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def stream() -> SingleStream:
    """Patches of 4 x 4 pixels in a grid of 4 x 6, two layers, no dropout."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return SingleStream(PixelEmbedder(2, SIZE_PX, WIDTH), TextEncoder(config, 2), MASK).eval()


def inputs(n: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, captions that begin with [CLS], and which tokens are real."""
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (n, 7))
    ids[:, 0] = CLS
    is_valid = torch.arange(7) < torch.tensor([7, 5] * n)[:n, None]
    return torch.randn(n, 3, *SIZE_PX), ids, is_valid


def test_a_patch_of_pixels_feeds_exactly_its_own_embedding(stream: SingleStream) -> None:
    """Bug: kernels that overlap, a grid in column order: masking would leak, or hide another place."""
    image, _, _ = inputs(1)
    before = stream.embed_image(image)
    for row, column in ((0, 0), (1, 4), (3, 5)):
        changed = image.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
        differs = (stream.embed_image(changed) != before).any(dim=2)[0]
        assert differs.nonzero().flatten().tolist() == [6 * row + column]


def test_the_pixels_of_a_masked_patch_change_nothing(stream: SingleStream) -> None:
    """Bug: the mask is applied after something has looked at the pixels."""
    image, ids, is_valid = inputs()
    is_masked = torch.zeros(2, 24, dtype=torch.bool)
    is_masked[:, [8, 13]] = True
    changed = image.clone()
    changed[:, :, 4:8, 8:12] = 9.0  # patch 8
    changed[:, :, 8:12, 4:8] = -9.0  # patch 13
    masked = stream(image, ids, is_valid, is_masked_patch=is_masked)
    assert torch.equal(masked, stream(changed, ids, is_valid, is_masked_patch=is_masked))
    assert not torch.equal(masked, stream(image, ids, is_valid))
    assert not torch.equal(stream(image, ids, is_valid), stream(changed, ids, is_valid))


def test_both_modalities_are_masked_by_the_one_word_embedding(stream: SingleStream) -> None:
    """Bug: a second mask embedding for images, or one that is added to the pixels rather than put in their place."""
    image, _, _ = inputs(1)
    everything = torch.ones(1, 24, dtype=torch.bool)
    mask = stream.text_encoder.bert.embeddings.word_embeddings.weight[MASK]
    expected = stream.image_norm(mask + stream.image_position)
    assert torch.equal(stream.embed_image(image, everything), expected)
    stream.embed_image(image, everything).square().sum().backward()
    gradient = stream.text_encoder.word_embeddings.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(dim=1).nonzero().flatten().tolist() == [MASK]
    assert not stream.embedder.project.weight.grad.any()


def test_the_words_see_what_a_plain_bert_sees(stream: SingleStream) -> None:
    """Bug: layers, positions or norms other than BERT's. Without an image the words' outputs are Hugging Face's own."""
    image, ids, is_valid = inputs()
    bert = BertModel(BertConfig(**SIZES, num_hidden_layers=2), add_pooling_layer=False).eval()
    bert.load_state_dict(stream.text_encoder.bert.state_dict())
    expected = bert(input_ids=ids, attention_mask=is_valid.long()).last_hidden_state
    got = stream(image, ids, is_valid, has_image=torch.tensor([False, False]))[:, 24:]
    torch.testing.assert_close(got[is_valid], expected[is_valid], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("missing", ["image", "text"])
def test_a_missing_modality_is_not_attended_to(stream: SingleStream, missing: str) -> None:
    """Bug: black pixels or an empty caption are read as if they meant something."""
    image, ids, is_valid = inputs()
    flags = torch.tensor([False, True])  # missing in the first, given in the second
    other_image, other_ids = image.roll(1, dims=0), ids.flip(0)
    if missing == "image":
        kept = [24, 25, 26, 27, 28]
        one = stream(image, ids, is_valid, has_image=flags)
        other = stream(other_image, ids, is_valid, has_image=flags)
    else:
        kept = [*range(24), 24]  # the patches and [CLS]
        one = stream(image, ids, is_valid, has_text=flags)
        other = stream(image, other_ids, is_valid.flip(0), has_text=flags)
    assert torch.equal(one[0, kept], other[0, kept])
    assert not torch.allclose(one[1, kept], other[1, kept])  # and where it is given it matters
    assert not torch.allclose(one[0, kept], stream(image, ids, is_valid)[0, kept])


def test_the_gradient_stops_at_a_missing_image(stream: SingleStream) -> None:
    """Bug: attention weights that are small but not zero."""
    image, ids, is_valid = inputs()
    image.requires_grad_()
    tokens = stream(image, ids, is_valid, has_image=torch.tensor([False, True]))
    stream.cls(tokens)[:, 0].sum().backward()  # the sum over a normalised vector would be constant
    assert image.grad is not None
    assert not image.grad[0].any()
    assert image.grad[1].abs().amax(dim=(1, 2)).all()


def test_sizes_of_the_paper() -> None:
    """Bug: another number of layers, or far from the stated 200 K and 2.8 M parameters."""
    with torch.device("meta"):
        embedder = PixelEmbedder(7, (384, 384), 1024)
        decoder = ImageDecoder(1024, embedder.grid, 7)
    assert embedder.grid == (3, 3)
    assert sum(isinstance(part, nn.Conv2d) for part in embedder.modules()) == 7
    assert sum(isinstance(part, nn.ConvTranspose2d) for part in decoder.modules()) == 10
    assert sum(p.numel() for p in embedder.parameters()) == pytest.approx(200e3, rel=0.15)
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(2.8e6, rel=0.05)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_decoder_gives_an_image_of_the_embedder_s_size(layers: int) -> None:
    """Bug: a doubling too few, rows and columns exchanged, values beyond 0 to 1."""
    size_px = (2 * 2**layers, 12 * 2**layers)
    embedder = PixelEmbedder(layers, size_px, WIDTH)
    tokens = torch.randn(2, 24, WIDTH)
    decoder = ImageDecoder(WIDTH, embedder.grid, layers)
    pixels = decoder(tokens)
    assert pixels.shape == (2, 3, *size_px)
    assert (pixels >= 0).all()
    assert (pixels <= 1).all()
    changed = tokens.clone()
    changed[:, 11] += 5.0  # the top right patch; three kernels of 3 and those of 4 reach less than 6 patches
    differs = (decoder(changed) != pixels).any(dim=1)
    assert differs[:, :, -(2**layers) :].all()
    assert not differs[:, :, : 6 * 2**layers].any()


def test_an_image_that_cannot_be_halved_is_refused() -> None:
    """Bug: the last rows of pixels are dropped in silence."""
    with pytest.raises(ValueError, match=r"data\.image_size_px: 20x16.*multiples of 8"):
        PixelEmbedder(3, (20, 16), WIDTH)


def test_exchanging_two_items_changes_nothing() -> None:
    """Bug: "the same item" depends on which listing comes first."""
    torch.manual_seed(0)
    head, (a, b) = ItemPairHead(WIDTH), torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(head(a, b), head(b, a))
    assert not torch.allclose(head(a, b), head(a, a))


@pytest.mark.parametrize("missing", ["neither", "image", "text"])
def test_a_listing_is_the_mean_of_what_is_given_of_it(stream: SingleStream, missing: str) -> None:
    """Bug: a mean over padding, over the slots of a missing picture, or over all words where the text is missing."""
    network = Mlim(stream, {"match": ItemPairHead(WIDTH)}).eval()
    image, ids, is_valid = inputs(4)
    has_image = torch.tensor([missing != "image", True, True, True])
    has_text = torch.tensor([missing != "text", True, True, True])
    tokens = stream(image, ids, is_valid, has_image=has_image, has_text=has_text)
    n_patches, n_words = stream.n_patches, is_valid.sum(dim=1).tolist()
    means = []
    for k in range(4):
        rows = list(tokens[k, :n_patches]) if has_image[k] else []
        rows += list(tokens[k, n_patches : n_patches + n_words[k]]) if has_text[k] else [tokens[k, n_patches]]  # [CLS]
        means.append(sum(rows) / len(rows))
    expected = network.match(torch.stack([means[0], means[2]]), torch.stack([means[1], means[3]]))
    pairs = [tensor.unflatten(0, (2, 2)) for tensor in (image, ids, is_valid, has_image, has_text)]
    torch.testing.assert_close(network.match_items(*pairs), expected)


def test_bert_weights_fill_the_whole_stream(stream: SingleStream, tmp_path: object) -> None:
    """Bug: layers of a BERT that are left at random, since MAMO gives the upper ones to fusion."""
    bert = BertModel(BertConfig(**SIZES, num_hidden_layers=2))
    bert.apply(init_by_fan_in)
    bert.save_pretrained(str(tmp_path))
    network = Mlim(stream, {"recon": ImageDecoder(WIDTH, stream.embedder.grid, 2)})
    report = load_bert_weights(network.backbone.text_encoder, None, str(tmp_path))
    assert report.new == ()
    for name, value in stream.text_encoder.bert.state_dict().items():
        assert torch.equal(value, bert.state_dict()[name]), name
