"""Fine-grained probes of the embedded world: caption-vs-foil accuracy and masked-word accuracy.

A word is masked only where the image decides it: any other word that the grammar allows there makes the caption false.

- "a small [MASK] circle" is used for one small circle, or two of one colour; never for a red and a blue one.
- "a [MASK] circle" is not used: the size and the colour would both be right.
- "higher than" is used only where neither "larger than" nor "smaller than" is true.
- Numbers are masked only in the counting caption, as other captions list what they count; never in "one circle", whose
  noun gives the number away.
- In captions with absolute positions, positions are masked and relations are not, as they would follow from them.

Either of two synonyms ("small", "little") is right.

Legend: N items, W tokens of the masked word, A right answers of an item.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamo.config.schema import ItemScore
from mamo.evaluation.items import pairs_of, score_pairs
from mamo.evaluation.metrics.items import judge
from mamo.evaluation.scorer import EncodedImages, MaskedWordPredictor, Scorer
from mamo.world.masked_words import MaskedWord
from mamo.world.probes import ProbeItem

TIE = 0.5
"""Value of a tie between a caption and its foil; published sets count it as wrong."""


def probe_accuracy(
    scorer: Scorer, images: EncodedImages, items: Sequence[ProbeItem], image_row: dict[int, int]
) -> dict[str, float]:
    """Compute the accuracy in percent by "itc" and "itm", as far as the network has the heads.

    The items are scored and judged as those of published sets are, in the precision of the weights, and with `TIE`.

    Args:
        scorer: scores images and texts.
        images: encoded images of the scenes.
        items: caption and foil of a scene each.
        image_row: scene index -> row in `images`.
    """
    records = [item.as_item("probe") for item in items]
    pairs = pairs_of(records)
    rows = torch.tensor([image_row[items[number].scene_index] for number, _, _ in pairs])
    scores = score_pairs(scorer, images, rows, [records[number].texts[text] for number, _, text in pairs])
    accuracy: dict[str, float] = {}
    names: tuple[ItemScore, ...] = ("itc", "itm")
    for name in names:
        if name in scores:
            columns = scores[name].view(2, -1).T.numpy()  # [N, 2]
            values = [judge(item, own[None], tie=TIE).accuracy for item, own in zip(records, columns, strict=True)]
            accuracy[name] = 100.0 * float(np.mean(values))
    return accuracy


def masked_word_accuracy(
    scorer: MaskedWordPredictor, images: Any, items: Sequence[MaskedWord], image_row: dict[int, int]
) -> dict[str, float]:
    """Compute the accuracy of `fill_masked_words`, in percent by word class."""
    filled = fill_masked_words(scorer, images, items, image_row)
    return {
        name: 100.0 * float(np.mean([is_right for item, _, is_right in filled if item.word_class == name]))
        for name in dict.fromkeys(item.word_class for item, _, _ in filled)
    }


def fill_masked_words(
    scorer: MaskedWordPredictor, images: Any, items: Sequence[MaskedWord], image_row: dict[int, int]
) -> list[tuple[MaskedWord, str, bool]]:
    """Predict each masked word; return (item, decoded prediction, whether it is right).

    All tokens of the word are masked, and all must be right at once. A synonym counts if it has as many tokens as the
    word. Items whose word was truncated with the end of a long caption are dropped. `images` are in the scorer's
    encoding.
    """
    encoded = scorer.tokenizer(
        [item.caption for item in items],
        padding=True,
        truncation=True,
        max_length=scorer.text_max_tokens,
        return_offsets_mapping=True,
    )
    starts, ends = torch.tensor(
        [
            [(start + (item.caption[start:end][:1] == " "), end) for start, end in row]  # byte-level BPE has the space
            for item, row in zip(items, encoded["offset_mapping"], strict=True)
        ]
    ).unbind(dim=-1)  # [N, L] each
    spans = torch.tensor([(item.start, item.end) for item in items])
    is_masked = (starts >= spans[:, :1]) & (ends <= spans[:, 1:]) & (ends > starts)  # [N, L]
    kept = is_masked.any(dim=1).nonzero()[:, 0]
    if not len(kept):
        return []
    is_masked, lengths = is_masked[kept], torch.tensor(encoded["attention_mask"]).sum(dim=1)[kept]
    items = [items[k] for k in kept.tolist()]
    n_tokens = is_masked.sum(dim=1)  # [N]
    is_slot = torch.arange(int(n_tokens.max())) < n_tokens[:, None]  # [N, W]
    slots = torch.zeros(is_slot.shape, dtype=torch.int64)
    slots[is_slot] = is_masked.nonzero()[:, 1]
    input_ids = torch.tensor(encoded["input_ids"])[kept].masked_fill(is_masked, scorer.tokenizer.mask_token_id)
    texts = scorer.encode_texts(input_ids, lengths)
    rows = torch.tensor([image_row[item.scene_index] for item in items])
    filled = scorer.predict_masked(images, texts, rows, torch.arange(len(items)), slots)  # [N, W]
    answers = _answer_tokens(scorer, items, n_tokens)  # [N, A, W]
    is_right = ((filled[:, None] == answers) | ~is_slot[:, None]).all(dim=2).any(dim=1)  # [N]
    spelled = [str(scorer.tokenizer.decode(row[:n])) for row, n in zip(filled, n_tokens.tolist())]
    return list(zip(items, spelled, is_right.tolist(), strict=True))


def _answer_tokens(scorer: MaskedWordPredictor, items: Sequence[MaskedWord], n_tokens: Tensor) -> Tensor:
    """Return the tokens of each right answer, int64 [N, A, W]; -1 (never predicted) for an answer of another length."""
    most = max(len(item.answers) for item in items)
    tokens = torch.full((len(items), most, int(n_tokens.max())), -1)
    spelling = {
        word: torch.tensor(scorer.tokenizer(word, add_special_tokens=False)["input_ids"])
        for word in {_in_place(item, answer) for item in items for answer in item.answers}
    }
    for row, (item, n) in enumerate(zip(items, n_tokens.tolist(), strict=True)):
        for column, answer in enumerate(item.answers):
            spelled = spelling[_in_place(item, answer)]
            if len(spelled) == n:
                tokens[row, column, :n] = spelled
    return tokens


def _in_place(item: MaskedWord, answer: str) -> str:
    """Return an answer with the space before it in its caption, which is a part of its token in byte-level BPE."""
    return answer if item.start == 0 else f" {answer}"
