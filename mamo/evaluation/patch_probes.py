"""Patch probes: linear read-outs of a frozen network's patches at every layer, in the embedded world.

| question | object |
|---|---|
| own | the object that the patch shows |
| neighbour | the nearest other object, which the pixels of the patch do not show |
| hidden | an object whose patches are masked, asked at its place |

Encoder layers have no token at a masked place: the nearest visible patch is read there. Fused layers are read with four
captions: true, true without the probed attribute, empty, and of another scene (shuffled). A true caption contains the
answers, so its number measures what the patch takes from the words; `empty` what it keeps of the picture. The baselines
are the pixels of the same patch, the same network with random weights, and the commonest answer.

Legend: B scenes, P patches, S fused tokens, D width, M examples.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.data.collate import tokenize
from mamo.data.processor import Processor
from mamo.evaluation.scorer import eval_mode
from mamo.models.vlm import Backbone
from mamo.world.patches import (
    HiddenObject,
    ShownPatch,
    caption_without,
    hidden_objects,
    probed_attributes,
    shown_patches,
)
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, Difficulty, Scene, SceneWorld, Split

QUESTIONS = ("own", "neighbour", "hidden")
PIXELS, COMMONEST = "pixels", "commonest answer"
FIT_ITERATIONS, INVERSE_PENALTY = 50, 0.1
_SCENES_AT_ONCE = 128
Floats = npt.NDArray[np.float32]
Labels = Mapping[str, Sequence[str]]
"""Answers by QUESTION/ATTRIBUTE."""
Features = dict[tuple[str, str], Floats]
"""float32 [M, D] by layer and caption; the caption of layers that read none is empty ("-")."""
NO_CAPTION, WITHOUT = "-", "without "
_LAST_FUSED = "fusion output"
_OUTPUTS = {
    "encoder": ("encoder output", NO_CAPTION),
    "no_caption": (_LAST_FUSED, "empty"),
    "true_caption": (_LAST_FUSED, "true"),
}
"""Where `patch_metrics` reads, by the end of the metric's name."""


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """Accuracies in percent of one layer: `accuracy` and, of the network with random weights, `random`.

    Keys are QUESTION/ATTRIBUTE; a missing one cannot be read.
    """

    layer: str
    caption: str
    accuracy: dict[str, float]
    random: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Scenes:
    """Scenes of one split with their pictures uint8 [B, 3, H, W] and what is asked about them."""

    scenes: list[Scene]
    pictures: Tensor
    shown: list[ShownPatch]
    hidden: list[HiddenObject]


def probe_patches(
    backbone: Backbone, random: Backbone, processor: Processor, difficulty: Difficulty, n_fit: int, n_test: int
) -> list[ProbeRow]:
    """Probe a frozen network.

    Args:
        backbone: the network, in any mode.
        random: the same with random weights.
        processor: its tokenizer and image size.
        difficulty: of the embedded world.
        n_fit: scenes of the split `val`, on which the read-outs are fitted.
        n_test: scenes of the split `test`, on which they are judged.

    Returns:
        The commonest answer, the pixels, then every layer and caption.

    Raises:
        ValueError: no patch of the scenes shows an object.
    """
    fit = _some_scenes("val", n_fit, difficulty, processor, backbone)
    test = _some_scenes("test", n_test, difficulty, processor, backbone)
    _require_objects(fit, test)
    labels = _labels(fit), _labels(test)
    found = {(COMMONEST, NO_CAPTION): {name: _majority(labels[0][name], labels[1][name]) for name in labels[0]}}
    features = [_features(backbone, processor, part) for part in (fit, test)]
    found |= _accuracies(features, labels)
    if not backbone.fusion.has_patch_outputs:
        found["fusion", NO_CAPTION] = {}
    features = [_features(random, processor, part, has_pixels=False) for part in (fit, test)]
    baseline = _accuracies(features, labels)
    return [ProbeRow(*key, accuracy, baseline.get(key, {})) for key, accuracy in found.items()]


