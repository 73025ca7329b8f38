"""A small pre-training task, and one step of it that shares no work: a sample at a time, unpadded, in Python loops."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mamo.config.schema import RunConfig
from mamo.data.pairs import Sample, hash_id
from mamo.models.vlm import Backbone
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.task import PretrainTask
from mamo.training.freezing import freeze_unused_parameters
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of

LOSS_NAMES = ("itc", "itm", "mlm", "mim", "mrm_image", "mrm_text")

IMAGE_IDS = (0, 1, 2, 2, 3, 4, 5, 6)
CAPTIONS = (
    "a red circle",
    "a large blue square above a small green circle",
    "two circles",
    "a green triangle left of a red square",
    "one small yellow circle",
    "a blue circle below a red triangle",
    "a blue circle below a red triangle",
    "three squares",
)
B, PATCHES = len(CAPTIONS), 9


@cache
def tokenizer() -> Any:
    return scenes_tokenizer()


def tiny(
    names: tuple[str, ...] = LOSS_NAMES, mode: str = "alternate", fusion_type: str = "concat", **losses: Any
) -> RunConfig:
    weights = {name: float(name in names) for name in LOSS_NAMES}
    return config_of(
        data={"image_size_px": 24},
        model={
            "image": {"width": 24, "depth": 2},
            "text": {"width": 16, "mlp_width": 32},
            "fusion_layers": 2,
            "fusion_type": fusion_type,
            "itc_width": 8,
            "dropout": 0.0,
        },
        masking={"mode": mode, "image_ratio": 0.6, "text_ratio": 0.3},
        losses={"weights": weights, "queue_size": 0, "itm_pool_size": 4, **losses},
        training={"batch_size_global": B, "total_steps": 100, "warmup_steps": 0},
    )


def make(config: RunConfig) -> tuple[PretrainTask, PairBatch]:
    """A task whose teacher differs from its student, and a batch with repeated images and captions."""
    task = PretrainTask(config, tokenizer())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (*task.network.parameters(), *task.teacher.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter) * (parameter.ndim > 0))
    images = torch.randint(0, 256, (7, 3, 24, 24), dtype=torch.uint8)
    drawn = [
        (0, Sample(images[image_id], caption, image_id, hash_id(caption), row, ()))
        for row, (image_id, caption) in enumerate(zip(IMAGE_IDS, CAPTIONS))
    ]
    batch = task.collator(drawn)
    freeze_unused_parameters(task, batch)
    return task, batch


def make_exact(config: RunConfig) -> tuple[PretrainTask, PairBatch]:
    """The same in float64, with four past samples in the queue: one of image 1, one with the caption of sample 0."""
    task, batch = make(config)
    for module in task.modules().values():
        module.double()
    if config.losses.queue_size:
        feature = torch.nn.functional.normalize(torch.randn(2, 4, config.model.itc_width).double(), dim=-1)
        task.queue.push(*feature, torch.tensor([1, 50, 51, 52]), torch.tensor([60, int(batch.caption_id[0]), 62, 63]))
    return task, batch


def gradients(network: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a sum in which each loss has another weight, by parameter name."""
    total = sum((i + 1) * losses[name] for i, name in enumerate(sorted(losses)))
    assert isinstance(total, Tensor)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found) if g is not None}


