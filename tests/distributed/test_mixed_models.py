"""Models of many parts on ranks, in many ways, stopped and resumed."""

import json
import pathlib

import pytest
from support import run_ranks

SCRIPT = pathlib.Path(__file__).with_name("mixed_script.py")
WAYS = {
    "plain": {},
    "workers": {"workers": 2},
    "bf16 with workers": {"precision": "bf16", "workers": 2, "window": 2},
    "unused parameters": {"unused": True},
    "unused parameters in a window": {"unused": True, "window": 2},
    "unused parameters in bf16": {"unused": True, "precision": "bf16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_model_of_many_parts_stopped_and_resumed_ends_the_same(tmp_path, ranks, way):
    options, stops = WAYS[way], (1, 4)  # in an epoch, and a window; at an epoch's end
    runs = [{"root": "whole", **options}]
    for stop in stops:
        runs += [{"root": f"{stop}", "stop": stop, **options}]
        runs += [{"root": f"{stop}", **options}]
    run_ranks(SCRIPT, ranks, tmp_path, json.dumps(runs), cwd=tmp_path)
    reports = [
        json.loads((tmp_path / f"rank_{rank}.json").read_text())
        for rank in range(ranks)
    ]
    assert len({report[0]["trained"] for report in reports}) == 1
    for whole, *pairs in reports:
        assert whole["finished"]
        # A scheduler advances once a step, whatever the number of ranks.
        assert whole["steps"] == [whole["done"]] * 2
        for first, second in zip(pairs[::2], pairs[1::2], strict=True):
            assert (first["finished"], second["finished"]) == (False, True)
            assert first["ids"] + second["ids"] == whole["ids"]
            assert first["logged"] + second["logged"] == whole["logged"]
            assert second["weights"] == whole["weights"]
            assert second["steps"] == whole["steps"]