def patch_metrics(backbone: Backbone, processor: Processor, difficulty: Difficulty, n_scenes: int) -> dict[str, float]:
    """Probe the outputs of a frozen network, as `probe_patches` does all of its layers.

    Args:
        backbone: the network, in any mode.
        processor: its tokenizer and image size.
        difficulty: of the embedded world.
        n_scenes: scenes to fit on, of the split `val`, and as many to judge on, of `test`.

    Returns:
        Accuracies in percent, by QUESTION/ATTRIBUTE/WHERE: `encoder`, its output; `no_caption` and `true_caption`, the
        last fused layer with them.

    Raises:
        ValueError: no patch of the scenes shows an object.
    """
    parts = [_some_scenes(split, n_scenes, difficulty, processor, backbone) for split in ("val", "test")]
    _require_objects(*parts)
    features = [_features(backbone, processor, part, has_pixels=False, only_outputs=True) for part in parts]
    found = _accuracies(features, (_labels(parts[0]), _labels(parts[1])))
    return {
        f"{name}/{where}": found[key][name] for where, key in _OUTPUTS.items() if key in found for name in found[key]
    }


def tables(rows: Sequence[ProbeRow]) -> str:
    """Format the rows as a Markdown table for each question: the network, and after a stroke the random weights."""
    lines = []
    names = list(rows[0].accuracy)
    for question in QUESTIONS:
        asked = [name for name in names if name.startswith(f"{question}/")]
        heads = [name.partition("/")[2] for name in asked]
        lines += ["", f"| {question} | caption | {' | '.join(heads)} |", "| --- | --- |" + " --- |" * len(heads)]
        lines += [f"| {row.layer} | {row.caption} | {' | '.join(_cell(row, name) for name in asked)} |" for row in rows]
    return "\n".join(lines[1:])


def _cell(row: ProbeRow, name: str) -> str:
    if name not in row.accuracy:
        return "—"
    return f"{row.accuracy[name]:.1f}" + (f" / {row.random[name]:.1f}" if name in row.random else "")


@torch.inference_mode(False)  # an evaluation is in it, and a tensor made there cannot be fitted
def linear_accuracies(fit: Floats, labels: Labels, test: Floats, test_labels: Labels) -> dict[str, float]:
    """Fit logistic regression on standardised features and return its accuracy on others in percent, by question.

    The questions share the passes over the features, not the weights. The objective is scikit-learn's at C = 0.1, the
    mean cross-entropy + |W|^2 / (2 C M). L-BFGS takes `FIT_ITERATIONS` steps.

    Args:
        fit, test: float32 [M, D].
        labels, test_labels: M answers by question.
    """
    mean, std = fit.mean(axis=0), fit.std(axis=0)
    scaled = [torch.from_numpy((values - mean) / np.where(std > 0, std, 1)) for values in (fit, test)]
    classes = {name: sorted(set(answers)) for name, answers in labels.items()}
    ends = list(itertools.accumulate(len(names) for names in classes.values()))
    parts = [slice(end - len(names), end) for end, names in zip(ends, classes.values(), strict=True)]
    rows = [torch.tensor([classes[name].index(answer) for answer in answers]) for name, answers in labels.items()]
    weight, bias = torch.zeros(fit.shape[1], ends[-1]), torch.zeros(ends[-1])
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()], max_iter=FIT_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def objective() -> float:
        optimizer.zero_grad()
        logits = scaled[0] @ weight + bias
        losses = [functional.cross_entropy(logits[:, part], row) for part, row in zip(parts, rows, strict=True)]
        loss = torch.stack(losses).sum() + weight.square().sum() / (2 * INVERSE_PENALTY * len(fit))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        logits = scaled[1] @ weight + bias
        found = [logits[:, part].argmax(dim=1).tolist() for part in parts]
    return {
        name: 100 * sum(classes[name][k] == answer for k, answer in zip(guess, test_labels[name])) / len(test)
        for name, guess in zip(labels, found, strict=True)
    }


def _some_scenes(
    split: Split, n_scenes: int, difficulty: Difficulty, processor: Processor, backbone: Backbone
) -> _Scenes:
    """Return the first scenes of a split."""
    world = SceneWorld(difficulty, WORLD_SEED)
    scenes = [world.scene(split, k) for k in range(n_scenes)]
    return _scenes(scenes, processor.image_size_px, backbone.image_encoder.grid)


def _require_objects(fit: _Scenes, test: _Scenes) -> None:
    if not (fit.shown and fit.hidden and test.shown and test.hidden):
        numbers = f"{len(fit.scenes)} and {len(test.scenes)}"
        raise ValueError(f"patch probes: no patch of {numbers} scenes shows an object; use more scenes")


