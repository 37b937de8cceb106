"""A rank that raises, in whatever hook: both end, and say which it was and where."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from distributed.failing_script import CASES, raises_on
from support.commands import ROOT

SCRIPT = pathlib.Path(__file__).with_name("failing_script.py")
END_S = 30  # on a machine that is busy otherwise; else a second or two
ALL_S = 1500  # likewise
# All hooks one after the other, in one job, which the first test waits for.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(ALL_S + 60),
    pytest.mark.xdist_group("failing_ranks"),
]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, SCRIPT, folder],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        assert process.wait(ALL_S) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return folder, json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=".".join)
def test_rank_that_raises_ends_the_job_and_is_named(job, case):
    root, report = job
    kind, hook = case
    name, failing = f"{kind}.{hook}", raises_on(hook)
    log = root / name / "logs" / ("run.rank_1.log" if failing else "run.log")
    console = (root / name / f"output_{failing}").read_text()
    for end in report[name]:
        assert end is not None, f"a rank did not end: {console}"
        assert end[1] < END_S
    assert report[name][failing][0] == 1
    named = rf"^[\d:]+ rank {failing} failed.*\nTraceback"
    assert re.search(named, console, re.MULTILINE)
    assert f"ValueError: on purpose in {hook}" in console
    text = log.read_text()
    assert re.search(rf"rank {failing} failed.*\nTraceback", text)
    assert f"ValueError: on purpose in {hook}" in text
