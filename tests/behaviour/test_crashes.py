"""A run that dies in the middle of a save, at each operation on the disk in turn."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("crash_script.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_that_dies_at_any_operation_of_its_saves_ends_as_if_it_had_not(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stderr
    assert int(re.findall(r"died (\d+) times", done.stdout)[0]) > 100
