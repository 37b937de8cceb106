"""Two ranks, and numbers that go bad on one of them."""

import json
import pathlib
import re

import pytest
from support import run_ranks

SCRIPT = pathlib.Path(__file__).with_name("health_script.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    run_ranks(SCRIPT, 2, folder, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def reports(folder):
    files = [folder / f"rank_{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_all_ranks_leave_out_the_step_of_one(reports, policy, window):
    weights = {report[f"{policy}_{window}"]["weights"] for report in reports}
    assert weights == {report[f"None_{window}"]["weights"] for report in reports}
    assert len(weights) == 1


@pytest.mark.parametrize("window", [1, 2])
def test_all_ranks_end_by_the_numbers_of_one(reports, window):
    step = 3 // window + 1
    for report in reports:
        error = report[f"stop_{window}"]["error"]
        at = rf"rank 1: loss is nan, .*at step {step} \(epoch 0, batch 3\)"
        assert re.search(at, error), error
        assert re.search(r"samples \[7\]", error), error


@pytest.mark.parametrize("policy", ["skip", "rollback", "warn"])
def test_log_of_the_rank_says_which_samples_it_were(folder, policy):
    main = (folder / f"{policy}_1.log").read_text()
    own = (folder / f"{policy}_1.rank_1.log").read_text()
    told = re.compile(r"rank 1: loss is nan.* at step 4 \(epoch 0, batch 3\), .*\[7\]")
    assert told.search(own)
    if policy != "warn":  # for which no rank waits for another
        assert told.search(main)
        assert "step 4 (epoch 0, batch 3), samples [6]" in main
