"""Several and long captions: keys and weights, sub-captions, lines, lists and named fields in shards."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamo.data.captions import (
    change_caption,
    draw_caption,
    draw_sub_caption,
    draw_tags,
    drop_words,
    named_sides,
    split_sentences,
    weighted_captions,
)
from mamo.data.pairs import PairDataset
from mamo.data.pairs_reader import read_pairs
from mamo.data.shards import TarShardDataset, index_folder

KEYS = {"re_caption": 0.7, "caption": 0.3}


def png(number: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file: Path, members: dict[str, str | bytes]) -> Path:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
    return file


def test_the_captions_of_a_row_have_the_weights_of_their_keys(tmp_path: Path) -> None:
    """Bug: a list has as many times the weight of its key, a row without a key draws nothing, or zero is drawn."""
    rows = [
        {"re_caption": "long", "caption": ["a", "b"], "url": "x"},
        {"caption": "a"},
        {"re_caption": "", "caption": "a"},
        {"re_caption": None, "caption": ["a", "b", " "]},
    ]
    first, *rest = read_pairs(write_lines(tmp_path / "a.jsonl", rows), None, KEYS)
    assert first.captions == ("long", "a", "b")
    assert np.allclose(first.weights, [0.7, 0.15, 0.15])
    assert [(record.captions, record.weights) for record in rest] == [(("a",), ()), (("a",), ()), (("a", "b"), ())]
    rng = np.random.default_rng(0)
    drawn = Counter(draw_caption(first.captions, first.weights, rng) for _ in range(20_000))
    for caption, share in zip(first.captions, (0.7, 0.15, 0.15)):
        assert abs(drawn[caption] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
    assert weighted_captions({"a": ["x"], "b": ["y"]}, {"a": 0.0, "b": 2.0}) == (("y",), ())


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"caption": "a"}], KEYS, "a.jsonl: no row has the caption key 're_caption'; correct data.caption_keys"),
        ([{"caption": "a"}], {"re_captoin": 1.0}, "a.jsonl:1: field 're_captoin' is missing"),
        ([{"caption": "a"}, {"x": 1}], KEYS, "a.jsonl:2: none of the caption keys re_caption, caption; the row has"),
        ([{"re_caption": 3, "caption": "a"}], KEYS, "a.jsonl:1: field 're_caption' must be a string"),
    ],
)
def test_a_key_that_is_not_there_is_named(
    tmp_path: Path, rows: list[dict[str, Any]], keys: dict[str, float], message: str
) -> None:
    """Bug: a mistyped key trains on the other one in silence."""
    with pytest.raises(ValueError) as caught:
        read_pairs(write_lines(tmp_path / "a.jsonl", rows), None, keys)
    assert message in str(caught.value)


SHARD: dict[str, str | bytes] = {
    "0.png": png(), "0.txt": "a dog runs.\r\na brown dog.\n\nthe dog plays.\n",
    "1.png": png(1), "1.txt": " \n", "1.json": '{"caption": "in the JSON"}',
    "2.png": png(2), "2.json": '{"caption": ["one", "two"], "image_id": 7}',
    "3.png": png(3), "3.txt": "a title\nwith a break", "3.json": '{"caption": "a title\\nwith a break", "url": "x"}',
    "4.png": png(4), "4.json": '{"caption": "short", "re_caption": "long", "syn": ["x", "y"], "width": 3}',
    "._4.png": b"attributes", "._4.json": b"\0\1",
    "5.png": png(5), "5.txt": "only a text",
}  # fmt: skip
DEFAULT = [
    ("a dog runs.", "a brown dog.", "the dog plays."), ("in the JSON",), ("one", "two"), ("a title\nwith a break",),
    ("short",), ("only a text",),
]  # fmt: skip
KEYED = [
    ("a dog runs.", "a brown dog.", "the dog plays."), ("in the JSON",), ("one", "two"), ("a title\nwith a break",),
    ("long", "short"), ("only a text",),
]  # fmt: skip


@pytest.mark.parametrize("is_indexed", [False, True])
def test_shards_with_lines_lists_and_keys(tmp_path: Path, is_indexed: bool) -> None:
    """Bug: five captions of a picture are one long one; a blank .txt hides the caption in .json; a caption with a line
    break is two; `._` files are pairs; an index of `caption` cannot serve another key.
    """
    folder = write_tar(tmp_path / "shards/0.tar", SHARD).parent
    if is_indexed:
        index_folder(folder)
    pairs = read_pairs(folder)
    assert isinstance(pairs, TarShardDataset)
    assert [record.captions for record in pairs] == DEFAULT
    assert [record.image_id for record in pairs][2] == "7"
    assert (pairs.most_captions, PairDataset(pairs, (4, 4)).n_caption_ids) == (3, 3)
    keyed = read_pairs(folder, None, KEYS)
    assert isinstance(keyed, TarShardDataset)
    assert [record.captions for record in keyed] == KEYED
    assert np.allclose(keyed[4].weights, [0.7, 0.3])
    assert keyed.most_captions >= 3
    assert keyed.fingerprint() != pairs.fingerprint()
    with pytest.raises(ValueError, match=r"no pair has the caption key 're_captoin'; correct data\.caption_keys"):
        read_pairs(folder, None, {"re_captoin": 1.0, "caption": 1.0})


def test_shards_of_other_keys_only(tmp_path: Path) -> None:
    """Bug: a recaptioned set without `caption` cannot be read or indexed, or is read as blank captions."""
    folder = write_tar(tmp_path / "s/0.tar", {"0.png": png(), "0.json": '{"vlm_caption": "long"}'}).parent
    with pytest.raises(ValueError, match=r"0: no caption: add a \.txt member or a 'caption' string"):
        read_pairs(folder)
    assert read_pairs(folder, None, {"vlm_caption": 1.0})[0].captions == ("long",)
    with pytest.raises(ValueError, match="no caption"):
        index_folder(folder)
    index_folder(folder, 0, ["vlm_caption"])
    assert read_pairs(folder, None, {"vlm_caption": 1.0})[0].captions == ("long",)


def test_joined_tars_are_read_to_their_end(tmp_path: Path) -> None:
    """Bug: of `cat a.tar b.tar` the second is refused or lost, or its keys, which begin at 0 too, are repeats."""
    one = write_tar(tmp_path / "1.tar", {"0.png": png(1), "0.txt": "one"})
    two = write_tar(tmp_path / "2.tar", {"0.png": png(2), "0.txt": "two"})
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + two.read_bytes())
    pairs = read_pairs(tmp_path / "joined.tar")
    data = PairDataset(pairs, (4, 4))
    shown = [data.load(k, np.random.default_rng(0)) for k in range(2)]
    assert [(sample.caption, int(sample.image[0, 0, 0])) for sample in shown] == [("one", 1), ("two", 2)]
    assert len({record.image_id for record in pairs}) == 2
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + b"junk" * 300)
    with pytest.raises(ValueError, match="data follow the end of the tar at byte"):
        read_pairs(tmp_path / "joined.tar")
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + two.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"not a complete uncompressed tar|cut short"):
        read_pairs(tmp_path / "joined.tar")


LONG = 'A dog runs on the grass. "Where to?" asks Mr. Smith of the U.S. army. It is 3.5 m long! 两只猫。 The end'
SENTENCES = [
    "A dog runs on the grass.", '"Where to?"', "asks Mr. Smith of the U.S. army.", "It is 3.5 m long!", "两只猫。",
    "The end",
]  # fmt: skip


def test_sentences_of_a_long_caption() -> None:
    """Bug: a sentence ends at a number or an abbreviation, or Chinese has none."""
    assert split_sentences(LONG) == SENTENCES
    assert split_sentences("one sentence") == ["one sentence"]
    assert split_sentences("") == []


def test_sub_captions_are_one_to_three_consecutive_sentences() -> None:
    """Bug: sentences from different places, always the first ones, a number of sentences that is never drawn."""
    valid = {" ".join(SENTENCES[k : k + n]): n for n in (1, 2, 3) for k in range(len(SENTENCES) - n + 1)}
    rng = np.random.default_rng(0)
    drawn = Counter(draw_sub_caption(LONG, 3, rng) for _ in range(6_000))
    assert drawn.keys() == valid.keys()
    for n in (1, 2, 3):
        assert abs(sum(count for text, count in drawn.items() if valid[text] == n) - 2_000) < 200
    assert draw_sub_caption("one sentence", 3, rng) == "one sentence"
    assert draw_sub_caption(LONG, 0, rng) == LONG


def test_sub_captions_are_drawn_anew_and_the_whole_is_kept(tmp_path: Path) -> None:
    """Bug: every epoch trains on one part of a caption; the record that evaluation reads is cut too."""
    (tmp_path / "a.png").write_bytes(png())
    records = read_pairs(write_lines(tmp_path / "a.jsonl", [{"caption": LONG}]))
    data = PairDataset(records, (4, 4), sub_caption_sentences=3)
    texts = {data.load(0, np.random.default_rng(epoch)).caption for epoch in range(40)}
    assert len(texts) > 5
    assert records[0].captions == (LONG,)
    assert data.load(0, np.random.default_rng(7)).caption == data.load(0, np.random.default_rng(7)).caption
    assert data.n_caption_ids == 2


def test_words_are_dropped_in_place_and_never_all() -> None:
    """Bug: an empty caption, words in another order, or another share than asked."""
    words = [f"w{k}" for k in range(20)]
    rng, kept = np.random.default_rng(0), Counter[str]()
    for _ in range(2000):
        found = drop_words(" ".join(words), 0.3, rng).split()
        assert found == [word for word in words if word in found]
        kept.update(found)
    assert all(abs(kept[word] / 2000 - 0.7) < 0.05 for word in words)  # 5 standard deviations
    single = Counter(drop_words("a b", 0.999, rng) for _ in range(300))
    assert set(single) == {"a", "b"}
    assert drop_words("", 0.5, rng) == ""


def test_tags_are_drawn_as_subsets_in_order() -> None:
    """Bug: an empty subset, another order, a text without commas that is cut, or subsets of one size only."""
    rng = np.random.default_rng(0)
    drawn = Counter(draw_tags("cat face, cat,  pet, ", rng) for _ in range(3000))
    assert set(drawn) == {
        "cat face", "cat", "pet", "cat face, cat", "cat face, pet", "cat, pet", "cat face, cat, pet",
    }  # fmt: skip
    sizes = Counter({1: 0, 2: 0, 3: 0})
    for text, n in drawn.items():
        sizes[len(text.split(","))] += n
    assert all(abs(n / 3000 - 1 / 3) < 0.05 for n in sizes.values())
    assert draw_tags("no commas here", rng) == "no commas here"
    state = rng.bit_generator.state
    assert change_caption("a, b", rng, 0.0, False) == "a, b"
    assert rng.bit_generator.state == state


def test_sides_are_whole_words() -> None:
    """Bug: a bright leftover counts as a side, or a capital hides one."""
    assert named_sides(["bright", "leftovers", "Left of it", "the right one", ""]) == (2, 5, "Left of it")
    assert named_sides([]) == (0, 0, "")
