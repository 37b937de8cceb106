"""FSDP2: a run whose ranks share the weights out, stopped, and resumed in many ways."""

import json
import pathlib

import pytest
import torch
from click.testing import CliRunner
from distributed.sharded_script import Network, Plain, ShardedModel
from safetensors.torch import load_file
from support import RandomData, StopAt, digest, run_ranks, train
from torch.utils.data import default_collate

from helios.checkpoint import CheckpointStore, find_last_checkpoint, read_checkpoint
from helios.cli import main

SCRIPT = pathlib.Path(__file__).with_name("sharded_script.py")
BY_HAND = pathlib.Path(__file__).with_name("sharded_session_script.py")


def run(folder, ranks, *runs, script=SCRIPT, **options):
    """What came of each run, by rank: `run(...)[rank][number]`."""
    arguments = folder, json.dumps(runs), json.dumps(options)
    run_ranks(script, ranks, *arguments, cwd=folder)
    return [
        json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)
    ]


@pytest.mark.parametrize(
    ("ranks", "stops", "kind", "options"),
    [
        (2, [0, 1, 5, 6, 9], "mixed", {}),
        (3, [1, 2, 4], "mixed", {"gradient_accumulation_steps": 2}),
        # torch has no batch norm for this mixture of types on the CPU.
        (2, [3], "plain", {"mixed_precision": "bf16"}),
    ],
    ids=["plain", "accumulated", "bf16"],
)
def test_sharded_run_stopped_anywhere_ends_the_same(
    tmp_path, ranks, stops, kind, options
):
    pairs = [({"root": f"{at}", "stop": at}, {"root": f"{at}"}) for at in stops]
    runs = [{"root": "whole"}, *(one for pair in pairs for one in pair)]
    runs = [{**one, "kind": kind} for one in runs]
    for found in run(tmp_path, ranks, *runs, **options):
        whole, *others = found
        assert whole["type"] == "DTensor"
        assert whole["finished"]
        for stopped, resumed in zip(others[::2], others[1::2], strict=True):
            assert not stopped["finished"]
            assert resumed["finished"]
            assert resumed["weights"] == whole["weights"]


