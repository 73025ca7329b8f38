"""The index of JSON Lines: the same records, errors and facts as those of a naive loop over the lines."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from mamo.data import pair_lines
from mamo.data.captions import CaptionKeys
from mamo.data.errors import ErrorCollector, json_rows
from mamo.data.files import JsonError, parse_json
from mamo.data.identity import identity_warnings
from mamo.data.pair_lines import LinePairs
from mamo.data.pair_record import PairRecord
from mamo.data.pair_rows import RowReader
from mamo.data.pairs import PairDataset
from mamo.data.pairs_reader import read_pairs

KEYS: CaptionKeys = {"caption": 1.0}
CAPTIONS: list[Any] = ['say "so"', "back\\slash", "", ["one", "two", "one"], ["\u2028line", "\x85"], "\n"]
IMAGES = [
    "./a.jpg",
    "b//c.jpg",
    "../d.jpg",
    "/abs/train2017/000000000001.jpg",
    "ü.jpg",
    " e",
    "~/f.jpg",
    "g/",
    "h/.",
    "i/../j",
]
CHANGES = ['"', "\\", ",", "0", "e", "-", ".", "[", "}", " ", "", "u", "\x01"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks of about ten rows, so that every file has several."""
    monkeypatch.setattr(pair_lines, "_BLOCK_BYTES", 700)


def naive(path: Path, keys: CaptionKeys = KEYS) -> list[PairRecord]:
    """Read each line by itself."""
    reader = RowReader(path, keys, ErrorCollector(path))
    text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    found = [reader.read(line, row) for line, row in json_rows(text.split("\n"), reader.errors)]
    reader.finish(len(found))
    return [record for record in found if record is not None]


def random_row(rng: random.Random) -> dict[str, Any]:
    """Draw a row: mostly of one shape, sometimes with what the regular expression leaves to the parser."""
    number = rng.randrange(40)
    row: dict[str, Any] = {"image": f"images/{number}.jpg", "caption": f"a picture of {number} things, größer"}
    if rng.random() < 0.8:
        row["image_id"] = rng.choice([number, f"coco/{number}", f"own {number}", f"mine/{number}", ""])
    if rng.random() < 0.5:
        row["caption"] = rng.choice(CAPTIONS)
    if rng.random() < 0.1:
        row["image"] = rng.choice(IMAGES)
    if rng.random() < 0.1:
        row["foils"] = rng.choice(["no", ["never", "not"]])
    if rng.random() < 0.1:
        row["url"] = rng.choice([None, 1.5e3, True, "x", [1]])
    return row


@pytest.mark.parametrize("seed", range(12))
def test_an_index_gives_the_records_of_a_naive_loop(seed: int, tmp_path: Path) -> None:
    """Bug: a row that the regular expression takes has another record, line or fact than the parser gives it."""
    rng = random.Random(seed)
    rows = [random_row(rng) for _ in range(200)]
    texts = [json.dumps(row, ensure_ascii=seed % 2 == 0, separators=(",", ":") if seed % 3 else None) for row in rows]
    if seed > 5:  # blank lines
        texts = [line for text in texts for line in ([text, "", " \t"] if rng.random() < 0.2 else [text])]
    path = tmp_path / "pairs.jsonl"
    ending = "\r\n" if seed in (3, 8) else "\n"
    content = ending.join(texts) + (ending if seed % 4 else "")
    path.write_bytes((b"\xef\xbb\xbf" if seed == 4 else b"") + content.encode())
    expected = naive(path)
    pairs = read_pairs(path)
    assert isinstance(pairs, LinePairs)
    assert len(pairs) == len(expected) == 200
    assert list(pairs) == expected
    assert [pairs[i] for i in range(200)] == expected
    assert pairs[-1] == expected[-1]
    assert pairs[30:70:3] == expected[30:70:3]
    indexed, listed = PairDataset(pairs, (16, 16)), PairDataset(expected, (16, 16))
    assert indexed.dataset_names() == listed.dataset_names()
    assert (indexed.n_caption_ids, indexed.has_foils()) == (listed.n_caption_ids, listed.has_foils())
    assert [*indexed.fingerprint_items(by_row=True)] == [*listed.fingerprint_items()]
    assert identity_warnings([pairs, expected]) == identity_warnings([expected, expected])


