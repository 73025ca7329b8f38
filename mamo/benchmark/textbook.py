"""A textbook step: the losses of ALBEF and of MAMO written plainly, to compare the speed of ours with.

It is what one would write from the papers with timm's ViT and transformers' BERT: eager, with fused attention and a
fused optimizer, no work shared between passes, every position of the last layer, and the logits of the whole vocabulary
at every position. A pass over a masked image encodes its visible patches. The losses equal ours to rounding.

Legend: B batch, L text tokens, S fused tokens, K masked patches, N ITC candidates, D width, V vocabulary.
"""

import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from mamo.models.fusion import Fusion, PostNormLayer
from mamo.models.image_encoder import ImageEncoder
from mamo.models.text_encoder import TextEncoder
from mamo.models.vlm import Backbone
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.task import PretrainTask

HEADS = ("itm", "mlm", "mim", "mrm_image", "mrm_text")


class TextbookNetwork(nn.Module):
    """timm's ViT and two parts of a BERT with copies of a backbone's weights, and copies of the heads.

    Args:
        backbone: with an `ImageEncoder`, a `TextEncoder`, and a `Fusion` or a `CrossFusion`.
        heads: by name.
    """

    def __init__(self, backbone: Backbone, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        image, text, fusion = backbone.image_encoder, backbone.text_encoder, backbone.fusion
        assert isinstance(image, ImageEncoder)
        assert isinstance(text, TextEncoder)
        self.mean, self.std = image.mean, image.std
        self.vit: Any = timm.create_model(
            image.name,
            img_size=tuple(cells * side for cells, side in zip(image.grid, image.patch_size_px)),
            patch_size=image.patch_size_px[0],
            embed_dim=image.width,
            depth=len(image.layers),
            num_heads=image.vit.blocks[0].attn.num_heads,
            num_classes=0,
            global_pool="",
        )
        self.vit.load_state_dict(image.vit.state_dict())
        config = copy.deepcopy(text.bert.config)
        config._attn_implementation = "sdpa"
        self.bert: Any = BertModel(config, add_pooling_layer=False)
        self.bert.load_state_dict(text.bert.state_dict())
        self.is_cross = not isinstance(fusion, Fusion)
        self.entry: Any = None
        if isinstance(fusion, Fusion):
            self.entry = copy.deepcopy(fusion)  # projections, positions and the mask token, before the layers
            self.entry.layers = nn.ModuleList()
        self.num_image_positions, self.num_prefix_tokens = fusion.num_image_positions, fusion.num_prefix_tokens
        self.layers = _bert_encoder(config, list(fusion.layers), image.width if self.is_cross else None)
        self.image_projection = copy.deepcopy(backbone.image_projection)
        self.text_projection = copy.deepcopy(backbone.text_projection)
        self.heads: Any = nn.ModuleDict(copy.deepcopy(heads))
        if "mlm" in heads:
            head: Any = self.heads["mlm"]
            head.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def image(self, image: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encode uint8 [B, 3, H, W], all patches or those of int64 [B, P_visible] -> [B, prefix + patches, D]."""
        mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (self.mean, self.std))
        tokens = self.vit._pos_embed(self.vit.patch_embed((image / 255 - mean) / std))
        if visible is not None:
            n = self.num_prefix_tokens
            patches = tokens[:, n:].gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
            tokens = torch.cat([tokens[:, :n], patches], dim=1)
        encoded: Tensor = self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens)))
        return encoded

    def text(self, input_ids: Tensor, is_valid: Tensor) -> Tensor:
        """Encode int64 [B, L], bool [B, L] -> [B, L, D]."""
        encoded: Tensor = self.bert(input_ids=input_ids, attention_mask=is_valid.long()).last_hidden_state
        return encoded

    def fuse(self, image: Tensor, text: Tensor, is_valid: Tensor, visible: Tensor | None = None) -> Tensor:
        """Fuse encoded images with encoded texts -> [B, S, D]: image tokens first, or the text only."""
        if self.is_cross:
            mask = is_valid[:, None, None, :]
            fused: Tensor = self.layers(
                text, attention_mask=mask, encoder_hidden_states=image, use_cache=False
            ).last_hidden_state
            return fused
        tokens = torch.cat([self.entry.embed_image(image, visible), self.entry.embed_text(text, is_valid)], dim=1)
        mask = functional.pad(is_valid, (self.num_image_positions, 0), value=True)[:, None, None, :]
        fused = self.layers(tokens, attention_mask=mask).last_hidden_state
        return fused

    def features(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised ITC features of encoded images and texts, each [B, D_itc]."""
        return (
            functional.normalize(self.image_projection(image[:, 0]), dim=-1),
            functional.normalize(self.text_projection(text[:, 0]), dim=-1),
        )


def _bert_encoder(config: BertConfig, layers: list[nn.Module], image_width: int | None) -> Any:
    """Build transformers' BERT layers with the weights of ours; `image_width` adds cross-attention."""
    first = layers[0]
    assert isinstance(first, PostNormLayer)
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = len(layers), first.width, first.heads
    config.intermediate_size = first.fc1.out_features
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = first.dropout_p
    if image_width is not None:
        assert image_width == first.width, "BERT's cross-attention takes images of its own width"
        config.is_decoder = config.add_cross_attention = True
    encoder: Any = BertModel(config, add_pooling_layer=False).encoder
    for theirs, ours in zip(encoder.layer, layers):
        assert isinstance(ours, PostNormLayer)
        theirs.load_state_dict(ours.bert_named_tensors())
    return encoder


class Textbook:
    """One training step: losses, backward pass, AdamW, momentum teacher and queue.

    Args:
        task: gives weights, teacher and settings; its own objects stay as they are.
    """

    def __init__(self, task: PretrainTask) -> None:
        network, teacher = task.network, task.teacher
        heads = {name: network.get_head(name) for name in HEADS if network.get_head(name) is not None}
        self.student = TextbookNetwork(network.backbone, heads)
        self.teacher = TextbookNetwork(teacher.backbone, {} if teacher.mlm is None else {"mlm": teacher.mlm})
        self.teacher.requires_grad_(False).eval()
        self.temperature = nn.Parameter(network.temperature.detach().clone())
        self.config, self.weights = task.config, task.weights
        self.queue = [task.queue.image_feature.clone(), task.queue.text_feature.clone()]
        self.is_filled, self.next = task.queue.is_filled().clone(), 0
        training = task.config.training
        parameters = [*self.student.parameters(), self.temperature]
        self.optimizer = torch.optim.AdamW(parameters, training.learning_rate, weight_decay=0.02, fused=True)

    def step(self, batch: PairBatch, precision: str = "fp32") -> dict[str, Tensor]:
        """Run one optimizer step; return the losses."""
        with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses, features = self.losses(batch)
        torch.stack([self.weights[name] * value for name, value in losses.items()]).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            named = dict(self.student.named_parameters())
            mine: list[Tensor] = list(self.teacher.parameters())
            theirs: list[Tensor] = [named[name] for name, _ in self.teacher.named_parameters()]
            torch._foreach_lerp_(mine, theirs, 1 - self.config.teacher.momentum)
            self._push(features)
        return {name: value.detach() for name, value in losses.items()}

    def _push(self, features: tuple[Tensor, Tensor]) -> None:
        size = len(self.is_filled)
        if size:
            rows = (self.next + torch.arange(len(features[0]), device=features[0].device)) % size
            for queue, feature in zip(self.queue, features):
                queue[rows] = feature.float()
            self.is_filled[rows] = True
            self.next = (self.next + len(rows)) % size

    def losses(self, batch: PairBatch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Compute the losses whose weight is not 0, and the teacher's features of the batch.

        All images and captions of the batch must differ.
        """
        student, teacher, valid = self.student, self.teacher, batch.is_valid
        with torch.no_grad():
            clean_image = teacher.image(batch.image)
            clean_text = teacher.text(batch.input_ids, valid)
            past = teacher.features(clean_image, clean_text)
        image, text = student.image(batch.image), student.text(batch.input_ids, valid)
        features = student.features(image, text)
        losses = {"itc": self._itc(features, past), "itm": self._itm(batch, image, text, features)}
        if student.is_cross:  # ALBEF: words are predicted with the encoding of the image that ITC has
            losses |= self._masked_text(batch, image, clean_image, None)
        else:
            with torch.no_grad():
                target = teacher.fuse(clean_image, clean_text, valid)
            losses |= self._masked_image(batch, clean_image, target)
            losses |= self._masked_text(batch, student.image(batch.image), clean_image, target)
        return {name: losses[name] for name in self.weights}, past

    def _itc(self, features: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor]) -> Tensor:
        alpha = self.config.losses.itc_soft_target_alpha
        total = features[0].new_zeros(())
        seen = torch.cat([self.is_filled.new_ones(len(past[0])), self.is_filled])
        for side in (0, 1):
            candidates = torch.cat([past[1 - side].float(), self.queue[1 - side]]).t()
            logits = (features[side].float() @ candidates / self.temperature).masked_fill(~seen, -torch.inf)
            target = torch.eye(*logits.shape, device=logits.device)
            if alpha:
                with torch.no_grad():
                    momentum = (past[side].float() @ candidates / self.temperature).masked_fill(~seen, -torch.inf)
                    target = alpha * momentum.softmax(dim=1) + (1 - alpha) * target
            terms = (target * logits.log_softmax(dim=1).masked_fill(~seen, 0.0)).sum(dim=1)
            total = total - terms.mean() / 2
        return total

    def _itm(self, batch: PairBatch, image: Tensor, text: Tensor, features: tuple[Tensor, Tensor]) -> Tensor:
        n, valid = len(batch), batch.is_valid
        with torch.no_grad():
            similarity = features[0].float() @ features[1].float().t() / self.temperature  # [B, B]
            itself = torch.eye(n, dtype=torch.bool, device=image.device)
            texts = (similarity + batch.itm_noise[:, 0]).masked_fill(itself, -torch.inf).argmax(dim=1)
            images = (similarity.t() + batch.itm_noise[:, 1]).masked_fill(itself, -torch.inf).argmax(dim=1)
        positive = self.student.fuse(image, text, valid)
        negative = self.student.fuse(
            torch.cat([image, image[images]]), torch.cat([text[texts], text]), torch.cat([valid[texts], valid])
        )
        cls = torch.cat([positive, negative])[:, self.student.num_image_positions]
        is_match = torch.arange(3 * n, device=image.device) < n
        return functional.cross_entropy(self.student.heads["itm"](cls).float(), is_match.long())

    def _masked_image(self, batch: PairBatch, clean_image: Tensor, target: Tensor) -> dict[str, Tensor]:
        student, visible = self.student, batch.visible_patches
        text = student.text(batch.input_ids, batch.is_valid)
        fused = student.fuse(student.image(batch.image, visible), text, batch.is_valid, visible)
        rows = torch.arange(len(batch), device=fused.device)[:, None]
        at = batch.masked_patches + student.num_prefix_tokens  # [B, K]
        wanted = functional.layer_norm(clean_image[rows, at].float(), clean_image.shape[2:], eps=1e-6)
        guess = student.heads["mrm_image"](fused[rows, at])
        return {
            "mim": functional.mse_loss(student.heads["mim"](fused[rows, at]).float(), wanted),
            "mrm_image": _distance(guess, target[rows, at]).mean(),
        }

    def _masked_text(
        self, batch: PairBatch, image: Tensor, clean_image: Tensor, target: Tensor | None
    ) -> dict[str, Tensor]:
        student, teacher, valid = self.student, self.teacher, batch.is_valid
        alpha, first = self.config.losses.mlm_soft_target_alpha, student.num_image_positions
        fused = student.fuse(image, student.text(batch.masked_input_ids, valid), valid)[:, first:]  # [B, L, D]
        logits = student.heads["mlm"](fused).float()  # [B, L, V]
        rows = torch.arange(len(batch), device=fused.device)[:, None].expand_as(batch.text_slots)
        is_masked = torch.zeros_like(valid)
        is_masked[rows[batch.text_slot_is_valid], batch.text_slots[batch.text_slot_is_valid]] = True
        labels = batch.input_ids.masked_fill(~is_masked, -100)
        losses = {"mlm": functional.cross_entropy(logits.transpose(1, 2), labels)}
        if alpha:
            with torch.no_grad():
                guess = teacher.fuse(clean_image, teacher.text(batch.masked_input_ids, valid), valid)[:, first:]
                probs = teacher.heads["mlm"](guess).float().softmax(dim=-1)
            soft = -(probs * logits.log_softmax(dim=-1)).sum(dim=-1)[is_masked].mean()
            losses["mlm"] = (1 - alpha) * losses["mlm"] + alpha * soft
        if target is not None:
            losses["mrm_text"] = _distance(student.heads["mrm_text"](fused), target[:, first:])[is_masked].mean()
        return losses


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of unit vectors."""
    return 2 - 2 * functional.cosine_similarity(prediction.float(), target.float(), dim=-1)
