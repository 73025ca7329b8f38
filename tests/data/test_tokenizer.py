"""Tokenizers: nothing of one's own data becomes [UNK], and the same captions give the same vocabulary."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mamo.data.tokenizer import is_word_start, train_tokenizer
from mamo.tasks.sources import load_tokenizer
from mamo.world import captions
from mamo.world.scene import SceneWorld
from mamo.world.vocabulary import scenes_tokenizer

SCENES = scenes_tokenizer()
PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " "
SENTENCES = [
    f"there {verb} {count} {colour} blocks near the tower"
    for verb in ("is", "are")
    for count in ("one", "two")
    for colour in ("yellow", "black", "grünlich", "東京")
]


def joined(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The text again without its spaces: tokens put together by hand."""
    return "".join(token.removeprefix("##") for token in tokenizer.tokenize(text))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "captions.txt").write_text("\n".join(SENTENCES), "utf-8")
    train_tokenizer([folder / "captions.txt"], 260, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("difficulty", ["easy", "full"])
def test_scene_captions_are_whole_words(difficulty: str) -> None:
    """Bug: a word of the grammar missing from the vocabulary, so that it falls into pieces or becomes [UNK]."""
    tokenizer, world = scenes_tokenizer(), SceneWorld(difficulty, 0)  # type: ignore[arg-type]
    for index in range(100):
        scene = world.scene("train", index)
        for caption in (*captions.all_captions(scene), captions.identifying_caption(scene)):
            tokens = tokenizer.tokenize(caption.text)
            assert "[UNK]" not in tokens
            assert "".join(tokens) == caption.text.lower().replace(" ", "")
            assert not [token for token in tokens if token.startswith("##")]


@given(st.text(PRINTABLE, max_size=300))
def test_ascii_never_becomes_unknown(text: str) -> None:
    """Bug: a character without its `##` form, or a long word over WordPiece's usual limit of 100."""
    tokenizer = SCENES
    ids = tokenizer(text)["input_ids"]
    assert not {tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id} & set(ids)
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert joined(tokenizer, text) == text.lower().replace(" ", "")


def test_special_words_and_long_words(trained: Path) -> None:
    """Bug: a caption can smuggle in a mask token, or a web address becomes one [UNK]."""
    for tokenizer in (scenes_tokenizer(), load_tokenizer(str(trained))):
        for text in ("a [MASK] [UNK] [PAD] [CLS] [SEP]", "x" * 900, PRINTABLE):
            assert joined(tokenizer, text) == text.lower().replace(" ", "")
            assert not set(tokenizer(text)["input_ids"][1:-1]) & set(tokenizer.all_special_ids)


def test_trained_tokenizer_learns_and_reloads(trained: Path) -> None:
    """Bug: merges never learned, the size ignored, non-ASCII characters lost, or a reload that differs."""
    tokenizer = load_tokenizer(str(trained))
    assert len(tokenizer) <= 260
    assert tokenizer.tokenize("There are two blocks") == ["there", "are", "two", "blocks"]
    for text in SENTENCES:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert load_tokenizer(str(trained)).get_vocab() == tokenizer.get_vocab()
    padded = tokenizer(["two", "two blocks near"], padding=True)
    assert padded["attention_mask"][0] == [1, 1, 1, 0, 0]
    assert padded["input_ids"][0][3:] == [tokenizer.pad_token_id] * 2


def test_training_twice_gives_identical_files(trained: Path, tmp_path: Path) -> None:
    """Bug: hash order decides ids or ties, so that two machines make two vocabularies."""
    (tmp_path / "captions.txt").write_text("\n".join(SENTENCES), "utf-8")
    for attempt in range(5):
        train_tokenizer([tmp_path / "captions.txt"], 260, tmp_path / str(attempt))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / str(attempt) / file).read_bytes() == (trained / file).read_bytes()


def test_pairs_files_and_text_give_the_same_tokenizer(trained: Path, tmp_path: Path) -> None:
    """Bug: JSON keys and paths learned as words, or only the first caption of a row read."""
    rows = [{"image": f"{i}.png", "caption": SENTENCES[i : i + 4]} for i in range(0, len(SENTENCES), 4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    train_tokenizer([tmp_path / "pairs.jsonl"], 260, tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == load_tokenizer(str(trained)).get_vocab()


def test_word_starts(trained: Path) -> None:
    """Bug: whole-word masking that splits words or merges neighbours."""
    tokenizer = load_tokenizer(str(trained))
    starts = is_word_start(tokenizer)
    assert starts.shape == (len(tokenizer),)
    ids = tokenizer("zq tower!", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["z", "##q", "tower", "!"]
    assert starts[ids].tolist() == [True, False, True, True]


def test_mistakes(trained: Path, tmp_path: Path) -> None:
    """Bug: a tokenizer that cannot serve masked language modelling is found out in the middle of training."""
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer([trained.parent / "captions.txt"], 100, tmp_path / "x")
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither 'scenes', nor a tokenizer folder"):
        load_tokenizer(str(tmp_path / "empty"))
    tokenizer = load_tokenizer(str(trained))
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "maskless")
    with pytest.raises(ValueError, match="no mask token"):
        load_tokenizer(str(tmp_path / "maskless"))