def test_rows_of_the_first_row_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the regular expression matches nothing, and every row of four million takes the slow way in silence."""
    path = tmp_path / "pairs.jsonl"
    row = {"url": "http://a/b.jpg", "file_name": "a.jpg", "width": 640, "text": 'a "quoted" word', "image_id": 7}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(100)))
    parsed: list[int] = []
    read = RowReader.read
    monkeypatch.setattr(RowReader, "read", lambda self, line, row: (parsed.append(line), read(self, line, row))[1])
    assert len(LinePairs(path, KEYS)) == 100
    assert parsed == [1]


@pytest.mark.parametrize("blank", ["\u00a0", "\u3000", "\u2028", "\x1c", " \t"])
def test_a_line_that_looks_blank_moves_no_row(blank: str, tmp_path: Path) -> None:
    """Bug: the index skips a line that the reader of a row counts, and every row after it is another one."""
    rows = [json.dumps({"image": f"{i}.jpg", "caption": f"number {i}"}) for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([*rows[:3], blank, *rows[3:], blank]), encoding="utf-8")
    pairs = read_pairs(path)
    assert [pairs[i].captions for i in range(40)] == [(f"number {i}",) for i in range(40)]
    assert list(pairs) == naive(path)
    assert [pairs[2].line, pairs[3].line] == [3, 5]


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_caption_key_keeps_its_name(is_plain: bool, tmp_path: Path) -> None:
    """Bug: a field called `text` is renamed to `caption` though the config names it, or two names of the image mix."""
    path = tmp_path / "pairs.jsonl"
    row = {"file_name": "a.jpg", "text": "short", "re": "a long one", **({} if is_plain else {"foils": "no"})}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    assert read_pairs(path, None, {"text": 1.0})[2].captions == ("short",)
    assert read_pairs(path, None, {"text": 0.5, "re": 0.25})[1].weights == (0.5, 0.25)
    assert read_pairs(path, None, {"caption": 1.0})[0].captions == ("short",)
    with pytest.raises(ValueError, match="no row has the caption key 'caption'"):
        read_pairs(path, None, {"caption": 1.0, "text": 1.0})
    both = {"file_name": "a.jpg", "filepath": "b.jpg", "title": "one", "text": "two"}
    path.write_text(json.dumps(both) + "\n")
    (record,) = read_pairs(path)
    assert (Path(str(record.image)).name, record.captions) == ("a.jpg", ("two",))


@pytest.mark.parametrize(
    "bad",
    [
        '{"image": "a.jpg", "caption": "b"',
        '{"image": "a.jpg", "image": "b.jpg", "caption": "c"}',
        '{"image": "a.jpg", "caption": []}',
        '{"image": " ", "caption": "c"}',
        '{"image": "a.jpg", "caption": "c", "width": 01}',
        '{"image": "a.jpg", "caption": "tab\there"}',
        '{"image": "a.jpg", "caption": "c\\x"}',
        '{"image": "a.jpg", "caption": "c", "image_id": 1.5}',
        '{"image": "a.jpg", "caption": "c", "image_id": true}',
        '{"image": "a.jpg", "caption": "c", "foils": "c"}',
        '{"image": "a.jpg", "captoin": "c"}',
        "[1]",
    ],
)
def test_bad_rows_are_named_as_by_a_naive_loop(bad: str, tmp_path: Path) -> None:
    """Bug: the regular expression takes a row that is no JSON, or the line of an error counts from its block."""
    path = tmp_path / "pairs.jsonl"
    good = '{"image": "a.jpg", "caption": "b"}'
    path.write_text("\n".join([*[good] * 30, "", bad, good, "{"]))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:32: ") as expected:
        naive(path)
    with pytest.raises(ValueError) as found:
        read_pairs(path)
    assert str(found.value) == str(expected.value)


def test_a_changed_character_is_never_taken_for_a_good_row(tmp_path: Path) -> None:
    """Bug: the regular expression accepts what the parser refuses."""
    rng = random.Random(0)
    row = '{"image": "a.jpg", "caption": ["one \\"x\\"", "tw\\u00f6"], "width": -1.5e+3, "image_id": 12}'
    reader = RowReader(tmp_path / "pairs.jsonl", KEYS)
    alike = pair_lines._Alike(row, reader)
    n_taken = 0
    for _ in range(20_000):
        at = rng.randrange(len(row))
        text = row[:at] + rng.choice(CHANGES) + row[at + 1 :]
        if not alike.find(text, 1)[0][alike.groups[0]]:
            continue
        n_taken += 1
        try:
            value = parse_json(text)
        except JsonError:
            pytest.fail(f"taken: {text}")
        assert RowReader(reader.path, KEYS).read(1, value) is not None, text
    assert n_taken > 1000


def test_text_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    """Bug: the byte of the error counts from the block, not from the start of the file."""
    good = b'{"image": "a.jpg", "caption": "b"}\n' * 60
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(good + b'{"image": "a.jpg", "caption": "\xff"}\n')
    with pytest.raises(ValueError, match=f"at byte {len(good) + 31}\\)"):
        read_pairs(path)


def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path: Path) -> None:
    """Bug: rows of the new file are read at the places of the old one."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "b"}\n' * 3)
    pairs = read_pairs(path)
    path.write_text('{"image": "a.jpg", "caption": "bc"}\n' * 3)
    with pytest.raises(OSError, match="was changed while it was in use"):
        pairs[2]


