"""The pre-training step against one that shares no work, and what else it must and must not do."""

import copy
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamo.tasks.pretrain.losses import linear_ramp, sphere_spread
from mamo.teacher import momentum_at
from mamo.training.optim import make_optimizer
from tests.tasks.pretrain.naive_step import CAPTIONS, LOSS_NAMES, B, Naive, gradients, make, make_exact, tiny

CROSS = ("itc", "itm", "mlm", "mrm_text")  # what needs no fused image tokens
ROWS = {  # the rows of the paper's Table 6
    "itc+itm": ("itc", "itm"),
    "+mlm": ("itc", "itm", "mlm"),
    "+mlm+mim": ("itc", "itm", "mlm", "mim"),
    "+mrm": ("itc", "itm", "mrm_image", "mrm_text"),
    "+mrm+mlm": ("itc", "itm", "mlm", "mrm_image", "mrm_text"),
    "all": LOSS_NAMES,
}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes in fp32 by a cast computes in float64, so that equal means equal to ten digits."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.parametrize(
    ("names", "fusion_type"),
    [
        (LOSS_NAMES, "concat"),
        (CROSS, "cross"),
        (("itc", "itm", "mim", "mrm_image"), "concat"),  # jointly masked text serves these too
        (("itc", "itm", "mlm", "mrm_text"), "concat"),
    ],
)
@pytest.mark.parametrize("mode", ["alternate", "joint"])
@pytest.mark.usefixtures("exact")
def test_step_equals_the_naive_step(mode: str, names: tuple[str, ...], fusion_type: str) -> None:
    """Bug: a pass gets the wrong view, slots are shifted, padding leaks, a target has a gradient, a count is local."""
    mlm_alpha = 0.3 if "mlm" in names else 0.0
    soft = {"itc_soft_target_alpha": 0.4, "mlm_soft_target_alpha": mlm_alpha}
    task, batch = make_exact(tiny(names, mode, fusion_type, queue_size=6, **soft))
    assert len({len(c.split()) for c in CAPTIONS}) > 3  # the rows are padded differently
    targets, _ = task.compute_targets(batch, B, step=0)
    ours, _ = task.losses(batch, targets, 0)
    naive = Naive(task, batch, alpha=0.4, mlm_alpha=mlm_alpha)
    expected = {"itc": naive.itc(), "itm": naive.itm(), **naive.masked(mode)}
    expected = {name: expected[name] for name in names}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-10, rtol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    found, wanted = gradients(task.network, ours), gradients(task.network, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.usefixtures("exact")
def test_negatives_are_uniform_at_first_and_hard_from_their_step_on() -> None:
    """Bug: one step too many or too few, or a similarity that still decides among negatives drawn at random."""
    task, batch = make_exact(tiny(("itc", "itm"), itm_uniform_steps=3, temperature=0.02))
    naive = Naive(task, batch, alpha=0)
    uniform, hard = naive.itm(is_hard=False), naive.itm()
    assert abs(float((uniform - hard).detach())) > 1e-3
    for step, expected in ((0, uniform), (2, uniform), (3, hard), (4, hard), (1, uniform)):
        targets, _ = task.compute_targets(batch, B, step)
        torch.testing.assert_close(task.losses(batch, targets, 0)[0]["itm"], expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("mode", ["alternate", "joint"])
@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 2, 8), (0, 6, 8)])
@pytest.mark.usefixtures("exact")
def test_uneven_micro_batches_add_up_to_the_whole(mode: str, cuts: tuple[int, ...]) -> None:
    """Bug: accumulation changes a loss or gradient, for a part divides by its own count or takes another's targets."""
    task, batch = make_exact(tiny(mode=mode, queue_size=6, itm_pool_size=2, itc_soft_target_alpha=0.4))
    targets, _ = task.compute_targets(batch, B, 0)
    whole, metrics = task.losses(batch, targets, 0)
    in_parts, _ = task.compute_targets(batch, 4, 0)
    losses, numbers = Counter(), Counter()
    for start, stop in itertools.pairwise(cuts):
        part, part_metrics = task.losses(batch.part(start, stop), in_parts, start)
        for name, value in part.items():
            losses[name] = losses[name] + value
        for name, value in part_metrics.items():
            numbers[name] = numbers[name] + value
    for name, value in whole.items():
        torch.testing.assert_close(losses[name], value, atol=1e-12, rtol=1e-10)
    assert {name: float(v) for name, v in numbers.items()} == pytest.approx({n: float(v) for n, v in metrics.items()})
    found, wanted = gradients(task.network, dict(losses)), gradients(task.network, whole)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-11, rtol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("mode", ["alternate", "joint"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("mim_target", ["features", "pixels"])
def test_every_trainable_parameter_gets_a_gradient(row: str, mode: str, mim_target: str) -> None:
    """Bug: a head or embedding that no loss reaches trains on weight decay alone (and stops data-parallel training)."""
    if mim_target == "pixels" and "mim" not in ROWS[row]:
        mim_target = "features"
    task, batch = make(tiny(ROWS[row], mode, mim_target=mim_target, queue_size=3))
    targets, _ = task.compute_targets(batch, B, 0)
    losses, _ = task.losses(batch, targets, 0)
    assert set(losses) == set(ROWS[row])
    found = gradients(task.network, losses)
    trainable = {name for name, p in task.network.named_parameters() if p.requires_grad}
    assert set(found) == trainable
    # the softmax over keys does not see a shift that all keys share
    dead = {name for name, gradient in found.items() if not gradient.any() and not name.endswith("key.bias")}
    assert not dead
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_each_trainable_parameter_is_optimized_once_and_no_teacher() -> None:
    """Bug: the tied word embeddings stepped twice, or the optimizer moves the teacher."""
    for row in ROWS.values():
        task, _ = make(tiny(row))
        held = Counter(
            id(p) for group in make_optimizer(task.network, task.config.training).param_groups for p in group["params"]
        )
        assert held == Counter({id(p): 1 for p in task.network.parameters() if p.requires_grad})
        assert not held.keys() & {id(p) for p in task.teacher.parameters()}
        assert not any(p.requires_grad for p in task.teacher.parameters())


@pytest.mark.parametrize("mode", ["alternate", "joint"])
def test_computing_losses_moves_no_state(mode: str) -> None:
    """Bug: teacher or queue move inside the forward pass, so that evaluation or accumulation moves them too."""
    task, batch = make(tiny(mode=mode, queue_size=6, itc_soft_target_alpha=0.4))
    before = {name: copy.deepcopy(module.state_dict()) for name, module in task.modules().items()}
    targets, _ = task.compute_targets(batch, 4, 0)
    for start in (0, 4):
        losses, _ = task.losses(batch.part(start, start + 4), targets, start)
        gradients(task.network, losses)
    for name, module in task.modules().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name][key]), f"{name}.{key}"
    assert all(p.grad is None for p in task.teacher.parameters())


