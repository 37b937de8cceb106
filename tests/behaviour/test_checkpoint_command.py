"""`helios checkpoint`, on checkpoints of real runs."""

import enum
import errno
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support import IdModel, IndexData, train

from helios.checkpoint import CheckpointStore
from helios.cli import main


def run(*arguments):
    return CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])


@pytest.fixture
def root(tmp_path):
    options = {"train_unit": "iteration", "total_steps": 3, "chkpt_frequency": 1}
    train(IdModel(), IndexData(), tmp_path / "root", **options)
    return tmp_path / "root"


def at(root, step):
    return root / "ids" / f"ids_epoch_0_iter_{step}"


def damage(root, step):
    path = at(root, step) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_list_shows_the_newest_first(root):
    result = run("list", root)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split()[:2] == ["checkpoint", "created"]
    names = [line.split()[0] for line in lines[1:]]
    assert names == [f"ids/ids_epoch_0_iter_{step}" for step in (3, 2, 1)]
    rows = json.loads(run("list", root, "--json").output)
    assert [row["step"] for row in rows] == [3, 2, 1]
    assert all(row["size_bytes"] > 0 for row in rows)


def test_list_of_one_checkpoint_shows_it(root):
    (row,) = json.loads(run("list", at(root, 2), "--json").output)
    assert (row["path"], row["step"]) == ("ids_epoch_0_iter_2", 2)


def test_list_names_those_whose_record_is_damaged(root):
    record = at(root, 2) / "helios.json"
    record.write_bytes(record.read_bytes()[:-9])
    result = run("list", root)
    assert result.exit_code == 1
    assert f"{at(root, 2)} has a record that cannot be read" in result.output
    names = [line.split()[0] for line in result.stdout.splitlines()[1:]]
    assert names == [f"ids/ids_epoch_0_iter_{step}" for step in (3, 1)]


def test_list_of_a_folder_without_any_says_so(tmp_path):
    result = run("list", tmp_path)
    assert (result.exit_code, result.output) == (0, "no checkpoints\n")
    assert json.loads(run("list", tmp_path, "--json").output) == []


def test_show_says_what_a_checkpoint_holds(root):
    result = run("show", at(root, 2), "--tensors")
    assert result.exit_code == 0
    for text in (
        "current_iteration  2",
        "train_data",
        "model.safetensors",
        "weight  fl",
    ):
        assert text in result.output
    found = json.loads(run("show", at(root, 2), "--json").output)
    assert found["progress"]["current_iteration"] == 2
    expected = {"dtype": "float32", "shape": [1, 1]}
    assert found["tensors"]["model"]["weight"] == expected


def test_show_of_something_else_is_an_error(tmp_path):
    result = run("show", tmp_path)
    assert result.exit_code == 2
    assert "is not the folder of a checkpoint" in result.output


def test_verify_names_what_is_damaged(root):
    result = run("verify", root)
    assert result.exit_code == 0
    assert result.output.count(": whole") == 3
    damage(root, 2)
    (at(root, 1) / "helios.json").unlink()
    result = run("verify", root)
    assert result.exit_code == 1
    assert result.output.count("DAMAGED") == 2
    assert "model.safetensors: it is altered, between the bytes 0" in result.output
    report = json.loads(run("verify", root, "--json").output)
    assert list(report[str(at(root, 2))]) == ["model.safetensors"]
    assert list(report[str(at(root, 1))]) == ["helios.json"]
    assert run("verify", at(root, 3)).exit_code == 0
    assert run("verify", at(root, 2)).exit_code == 1


def test_verify_of_a_folder_without_any_is_an_error(tmp_path):
    result = run("verify", tmp_path)
    assert result.exit_code == 2
    assert "there is no checkpoint" in result.output


def test_diff_names_the_first_differences(root, tmp_path):
    result = run("diff", at(root, 1), at(root, 1))
    assert (result.exit_code, result.output) == (0, "the same, bit by bit\n")
    result = run("diff", at(root, 1), at(root, 2))
    assert result.exit_code == 1
    assert "model['weight'][0][0]: " in result.output
    assert "progress['current_iteration']: 1 / 2" in result.output
    rows = json.loads(run("diff", at(root, 1), at(root, 2), "--json").output)
    assert rows[0]["path"].startswith("model")
    short = run("diff", at(root, 1), at(root, 2), "--most", 1).output
    assert short.splitlines()[1:] == ["and more"]
    options = {"train_unit": "iteration", "total_steps": 3, "chkpt_frequency": 1}
    train(IdModel(), IndexData(), tmp_path / "again", **options)
    assert run("diff", at(root, 1), at(tmp_path / "again", 1)).exit_code == 0