def test_a_loader_process_gets_a_small_index(tmp_path: Path) -> None:
    """Bug: the records travel to every loader process: 1.2 GB for a million pairs."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"image": f"{i}.jpg", "caption": f"{i} words"}) + "\n" for i in range(20_000)))
    pairs = read_pairs(path)
    sent = pickle.dumps(pairs)
    assert len(sent) < 20_000 * 16 / 32 + 4096
    assert pickle.loads(sent)[12_345] == pairs[12_345]


def test_the_fingerprint_follows_content_and_name_not_the_folder(tmp_path: Path) -> None:
    """Bug: moved data cannot be resumed on, or a changed caption can."""
    prints = {}
    for folder in ("here", "there"):
        path = tmp_path / folder / "pairs.jsonl"
        path.parent.mkdir()
        rows = [{"image": str(path.parent / f"{i}.jpg"), "caption": "b"} for i in range(50)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prints[folder] = [*PairDataset(read_pairs(path), (8, 8)).fingerprint_items()]
    assert prints["here"] == prints["there"]
    path.write_text(path.read_text().replace('"b"', '"c"', 1))
    os.utime(path)
    assert [*PairDataset(read_pairs(path), (8, 8)).fingerprint_items()] != prints["there"]
    other = shutil.copy(tmp_path / "here/pairs.jsonl", tmp_path / "here/other.jsonl")
    assert [*PairDataset(read_pairs(Path(other)), (8, 8)).fingerprint_items()] != prints["here"]
    keyed = LinePairs(tmp_path / "here/pairs.jsonl", {"caption": 1.0, "long": 0.0})
    assert keyed.fingerprint() != LinePairs(tmp_path / "here/pairs.jsonl", KEYS).fingerprint()


def test_identities_are_compared_by_content_not_by_chance() -> None:
    """Bug: the two pictures of a shared id are not those that share it."""
    record = PairRecord("/a/1.jpg", ("x",), "one", 1, "f")
    rows = [record, PairRecord("/a/2.jpg", ("x",), "two", 2, "f"), PairRecord("/a/3.jpg", ("x",), "one", 3, "f")]
    rows.append(PairRecord("/a/2.jpg", ("x",), "three", 4, "f"))
    shared, several = identity_warnings([rows[:2], rows[2:]])
    assert "1 of 3 image_ids" in shared
    assert "'one' of /a/1.jpg and /a/3.jpg (f:3)" in shared
    assert "1 pictures have several" in several
    assert "/a/2.jpg is 'two' and 'three' (f:4)" in several
    assert not identity_warnings([rows[:2]])