def test_on_optimizer_step_moves_teacher_queue_and_temperature_once() -> None:
    """Bug: the queue gets the online features or the old queue again, the teacher the wrong momentum or nothing."""
    task, batch = make(tiny(queue_size=12, mlm_soft_target_alpha=0.4))
    targets, _ = task.compute_targets(batch, B, 0)
    teacher = task.teacher.module
    with torch.no_grad():
        expected = teacher.image_feature(teacher.image_encoder(batch.image))
        task.network.temperature.fill_(0.7)
    old = {name: p.clone() for name, p in teacher.named_parameters()}
    old_head = [p.clone() for p in task.teacher.mlm.bert_named_tensors().values()]
    task.on_optimizer_step(batch, targets, step=10)
    momentum = momentum_at(task.config.teacher, 10, 100)
    for name, parameter in task.network.backbone.named_parameters():
        wanted = momentum * old[name] + (1 - momentum) * parameter.detach()
        torch.testing.assert_close(teacher.get_parameter(name), wanted, msg=name)
    for before, after, mine in zip(
        old_head, task.teacher.mlm.bert_named_tensors().values(), task.network.mlm.bert_named_tensors().values()
    ):
        torch.testing.assert_close(after, momentum * before + (1 - momentum) * mine)
    assert task.teacher.mlm.decoder.weight is teacher.text_encoder.word_embeddings.weight
    assert int(task.queue.filled) == B
    torch.testing.assert_close(task.queue.image_feature[:B], expected)
    assert torch.equal(task.queue.image_id[:B], batch.image_id)
    assert torch.equal(task.queue.caption_id[:B], batch.caption_id)
    assert float(task.network.temperature.detach()) == pytest.approx(0.5)


def test_false_negatives_change_nothing() -> None:
    """Bug: another view of the same image, or of the same caption, in batch or queue repels its own pair."""
    task, batch = make(tiny(("itc",), queue_size=6, itc_soft_target_alpha=0.4))
    features = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
    task.queue.push(*features, torch.tensor([1, 50, 51, 52]), torch.tensor([60, int(batch.caption_id[0]), 62, 63]))
    targets, _ = task.compute_targets(batch, B, 0)
    candidates = targets.fixed["itc"]
    excluded = {0: {9}, 1: {8}, 2: {3}, 3: {2}, 4: set(), 5: {6}, 6: {5}, 7: set()}

    def loss(row: int, image: Tensor | None, text: Tensor | None) -> float:
        changed = dataclasses.replace(targets, fixed={"itc": dataclasses.replace(candidates, image=image, text=text)})
        return float(task.losses(batch.part(row, row + 1), changed, row)[0]["itc"].detach())

    assert candidates.image.shape == (B + 6, 8)
    for row in range(B):
        expected = loss(row, candidates.image, candidates.text)
        for candidate in range(B + 6):
            image, text = candidates.image.clone(), candidates.text.clone()
            image[candidate] = -3 * image[candidate] + 1
            text[candidate] = -2 * text[candidate] - 1
            is_unused = candidate in excluded[row] or candidate >= B + 4  # the last two slots were never filled
            assert (loss(row, image, text) == expected) == is_unused, (row, candidate)