def _scenes(scenes: list[Scene], size: tuple[int, int], grid: tuple[int, int]) -> _Scenes:
    pictures = torch.from_numpy(np.stack([render(scene, size) for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    return _Scenes(scenes, pictures, shown_patches(scenes, size, grid), hidden_objects(scenes, size, grid))


def _labels(part: _Scenes) -> dict[str, list[str]]:
    """Return the answers to QUESTION/ATTRIBUTE."""
    attributes = probed_attributes(part.scenes[0].difficulty)
    asked = {
        "own": [item.own for item in part.shown],
        "neighbour": [item.neighbour for item in part.shown],
        "hidden": [item.own for item in part.hidden],
    }
    return {f"{name}/{a}": [getattr(obj, a) for obj in objects] for name, objects in asked.items() for a in attributes}


def _majority(fit_labels: Sequence[str], test_labels: Sequence[str]) -> float:
    commonest = Counter(fit_labels).most_common(1)[0][0]
    return 100 * sum(label == commonest for label in test_labels) / len(test_labels)


def _accuracies(
    features: Sequence[tuple[Features, Features]], labels: tuple[Labels, Labels]
) -> dict[tuple[str, str], dict[str, float]]:
    """Fit and judge every read-out.

    Args:
        features: of shown and of hidden patches; to fit on, then to judge on.
        labels: to fit on, then to judge on.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for is_hidden, (fit, test) in enumerate(zip(*features, strict=True)):
        for layer, caption in fit:
            asked = [name for name in labels[0] if name.startswith("hidden/") == bool(is_hidden)]
            if caption.startswith(WITHOUT):
                asked = [name for name in asked if name.endswith(f"/{caption.removeprefix(WITHOUT)}")]
            own = [{name: part[name] for name in asked} for part in labels]
            accuracy = linear_accuracies(fit[layer, caption], own[0], test[layer, caption], own[1])
            found.setdefault((layer, "without it" if caption.startswith(WITHOUT) else caption), {}).update(accuracy)
    return found


def _features(
    network: Backbone, processor: Processor, part: _Scenes, has_pixels: bool = True, only_outputs: bool = False
) -> tuple[Features, Features]:
    """Return the features of the shown patches and of the hidden objects' places."""
    captions = _captions(part.scenes)
    if only_outputs:
        captions = {kind: captions[kind] for layer, kind in _OUTPUTS.values() if layer == _LAST_FUSED}
    reader = _Reader(network, processor, part.pictures, captions, has_pixels, only_outputs)
    shown, hidden = _Collector(), _Collector()
    with eval_mode(network):
        for start in range(0, len(part.scenes), _SCENES_AT_ONCE):
            rows = range(start, min(start + _SCENES_AT_ONCE, len(part.scenes)))
            places = [(item.row - start, item.patch) for item in part.shown if item.row in rows]
            reader.read(rows, None, places, places, shown)
        order: list[int] = []
        for group in _equally_masked(part.hidden):
            every = set(range(network.image_encoder.grid[0] * network.image_encoder.grid[1]))
            visible = [sorted(every - set(item.masked)) for item in group]
            nearest = [(k, visible[k].index(item.nearest_visible)) for k, item in enumerate(group)]
            places = [(k, item.patch) for k, item in enumerate(group)]
            reader.read([item.row for item in group], torch.tensor(visible), nearest, places, hidden)
            order += [item.row for item in group]
    back = np.argsort(order)
    return shown.features(), {key: values[back] for key, values in hidden.features().items()}


def _equally_masked(items: Sequence[HiddenObject]) -> Iterator[list[HiddenObject]]:
    """Yield batches in which all items have equally many masked patches."""
    by_number: dict[int, list[HiddenObject]] = {}
    for item in items:
        by_number.setdefault(len(item.masked), []).append(item)
    for several in by_number.values():
        for start in range(0, len(several), _SCENES_AT_ONCE):
            yield several[start : start + _SCENES_AT_ONCE]


def _captions(scenes: Sequence[Scene]) -> dict[str, list[str]]:
    """Return the captions of all scenes by kind."""
    attributes = probed_attributes(scenes[0].difficulty)
    true = [caption_without(scene) for scene in scenes]
    without = {WITHOUT + name: [caption_without(scene, name) for scene in scenes] for name in attributes}
    return {"true": true, **without, "empty": [""] * len(scenes), "shuffled": [*true[1:], true[0]]}


class _Collector:
    """Features of one batch after the other."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, str], list[Tensor]] = {}

    def add(self, layer: str, caption: str, values: Tensor) -> None:
        self.parts.setdefault((layer, caption), []).append(values.float().cpu())

    def features(self) -> Features:
        return {key: torch.cat(values).numpy() for key, values in self.parts.items()}


Places = Sequence[tuple[int, int]]
"""(scene of the batch, index of a patch)."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """A network in eval mode, with the pictures uint8 [N, 3, H, W] and captions (by kind) of all scenes."""

    network: Backbone
    processor: Processor
    pictures: Tensor
    captions: dict[str, list[str]]
    has_pixels: bool
    only_outputs: bool

    def read(
        self, rows: Sequence[int], visible: Tensor | None, encoded_at: Places, fused_at: Places, to: _Collector
    ) -> None:
        """Run the network on the scenes `rows` and collect its tokens at the places.

        Args:
            rows: the scenes of the batch.
            visible: int64 [B, P_visible], the patches that are encoded; None for all.
            encoded_at: places among the encoded patches.
            fused_at: places among all patches.
            to: takes the features.
        """
        encoder, fusion, image = self.network.image_encoder, self.network.fusion, self.pictures[list(rows)]
        device = next(self.network.parameters()).device
        if self.has_pixels:
            to.add(PIXELS, NO_CAPTION, _at(_patches(image, encoder.patch_size_px, visible), encoded_at, 0))
        visible = None if visible is None else visible.to(device)
        with _recorded(encoder.layers) as layers:
            encoded = encoder.encode(encoder.embed(image.to(device)), visible)
        for number, tokens in enumerate([] if self.only_outputs else layers, 1):
            n_tokens = encoded.shape[1] + encoder.num_registers
            if tokens.ndim == 3 and tokens.shape[1] == n_tokens:  # stages and towers from outside have other shapes
                first = encoder.num_prefix_tokens + encoder.num_registers
                to.add(f"encoder {number}", NO_CAPTION, _at(tokens, encoded_at, first))
        to.add("encoder output", NO_CAPTION, _at(encoded, encoded_at, encoder.num_prefix_tokens))
        if not fusion.has_patch_outputs:
            return
        slots = fusion.embed_image(encoded, *(() if visible is None else (visible,)))
        for kind, texts in self.captions.items():
            chosen = [self.processor.clean(texts[row]) for row in rows]
            made = tokenize(self.processor.tokenizer, chosen, self.processor.text_max_tokens)
            ids, is_valid = (value.to(device) for value in made)
            with _recorded(fusion.layers) as layers:
                fusion(slots, self.network.text_encoder(ids, is_valid), is_valid)
            named = {f"fusion {number}": tokens for number, tokens in enumerate(layers, 1)}
            for layer, tokens in ({_LAST_FUSED: layers[-1]} if self.only_outputs else named).items():
                to.add(layer, kind, _at(tokens, fused_at, fusion.num_prefix_tokens))


def _patches(image: Tensor, patch_size_px: tuple[int, int], visible: Tensor | None) -> Tensor:
    """Cut images uint8 [B, 3, H, W] into patches [B, P, 3 p q], or the visible ones [B, P_visible, 3 p q]."""
    cut = image.unfold(2, patch_size_px[0], patch_size_px[0]).unfold(3, patch_size_px[1], patch_size_px[1])
    patches = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return patches if visible is None else patches.gather(1, visible[:, :, None].expand(-1, -1, patches.shape[2]))


def _at(tokens: Tensor, places: Places, num_prefix_tokens: int) -> Tensor:
    """Return the tokens [M, D] of [B, num_prefix_tokens + P, D] at some patches."""
    scenes, patches = torch.tensor(places, dtype=torch.int64).view(-1, 2).unbind(dim=1)
    return tokens[scenes.to(tokens.device), patches.to(tokens.device) + num_prefix_tokens]


@contextmanager
def _recorded(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Record what each layer returns, in order."""
    outputs: list[Tensor] = []
    keep: Callable[..., None] = lambda _, __, output: outputs.append(output)  # noqa: E731
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
