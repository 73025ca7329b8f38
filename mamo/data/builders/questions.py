"""Builders of VQA v2 and Visual Genome QA: official files to `VqaRecord`."""

from pathlib import Path

from mamo.config.values import Values
from mamo.data.builders.captions import FOLDER_HINT
from mamo.data.builders.report import BuildReport, Count, ReleaseImages, UniqueIds, entries_of
from mamo.data.files import read_json
from mamo.data.output import OutputFolder
from mamo.data.records import VqaRecord, write_task_records

_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
_ANNOTATIONS = "v2_mscoco_{}_annotations.json"
_SPLITS = {  # split -> (official name, whether answers are public, number of questions)
    "train": ("train2014", True, 443_757),
    "val": ("val2014", True, 214_354),
    "test": ("test2015", False, 447_793),
    "test-dev": ("test-dev2015", False, None),
}
_VG_QUESTIONS = 1_445_322


def build_vqa2(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `train.jsonl`, `val.jsonl`, `test.jsonl` and `test-dev.jsonl`, for each question file in `source`.

    `source` contains the official question and annotation files and the images in `train2014/`, `val2014/` and
    `test2015/`.

    Raises:
        ValueError: no question file, a missing annotation file, questions and annotations that do not match, or an
            output file that exists while `overwrite` is False.
    """
    images, counts, absent = ReleaseImages(source, to), [], []
    with OutputFolder(to, overwrite) as output:
        for split, (official, has_answers, expected) in _SPLITS.items():
            file = source / _QUESTIONS.format(official)
            if not file.is_file():
                absent.append(file.name)
                continue
            answers = _answers(source / _ANNOTATIONS.format(official)) if has_answers else None
            records = _questions(file, official.replace("test-dev", "test"), answers, images)
            write_task_records(output.path(f"{split}.jsonl"), records)
            counts.append(Count(f"{split} questions", len(records), expected))
        if not counts:
            raise ValueError(f"{source}: contains none of the official files {_QUESTIONS.format('*')}")
    return BuildReport((*counts, images.count()), tuple(absent))


def _questions(file: Path, folder: str, answers: dict[int, Values] | None, images: ReleaseImages) -> list[VqaRecord]:
    """Read a question file; join the answers by question id, if there are any."""
    ids, records = UniqueIds(), []
    for entry in entries_of(read_json(file), "questions", file):
        number = entry.integer("question_id")
        ids.add(entry, "question_id", number)
        if answers is not None and number not in answers:
            raise ValueError(f"{entry.place}: question_id {number} has no annotation; fetch both files again")
        name = images.relative_path(f"{folder}/COCO_{folder}_{entry.integer('image_id'):012d}.jpg")
        question = {"image": name, "question_id": number, "question": entry.text("question")}
        records.append(entry.record(VqaRecord, {**question, **(answers.pop(number) if answers else {})}))
    if answers:
        raise ValueError(
            f"{file}: {len(answers)} annotations have no question, the first is {min(answers)}; fetch both files again"
        )
    return records


def _answers(file: Path) -> dict[int, Values]:
    """Read the answers and types of an annotation file by question id."""
    ids = UniqueIds()
    found: dict[int, Values] = {}
    for entry in entries_of(read_json(file, FOLDER_HINT), "annotations", file):
        number = entry.integer("question_id")
        ids.add(entry, "question_id", number)
        found[number] = {
            "answers": [answer.text("answer") for answer in entry.entries("answers")],
            "answer_type": entry.text("answer_type"),
            "question_type": entry.text("question_type"),
        }
        if "multiple_choice_answer" in entry:
            found[number]["multiple_choice_answer"] = entry.text("multiple_choice_answer")
    return found


def build_vgqa(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `questions.jsonl`: Visual Genome's questions, each with its single answer (without the full stop).

    `source` contains `question_answers.json` and the images in `VG_100K/` and `VG_100K_2/`.

    Raises:
        ValueError: the file does not have Visual Genome's format, or `questions.jsonl` exists and `overwrite` is False.
    """
    file = source / "question_answers.json"
    images, ids, records = ReleaseImages(source, to), UniqueIds(), []
    for entry in entries_of(read_json(file, FOLDER_HINT), "", file):
        for row in entry.entries("qas"):
            number, picture = row.integer("qa_id"), row.integer("image_id")
            ids.add(row, "qa_id", number)
            name = images.relative_path(f"VG_100K/{picture}.jpg", f"VG_100K_2/{picture}.jpg")
            answer = row.text("answer").strip().removesuffix(".").lower()
            question = {"image": name, "question_id": number, "question": row.text("question"), "answers": [answer]}
            records.append(row.record(VqaRecord, question))
    with OutputFolder(to, overwrite) as output:
        write_task_records(output.path("questions.jsonl"), records)
    return BuildReport((Count("questions", len(records), _VG_QUESTIONS), images.count()))
