"""Saving on several ranks: what only the main rank knows is agreed on."""

import json
import pathlib

from support import run_ranks

from helios.checkpoint import CheckpointStore, find_last_checkpoint

SCRIPT = pathlib.Path(__file__).with_name("saving_script.py")


def run(folder, which):
    run_ranks(SCRIPT, 2, folder, which, cwd=folder, timeout_s=60)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def test_write_that_failed_is_made_again_by_all_ranks_at_the_stop(tmp_path):
    reports = run(tmp_path, "first")
    assert [report["is_finished"] for report in reports] == [False, False]
    assert [report["writes"] for report in reports] == [2, 0]
    assert find_last_checkpoint(tmp_path / "checkpoints").name == "ids_epoch_0_iter_2"


def test_last_write_that_fails_is_an_error_on_all_ranks(tmp_path):
    for report in run(tmp_path, "each"):
        assert "the last checkpoint could not be written" in report["error"]
    assert list((tmp_path / "checkpoints" / "ids").iterdir()) == []


def test_rank_that_cannot_write_is_named_and_leaves_nothing(tmp_path):
    for report in run(tmp_path, "other"):
        assert "the last checkpoint could not be written" in report["error"]
        assert report["writes"] == 0
    assert list((tmp_path / "checkpoints" / "ids").iterdir()) == []


def test_no_rank_waits_for_the_disk_of_another(tmp_path):
    main, other = run(tmp_path, "behind")
    assert main["is_finished"]
    assert other["was_behind"]
    assert all(other["was_behind"])
    store = CheckpointStore(tmp_path / "checkpoints" / "ids")
    steps = [r["progress"]["current_iteration"] for r in store.records().values()]
    assert {*steps} == {2, 4, 6}
