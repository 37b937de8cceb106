"""Ranks that were started with different arguments, or with too little data."""

import json
import pathlib

import pytest
from support import run_ranks

SCRIPT = pathlib.Path(__file__).with_name("disagreeing_script.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What came of each run on each of three ranks."""
    folder = tmp_path_factory.mktemp("disagreeing")
    run_ranks(SCRIPT, 3, folder, cwd=folder)
    return [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(3)]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("batch", "`global batch of phase 0` is 6 on rank 0 and 9 on rank 1"),
        ("length", "`samples of phase 0` is 12 on rank 0 and 16 on rank 1"),
        ("seed", "`random_seed` is 0 on rank 0 and 1 on rank 1"),
        ("steps", "`total_steps` is 2 on rank 0 and 3 on rank 1"),
        ("frequency", "`valid_frequency` is 1 on rank 0 and 2 on rank 1"),
        ("accumulation", "`accumulation_steps` is 1 on rank 0 and 2 on rank 1"),
    ],
)
def test_ranks_that_differ_are_all_refused_before_the_first_step(said, case, expected):
    for found in said:
        kind, message, batches = found[case]
        assert kind == "LaunchError"
        assert expected in message
        assert batches == []


def test_data_of_a_rank_alone_may_have_another_length(said):
    assert all(finished for found in said for finished, *_ in [found["own data"]])


def test_fewer_samples_than_ranks_are_repeated_or_refused(said):
    for found in said:
        assert found["one sample"] == [True, [[0]]]
        kind, message, batches = found["one sample dropped"]
        assert (kind, batches) == ("DataError", [])
        assert "1 samples fill no batch; lower `batch_size`" in message
