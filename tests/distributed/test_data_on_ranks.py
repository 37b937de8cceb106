"""Data of many kinds on several gloo ranks: shared out, resumed, counted once."""

import json
import math
import pathlib
from collections import Counter
from itertools import chain

import pytest
from support import run_ranks
from support.kinds import KINDS, LENGTH

# In one process of the tests: runs on ranks are long, and shared between tests.
pytestmark = pytest.mark.xdist_group("data_on_ranks")

SCRIPT = pathlib.Path(__file__).with_name("data_script.py")
# What keeps its global batches when the number of ranks changes.
KEPT = ["random", "weighted", "weighted_once", "by_length", "at", "order", "stream"]


def run(folder, ranks, name, **spec):
    spec = {"batch_size": 4, "stops": [], "finishes": True, **spec}
    run_ranks(SCRIPT, ranks, folder, name, json.dumps(spec), cwd=folder)
    return [
        json.loads((folder / f"{name}_{rank}.json").read_text())
        for rank in range(ranks)
    ]


def global_batches(reports, kind):
    """The samples of each step of all ranks together, in order."""
    ids = [report[kind]["ids"] for report in reports]
    return [sorted(chain(*parts)) for parts in zip(*ids, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, 2, "whole", kinds=list(KINDS), breaks=True, evaluates=True)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_end_together_and_with_the_same_weights(whole, kind):
    first, second = (report[kind] for report in whole)
    assert first["finished"] == second["finished"] == [True]
    assert first["weights"] == second["weights"]
    assert len(first["ids"]) == len(second["ids"]) > 0


@pytest.mark.parametrize("kind", ["sequential", "random", "distributed", "order"])
def test_ranks_share_each_epoch(whole, kind):
    batches = global_batches(whole, kind)
    assert len(batches) == 9
    for epoch in range(3):
        seen = list(chain(*batches[3 * epoch : 3 * epoch + 3]))
        assert sorted(seen) == list(range(LENGTH))


def test_shards_of_different_lengths_are_read_without_repeats(whole):
    for epoch in range(3):
        batches = global_batches(whole, "sharded_stream")[2 * epoch : 2 * epoch + 2]
        seen = list(chain(*batches))
        # The rank with eight samples ends the epoch.
        assert len(seen) == len(set(seen)) == 16


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    # Inside a window, at its end, and in the last epoch.
    return run(folder, 2, "parts", kinds=list(KINDS), stops=[1, 2, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_stopped_and_started_again_end_with_the_same_bits(whole, parts, kind):
    for uninterrupted, interrupted in zip(whole, parts, strict=True):
        assert interrupted[kind].pop("finished") == [False, False, False, True]
        for name, value in interrupted[kind].items():
            assert value == uninterrupted[kind][name], name


@pytest.fixture(scope="module")
def by_one_two_and_three(tmp_path_factory):
    """Runs of 12 samples a batch, on one rank; on two, then three, then one."""
    folder = tmp_path_factory.mktemp("changed")
    whole = run(folder, 1, "alone", kinds=KEPT, batch_size=6)
    first = run(
        folder, 2, "a", run="r", kinds=KEPT, batch_size=3, stops=[2], finishes=False
    )
    second = run(
        folder, 3, "b", run="r", kinds=KEPT, batch_size=2, stops=[4], finishes=False
    )
    third = run(folder, 1, "c", run="r", kinds=KEPT, batch_size=6)
    return whole, [first, second, third]


@pytest.mark.parametrize("kind", KEPT)
def test_another_number_of_ranks_keeps_the_global_batches(by_one_two_and_three, kind):
    whole, changed = by_one_two_and_three
    found = list(chain(*(global_batches(reports, kind) for reports in changed)))
    assert found == global_batches(whole, kind)


@pytest.fixture(scope="module")
def by_two_and_four(tmp_path_factory):
    """Runs of 12 samples a batch: on one rank; on two, then four, inside an epoch."""
    folder = tmp_path_factory.mktemp("doubled")
    whole = run(folder, 1, "alone", kinds=KEPT, batch_size=12)
    first = run(
        folder, 2, "a", run="r", kinds=KEPT, batch_size=6, stops=[1], finishes=False
    )
    second = run(folder, 4, "b", run="r", kinds=KEPT, batch_size=3)
    return whole, [first, second]


@pytest.mark.parametrize("kind", KEPT)
def test_twice_as_many_ranks_keep_the_global_batches(by_two_and_four, kind):
    whole, changed = by_two_and_four
    found = list(chain(*(global_batches(reports, kind) for reports in changed)))
    expected = global_batches(whole, kind)
    assert len(found) == len(expected) > 2
    for batch, other in zip(found, expected, strict=True):
        # What four ranks cannot share out evenly is filled up with repeated samples.
        assert Counter(other) <= Counter(batch)
        assert len(batch) == math.ceil(len(other) / 4) * 4


def test_run_whose_data_failed_on_one_rank_goes_on_at_the_same_batch(whole):
    reports = [report["broken"] for report in whole]
    errors = [report["broken"]["error"] for report in reports]
    assert sorted(errors) == [
        "another rank could not read its next batch; see its log",
        "unreadable",
    ]
    for report, full in zip(reports, whole, strict=True):
        assert report["mended"]["weights"] == full["sequential"]["weights"]
        both = report["broken"]["ids"] + report["mended"]["ids"]
        assert both == full["sequential"]["ids"]
        assert len(report["broken"]["ids"]) == 1


def test_rank_without_anything_to_train_on_is_an_error_on_all(whole):
    for report in whole:
        assert "a rank has no samples to train on" in report["empty"]["error"]


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ("map", 7),
        ("small", 1),
        ("batches", 7),
        ("stream", 6),
        ("shards", 7),
        ("own_loaders", 7),
    ],
)
@pytest.mark.parametrize("values", ["tensors", "nested", "objects"])
def test_validation_counts_each_sample_once(whole, data, count, values):
    for report in whole:
        seen = list(map(int, report["evaluated"][data][values]))
        assert len(seen) == 3 * count
        for cycle in range(3):
            part = seen[cycle * count : (cycle + 1) * count]
            expected = [i for i in range(7) if i != 4] if count == 6 else range(count)
            assert sorted(part) == list(expected)


def test_loaders_of_the_user_share_the_samples_out(whole):
    first, second = (report["evaluated"]["trained_of_own_loaders"] for report in whole)
    assert len(first) == len(second) == 6
    for epoch in range(3):
        part = slice(2 * epoch, 2 * epoch + 2)
        assert sorted(chain(*first[part], *second[part])) == list(range(4))


def test_objects_that_no_rank_could_tell_apart_are_refused(whole):
    for report in whole:
        refused = report["evaluated"]["map"]["refused"]
        ends = ["dict with str", "tuple with str", "list with str", "list with str"]
        assert [message.partition(", got ")[2] for message in refused] == ends


def test_rank_without_anything_to_evaluate_is_an_error_on_all(whole):
    for report in whole:
        assert (
            "a rank has no samples to evaluate" in report["evaluated"]["too_few_shards"]
        )
