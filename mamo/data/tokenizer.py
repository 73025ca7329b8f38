"""Tokenizers in Hugging Face format: training and building WordPiece, and loading those of published text encoders.

The tokenizers that this module builds lower-case text like BERT's. They contain every printable ASCII character and its
`##` continuation, so no ASCII caption contains [UNK]. They treat "[MASK]" in a caption as text, not as the mask token.

Legend: V vocabulary.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, BatchEncoding, BertTokenizer, PreTrainedTokenizerFast

from mamo.data.files import read_json, read_text
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import clean_caption, read_pairs
from mamo.hub import hub_folder

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ASCII = tuple(chr(code) for code in range(0x21, 0x7F))  # printable, without the space
NEEDED_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
"""Files of a tokenizer's folder, at least one of which is there."""
_FURTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json", "merges.txt")
TOKENIZER_FILES = (*NEEDED_FILES, *_FURTHER_FILES)
"""Files of a tokenizer's folder."""
_NEEDED_KINDS = ("pad", "cls", "sep")
_KINDS = (*_NEEDED_KINDS, "unk", "mask")
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

    A folder with BERT's `vocab.txt` only is read as BERT's, in lower case unless the vocabulary has capitals. Start and
    end of a text serve as [CLS] and [SEP] where a tokenizer has none (CLIP, SigLIP).

    Args:
        source: folder or name.
        has_sep: whether texts end with [SEP], see `use_sep`; a folder does not keep it for every kind of tokenizer.

    Raises:
        ValueError: no such tokenizer, no fast version, no token of padding, start or end, or it does not read a text
            as `check_tokenizer` demands.
    """
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise ValueError(f"tokenizer {source!r}: no such folder; make one with `mamo data tokenizer`")
    try:
        folder = Path(source) if Path(source).exists() else hub_folder(source, NEEDED_FILES, _FURTHER_FILES)
        tokenizer = _from_folder(folder)
    except Exception as error:  # transformers raises errors of any kind for files of others
        if Path(source).is_dir():
            _check_json_files(Path(source))
        near = "; did you mean 'scenes'?" if difflib.get_close_matches(source, ["scenes"]) else ""
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"tokenizer {source!r}: neither 'scenes', nor a tokenizer folder, nor a hub name{near}: {first_line}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer {source!r} has no fast version (tokenizer.json); save it as a fast tokenizer first"
        )
    tokenizer = _with_frame(tokenizer)
    missing = [kind for kind in _NEEDED_KINDS if getattr(tokenizer, f"{kind}_token") is None]
    if missing:
        raise ValueError(
            f"tokenizer {source!r} has no {', '.join(missing)} token; use one made for masked language models"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_input_names = list(dict.fromkeys([*tokenizer.model_input_names, "attention_mask"]))
    check_tokenizer(tokenizer, source)
    return use_sep(tokenizer, has_sep)


def _check_json_files(folder: Path) -> None:
    """Raise ValueError naming the file where a folder of a tokenizer has none, or JSON that cannot be read."""
    vocabularies = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
    if not any((folder / name).is_file() for name in vocabularies):
        raise ValueError(f"tokenizer {str(folder)!r}: no tokenizer folder; it has none of {', '.join(vocabularies)}")
    for name in ("config.json", *TOKENIZER_FILES):
        if name.endswith(".json") and (folder / name).is_file():
            value = read_json(folder / name)
            if not isinstance(value, dict):
                raise ValueError(f"{folder / name}: must be a JSON object")


def _from_folder(folder: Path) -> Any:
    """Load the tokenizer of a folder, of whatever type.

    transformers reads a plain `vocab.txt` in lower case, that of a cased BERT too, and SigLIP's `tokenizer.json` not at
    all: it has only a slow type for it.
    """
    has = {name: (folder / name).is_file() for name in TOKENIZER_FILES}
    is_plain = has["vocab.txt"] and not (has["tokenizer.json"] or has["tokenizer_config.json"])
    if is_plain and (not has["config.json"] or _model_type(folder) in ("bert", "distilbert")):
        words = read_text(folder / "vocab.txt").split()
        is_cased = any(word != word.lower() for word in words if not word.startswith("["))
        return BertTokenizer.from_pretrained(folder, local_files_only=True, do_lower_case=not is_cased)
    if has["tokenizer.json"] and _model_type(folder) == "siglip":
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _model_type(folder: Path) -> str:
    """Return `model_type` of a folder's config.json, "" without one. Raises ValueError for a damaged file."""
    file = folder / "config.json"
    values = json.loads(read_text(file)) if file.is_file() else {}
    return str(values.get("model_type", "")) if isinstance(values, dict) else ""


