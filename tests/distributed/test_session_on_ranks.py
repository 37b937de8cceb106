"""Loops by hand on several gloo ranks: the same weights on all, exact resume."""

import json
import pathlib
from itertools import chain

import pytest
from support import run_ranks

SCRIPT = pathlib.Path(__file__).with_name("session_script.py")


def run(folder, ranks, *stops, **settings):
    folder.mkdir(parents=True)
    texts = json.dumps(stops), json.dumps(settings)
    run_ranks(SCRIPT, ranks, folder, *texts, cwd=folder)
    files = [folder / f"rank_{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files]


def same(whole, parts, but=()):
    """Whether the ranks have done the same in both runs, in bits."""
    for one, other in zip(whole, parts, strict=True):
        for name in one["outcome"].keys() - {*but}:
            value = one["outcome"][name]
            assert other["outcome"][name] == value, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks") / "whole", 2, window=2)


def test_ranks_share_each_epoch_and_end_with_the_same_weights(whole):
    first, second = (report["outcome"] for report in whole)
    assert first["weights"] == second["weights"]
    assert first["optimizers"] == second["optimizers"]
    for epoch in range(3):
        batches = slice(3 * epoch, 3 * epoch + 3)
        shares = [chain(*report["outcome"]["ids"][batches]) for report in whole]
        samples = sorted(chain(*shares))
        assert len(samples) == 24  # of 22: as Accelerate fills up the last batches
        assert set(samples) == set(range(22))


def test_ranks_stopped_and_started_again_end_with_the_same_bits(tmp_path, whole):
    # Inside a window, at its end, in a validation, and at the end of an epoch.
    stops = [{"batch": 0}, {"batch": 1}, {"in_validation": 0}, {"batch": 5}]
    same(whole, run(tmp_path / "parts", 2, *stops, window=2))


def test_objects_that_nobody_has_prepared_resume_exactly_on_ranks(tmp_path):
    settings = {"window": 2, "is_prepared": False, "workers": 1}
    parts = run(tmp_path / "parts", 2, {"batch": 3}, {"after_epoch": 1}, **settings)
    same(run(tmp_path / "whole", 2, **settings), parts)


def test_three_ranks_stopped_and_started_again_end_with_the_same_bits(tmp_path):
    # With three, a sum depends on where a gradient lies among the others.
    parts = run(tmp_path / "parts", 3, {"at_start": True}, {"batch": 2})
    same(run(tmp_path / "whole", 3), parts)


def test_step_whose_numbers_are_bad_on_one_rank_is_skipped_on_all(tmp_path):
    settings = {"spoiled": [4], "options": {"bad_numbers": "skip"}}
    whole = run(tmp_path / "whole", 2, **settings)
    first, second = (report["outcome"] for report in whole)
    assert first["weights"] == second["weights"]
    parts = run(tmp_path / "parts", 2, {"batch": 4}, {"batch": 6}, **settings)
    same(whole, parts, but=["logged"])  # a loss that is NaN equals nothing
    record = next((tmp_path / "whole" / "run").rglob("helios.json")).read_text()
    assert '"skipped_steps": 1' in record


def test_accelerate_counts_each_sample_of_a_stream_once(whole):
    for report in whole:
        assert report["counted"] == [[0, 1, 2, 3], [4, 5, 6]]
        assert report["trained"] == report["counted"]


def test_what_ranks_would_train_each_by_itself_is_refused(whole):
    for report in whole:
        first, second, third = report["refusals"]
        assert "`head` is trained, and was not prepared" in first
        assert "`nets.0` is trained, and was not prepared" in second
        assert "`samples of phase 0` is 9 on rank 0 and 10 on rank 1" in third
