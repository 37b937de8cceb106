"""Several gloo ranks: one epoch between them, the same weights on all, exact resume."""

import json
import pathlib
from itertools import chain

import pytest
from support import run_ranks

SCRIPT = pathlib.Path(__file__).with_name("ranks_script.py")


def run(folder, ranks, *stops):
    folder.mkdir()
    run_ranks(SCRIPT, ranks, folder, *stops, cwd=folder)
    files = [folder / f"rank_{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks") / "whole", 2)


def test_ranks_share_each_epoch_and_end_with_the_same_weights(whole):
    first, second = whole
    assert first["is_finished"] == second["is_finished"] == [True]
    assert first["networks"] == second["networks"]
    assert first["optimizers"] == second["optimizers"]
    for epoch in range(3):
        batches = slice(3 * epoch, 3 * epoch + 3)
        shares = [list(chain.from_iterable(report["ids"][batches])) for report in whole]
        assert sorted(shares[0] + shares[1]) == list(range(22))
        assert len(shares[0]) == len(shares[1]) == 11


def test_parameter_in_no_network_is_refused_where_ranks_would_train_each_its_own(whole):
    for report in whole:
        assert "['scale'] are in no network" in report["refusal"]


def test_ranks_stopped_and_started_again_end_with_the_same_bits(tmp_path, whole):
    # Inside an accumulation window, at its end, and at the end of an epoch.
    parts = run(tmp_path / "parts", 2, 1, 2, 6)
    for interrupted, uninterrupted in zip(parts, whole, strict=True):
        assert interrupted.pop("is_finished") == [False, False, False, True]
        for name, value in interrupted.items():
            assert value == uninterrupted[name], name


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_stopped_and_started_again_end_with_the_same_bits(tmp_path, ranks):
    # With three, a sum depends on where a gradient lies among the others.
    whole = run(tmp_path / "whole", ranks)
    assert len({report["networks"] for report in whole}) == 1
    parts = run(tmp_path / "parts", ranks, 1, 2, 5)
    for interrupted, uninterrupted in zip(parts, whole, strict=True):
        assert interrupted.pop("is_finished") == [False, False, False, True]
        for name, value in interrupted.items():
            assert value == uninterrupted[name], name
