"""WordPiece tokenizers in Hugging Face format: the one of `scenes`, one trained on files, or a given one.

All of ours lower-case as BERT does, hold every printable ASCII character alone and as a `##` continuation (so no ASCII
caption ever becomes [UNK]), and read "[MASK]" in a caption as text, never as the mask.

Legend: V vocabulary.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mamo.data.pairs_reader import clean_caption, read_pairs
from mamo.hub import hub_folder

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ASCII = tuple(chr(code) for code in range(0x21, 0x7F))  # printable, without the space
_NEEDED_FILES = ("tokenizer.json", "vocab.txt")  # one of them
_FURTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
_PAIR_SUFFIXES = (".json", ".jsonl", ".tar")
# A longer word would become [UNK] whole; captions are cut to fewer characters than this.
_MAX_WORD_CHARS = 1000


def train_tokenizer(files: Sequence[Path], size: int, folder: Path, split: str | None = None) -> int:
    """Trains a WordPiece vocabulary of at most `size` tokens on the captions of `files`; saves it in `folder`.

    Each file is anything `read_pairs` reads (by its suffix .json, .jsonl or .tar, or a folder) or plain text, one
    caption a line; `split` is for Karpathy files. The result is a function of the captions alone.
    Returns the number of tokens.

    Raises ValueError where a file cannot be read or `size` does not hold the characters of the captions.
    """
    captions = [caption for file in files for caption in _captions(file, split)]
    normalizer, splitter = _normalizer(), pre_tokenizers.BertPreTokenizer()
    seen = {
        char
        for text in captions
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
        for char in word
    }
    base = base_tokens((*ASCII, *sorted(seen - set(ASCII))))
    if size < len(base):
        raise ValueError(f"--size {size} is too small: the special tokens and characters alone are {len(base)}")
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizer, splitter
    # The trainer numbers `##` characters in hash order, which decides between equally frequent merges: naming all of
    # them beforehand makes the result repeatable.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(base), initial_alphabet=[], min_frequency=2, show_progress=False
    )
    model.train_from_iterator(captions, trainer)
    tokenizer = tokenizer_of(sorted(model.get_vocab(), key=model.get_vocab().__getitem__))
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def read_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Load a folder that `save_pretrained` wrote, or a hub name.

    Raises ValueError where there is none, where it is slow, or where it lacks one of the five special tokens.
    """
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise ValueError(f"tokenizer {source!r}: no such folder; make one with scripts/data.py tokenizer")
    try:
        folder = Path(source) if Path(source).exists() else hub_folder(source, _NEEDED_FILES, _FURTHER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        near = "; did you mean 'scenes'?" if difflib.get_close_matches(source, ["scenes"]) else ""
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"tokenizer {source!r}: neither 'scenes', nor a tokenizer folder, nor a hub name{near}: {first_line}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {source!r} has no fast version (tokenizer.json); convert it first")
    lacking = [kind for kind in ("pad", "unk", "cls", "sep", "mask") if getattr(tokenizer, f"{kind}_token") is None]
    if lacking:
        raise ValueError(
            f"tokenizer {source!r} has no {', '.join(lacking)} token; use one made for masked language models"
        )
    return tokenizer


def is_word_start(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.bool_]:
    """bool [V]: True where a token begins a word, False where it continues one (`##`); for whole-word masking."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([not token.startswith("##") for token in tokens])  # [V]


def base_tokens(characters: Sequence[str]) -> tuple[str, ...]:
    """The special tokens, the characters, and the characters as `##` continuations."""
    return (*SPECIAL_TOKENS, *characters, *(f"##{char}" for char in characters))


def _normalizer() -> normalizers.Normalizer:
    return normalizers.BertNormalizer(lowercase=True)


def tokenizer_of(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Numbers the distinct tokens in order and builds the Hugging Face tokenizer: [CLS] text [SEP]."""
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    model = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=_MAX_WORD_CHARS))
    model.normalizer, model.pre_tokenizer = _normalizer(), pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=model, split_special_tokens=True, **names)  # type: ignore[no-untyped-call]


def _captions(file: Path, split: str | None) -> Iterator[str]:
    if file.is_dir() or file.suffix in _PAIR_SUFFIXES:
        texts = [caption for record in read_pairs(file, split) for caption in record.captions]
    else:
        try:
            texts = file.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    return (clean_caption(text) for text in texts)
