"""The end of a process whose run was stopped."""

import gzip
import os
import subprocess
import sys

import pytest

from helios.stopping.ranks import STARTER, STARTER_FOLDER

SCRIPT = """
import atexit, sys
from helios.stopping.status import end_soon

class Holder:
    def __init__(self, path, mode, value):
        self.own = self  # only a look for garbage finds that nobody has it
        self.file = open(path, mode)
        self.file.write(value)

if sys.argv[1] == "soon":
    end_soon()
text, data = Holder("text", "w", "kept"), Holder("data", "wb", b"kept")
closed = Holder("closed", "w", "kept")
closed.file.close()
atexit.register(lambda: later.append(Holder("later", "w", "kept")))
later = []
"""


def run(script, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_files_that_nobody_has_closed_are_written_where_garbage_is_not_looked_for(
    tmp_path,
):
    for how in ("as ever", "soon"):
        (tmp_path / how).mkdir()
        done = run(SCRIPT, how, cwd=tmp_path / how)
        assert (done.returncode, done.stderr) == (0, "")
        for name in ("text", "data", "closed", "later"):
            assert (tmp_path / how / name).read_text() == "kept", (how, name)


ENDINGS = """
import atexit, gc
first = gc.get_freeze_count()  # Python 3.12 has some of its own
atexit.register(lambda: print(["looked", "frozen"][gc.get_freeze_count() > first]))

import gzip, sys, tqdm
from helios.stopping.status import end_soon

class Told:
    def __del__(self):
        print("told")

def tells():
    try:
        yield
    finally:
        print("told")

class Loop:
    def __init__(self, what):
        self.own, self.what = self, what

end_soon()
if sys.argv[1] == "object":
    loop = Loop(Told())
elif sys.argv[1] == "generator":
    loop = Loop(tells())
    next(loop.what)
elif sys.argv[1] == "archive":
    loop = Loop(gzip.open("archive", "wt"))
    loop.what.write("kept")
else:
    loop = Loop([tqdm.tqdm(disable=True), tells()])
"""


@pytest.mark.parametrize("what", ["object", "generator", "archive", "nothing"])
def test_garbage_is_looked_for_if_it_has_something_to_do(tmp_path, what):
    done = run(ENDINGS, what, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    told = {"archive": "looked\n", "nothing": "frozen\n"}
    assert done.stdout == told.get(what, "looked\ntold\n")
    if what == "archive":
        with gzip.open(tmp_path / "archive", "rt") as file:
            assert file.read() == "kept"


IMPORTS = """
import gc, helios
assert helios.Trainer
print(gc.get_freeze_count() > 100_000)
"""


@pytest.mark.parametrize("is_started", [True, False])
def test_ranks_that_helios_starts_spare_the_collector_what_is_imported(
    tmp_path, is_started
):
    variables = {STARTER: f"{os.getpid()}", STARTER_FOLDER: f"{tmp_path}"}
    variables |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env={**os.environ, **variables} if is_started else None,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{is_started}\n"