def test_a_batch_of_one_image_has_nothing_to_contrast() -> None:
    """Bug: a batch in which every sample matches every other crashes, or trains on wrong negatives."""
    task, batch = make(tiny(("itc", "itm")))
    batch = dataclasses.replace(batch, image_id=torch.zeros_like(batch.image_id))
    targets, _ = task.compute_targets(batch, B, 0)
    losses, _ = task.losses(batch, targets, 0)
    assert float(losses["itc"].detach()) == pytest.approx(0, abs=1e-6)
    assert int(targets.counts["itm"]) == B  # the positives alone
    assert float(losses["itm"].detach()) > 0


def test_alpha_grows_over_its_ramp() -> None:
    """Bug: soft targets from a teacher that knows nothing yet, a share that never arrives, or one ramp for both."""
    ramps = {"itc_soft_target_alpha": 0.4, "itc_soft_target_ramp_steps": 10, "mlm_soft_target_alpha": 0.2}
    task, batch = make(tiny(("itc", "mlm"), mlm_soft_target_ramp_steps=20, **ramps))
    fixed = [task.compute_targets(batch, B, step)[0].fixed for step in (0, 5, 10, 99)]
    shares = [(each["itc"].alpha, each["mlm"]) for each in fixed]
    assert shares == [pytest.approx(pair) for pair in ((0, 0), (0.2, 0.05), (0.4, 0.1), (0.4, 0.2))]
    assert linear_ramp(0.4, 0, step=0) == 0.4


def test_in_batch_contrast_equals_cross_entropy() -> None:
    """Bug: `itc_candidates: batch` still reads the teacher, or excludes by the wrong rows."""
    task, batch = make(tiny(("itc",), itc_candidates="batch"))
    targets, _ = task.compute_targets(batch, B, 0)
    losses, _ = task.losses(batch, targets, 0)
    body = task.network.backbone
    image = body.image_feature(body.image_encoder(batch.image))
    text = body.text_feature(body.text_encoder(batch.input_ids, batch.is_valid))
    scores = image @ text.T / 0.07
    for i, j in ((2, 3), (3, 2), (5, 6), (6, 5)):
        scores[i, j] = -torch.inf
    wanted = (
        nn.functional.cross_entropy(scores, torch.arange(B)) + nn.functional.cross_entropy(scores.T, torch.arange(B))
    ) / 2
    torch.testing.assert_close(losses["itc"], wanted)


@pytest.mark.parametrize("candidates", ["batch", "teacher"])
def test_sigmoid_contrast_equals_a_loop_over_pairs(candidates: str) -> None:
    """Bug: the bias is divided by the temperature or not learned, or one direction is left out."""
    task, batch = make(tiny(("itc",), itc_candidates=candidates, itc_contrast="sigmoid", temperature=0.1))
    with torch.no_grad():
        task.network.get_head("itc_bias").fill_(-3.0)
    targets, _ = task.compute_targets(batch, B, 0)
    losses, _ = task.losses(batch, targets, 0)
    sides = []
    for body in (task.network.backbone, task.teacher.module if candidates == "teacher" else task.network.backbone):
        image = body.image_feature(body.image_encoder(batch.image))
        sides.append((image, body.text_feature(body.text_encoder(batch.input_ids, batch.is_valid))))
    (image, text), (other_image, other_text) = [[side.detach() for side in pair] for pair in sides]
    total = 0.0
    for i in range(B):
        for j in range(B):
            if i != j and (i, j) in ((2, 3), (3, 2), (5, 6), (6, 5)):
                continue
            for one, other in ((image[i], other_text[j]), (text[i], other_image[j])):
                logit = float(one @ other) / 0.1 - 3.0
                total += math.log1p(math.exp(-logit if i == j else logit))
    assert float(losses["itc"].detach()) == pytest.approx(total / (2 * B), rel=1e-5)
    losses["itc"].backward()
    assert task.network.get_head("itc_bias").grad.abs() > 0


