"""Stopped with two ranks, resumed with others: the same curve, to reduction error."""

import json
import pathlib
import shutil

import pytest
from support import run_ranks

# In one process of the tests: the first runs are long, and shared.
pytestmark = pytest.mark.xdist_group("curves")

SCRIPT = pathlib.Path(__file__).with_name("curve_script.py")
BATCHES = 12  # four an epoch


def run(folder, ranks, root, **options):
    options = {"root": root, **options}
    run_ranks(SCRIPT, ranks, folder, json.dumps(options), cwd=folder)
    paths = [folder / f"rank_{rank}.json" for rank in range(ranks)]
    return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two ranks, by accumulation: a whole one, and one stopped in an epoch.

    With a window of two batches, the stop is inside one.
    """
    folder, found = tmp_path_factory.mktemp("curves"), {}
    for window in (1, 2):
        options = {"accumulation_steps": window}
        whole = run(folder, 2, f"whole_{window}", **options)[0]
        half = run(folder, 2, f"half_{window}", stop=5, **options)[0]
        assert (whole["finished"], half["finished"]) == (True, False)
        found[window] = whole["logged"], half["logged"]
    return folder, found


def values(logged, name):
    return [value for _, key, value in logged if key == name]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_other_number_of_ranks_goes_on_with_the_same_curve(
    runs, tmp_path, ranks, window
):
    folder, found = runs
    whole, half = found[window]
    shutil.copytree(folder / f"half_{window}", tmp_path / "half")
    rest = run(tmp_path, ranks, "half", accumulation_steps=window)[0]
    assert rest["finished"]
    logged = half + rest["logged"]
    assert [entry[:2] for entry in logged] == [entry[:2] for entry in whole]
    assert len(values(whole, "loss")) == BATCHES // window
    assert values(logged, "loss") == pytest.approx(values(whole, "loss"), rel=1e-5)
    # Once a step, whatever the number of ranks.
    assert values(logged, "lr") == values(whole, "lr")


def test_global_batch_that_is_not_kept_is_refused_by_name(runs, tmp_path):
    folder, _ = runs
    shutil.copytree(folder / "half_1", tmp_path / "half")
    for report in run(tmp_path, 3, "half", batch_size=5):
        assert report["error"].startswith("ResumeError")
        assert "was {'global batch of phase 0': 12}, is {'global" in report["error"]
        assert report["logged"] == []
    for report in run(tmp_path, 3, "half", batch_size=5, allow_inexact=True):
        assert report["finished"]