def test_diff_with_a_damaged_one_is_an_error(root):
    damage(root, 2)
    result = run("diff", at(root, 1), at(root, 2))
    assert result.exit_code == 2
    assert "it is altered" in result.output


class Colour(enum.Enum):
    RED = 1


class Coloured(IdModel):
    """Has a value of a class of its own, and logs what is no number."""

    def user_state_dict(self):
        return {"colour": Colour.RED}

    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        self.log("bad", float("nan"))


def test_classes_of_the_program_are_not_needed(tmp_path, monkeypatch):
    options = {"train_unit": "iteration", "total_steps": 2, "chkpt_frequency": 1}
    options["print_frequency"] = 1
    train(Coloured(), IndexData(), tmp_path, **options)
    monkeypatch.delattr(sys.modules[__name__], "Colour")
    first, second = at(tmp_path, 1), at(tmp_path, 2)
    found = run("diff", first, second)
    assert found.exit_code == 1, found.output
    assert "colour" not in found.output
    assert run("diff", first, first).exit_code == 0
    (row, _) = json.loads(run("list", tmp_path, "--json").output)
    assert row["metrics"]["bad"] is None
    assert "bad nan" in run("list", tmp_path).output
    # Strict readers of JSON know no NaN.
    text = (at(tmp_path, 1) / "helios.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))["record"]
    assert record["metrics"]["bad"] == "nan"
    (tmp_path / "latest").symlink_to(tmp_path / "ids")
    assert len(json.loads(run("list", tmp_path, "--json").output)) == 2
    assert len(json.loads(run("verify", tmp_path, "--json").output)) == 2


def test_prune_spares_the_best_one_and_tells_other_programs(root):
    store = CheckpointStore(root / "ids")
    store.amend(at(root, 1), is_best=True)
    assert "the best one" in run("show", at(root, 1)).output
    doomed = [str(at(root, 2))]
    would = run("prune", root, "--keep-last", 1, "--dry-run", "--json")
    assert json.loads(would.output) == doomed
    assert at(root, 2).exists()
    assert json.loads(run("prune", root, "--keep-last", 1, "--json").output) == doomed
    assert [path.name[-1] for path in store.list()] == ["3", "1"]


def test_prune_that_cannot_delete_says_so(root, monkeypatch):
    def resist(self, path):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(CheckpointStore, "remove", resist)
    result = run("prune", root, "--keep-last", 1)
    assert result.exit_code == 2
    assert "resource busy" in result.output


@pytest.mark.parametrize("command", ["list", "show", "verify"])
def test_file_in_the_place_of_a_folder_is_refused(command):
    assert run(command, __file__).exit_code == 2


def test_prune_deletes_the_older_ones(root):
    result = run("prune", root, "--keep-last", 2, "--dry-run")
    assert result.output == f"would delete {at(root, 1)}\n"
    assert len(CheckpointStore(root / "ids").list()) == 3
    result = run("prune", root, "--keep-last", 2)
    assert result.output == f"deleted {at(root, 1)}\n"
    assert CheckpointStore(root / "ids").list() == [at(root, 3), at(root, 2)]
    assert run("prune", root).exit_code == 2
    assert run("prune", root, "--keep-last", 0).exit_code == 2


def test_prune_never_deletes_the_only_whole_one(root):
    damage(root, 3)
    damage(root, 2)
    (root / "latest").symlink_to(root / "ids")
    assert run("prune", root, "--keep-last", 1).output == ""
    damage(root, 2)  # mended: the same bit once more
    result = run("prune", root, "--keep-last", 1)
    assert result.output == f"deleted {at(root, 1)}\n"


def test_export_writes_the_weights_in_one_file(root, tmp_path):
    out = tmp_path / "weights.safetensors"
    assert run("export", at(root, 3), out).exit_code == 0
    net = torch.nn.Linear(1, 1)
    net.load_state_dict(load_file(out))
    assert load_file(at(root, 3) / "model.safetensors")["weight"].equal(net.weight)
    again = run("export", at(root, 2), out)
    assert again.exit_code == 2
    assert "exists" in again.output
    damage(root, 1)
    broken = run("export", at(root, 1), tmp_path / "other.safetensors")
    assert broken.exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"root", out.name}


def test_export_tells_other_programs_what_it_left_out(root, tmp_path):
    out = tmp_path / "folder"
    report = json.loads(
        run("export", at(root, 3), out, "--accelerate", "--json").stdout
    )
    assert report["path"] == str(out)
    assert any("the position in the data" in line for line in report["left_out"])
