"""Names of file formats that are not read, each with the way to read it."""

from pathlib import Path

from mamo.data.tables import separator_of

METADATA = ("metadata.jsonl", "metadata.csv")
"""Files of a Hugging Face image folder, whose rows are pairs."""
_BINARY = (
    (b"PAR1", "a Parquet file; make tar shards of it: mamo data build parquet --from FILES --to SHARDS"),
    (b"ARROW1", "an Arrow file; write its texts as JSON Lines and its images as files"),
    (b"\x1f\x8b", "a gzip file; unpack it with gunzip or tar -xzf"),
    (b"BZh", "a bzip2 file; unpack it with bunzip2"),
    (b"\xfd7zXZ", "an xz file; unpack it with unxz"),
    (b"(\xb5/\xfd", "a Zstandard file; unpack it with unzstd"),
    (b"PK\x03\x04", "a ZIP archive or spreadsheet; unpack it with unzip, or save the table as JSON Lines"),
    (b"\xff\xfe", "UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\x89HDF", "an HDF5 file; write its texts as JSON Lines and its images as files"),
    (b"\x93NUMPY", "a NumPy file; write its content as JSON Lines"),
    (b"SQLite format 3", "an SQLite database; write its rows as JSON Lines"),
    (b"\x89PNG", "a PNG image; name a file of records"),
    (b"\xff\xd8\xff", "a JPEG image; name a file of records"),
    (b"%PDF", "a PDF file; name a file of records"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file with git lfs pull"),
    (b"<!DOCTYPE", "an HTML page; fetch the file again"),
    (b"<html", "an HTML page; fetch the file again"),
    (b"<?xml", "an XML page; fetch the file again"),
)  # fmt: skip
_CSV_COMMAND = (
    'python -c "import csv, json, sys; [print(json.dumps(row)) for row in '
    "csv.DictReader(open(sys.argv[1], newline='', encoding='utf-8-sig'){})]\" {} > records.jsonl"
)


def name_binary(start: bytes) -> str:
    """Return "FORMAT; REMEDY" for the first 512 bytes of a file in a format that is not read, else ""."""
    if start[257:262] == b"ustar":
        return "a tar archive; give it the suffix .tar"
    known = next((text for magic, text in _BINARY if start.startswith(magic)), "")
    return known or _name_utf16(start)


def _name_utf16(start: bytes) -> str:
    """Name UTF-16 without a byte order mark; most characters are ASCII: one byte is 0."""
    for first, form in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros, others = start[first::2], start[1 - first :: 2]
        if 2 * zeros.count(0) > len(zeros) and not others.count(0):
            return f"{form} text without a byte order mark; convert it with iconv -f {form} -t UTF-8"
    return ""


def name_table(path: Path, text: str) -> str:
    """Return "FORMAT; REMEDY" if the text is a CSV or TSV table, for readers of JSON Lines only, else ""."""
    separator = separator_of(path, text)
    if not separator:
        return ""
    kind = "TSV" if separator == "\t" else "CSV"
    delimiter = "\\t" if separator == "\t" else separator
    command = _CSV_COMMAND.format("" if separator == "," else f", delimiter='{delimiter}'", path.name)
    return f"a {kind} table; name its columns as the fields of a record in its first line, and convert it: {command}"


def name_folder(folder: Path) -> str:
    """Return "FORMAT; REMEDY" for a folder without tar shards."""
    names = sorted(entry.name for entry in folder.iterdir())
    suffixes = {Path(name).suffix.lower() for name in names}
    if {"dataset_info.json", "state.json"} <= set(names):
        return (
            "a Hugging Face data set on disk (Arrow); make tar shards of it: "
            f"mamo data build huggingface --from {folder} --to SHARDS"
        )
    if ".parquet" in suffixes:
        return f"a folder of Parquet files; make tar shards: mamo data build parquet --from {folder} --to SHARDS"
    files = [name for name in names if name.endswith((".jsonl", ".json"))]
    if files:
        return f"a folder; name a file in it, such as {folder / files[0]}"
    if suffixes & {".gz", ".tgz", ".zip"}:
        return "a folder of compressed files; unpack them"
    if suffixes & {".jpg", ".jpeg", ".png", ".webp"}:
        return (
            'a folder of images; write a pairs file next to them, a line each: {"image": "1.jpg", "caption": "a kite"}'
        )
    if any((folder / name).is_dir() and any((folder / name).glob("*.tar")) for name in names):
        return f"a folder of folders; use the glob '{folder}/*/*.tar'"
    return "an unknown folder; use a pairs file, a folder of shards or a glob"
