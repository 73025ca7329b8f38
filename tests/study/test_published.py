"""The papers' differences beside ours, on planted results."""

from pathlib import Path

import pytest
import yaml

from mamo.study.published import PUBLISHED, direction, published_table, read_published
from mamo.study.report import write_report
from mamo.study.results import append_row, latest_results, read_rows
from mamo.study.spec import read_study
from mamo.study.statistics import interval

STUDIES = Path(__file__).parents[2] / "configs/studies"
TEXT, IMAGE = "rerank/i2t_r1", "rerank/t2i_r1"


def plant(
    study: str, differences: dict[str, list[float]], folder: Path, metric: str = TEXT, first_seed: int = 0
) -> None:
    """Finished cells of a shipped study: each variant so much above 50, seed by seed."""
    for variant, values in differences.items():
        for seed, value in enumerate(values, first_seed):
            cell = read_study(STUDIES / f"{study}.yaml").trial(variant, seed)
            append_row(folder, {"cell": cell.config_hash, "metrics": {metric: 50 + value}})


def lines(folder: Path) -> dict[tuple[str, str, str], list[str]]:
    """(study, difference, metric) -> the other cells of the table."""
    found = {}
    for line in published_table(STUDIES / PUBLISHED, folder).splitlines()[2:]:
        study, what, metric, *rest = line.strip("| ").split(" | ")
        found[study, what.split(": ")[-1], metric.strip("`")] = rest
    return found


def test_directions_of_planted_results(tmp_path: Path) -> None:
    """Bug: the sign is turned, TR and IR or two studies are mixed up, seeds are not paired, a comparison that was not
    run is a row."""
    plant("losses", {"itc+itm": [0, 9, 5], "+mlm": [2, 12, 9]}, tmp_path)  # +2, +3, +4: t = 4.303, s = 1
    plant("mim_target", {"pixels": [5, 6], "features": [1, 2.1]}, tmp_path)  # -4, -3.9
    found = lines(tmp_path)
    mlm = found["losses", "+mlm − itc+itm", TEXT]
    assert mlm == [
        "-0.3 on Flickr30K, +3.6 on COCO; MAMO (Zhao et al. 2023), Table 6",
        "+3.0 [+0.5, +5.5]",
        "3",
        "same",
    ]
    assert found["mim_target", "features − pixels", TEXT][3] == "opposite"
    assert found.keys() == {
        ("losses", "+mlm − itc+itm", TEXT),
        ("losses", "all − +mlm", TEXT),  # `all` is the trial of `features`
        ("mim_target", "features − pixels", TEXT),
    }
    plant("mlim", {"mlim": [1], "no dropout": [2]}, tmp_path, "matching/pr_auc/both", first_seed=10)
    plant("methods", {"mamo": [1], "albef, equal compute": [2]}, tmp_path)
    found = lines(tmp_path)
    assert found["mlim", "mlim − no dropout", "matching/pr_auc/both"][0].startswith("+2.0 on")
    assert found["methods", "mamo − albef, equal compute", TEXT][0].startswith("+1.9 on Flickr30K, +6.0 on COCO")
    unpublished = {"short_text", "contrast", "frozen_target"}  # no paper has them on pictures and captions as these
    assert read_published(STUDIES / PUBLISHED).keys() == {path.stem for path in shipped()} - unpublished


def test_earlier_results_are_read_with_their_own_studies(tmp_path: Path) -> None:
    """Bug: trials of earlier code are looked up by today's studies, or an older folder goes before a newer one."""
    studies, old = tmp_path / "studies", tmp_path / "studies/results/2026-11"
    for folder in (studies, old):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("base_scenes", "losses"):
            (folder / f"{name}.yaml").write_text((STUDIES / f"{name}.yaml").read_text())
    entry = yaml.safe_load((STUDIES / PUBLISHED).read_text())["losses"]
    (studies / PUBLISHED).write_text(yaml.safe_dump({"losses": entry}))
    plant("losses", {"itc+itm": [0, 9, 5], "+mlm": [2, 12, 9]}, old)
    changed = (studies / "base_scenes.yaml").read_text().replace("total_steps: 480", "total_steps: 500")
    (studies / "base_scenes.yaml").write_text(changed)
    results = studies / "results"
    (results / "2025-12").mkdir()
    append_row(results / "2025-12", row_of("older", {}))
    assert latest_results(results) == old
    assert "+3.0 [+0.5, +5.5]" in published_table(studies / PUBLISHED, latest_results(results))
    append_row(results, row_of("new", {}))
    assert latest_results(results) == results
    assert len(published_table(studies / PUBLISHED, results).splitlines()) == 2


