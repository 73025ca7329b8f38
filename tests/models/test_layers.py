"""The listed layers against the rules that they replace: a pattern of names for Muon, a tuple of types for the rest."""

import re

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from mamo.config.schema import TrainingConfig
from mamo.models.cross_fusion import CrossFusion
from mamo.models.fusion import Fusion, FusionEncoder, FusionLayer, PostNormLayer
from mamo.models.heads import ITMHead, MIMHead, MLMHead, MRMHead
from mamo.models.image_encoder import ImageEncoder
from mamo.models.layers import LayeredModule, forward_layers, transformer_layers
from mamo.models.text_encoder import TextEncoder
from mamo.models.vlm import Backbone
from mamo.tasks.mlim.network import ImageDecoder, ItemPairHead, Mlim, PixelEmbedder, SingleStream
from mamo.tasks.reasoning.head import ReasoningHead
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder, DecoderLayer
from mamo.training.optim import layer_matrices
from mamo.training.parallel import apply_compile_and_checkpointing

D = 16
IN_A_LAYER = re.compile(r"\b(layers|layer|blocks)\.\d+\.")
UNITS = (Block, BertLayer, FusionLayer, DecoderLayer)


def bert() -> BertConfig:
    return BertConfig(vocab_size=9, hidden_size=D, num_attention_heads=2, intermediate_size=24)


def backbone(fusion_type: str = "concat") -> Backbone:
    image_encoder = ImageEncoder("vit_tiny_patch16_224", (16, 24), patch_size_px=8, width=D, depth=2, heads=2)
    sizes = {"width": D, "layers": 2, "heads": 2, "mlp_width": 24, "image_width": D, "grid": (2, 3)}
    fusion: FusionEncoder = CrossFusion(**sizes, num_prefix_tokens=1)
    if fusion_type == "concat":
        fusion = Fusion(**sizes, num_prefix_tokens=1, text_width=D)
    return Backbone(image_encoder, TextEncoder(bert(), 3), fusion, itc_width=8)


def networks() -> dict[str, nn.Module]:
    """Each shipped kind of network, its parts named as in checkpoints."""
    made: dict[str, nn.Module] = {}
    for fusion_type in ("concat", "cross"):
        body = backbone(fusion_type)
        heads: dict[str, nn.Module] = {
            "itm": ITMHead(D),
            "mlm": MLMHead(D, body.text_encoder.word_embeddings),
            "mrm_text": MRMHead(D, D),
        }
        if fusion_type == "concat":
            heads |= {"mim": MIMHead(D, D, blocks=2, heads=2), "mrm_image": MRMHead(D, D)}
        made[f"pretrain {fusion_type}"] = nn.ModuleDict({"backbone": body, **heads})
        made[f"classifier {fusion_type}"] = nn.ModuleDict({"backbone": body, "answer": AnswerClassifier(D, 5)})
    body = backbone()
    made["decoder"] = nn.ModuleDict({"backbone": body, "answer": AnswerDecoder(body.fusion, body.text_encoder)})
    made["reasoning"] = nn.ModuleDict({"backbone": body, "pair": ReasoningHead(body.fusion, 2)})
    stream = SingleStream(PixelEmbedder(3, (16, 24), D), TextEncoder(bert(), 3), mask_token_id=1)
    heads = {"mlm": MLMHead(D, stream.text_encoder.word_embeddings), "recon": ImageDecoder(D, (2, 3), 3)}
    made["mlim"] = Mlim(stream, {**heads, "itm": ITMHead(D)})
    made["matching"] = Mlim(stream, {"match": ItemPairHead(D)})
    return made


def units(module: nn.Module) -> list[nn.Module]:
    """The rule that compilation, checkpointing and sharding had."""
    return [module] if type(module) in UNITS else [unit for child in module.children() for unit in units(child)]


def test_layers_are_those_of_the_old_rules() -> None:
    """Bug: Muon loses or gains a matrix, in another order; a layer is neither compiled, checkpointed nor sharded."""
    for name, network in networks().items():
        frozen = [path for path, _ in network.named_parameters() if re.search(r"encoder\.layer\.1\..*dense", path)]
        network.get_parameter(frozen[0]).requires_grad_(False)
        matrices = [
            part.weight
            for path, part in network.named_modules()
            if isinstance(part, nn.Linear) and IN_A_LAYER.search(path) and part.weight.requires_grad
        ]
        assert len(matrices) > 10
        assert [id(matrix) for matrix in layer_matrices(network)] == [id(matrix) for matrix in matrices], name
        if "cross" not in name:
            assert transformer_layers(network) == forward_layers(network) == units(network), name


@pytest.mark.parametrize("key", ["compile", "activation_checkpointing"])
def test_a_layer_without_forward_is_refused(key: str) -> None:
    """Bug: wrapping the `forward` of a layer that is called in parts has no effect, in silence."""

    class Parts(LayeredModule):
        def __init__(self) -> None:
            super().__init__()
            self.stage = PostNormLayer(D, 2, 24)

        @property
        def layers(self) -> list[nn.Module]:
            return [self.stage]

    body = nn.ModuleDict({"parts": Parts()})
    apply_compile_and_checkpointing(TrainingConfig(), {"student": body})
    with pytest.raises(ValueError, match=r"parts\.stage \(PostNormLayer\) has no `forward`"):
        apply_compile_and_checkpointing(TrainingConfig(**{key: True}), {"student": body})


def test_the_projection_of_the_image_is_a_layer_of_its_own() -> None:
    """Bug: sharded with its layer, its weights are not gathered when images are embedded; Muon moves it twice."""
    body = backbone("cross")
    found = transformer_layers(body)
    assert len(found) == 2 + 3 + 2 * 2
    assert found[-2:] == [layer.cross_key_value for layer in body.fusion.layers]
    assert len({id(matrix) for matrix in layer_matrices(body)}) == len(layer_matrices(body))


class LoudLayer(FusionLayer):
    """A layer of a foreign fusion."""


def test_a_foreign_layer_is_taken_under_any_name() -> None:
    """Bug: a subclass of a layer, or a stack of another name, gets AdamW and no checkpointing."""

    class Head(LayeredModule):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([LoudLayer(D, 2, 24), LoudLayer(D, 2, 24)])

        @property
        def layers(self) -> nn.ModuleList:
            return self.stages

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            for stage in self.stages:
                tokens = stage(tokens, None)
            return tokens

    head = nn.Sequential(nn.Linear(D, D), Head())
    assert forward_layers(head) == list(head[1].stages)
    assert len(layer_matrices(head)) == 2 * 4
    tokens = torch.randn(2, 5, D)
    expected = head(tokens)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        head(tokens)
    plain = sum(saved)
    saved.clear()
    apply_compile_and_checkpointing(TrainingConfig(activation_checkpointing=True), {"student": head})
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        torch.testing.assert_close(head(tokens), expected, atol=0, rtol=0)
    assert sum(saved) < plain / 2
