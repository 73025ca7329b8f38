"""Tokenizers: nothing of one's own data becomes [UNK], and the same captions give the same vocabulary."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mamo.data.collate import tokenize, tokenize_closed, tokenize_words
from mamo.data.tokenizer import (
    SPECIAL_TOKENS,
    add_mask_token,
    check_words,
    read_tokenizer,
    train_tokenizer,
    unknown_share,
    use_sep,
)
from mamo.tasks.sources import load_tokenizer
from mamo.world import captions
from mamo.world.scene import SceneWorld
from mamo.world.vocabulary import scenes_tokenizer
from tests.published import CAPTIONS, clip_tokenizer, siglip_tokenizer

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


def test_words_are_numbered(trained: Path) -> None:
    """Bug: whole-word masking that splits words or merges neighbours."""
    tokenizer = load_tokenizer(str(trained))
    ids, _, words = tokenize_words(tokenizer, ["zq tower!", "two"], 16, by_word=True)
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist())[1:-1] == ["z", "##q", "tower", "!"]
    assert words is not None
    assert words.tolist() == [[-1, 0, 0, 1, 2, -1], [-1, 0, -1, -1, -1, -1]]


def test_mistakes(trained: Path, tmp_path: Path) -> None:
    """Bug: a tokenizer that cannot serve masked language modelling is found out in the middle of training."""
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer([trained.parent / "captions.txt"], 100, tmp_path / "x")
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer folder; it has none of tokenizer\.json"):
        load_tokenizer(str(tmp_path / "empty"))
    tokenizer = load_tokenizer(str(trained))
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "maskless")
    maskless = load_tokenizer(str(tmp_path / "maskless"))
    assert maskless.mask_token_id is None
    assert add_mask_token(maskless).mask_token_id == tokenizer.convert_tokens_to_ids("[MASK]")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "padless")
    with pytest.raises(ValueError, match="no pad token"):
        load_tokenizer(str(tmp_path / "padless"))


LETTERS = tuple(string.ascii_lowercase)
KINDS = ("pad", "unk", "cls", "sep", "mask")
FRAME = "[CLS] $A [SEP]"


def save(folder: Path, ids: dict[str, int], frame: str = FRAME, prefix: str = "##", **options: str) -> str:
    """Write a WordPiece tokenizer of a vocabulary, with a template of special tokens and options of its own."""
    model = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix=prefix))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    model.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in KINDS}
    PreTrainedTokenizerFast(tokenizer_object=model, **{**names, **options}).save_pretrained(folder)
    return str(folder)


@settings(deadline=None, max_examples=30)
@given(
    order=st.permutations([*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]),
    gap=st.sampled_from([0, 0, 0, 5]),
    frame=st.sampled_from([FRAME, FRAME, "[CLS] $A", "$A [SEP] [CLS]", "[CLS] [CLS] $A [SEP]", "[SEP] $A [CLS]", "$A"]),
    side=st.sampled_from(["left", "right"]),
    shared=st.sampled_from([{}, {}, {}, {"pad_token": "[CLS]"}, {"mask_token": "[UNK]"}]),
)
def test_a_tokenizer_does_what_batches_rely_on_or_is_refused(
    order: list[str], gap: int, frame: str, side: str, shared: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bug: heads read padding or a word instead of [CLS], or an id has no row in the word embeddings."""
    ids = {token: number + (gap if number > 20 else 0) for number, token in enumerate(order)}
    sides = {"padding_side": side, "truncation_side": side}
    folder = save(tmp_path_factory.mktemp("tokenizer"), ids, frame, **sides, **shared)
    if gap or shared or not frame.startswith("[CLS] $A"):
        with pytest.raises(ValueError, match=r"number them from 0 to|gives one id to|not as \[CLS\] words \[SEP\]"):
            read_tokenizer(folder)
        return
    for has_sep in (True, False):
        tokenizer = read_tokenizer(folder, has_sep)
        input_ids, is_valid = tokenize(tokenizer, ["abc", "red circle above"], 8)
        assert input_ids.shape == (2, 8)  # cut behind
        assert (input_ids[:, 0] == ids["[CLS]"]).all()
        assert is_valid.sum(dim=1).tolist() == [4 + has_sep, 8]
        assert (input_ids[0, 4 + has_sep :] == ids["[PAD]"]).all()
        assert (input_ids == ids["[SEP]"]).sum().item() == 2 * has_sep
        closed, closed_is_valid = tokenize_closed(tokenizer, ["abc", "red circle above"], 8)
        assert closed_is_valid.sum(dim=1).tolist() == [5, 8]
        assert closed[0, 4] == closed[1, 7] == ids["[SEP]"]


