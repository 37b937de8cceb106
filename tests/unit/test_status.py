"""The end of a process whose run was stopped."""

import os
import subprocess
import sys

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


def test_files_that_nobody_has_closed_are_written_where_garbage_is_not_looked_for(
    tmp_path,
):
    for how in ("as ever", "soon"):
        (tmp_path / how).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, how],
            cwd=tmp_path / how,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        for name in ("text", "data", "closed", "later"):
            assert (tmp_path / how / name).read_text() == "kept", (how, name)
