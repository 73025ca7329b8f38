"""WordPiece tokenizers in Hugging Face format: training, building from a vocabulary, and loading.

The tokenizers that this module builds lower-case text like BERT's. They contain every printable ASCII character and its
`##` continuation, so no ASCII caption contains [UNK]. They treat "[MASK]" in a caption as text, not as the mask token.

Legend: V vocabulary.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from mamo.data.files import read_text
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import clean_caption, read_pairs
from mamo.hub import hub_folder

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ASCII = tuple(chr(code) for code in range(0x21, 0x7F))  # printable, without the space
_NEEDED_FILES = ("tokenizer.json", "vocab.txt")  # at least one of them
_FURTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
TOKENIZER_FILES = (*_NEEDED_FILES, *_FURTHER_FILES)
"""Files of a tokenizer's folder; one of the first two is there."""
_TYPE_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")  # from which transformers infers the kind
_KINDS = ("pad", "unk", "cls", "sep", "mask")
_PROBES = ("red", "a small red circle")
_PAIR_SUFFIXES = (".json", ".jsonl", ".tar", ".csv", ".tsv")
# Longer words become [UNK].
_MAX_WORD_CHARS = 1000


def train_tokenizer(
    files: Sequence[Path],
    size: int,
    folder: Path,
    split: str | None = None,
    overwrite: bool = False,
    read_as: tuple[Any, ...] = (),
) -> int:
    """Train a WordPiece tokenizer on captions and save it in `folder`. The result depends only on captions and size.

    Args:
        files: input of `read_pairs` (suffix .json, .jsonl, .csv, .tsv or .tar, or a folder), or plain text with one
            caption a line.
        size: largest number of tokens.
        folder: output.
        split: of Karpathy files.
        overwrite: whether existing files may be replaced.
        read_as: further arguments of `read_pairs`, from the split on, in place of `split`.

    Returns:
        The number of tokens.

    Raises:
        ValueError: a file cannot be read, there is no caption, `size` is smaller than the alphabet of the captions, or
            the folder has a tokenizer while `overwrite` is False.
        OSError: the tokenizer cannot be written, such as on a full disk; the folder stays as it was.
    """
    captions = [caption for file in files for caption in _captions(file, read_as or (split,)) if caption]
    if not captions:
        raise ValueError(f"{', '.join(map(str, files))}: no caption that is not blank; a tokenizer needs some")
    normalizer, splitter = _normalizer(), pre_tokenizers.BertPreTokenizer()
    seen = {
        char
        for text in captions
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
        for char in word
    }
    base = base_tokens((*ASCII, *sorted(seen - set(ASCII))))
    if size < len(base):
        raise ValueError(
            f"--size {size} is too small; use at least {len(base)}, the number of special tokens and characters"
        )
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizer, splitter
    # The trainer numbers `##` characters in hash order, and this order decides between equally frequent merges. Passing
    # all of them as special tokens makes the result reproducible.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(base), initial_alphabet=[], min_frequency=2, show_progress=False
    )
    model.train_from_iterator(captions, trainer)
    tokenizer = build_tokenizer(sorted(model.get_vocab(), key=model.get_vocab().__getitem__))
    with OutputFolder(folder, overwrite) as output:
        _save(tokenizer, output.temporary)
    return len(tokenizer)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer. Raises OSError where the tokenizers library raises an Exception with the number in its text."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def read_tokenizer(source: str, has_sep: bool = True) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder that `save_pretrained` wrote, or from the hub by name; it pads and cuts behind.

    A folder with nothing but BERT's `vocab.txt` is read as BERT's, in lower case.

    Args:
        source: folder or name.
        has_sep: whether texts end with [SEP], see `use_sep`; a folder does not keep it for every kind of tokenizer.

    Raises:
        ValueError: no such tokenizer, no fast version, one of the five special tokens is missing, or it does not read a
            text as `check_tokenizer` demands.
    """
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise ValueError(f"tokenizer {source!r}: no such folder; make one with `mamo data tokenizer`")
    try:
        folder = Path(source) if Path(source).exists() else hub_folder(source, _NEEDED_FILES, _FURTHER_FILES)
        is_plain = (folder / "vocab.txt").is_file() and not any((folder / name).is_file() for name in _TYPE_FILES)
        kind = BertTokenizer if is_plain else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        near = "; did you mean 'scenes'?" if difflib.get_close_matches(source, ["scenes"]) else ""
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"tokenizer {source!r}: neither 'scenes', nor a tokenizer folder, nor a hub name{near}: {first_line}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer {source!r} has no fast version (tokenizer.json); save it as a fast tokenizer first"
        )
    missing = [kind for kind in _KINDS if getattr(tokenizer, f"{kind}_token") is None]
    if missing:
        raise ValueError(
            f"tokenizer {source!r} has no {', '.join(missing)} token; use one made for masked language models"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_input_names = list(dict.fromkeys([*tokenizer.model_input_names, "attention_mask"]))
    check_tokenizer(tokenizer, source)
    return use_sep(tokenizer, has_sep)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    """Check what every batch relies on: [CLS] words [SEP], padding behind, ids from 0 to V - 1, five special tokens.

    [SEP] may be missing: `use_sep` sets it.

    Args:
        tokenizer: fast, with all five special tokens.
        source: names it in messages.

    Raises:
        ValueError: names what it does instead; or its BPE has a dropout, so that tokens are drawn at random.
    """
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in _KINDS}
    problem = ""
    if len({*ids.values()}) < len(_KINDS):
        shared = ", ".join(f"{kind} {number}" for kind, number in ids.items())
        problem = f"gives one id to several special tokens ({shared})"
    elif {*tokenizer.get_vocab().values()} != {*range(len(tokenizer))}:
        largest = max(tokenizer.get_vocab().values())
        problem = f"has {len(tokenizer)} tokens with ids up to {largest}: number them from 0 to {len(tokenizer) - 1}"
    elif getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        problem = "reads a text differently each time: set `dropout` of `model` in its tokenizer.json to null"
    else:
        encoded = tokenizer(list(_PROBES), padding=True)
        for row, valid in zip(encoded["input_ids"], encoded["attention_mask"], strict=True):
            n_valid = sum(valid)
            words = row[1 : n_valid - (row[n_valid - 1] == ids["sep"])]
            is_framed = row[0] == ids["cls"] and not {*words} & {ids["cls"], ids["sep"], ids["pad"]}
            if not is_framed or not words or valid != [1] * n_valid + [0] * (len(row) - n_valid):
                read = " ".join(tokenizer.convert_ids_to_tokens(row))
                problem = f"reads a text as {read}, not as [CLS] words [SEP] and padding"
                break
    if problem:
        raise ValueError(f"tokenizer {source!r} {problem}; use one made for masked language models, such as BERT's")


def is_word_start(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.bool_]:
    """Return bool [V], True for tokens that begin a word, False for continuations (`##`); for whole-word masking.

    Raises:
        ValueError: the tokens do not show where a word begins, as those of byte-level BPE or SentencePiece.
    """
    model = tokenizer.backend_tokenizer.model
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if isinstance(model, models.WordLevel):
        return np.ones(len(tokens), dtype=bool)
    prefix = model.continuing_subword_prefix if isinstance(model, models.WordPiece | models.BPE) else None
    if not prefix:
        raise ValueError(
            f"masking.text_unit: word needs a tokenizer that marks the pieces within a word (##), and tokens of "
            f"{type(model).__name__} do not; use text_unit: token, or a WordPiece tokenizer"
        )
    return np.array([not token.startswith(prefix) for token in tokens])  # [V]


def use_sep(tokenizer: PreTrainedTokenizerFast, has_sep: bool) -> PreTrainedTokenizerFast:
    """Make a tokenizer end texts with [SEP] or, as ALBEF does, without it; it is changed in place and returned."""
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    if ends_with_sep(tokenizer) != has_sep:
        ids = [(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)]
        end = [sep] if has_sep else []
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[cls, "$A", *end], pair=[cls, "$A", *end, "$B", *end], special_tokens=ids[: 1 + len(end)]
        )
    return tokenizer


def ends_with_sep(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a tokenizer ends texts with [SEP]."""
    return bool(tokenizer.num_special_tokens_to_add(pair=False) > 1)  # the other is [CLS]; encodes nothing