def test_words_need_a_division(tmp_path: Path) -> None:
    """Bug: whole-word masking of a tokenizer that does not divide a text masks all of it."""
    at = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *LETTERS, *(f"@@{c}" for c in LETTERS), "##"))}
    tokenizer = read_tokenizer(save(tmp_path, at, prefix="@@"))
    check_words(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    with pytest.raises(ValueError, match=r"divides a text into words, and this one reads 'a small red circle' as 1"):
        check_words(tokenizer)


def test_an_end_of_text_pads(tmp_path: Path) -> None:
    """Bug: a tokenizer of CLIP's kind, whose end of text is also its padding and unknown word, is refused or reads
    padding as words."""
    ids = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS)))}
    tokenizer = read_tokenizer(save(tmp_path, ids, pad_token="[SEP]", unk_token="[SEP]"))
    batch, is_valid = tokenize(tokenizer, ["ab", "red circle"], 16)
    assert is_valid.sum(dim=1).tolist() == [4, batch.shape[1]]
    assert unknown_share(tokenizer, batch, is_valid) == 0


def test_a_start_is_added_where_there_is_none(tmp_path: Path) -> None:
    """Bug: of SigLIP, whose texts have no start, heads read the first word in place of [CLS]; or the frame, decoding or
    a literal end of text changes when the tokenizer is saved and read again."""
    siglip_tokenizer().save_pretrained(tmp_path / "siglip")
    clip_tokenizer().save_pretrained(tmp_path / "clip")
    for kind, n_added in (("siglip", 1), ("clip", 0)):
        before = AutoTokenizer.from_pretrained(tmp_path / kind)
        tokenizer = read_tokenizer(str(tmp_path / kind))
        assert len(tokenizer) == len(before) + n_added
        plain, framed = (one("a small red circle")["input_ids"] for one in (before, tokenizer))
        assert framed[-len(plain) + (not n_added) :] == plain[not n_added :]
        assert framed[0] == tokenizer.cls_token_id
        assert tokenizer.decode(framed, skip_special_tokens=True) == "a small red circle"
        end = "<|endoftext|>"
        assert tokenizer(f"a {end} b")["input_ids"].count(tokenizer.sep_token_id) == 1
        add_mask_token(tokenizer).save_pretrained(tmp_path / "again")
        again = read_tokenizer(str(tmp_path / "again"))
        for text in (*CAPTIONS[:5], f"a {end} b"):
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (again.mask_token_id, len(again)) == (len(before) + n_added, len(tokenizer))


def test_a_cased_vocabulary_of_bert_stays_cased(tmp_path: Path) -> None:
    """Bug: of a cased or multilingual BERT with only `vocab.txt`, every word with a capital becomes lower case."""
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "a", "Red", "red", "É"]) + "\n", "utf-8")
    for config in (None, {"model_type": "bert"}):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_tokenizer(str(tmp_path))("a Red red É")["input_ids"] == [2, 5, 6, 7, 8, 3]


def test_the_share_of_unknown_words_is_counted() -> None:
    """Bug: captions of which the tokenizer knows no word train in silence."""
    tokenizer = scenes_tokenizer()
    assert unknown_share(tokenizer, *tokenize(tokenizer, ["赤い丸", "青い四角"], 16)) == 1
    assert unknown_share(tokenizer, *tokenize(tokenizer, ["a red circle", "two"], 16)) == 0
    assert 0 < unknown_share(tokenizer, *tokenize(tokenizer, ["a red circle 赤", "two"], 16)) < 0.5


def test_a_vocabulary_of_bert_is_enough(tmp_path: Path) -> None:
    """Bug: a folder with `vocab.txt` is answered by a library's advice to install another library."""
    vocabulary = [*SPECIAL_TOKENS, "a", "red", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = read_tokenizer(str(tmp_path))
    assert tokenizer("A Reds")["input_ids"] == [2, 5, 6, 7, 3]
    use_sep(tokenizer, False).save_pretrained(tmp_path / "again")  # which forgets that
    assert read_tokenizer(str(tmp_path / "again"), has_sep=False)("red")["input_ids"] == [2, 6]
    assert read_tokenizer(str(tmp_path / "again"))("red")["input_ids"] == [2, 6, 3]


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path: Path) -> None:
    """Bug: with BPE's dropout each evaluation of one checkpoint reads other tokens and has other results."""
    tokens = [*SPECIAL_TOKENS, *string.ascii_lowercase, "re", "red"]
    ids = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(ids, [("r", "e"), ("re", "d")], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    read_tokenizer(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text("utf-8"))
    values["model"].update({"dropout": 0.5})
    file.write_text(json.dumps(values), "utf-8")
    with pytest.raises(
        ValueError, match=r"reads a text differently each time: set `dropout` of `model` in its tokenizer\.json to null"
    ):
        read_tokenizer(str(tmp_path))