@pytest.mark.parametrize(("ranks", "window"), [(2, 1), (3, 2)])
def test_sharded_loop_by_hand_stopped_anywhere_ends_the_same(tmp_path, ranks, window):
    stops = [0, 2, 6, 8] if ranks == 2 else [0, 1, 4, 6]
    runs = [("whole", None), *((f"{at}", stop) for at in stops for stop in (at, None))]
    for found in run(
        tmp_path, ranks, *runs, gradient_accumulation_steps=window, script=BY_HAND
    ):
        whole, *others = found
        assert whole["type"] == "DTensor"
        assert whole["finished"]
        for stopped, resumed in zip(others[::2], others[1::2], strict=True):
            assert not stopped["finished"]
            assert resumed == whole


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run on two ranks that was stopped, what came of it and of a whole one."""
    folder = tmp_path_factory.mktemp("stopped")
    options = {"batch_size": 3}
    runs = {"root": "whole", **options}, {"root": "runs", "stop": 5, **options}
    return folder, run(folder, 2, *runs)[0]


def copied(folder, to):
    """The checkpoints of a stopped run, for a test to go on from."""
    source = folder / "runs"
    for path in source.rglob("*"):
        target = to / "runs" / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True)
        else:
            target.write_bytes(path.read_bytes())


def test_ranks_write_their_own_pieces_and_no_other(stopped):
    folder, _ = stopped
    path = find_last_checkpoint(folder / "runs")
    sizes = {f.name: len(load_file(f)) for f in path.glob("*.safetensors")}
    assert set(sizes) == {f"{n}.safetensors" for n in ("model", "training")} | {
        f"rank_{rank}.safetensors" for rank in range(2)
    }
    files = [load_file(path / f"rank_{rank}.safetensors") for rank in range(2)]
    name = "shards.model.net.body.0.weight.1"
    assert [tuple(file[name].shape) for file in files] == [(3, 4), (2, 4)]
    assert "net.body.0.weight" not in load_file(path / "model.safetensors")


def test_another_number_of_ranks_goes_on_from_the_same_state(stopped, tmp_path):
    folder, (_, half) = stopped
    copied(folder, tmp_path)
    options = {"root": "runs", "batch_size": 2}
    loaded, resumed = run(tmp_path, 3, {**options, "stop": 0}, options)[0]
    assert loaded["weights"] == half["weights"]
    assert resumed["finished"]


def test_another_number_of_ranks_comes_to_the_same_weights(tmp_path):
    options = {"root": "runs", "batch_size": 3, "kind": "plain"}
    whole, _ = run(tmp_path, 2, {**options, "root": "w"}, {**options, "stop": 5})[0]
    (resumed,) = run(tmp_path, 3, {**options, "batch_size": 2})[0]
    assert resumed["finished"]
    for one, other in zip(whole["last"], resumed["last"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other))
    assert whole["weights"] != resumed["weights"]  # sums in another order


def in_one_process(root, *callbacks, kind=ShardedModel, **options):
    model = kind("sharded")
    options = {"total_steps": 2, "print_frequency": 1, **options}
    data = RandomData(length=24, batch_size=6)
    if kind is Plain:
        data.params["collate_fn"] = default_collate
    finished, _ = train(model, data, root, *callbacks, **options)
    return finished, model


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """What steps of two batches each come to, in one process."""
    root = tmp_path_factory.mktemp("windowed")
    finished, model = in_one_process(root, kind=Plain, accumulation_steps=2)
    assert finished
    return model


# The numbers of ranks, and which version of FSDP they have; None: DDP.
CHANGES = [(2, 3, 2, 2), (3, 2, None, None), (1, 3, None, 2)]
SLOW = [(3, 1, 2, None), (2, 3, None, None), (3, 2, 2, 2), (3, 2, 2, None)]
CHANGES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(
    ("before", "after", "version_before", "version_after"), CHANGES
)
def test_gradients_of_an_open_window_go_over_to_another_number_of_ranks(
    tmp_path, windowed, before, after, version_before, version_after
):
    for ranks, stop, version in (
        (before, 5, version_before),
        (after, None, version_after),
    ):
        options = {"root": "runs", "kind": "plain", "batch_size": 6 // ranks}
        if ranks > 1:
            accelerator = {"fsdp_version": version, "gradient_accumulation_steps": 2}
            (found,) = run(tmp_path, ranks, {**options, "stop": stop}, **accelerator)[0]
            assert found.get("finished") is (stop is None), found
            last = [torch.tensor(values) for values in found["last"]]
        else:
            finished, model = in_one_process(
                tmp_path / "runs", StopAt(batch=stop), kind=Plain, accumulation_steps=2
            )
            assert finished is (stop is None)
            last = [value.flatten() for value in model.net.state_dict().values()]
    expected = windowed.net.state_dict().values()
    for one, other in zip(last, expected, strict=True):
        torch.testing.assert_close(one, other.flatten())


def test_one_process_goes_on_from_pieces(stopped, tmp_path):
    folder, (_, half) = stopped
    copied(folder, tmp_path)
    finished, model = in_one_process(tmp_path / "runs", StopAt(batch=0))
    assert not finished
    found = {"net": model.net.state_dict(), "o": model.optimizer.state_dict()}
    assert digest(found) == half["weights"]
    assert model.net.tied.weight is model.net.head.weight
    assert in_one_process(tmp_path / "runs")[0]


def test_ranks_share_out_what_one_process_has_saved(tmp_path):
    finished, model = in_one_process(tmp_path / "runs", StopAt(batch=5))
    assert not finished
    found = {"net": model.net.state_dict(), "o": model.optimizer.state_dict()}
    options = {"root": "runs", "batch_size": 3}
    loaded, resumed = run(tmp_path, 2, {**options, "stop": 0}, options)[0]
    assert loaded.get("weights") == digest(found), loaded
    assert (loaded["type"], resumed["finished"]) == ("DTensor", True)


def test_export_joins_the_pieces(stopped, tmp_path):
    folder, (_, half) = stopped
    out = tmp_path / "weights.safetensors"
    path = find_last_checkpoint(folder / "runs")
    done = CliRunner().invoke(main, ["checkpoint", "export", str(path), str(out)])
    assert done.exit_code == 0, done.output
    weights = load_file(out)
    net = Network()
    net.load_state_dict(
        {n.removeprefix("net."): t for n, t in weights.items() if n.startswith("net.")}
    )
    assert digest(net.state_dict()) == half["networks"]


def test_missing_and_altered_pieces_are_found(stopped, tmp_path):
    folder, _ = stopped
    copied(folder, tmp_path)
    (path,) = CheckpointStore(tmp_path / "runs" / "sharded").list()
    tree = read_checkpoint(path).record["trees"]["rank_1"]["shards"]
    assert tree
    (path / "rank_1.safetensors").unlink()
    reports = []
    assert CheckpointStore(path.parent).find_last(reports.append) is None
    assert "rank_1.safetensors: " in reports[0]


def test_what_cannot_be_sharded_is_refused_by_every_rank(tmp_path):
    for (found,) in run(tmp_path, 2, {"root": "two", "kind": "two"}):
        assert "FSDP shards one network" in found["error"]
        assert "the model has 2" in found["error"]
    for (found,) in run(tmp_path, 2, {"root": "old"}, fsdp_version=1):
        assert "set `fsdp_version` to 2" in found["error"]


def test_variable_of_which_each_rank_has_a_piece_is_not_carried(tmp_path):
    for (found,) in run(tmp_path, 2, ["run", "carried"], script=BY_HAND):
        assert "'averages', which is shared out over the ranks" in found[0]
