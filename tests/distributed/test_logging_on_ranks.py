"""What several ranks log, each its own value, becomes one as is asked."""

import json
import pathlib

from support import run_ranks

SCRIPT = pathlib.Path(__file__).with_name("logging_script.py")
RANKS = 3


def logged(folder, *stops):
    run_ranks(SCRIPT, RANKS, folder, *stops, cwd=folder)
    first, *others = [
        json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(RANKS)
    ]
    assert others == [[], []]  # the main rank writes
    return [row for row in first if row[1] != "loss"]


def test_values_of_all_ranks_become_one(tmp_path):
    found = logged(tmp_path)
    # The values are those of the batches 3 and 6, with the rank added.
    trained = {
        4: {"None": 30.0, "mean": 31.0, "sum": 93.0, "max": 32.0, "min": 30.0},
        8: {"None": 60.0, "mean": 61.0, "sum": 183.0, "max": 62.0, "min": 60.0},
    }
    # The ranks' batches begin with 0 and 6, 2 and 8, 4 and 10.
    valid = {"None": 5.0, "mean": 5.0, "sum": 30.0, "max": 10.0, "min": 0.0}
    assert found == [
        [0, "at once", 6.0],
        *([4, f"train {how}", value] for how, value in trained[4].items()),
        *([8, f"train {how}", value] for how, value in trained[8].items()),
        *([8, f"valid {how}", value] for how, value in valid.items()),
    ]


def test_reductions_that_wait_for_a_log_point_go_on_after_a_stop(tmp_path):
    # Between a value and the log point that it is written at.
    whole, parts = logged(tmp_path), logged(tmp_path, 4, 7)
    assert [row for row in parts if row[1] != "at once"] == whole[1:]
