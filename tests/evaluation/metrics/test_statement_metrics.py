"""True or false statements: thresholds, folds, the clustered interval and the file."""

import json

import numpy as np
import pytest
from scipy import stats

from mamo.evaluation.metrics import statements
from mamo.evaluation.metrics.statements import (
    StatementRecord,
    best_threshold,
    clustered_interval,
    fold_predictions,
    folds_of,
    read_scores,
    read_statements,
    statement_metrics,
    write_scores,
)


def records_of(labels, directories, sentences=None):
    sentences = sentences or [f"sentence {k}" for k in range(len(labels))]
    return [
        StatementRecord("i.png", text, bool(label), folder)
        for text, label, folder in zip(sentences, labels, directories)
    ]


def test_best_threshold_equals_trying_all():
    """Would catch an off-by-one among the cuts, a flipped sign, and tied scores that are split."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        score, label = rng.integers(0, 6, 15).astype(float), rng.random(15) < 0.5
        best = max(((score > cut) == label).sum() for cut in (-1, 0, 1, 2, 3, 4, 5))
        assert ((score > best_threshold(score, label)) == label).sum() == best


def test_a_fold_is_not_fitted_on_itself():
    """Would catch a threshold that saw its own directory: its labels must not change what is said of it."""
    rng = np.random.default_rng(1)
    score, label = rng.normal(size=300), rng.random(300) < 0.5
    fold = folds_of([str(k % 6) for k in range(300)])
    before = fold_predictions(score, label, fold)
    for held_out in range(6):
        mine = fold == held_out
        assert np.array_equal(fold_predictions(score, label ^ mine, fold)[mine], before[mine])
        assert not np.array_equal(fold_predictions(score, label ^ ~mine, fold)[mine], before[mine])


def test_directories_are_not_split():
    """Would catch folds by row, which share a directory between fitting and testing."""
    directories = [str(k % 11) for k in range(110)]
    fold = folds_of(directories)
    assert len(set(zip(directories, fold.tolist()))) == 11
    assert set(fold.tolist()) == set(range(6))


def test_one_directory_alone_uses_the_natural_threshold():
    """Would catch a crash or a fit on the test data itself where one directory is held out."""
    score = np.array([-2.0, -0.1, 0.1, 3.0])
    predicted = fold_predictions(score, np.array([True, True, False, False]), folds_of(["5"] * 4))
    assert predicted.tolist() == [False, False, True, True]


def test_interval_equals_a_naive_bootstrap_and_scipy():
    """Would catch clusters weighed alike whatever their size, and quantiles of the wrong tails."""
    rng = np.random.default_rng(2)
    cluster = np.sort(rng.integers(0, 30, 400))
    is_right = rng.random(400) < np.linspace(0.3, 0.9, 30)[cluster]
    low, high = clustered_interval(is_right, cluster)
    draws, means = np.random.default_rng(statements._SEED), []
    for _ in range(statements._N_RESAMPLES):
        drawn = draws.integers(30, size=30)
        means.append(np.mean([value for c in drawn for value in is_right[cluster == c]]))
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))
    right, size = np.bincount(cluster, weights=is_right), np.bincount(cluster)
    theirs = stats.bootstrap(
        (right, size),
        lambda r, s, axis: r.sum(axis=axis) / s.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=5000,
        rng=np.random.default_rng(9),
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_clustered_interval_is_wider_where_sentences_decide():
    """Would catch an interval over rows: 20 sentences with 50 equal outcomes each are 20 facts, not 1000."""
    cluster = np.repeat(np.arange(20), 50)
    is_right = cluster % 2 == 0
    low, high = clustered_interval(is_right, cluster)
    row_low, row_high = clustered_interval(is_right, np.arange(1000))
    assert (high - low) > 5 * (row_high - row_low)
    assert low < 0.5 < high


def test_an_oracle_and_a_constant():
    """Would catch exchanged labels, and a score without information that beats the majority class."""
    rng = np.random.default_rng(3)
    labels = rng.random(600) < 0.55
    records = records_of(labels, [str(k % 6) for k in range(600)])
    oracle = statement_metrics(np.where(labels, 4.0, 3.0), records)
    assert oracle["accuracy"] == oracle["interval_low"] == oracle["interval_high"] == 100
    constant = statement_metrics(np.zeros(600), records)
    assert constant["accuracy"] == pytest.approx(constant["majority"]) == pytest.approx(100 * labels.mean())


def test_interval_clusters_by_sentence():
    """Would catch an interval clustered by directory or by image, which are all alike here."""
    labels = [True, False] * 300
    sentences = [f"sentence {k // 100}" for k in range(600)]
    score = np.array([1.0 if (k // 100) % 2 == label else 0.0 for k, label in enumerate(labels)])
    metrics = statement_metrics(score, records_of(labels, ["0"] * 600, sentences))
    assert metrics["accuracy"] == 50
    assert metrics["interval_low"] < 20
    assert metrics["interval_high"] > 80


def test_scores_survive_their_file(tmp_path):
    """Would catch rounded scores, and rows that lose what the folds and the clusters are made of."""
    score = np.array([0.1 + 0.2, -1e-17, 3.0])
    records = records_of([True, False, True], ["0", "1", "1"], ["a", "b", "a"])
    write_scores(tmp_path / "scores.jsonl", score, records)
    again, found = read_scores(tmp_path / "scores.jsonl")
    assert again.tolist() == score.tolist()
    assert [(r.sentence, r.label, r.directory) for r in found] == [(r.sentence, r.label, r.directory) for r in records]
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"sentence": "a"}\n')
    with pytest.raises(ValueError, match=r"scores\.jsonl:4: not a row of statement scores"):
        read_scores(tmp_path / "scores.jsonl")


def test_a_sentence_may_hold_odd_line_ends(tmp_path):
    """Bug: a row is cut in two at a character that ends a line for Python and not for JSON."""
    file = tmp_path / "scores.jsonl"
    sentence = "one\u2028two\u2029three\u0085four"
    write_scores(file, np.array([0.5, 1.5]), records_of([True, False], ["0", "1"], [sentence, "b"]))
    score, found = read_scores(file)
    assert score.tolist() == [0.5, 1.5]
    assert [record.sentence for record in found] == [sentence, "b"]


def test_a_file_of_another_encoding_is_named(tmp_path):
    """Bug: "can't decode byte 0xfc" without a word about where."""
    file = tmp_path / "statements.jsonl"
    row = {"image": "a.png", "sentence": "grün", "label": True, "directory": "0", "score": 1.0}
    file.write_bytes(json.dumps(row, ensure_ascii=False).encode("latin-1"))
    for read in (read_statements, read_scores):
        with pytest.raises(ValueError, match=r"statements\.jsonl: not UTF-8 text"):
            read(file)


def test_reading_a_file_and_its_mistakes(tmp_path):
    """Would catch paths relative to the working directory, and labels such as "true" that are all truthy."""
    file = tmp_path / "statements.jsonl"
    row = {"image": "images/0/a.png", "sentence": "There is a box.", "label": False, "directory": "0", "permutation": 2}
    file.write_text(json.dumps(row) + "\n")
    assert read_statements(file) == [StatementRecord(str(tmp_path / "images/0/a.png"), "There is a box.", False, "0")]
    for bad, message in (({**row, "label": "true"}, ":2: needs field 'label'"), ([], ":2: needs field 'image'")):
        file.write_text(json.dumps(row) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(ValueError, match=message):
            read_statements(file)
    with pytest.raises(ValueError, match=r"absent\.jsonl: cannot be read: .*; build it with"):
        read_statements(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
def test_hostile_rows_are_named_and_blank_lines_skipped(tmp_path, value):
    """Bug: a nesting bomb among the statements is a RecursionError; a blank line is "not valid JSON"."""
    file = tmp_path / "statements.jsonl"
    row = {"image": "a.png", "sentence": "There is a box.", "label": False, "directory": "0", "score": 1.0}
    file.write_text(f"\n{json.dumps(row)}\n \n")
    assert len(read_statements(file)) == 1
    assert len(read_scores(file)[0]) == 1
    file.write_text(f"{json.dumps(row)}\n{value}\n")
    for read in (read_statements, read_scores):
        with pytest.raises(ValueError, match=r"statements\.jsonl:2: not "):
            read(file)