def unknown_share(tokenizer: PreTrainedTokenizerFast, input_ids: Tensor, is_valid: Tensor) -> float:
    """Return the share of [UNK] among the words of a batch, int64 and bool [..., L]; special tokens do not count."""
    special = torch.tensor([token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id])
    is_word = is_valid & ~torch.isin(input_ids, special)
    return float((is_word & (input_ids == tokenizer.unk_token_id)).sum() / is_word.sum().clamp(min=1))


def base_tokens(characters: Sequence[str]) -> tuple[str, ...]:
    """Return the special tokens, the characters, and their `##` continuations."""
    return (*SPECIAL_TOKENS, *characters, *(f"##{char}" for char in characters))


def _normalizer() -> normalizers.Normalizer:
    return normalizers.BertNormalizer(lowercase=True)


def build_tokenizer(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a Hugging Face tokenizer ([CLS] text [SEP]) from a vocabulary. Ids follow the order of distinct tokens."""
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    model = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=_MAX_WORD_CHARS))
    model.normalizer, model.pre_tokenizer = _normalizer(), pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=model, split_special_tokens=True, **names)  # type: ignore[no-untyped-call]


def _captions(file: Path, read_as: tuple[Any, ...]) -> Iterator[str]:
    """Yield the cleaned captions of a pairs file or of a text file with one caption a line."""
    if file.is_dir() or file.suffix in _PAIR_SUFFIXES:
        texts = [caption for record in read_pairs(file, *read_as) for caption in record.captions]
    else:
        texts = read_text(file).splitlines()
    return (clean_caption(text) for text in texts)