def _with_frame(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads `start words end`, with start and end as its [CLS] and [SEP].

    One that has both tokens is returned as it is. Where the start is missing (SigLIP) or is the end, [CLS] is added.
    """
    end = tokenizer.sep_token or tokenizer.eos_token
    if end is None or (tokenizer.cls_token is not None and tokenizer.sep_token is not None):
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    start = tokenizer.cls_token or tokenizer.bos_token
    if start is None or start == end:
        start = SPECIAL_TOKENS[2]
        backend.add_special_tokens([start])
    ids = [(token, backend.token_to_id(token)) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(
        single=[start, "$A", end], pair=[start, "$A", end, "$B", end], special_tokens=ids
    )
    if getattr(backend.model, "end_of_word_suffix", None):  # CLIP's, which its own type removes in Python
        space = decoders.Replace(backend.model.end_of_word_suffix, " ")
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), space, decoders.Strip(" ", 0, 1)])
    names = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("pad", "unk", "mask")}
    names |= {"cls_token": start, "sep_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True, **names)  # type: ignore[no-untyped-call]


def add_mask_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add [MASK], with the next id, to a tokenizer that has no such token; it is changed in place and returned."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": SPECIAL_TOKENS[4]})
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    """Check what every batch relies on: [CLS] words [SEP], padding behind, ids from 0 to V - 1, tokens of their own.

    [SEP] may be missing: `use_sep` sets it. It may also be padding and the unknown word, as CLIP's end of text is.

    Args:
        tokenizer: fast, with tokens of padding, start and end; those of unknown words and of masks may be missing.
        source: names it in messages.

    Raises:
        ValueError: names what it does instead; or its BPE has a dropout, so that tokens are drawn at random.
    """
    known = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in _KINDS}
    ids = {kind: number for kind, number in known.items() if number is not None}
    own = [number for kind, number in ids.items() if kind not in ("pad", "unk") or number != ids["sep"]]
    problem = ""
    if len({*own}) < len(own):
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


def word_numbers(encoded: BatchEncoding, n_tokens: int) -> NDArray[np.int64]:
    """Return the number of the word of each token, int64 [B, L], -1 at special tokens and padding.

    The words are those that the tokenizer divides a text into before it looks up pieces.

    Args:
        encoded: texts, by a fast tokenizer.
        n_tokens: L, at least the length of the longest.
    """
    numbers = np.full((len(encoded["input_ids"]), n_tokens), -1)
    for row in range(len(numbers)):
        words = encoded.word_ids(row)
        numbers[row, : len(words)] = [-1 if word is None else word for word in words]
    return numbers


def check_words(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ValueError unless a tokenizer divides a text into its words, which whole-word masking needs."""
    text = _PROBES[-1]
    numbers = {*tokenizer(text).word_ids()} - {None}
    if len(numbers) < len(text.split()):
        raise ValueError(
            f"masking.text_unit: word needs a tokenizer that divides a text into words, and this one reads {text!r} as "
            f"{len(numbers)}; use text_unit: token, or another tokenizer"
        )


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
    if tokenizer.unk_token_id in (None, tokenizer.sep_token_id):  # byte-level BPE knows every word
        return 0.0
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
