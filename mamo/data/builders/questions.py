"""Builders of VQA v2 and Visual Genome QA: official files to `VqaRecord`."""

from pathlib import Path

from mamo.data.builders.report import BuildReport, Count, ReleaseImages, get_rows, read_json
from mamo.data.records import VqaRecord, write_task_records

_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
_ANNOTATIONS = "v2_mscoco_{}_annotations.json"
_SPLITS = {  # split -> (official name, whether answers are public, number of questions)
    "train": ("train2014", True, 443_757),
    "val": ("val2014", True, 214_354),
    "test": ("test2015", False, 447_793),
    "test-dev": ("test-dev2015", False, None),
}


def build_vqa2(source: Path, to: Path) -> BuildReport:
    """Write `train.jsonl`, `val.jsonl`, `test.jsonl` and `test-dev.jsonl`, for each question file in `source`.

    `source` contains the official question and annotation files and the images in `train2014/`, `val2014/` and
    `test2015/`.

    Raises:
        ValueError: no question file, a missing annotation file, or questions and annotations that do not match.
    """
    images, counts = ReleaseImages(source, to), []
    for split, (official, has_answers, expected) in _SPLITS.items():
        file = source / _QUESTIONS.format(official)
        if not file.is_file():
            continue
        answers = _answers(source / _ANNOTATIONS.format(official)) if has_answers else {}
        folder = official.replace("test-dev", "test")
        records = []
        for row in get_rows(read_json(file), "questions", ("image_id", "question", "question_id"), file):
            name = images.relative_path(f"{folder}/COCO_{folder}_{row['image_id']:012d}.jpg")
            annotation = answers.pop(row["question_id"], None)
            if has_answers and annotation is None:
                raise ValueError(f"{file}: question_id {row['question_id']} has no annotation; fetch both files again")
            question = {"image": name, "question_id": row["question_id"], "question": row["question"]}
            records.append(VqaRecord.model_validate({**question, **(annotation or {})}))
        if answers:
            raise ValueError(
                f"{file}: {len(answers)} annotations have no question, the first is {min(answers)}; "
                "fetch both files again"
            )
        write_task_records(to / f"{split}.jsonl", records)
        counts.append(Count(f"{split} questions", len(records), expected))
    if not counts:
        raise ValueError(f"{source}: contains none of the official files {_QUESTIONS.format('*')}")
    return BuildReport((*counts, images.count()))


def _answers(file: Path) -> dict[int, dict[str, object]]:
    """Read the answers and types of an annotation file by question id."""
    fields = ("question_id", "answers", "answer_type", "question_type")
    found: dict[int, dict[str, object]] = {}
    for row in get_rows(read_json(file), "annotations", fields, file):
        if row["question_id"] in found:
            raise ValueError(f"{file}: question_id {row['question_id']} occurs twice; fetch the file again")
        found[row["question_id"]] = {
            "answers": [answer["answer"] for answer in row["answers"]],
            "answer_type": row["answer_type"],
            "question_type": row["question_type"],
        }
    return found


def build_vgqa(source: Path, to: Path) -> BuildReport:
    """Write `questions.jsonl`: Visual Genome's questions, each with its single answer (without the full stop).

    `source` contains `question_answers.json` and the images in `VG_100K/` and `VG_100K_2/`.

    Raises:
        ValueError: the file does not have Visual Genome's format.
    """
    file = source / "question_answers.json"
    images, records = ReleaseImages(source, to), []
    for entry in get_rows(read_json(file), "", ("qas",), file):
        for row in entry["qas"]:
            name = images.relative_path(f"VG_100K/{row['image_id']}.jpg", f"VG_100K_2/{row['image_id']}.jpg")
            answer = row["answer"].strip().removesuffix(".").lower()
            question = {"image": name, "question_id": row["qa_id"], "question": row["question"], "answers": [answer]}
            records.append(VqaRecord.model_validate(question))
    write_task_records(to / "questions.jsonl", records)
    return BuildReport((Count("questions", len(records)), images.count()))
