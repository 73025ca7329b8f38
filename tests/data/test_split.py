"""`mamo data split`: by image, the same in every call, rows as they were."""

import json
from pathlib import Path

import pytest

from mamo.commands.data import main
from mamo.data.pairs_reader import read_pairs, write_json_lines


def rows_of(n: int = 200) -> list[dict[str, str]]:
    return [{"image": f"{k % 100}.jpg", "caption": f"text {k}, “quoted”", "more": "kept"} for k in range(n)]


def parts(file: Path) -> tuple[list[str], list[str]]:
    names = (file.with_name(f"{file.stem}-{side}{file.suffix}") for side in ("train", "eval"))
    train, held_out = (name.read_text().splitlines() for name in names)
    return train, held_out


def test_all_rows_of_a_picture_are_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a held-out picture is trained on with its other caption; rows are lost, changed, or another share held out;
    new rows or another folder move pictures to the other side."""
    file = tmp_path / "a.jsonl"
    write_json_lines(file, rows_of())
    assert main(["split", str(file), "--held-out", "0.3"]) == 0
    train, held_out = parts(file)
    assert sorted(train + held_out) == sorted(file.read_text().splitlines())
    names = [{json.loads(line)["image"] for line in side} for side in (train, held_out)]
    assert not names[0] & names[1]
    assert 15 <= len(names[1]) <= 45  # 30 expected, standard deviation 4.6
    said = capsys.readouterr().out
    assert f"a-train.jsonl: {len(train)} pairs of {len(names[0])} images" in said
    assert f"a-eval.jsonl: {len(held_out)} pairs of {len(names[1])} images" in said
    other = tmp_path / "other/a.jsonl"
    write_json_lines(other, [{"image": "new.jpg", "caption": "new"}, *rows_of()])
    main(["split", str(other), "--held-out", "0.3"])
    assert set(parts(other)[1]) - set(held_out) <= {'{"image": "new.jpg", "caption": "new"}'}
    assert set(held_out) <= set(parts(other)[1])


def test_tables_keep_header_quotes_and_ids(tmp_path: Path) -> None:
    """Bug: a caption with a comma or line feed breaks its row; ids are ignored; a bare table loses a row."""
    file = tmp_path / "a.csv"
    lines = "".join(f'{k}.jpg,"red, {k}\nor blue",{k // 2}\n' for k in range(40))
    file.write_text(f"image,caption,image_id\n{lines}")
    main(["split", str(file), "--held-out", "0.5"])
    train, held_out = (read_pairs(tmp_path / f"a-{side}.csv") for side in ("train", "eval"))
    assert len(train) + len(held_out) == 40
    assert sorted([*train, *held_out], key=lambda r: int(Path(str(r.image)).stem))[7].captions == ("red, 7\nor blue",)
    assert not {r.image_id for r in train} & {r.image_id for r in held_out}
    bare = tmp_path / "b.tsv"
    bare.write_text("".join(f"text {k}\t{k}.jpg\n" for k in range(40)))
    main(["split", str(bare), "--held-out", "0.5", "--columns", "caption,image"])
    assert sorted([*parts(bare)[0], *parts(bare)[1]]) == sorted(bare.read_text().splitlines())


def test_two_spellings_of_a_path_are_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a picture that is named by `a/x.jpg` and `./a/x.jpg` counts twice."""
    file = tmp_path / "a.jsonl"
    names = [f"{before}{k}.jpg" for k in range(20) for before in ("", "./", "b/../")]
    write_json_lines(file, [{"image": name, "caption": name} for name in names])
    main(["split", str(file), "--held-out", "0.4"])
    counts = [int(line.split()[-2]) for line in capsys.readouterr().out.splitlines()]
    assert sum(counts) == 20


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    """Bug: an empty side, an official file cut apart, or a file of the user's that is overwritten."""
    file = tmp_path / "a.jsonl"
    write_json_lines(file, rows_of(100))
    for share in ("0", "1", "nan"):
        with pytest.raises(ValueError, match="--held-out: must be between 0 and 1"):
            main(["split", str(file), "--held-out", share])
    with pytest.raises(ValueError, match="leaves one side empty"):
        main(["split", str(file), "--held-out", "0.000001"])
    whole = tmp_path / "albef.json"
    whole.write_text(json.dumps(rows_of(4)))
    with pytest.raises(ValueError, match="only JSON Lines, CSV and TSV are split"):
        main(["split", str(whole)])
    with pytest.raises(ValueError, match="no such file"):
        main(["split", str(tmp_path)])
    (tmp_path / "a-eval.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        main(["split", str(file)])
    assert not (tmp_path / "a-train.jsonl").exists()
    assert main(["split", str(file), "--overwrite"]) == 0