def shipped() -> list[Path]:
    """The studies that ship."""
    files = STUDIES.glob("*.yaml")
    return [path for path in files if not path.stem.startswith("base") and path.name != PUBLISHED]


def test_what_decides_nothing(tmp_path: Path) -> None:
    """Bug: one seed, an interval that holds zero, or a paper's difference within its noise passes for a finding."""
    plant("losses", {"itc+itm": [0, 0], "+mlm": [5, -4], "+mlm+mim": [9, 0.1], "+mrm": [7]}, tmp_path)
    found = lines(tmp_path)
    assert found["losses", "+mlm − itc+itm", TEXT][3] == "not decided: the interval holds zero"
    assert found["losses", "+mlm+mim − +mlm", TEXT][3] == "not decided: the paper's is below 0.5"
    plant("losses", {"itc+itm": [0], "+mrm": [7]}, tmp_path, IMAGE)
    assert ("losses", "+mrm − itc+itm", IMAGE) not in found
    assert lines(tmp_path)["losses", "+mrm − itc+itm", IMAGE][3] == "not decided: one seed"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.2, 0.1], "same"),
        ([1.1, 1.2, 1.1], "opposite"),
        ([-1.1, -1.2, -1.1], "opposite"),
        ([0.7, 0.9, 0.7], "not decided: the interval holds -0.8 or 0.8"),
    ],
)
def test_a_claim_that_nothing_matters(values: list[float], expected: str) -> None:
    """Bug: "no difference" is confirmed by an interval that merely holds zero, however wide."""
    assert direction(interval(values), (-0.8, 0.8)) == expected
    assert direction(interval([-5.0, 0.0, 5.0]), (-0.8, 0.8)).startswith("not decided")
    assert direction(interval([0.0, 0.0]), (0.0, float("inf"))) == "not decided: the interval holds zero"


def test_published_rows_are_the_studies_variants(tmp_path: Path) -> None:
    """Bug: a row whose variant was renamed drops out of the table in silence; a row is a value short."""
    for name, published in read_published(STUDIES / PUBLISHED).items():
        study = read_study(STUDIES / f"{name}.yaml")
        assert {*published.rows, *published.lower} <= study.variants.keys()
        assert {column.metric for column in published.columns} <= {*study.file.metrics}
    entry = {"source": "s", "columns": [{"data": "d", "metric": "m"}], "rows": {"a": [1.0, 2.0]}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"losses": entry}))
    with pytest.raises(ValueError, match=r"mine.yaml: losses.rows.a: 2 values"):
        read_published(path)
    path.write_text(yaml.safe_dump({"losses": {**entry, "row": {}}}))
    with pytest.raises(ValueError, match=r"mine.yaml: losses: row: unknown key; did you mean `rows`"):
        read_published(path)


def test_a_method_without_a_metric_shows_a_dash(tmp_path: Path) -> None:
    """Bug: MLIM, which ranks nothing, stops the report of the methods, also when its cell is the first to finish."""
    study = read_study(STUDIES / "methods.yaml")
    words = {"masked_word/colour": 60.0, "masked_word/shape": 40.0}
    append_row(tmp_path, row_of(study.trial("mlim, equal samples", 0).config_hash, words))
    write_report(study, read_rows(tmp_path), tmp_path)
    every = dict.fromkeys(study.file.metrics, 70.0)
    for variant in ("mamo", "itc+itm+mlm, equal compute"):
        append_row(tmp_path, row_of(study.trial(variant, 0).config_hash, every))
    write_report(study, read_rows(tmp_path), tmp_path)
    (line,) = (x for x in (tmp_path / "methods.md").read_text().splitlines() if x.startswith("| mlim, equal samples |"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["1"] + ["—"] * 10 + ["60.0", "-10.0", "40.0", "-30.0"]


def row_of(config_hash: str, metrics: dict[str, float]) -> dict[str, object]:
    """A finished cell."""
    return {"cell": config_hash, "steps": 1, "samples": 1, "train_s": 1.0, "metrics": metrics}