def test_the_trivial_value_of_sigmoid_contrast_is_that_of_the_best_constant() -> None:
    """Bug: an alarm at log N, which a constant of sigmoid contrast never reaches, or never an alarm."""
    task, batch = make(tiny(("itc",), itc_contrast="sigmoid", queue_size=24))
    n = B + 24
    constants = torch.linspace(-9, 0, 9001, dtype=torch.float64)
    sigmoid = nn.functional.logsigmoid
    best = (-sigmoid(constants) - (n - 1) * sigmoid(-constants)).min()
    assert task.trivial_losses(batch)["loss/itc"] == pytest.approx(float(best), abs=1e-5)


def test_spread_tells_collapse_from_a_full_sphere() -> None:
    """Bug: a collapse metric that depends on the width, or does not fall when all features agree."""
    torch.manual_seed(0)
    for width in (8, 256):
        full = nn.functional.normalize(torch.randn(5000, width), dim=-1)
        assert float(sphere_spread(full)) == pytest.approx(1, abs=0.02)
        assert float(sphere_spread(full[:1].expand(100, width))) == pytest.approx(0, abs=1e-5)
        half = nn.functional.normalize(torch.randn(5000, width) * (torch.arange(width) < width // 4), dim=-1)
        assert float(sphere_spread(half)) == pytest.approx(math.sqrt(1 / 4), abs=0.02)


def count(calls: Counter[str], owner: Any, method: str, name: str) -> None:
    """Count calls of a bound method."""
    original: Callable[..., Any] = getattr(owner, method)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return original(*arguments, **options)

    setattr(owner, method, counted)


@pytest.mark.parametrize("mode", ["alternate", "joint"])
def test_no_work_is_done_twice(mode: str) -> None:
    """Bug: the clean image or caption is encoded again for each pass, or the last fusion layer computes unread ones."""
    task, batch = make(tiny(mode=mode, mlm_soft_target_alpha=0.4))
    body, teacher = task.network.backbone, task.teacher.module
    calls: Counter[str] = Counter()
    for encoder, side in ((body.image_encoder, "online"), (teacher.image_encoder, "teacher")):
        count(calls, encoder, "embed", f"{side} embed")
        count(calls, encoder, "encode", f"{side} encode")
    for side, network in (("online", body), ("teacher", teacher)):
        network.text_encoder.register_forward_hook(lambda *_, side=side: calls.update([f"{side} text"]))
    read: list[tuple[int, ...]] = []
    for network in (body, teacher):
        network.fusion.layers[-1].register_forward_hook(
            lambda layer, inputs, output: read.append(tuple(output.shape[:2]))
        )
    targets, _ = task.compute_targets(batch, B, 0)
    task.losses(batch, targets, 0)
    assert calls == {
        "online embed": 1, "online encode": 2, "online text": 1,
        "teacher embed": 1, "teacher encode": 1, "teacher text": 1,
    }  # fmt: skip
    n_image, n_text = batch.masked_patches.shape[1], batch.text_slots.shape[1]
    masked = [(B, n_image + n_text)] if mode == "joint" else [(B, n_image), (B, n_text)]
    assert sorted(read) == sorted([(B, n_image + n_text), (B, n_text), (3 * B, 1), *masked])


def test_cross_attention_embeds_each_side_once() -> None:
    """Bug: keys and values of an image, or a text's first self-attention, computed for every pair anew."""
    task, batch = make(tiny(CROSS, fusion_type="cross", mlm_soft_target_alpha=0.4))
    sizes: list[tuple[str, int]] = []
    for side, body in (("online", task.network.backbone), ("teacher", task.teacher.module)):
        first = body.fusion.layers[0]
        for name in ("project_image", "attend_text"):
            original = getattr(first, name)

            def counted(tokens: Tensor, *rest: Any, original: Any = original, key: str = f"{side} {name}") -> Tensor:
                sizes.append((key, len(tokens)))
                return original(tokens, *rest)

            setattr(first, name, counted)
    targets, _ = task.compute_targets(batch, B, 0)
    task.losses(batch, targets, 0)
    texts = [("attend_text", B)] * 2  # the clean and the masked caption
    once = [("project_image", B), *texts]
    assert sorted(sizes) == sorted((f"{side} {name}", n) for side in ("online", "teacher") for name, n in once)


@pytest.mark.parametrize("mode", ["alternate", "joint"])
def test_every_parameter_of_cross_attention_gets_a_gradient(mode: str) -> None:
    """Bug: a cross-attention that no token goes through, or a mask token that this fusion has no use for."""
    task, batch = make(tiny(CROSS, mode, "cross", queue_size=3, mlm_soft_target_alpha=0.4))
    targets, _ = task.compute_targets(batch, B, step=1)
    found = gradients(task.network, task.losses(batch, targets, 0)[0])
    assert set(found) == {name for name, p in task.network.named_parameters() if p.requires_grad}
    dead = {name for name, gradient in found.items() if not gradient.any() and not name.endswith("key.bias")}
    assert not dead
    assert not any(p.requires_grad for p in task.teacher.parameters())