class Naive:
    """Every loss of one step from single, unpadded samples; whole fusions, nothing shared between passes."""

    def __init__(self, task: PretrainTask, batch: PairBatch, alpha: float, mlm_alpha: float = 0) -> None:
        self.task, self.batch, self.alpha = task, batch, alpha
        self.body, self.teacher = task.network.backbone, task.teacher.module
        self.temperature = task.network.temperature
        self.mlm_alpha = mlm_alpha
        self.first_word = int(self.body.fusion.text_positions(torch.tensor(0)))
        self.pixels = self.body.image_encoder.normalize(batch.image)
        self.slots = [batch.text_slots[i][batch.text_slot_is_valid[i]].tolist() for i in range(B)]
        self.patches = [batch.masked_patches[i].tolist() for i in range(B)]

    def image(self, body: Backbone, i: int, is_masked: bool = False) -> Tensor:
        visible = self.batch.visible_patches[i : i + 1] if is_masked else None
        return body.image_encoder(self.pixels[i : i + 1], visible)

    def text(self, body: Backbone, i: int, is_masked: bool = False) -> Tensor:
        ids = (self.batch.masked_input_ids if is_masked else self.batch.input_ids)[i][self.batch.is_valid[i]][None]
        return body.text_encoder(ids, torch.ones_like(ids, dtype=torch.bool))

    def fuse(self, body: Backbone, i: int, j: int, image_masked: bool = False, text_masked: bool = False) -> Tensor:
        """Image i with caption j -> [S, D]."""
        visible = self.batch.visible_patches[i : i + 1] if image_masked else None
        slots = body.fusion.embed_image(self.image(body, i, image_masked), visible)
        text = self.text(body, j, text_masked)
        return body.fusion(slots, text, torch.ones(text.shape[:2], dtype=torch.bool))[0]

    def feature(self, body: Backbone, i: int) -> tuple[Tensor, Tensor]:
        return body.image_feature(self.image(body, i))[0], body.text_feature(self.text(body, i))[0]

    def matches(self, i: int, image_id: int, caption_id: int) -> bool:
        return int(self.batch.image_id[i]) == image_id or int(self.batch.caption_id[i]) == caption_id

    def itc(self) -> Tensor:
        queue, ids, captions = self.task.queue, self.batch.image_id.tolist(), self.batch.caption_id.tolist()
        with torch.no_grad():
            candidates = [self.feature(self.teacher, n) for n in range(B)]
        for n in range(int(queue.filled)):
            candidates.append((queue.image_feature[n], queue.text_feature[n]))
            ids.append(int(queue.image_id[n]))
            captions.append(int(queue.caption_id[n]))
        loss = torch.zeros(()).double()
        for i in range(B):
            kept = [n for n in range(len(ids)) if n == i or not self.matches(i, ids[n], captions[n])]
            for side in (0, 1):
                online = self.feature(self.body, i)[side]
                scores = torch.stack([online @ candidates[n][1 - side] / self.temperature for n in kept])
                with torch.no_grad():
                    opinion = [candidates[i][side] @ candidates[n][1 - side] / self.temperature for n in kept]
                    target = self.alpha * torch.stack(opinion).softmax(0)
                target[kept.index(i)] += 1 - self.alpha
                loss = loss - (target * (scores - scores.exp().sum().log())).sum() / 2
        return loss / B

    def itm(self, is_hard: bool = True) -> Tensor:
        with torch.no_grad():
            features = [self.feature(self.body, i) for i in range(B)]
        ids, captions = self.batch.image_id.tolist(), self.batch.caption_id.tolist()
        pairs = [(i, i, 1) for i in range(B)]
        for i in range(B):
            pool = range(i // 4 * 4, i // 4 * 4 + 4)
            others = [n for n in pool if not self.matches(i, ids[n], captions[n])]
            if others:
                noise = self.batch.itm_noise[i]

                def score(n: int, side: int, i: int = i, noise: Tensor = noise) -> float:
                    similarity = features[i][side] @ features[n][1 - side] / self.temperature.detach()
                    return float(is_hard * similarity + noise[side, n % 4])

                pairs.append((i, max(others, key=lambda n: score(n, 0)), 0))
                pairs.append((max(others, key=lambda n: score(n, 1)), i, 0))
        loss = torch.zeros(()).double()
        for i, j, is_match in pairs:
            logits = self.task.network.itm(self.fuse(self.body, i, j)[self.first_word])
            loss = loss - (logits[is_match] - logits.exp().sum().log())
        return loss / len(pairs)

    def masked(self, mode: str) -> dict[str, Tensor]:
        network, joint = self.task.network, mode == "joint"
        sums = {name: torch.zeros(()).double() for name in ("mim", "mrm_image", "mlm", "mrm_text")}
        for i in range(B):
            by_image = self.fuse(self.body, i, i, image_masked=True, text_masked=joint)
            by_text = self.fuse(self.body, i, i, image_masked=joint, text_masked=True)
            with torch.no_grad():
                goal, features = self.fuse(self.teacher, i, i), self.image(self.teacher, i)[0]
                guess = self.fuse(self.teacher, i, i, text_masked=True)
            for p in self.patches[i] if network.get_head("mim") is not None else ():
                token = by_image[1 + p]
                wanted = (features[1 + p] - features[1 + p].mean()) / (features[1 + p].var(correction=0) + 1e-6).sqrt()
                sums["mim"] = sums["mim"] + (network.mim(token[None, None])[0, 0] - wanted).square().mean()
                sums["mrm_image"] = sums["mrm_image"] + self.distance(network.mrm_image(token), goal[1 + p])
            for t in self.slots[i] if network.get_head("mlm") is not None else ():
                place = self.first_word + t
                token, logits = by_text[place], network.mlm(by_text[place][None])[0]
                target = nn.functional.one_hot(self.batch.input_ids[i, t], len(logits)).double()
                if self.mlm_alpha:
                    with torch.no_grad():
                        words = self.task.teacher.mlm(guess[place][None])[0]
                    target = (1 - self.mlm_alpha) * target + self.mlm_alpha * words.exp() / words.exp().sum()
                sums["mlm"] = sums["mlm"] - (target * (logits - logits.exp().sum().log())).sum()
                sums["mrm_text"] = sums["mrm_text"] + self.distance(network.mrm_text(token), goal[place])
        n_patches, n_words = sum(map(len, self.patches)), sum(map(len, self.slots))
        counts = {"mim": n_patches, "mrm_image": n_patches, "mlm": n_words, "mrm_text": n_words}
        return {name: value / counts[name] for name, value in sums.items()}

    @staticmethod
    def distance(prediction: Tensor, target: Tensor) -> Tensor:
        return 2 - 2 * (prediction @ target) / (prediction @ prediction).sqrt() / (target @ target).sqrt()
