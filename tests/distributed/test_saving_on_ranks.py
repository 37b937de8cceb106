"""Saving on several ranks: what only the main rank knows is agreed on."""

import json
import pathlib

from support import run_ranks

from helios.checkpoint import find_last_checkpoint

SCRIPT = pathlib.Path(__file__).with_name("saving_script.py")


def test_write_that_failed_is_made_again_by_all_ranks_at_the_stop(tmp_path):
    run_ranks(SCRIPT, 2, tmp_path, cwd=tmp_path, timeout_s=60)
    reports = [
        json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)
    ]
    assert [report["is_finished"] for report in reports] == [False, False]
    assert [report["writes"] for report in reports] == [2, 0]
    assert find_last_checkpoint(tmp_path / "checkpoints").name == "ids_epoch_0_iter_2"
