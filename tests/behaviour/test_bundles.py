"""What a step that fails leaves behind, and the command that runs it again."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from support import IdModel, RandomData, RandomModel, StopAt, train

import helios
from helios.checkpoint import read_checkpoint
from helios.cli import main
from helios.errors import CheckpointError
from helios.failures.bundle import read_bundle

TIMEOUT_S = 90


class Broken(Exception):
    """What the tests raise."""


class Failing(RandomModel):
    """Fails in the forward pass of a batch, when random numbers have been drawn."""

    batch = 7

    def train_step(self, batch, state):
        if state.global_iteration == self.batch:
            torch.rand(3)
            raise Broken("on purpose")
        super().train_step(batch, state)


OPTIONS = {"total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1}


def fail(root, model=None, data=None, **options):
    with pytest.raises(Broken):
        train(
            *(model or Failing(), data or RandomData(), root / "checkpoints"),
            **{"log_root": root / "logs", **OPTIONS, **options},
        )
    return root / "logs" / "run_crash_batch_7_rank_0"


def test_failed_step_leaves_a_bundle(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("A_SECRET", "of mine")
    folder = fail(tmp_path)
    assert f"helios replay {folder}" in capsys.readouterr().err
    found = read_bundle(folder)
    assert found["error"] == "Broken: on purpose"
    assert (found["rank"], found["world_size"]) == (0, 1)
    assert found["progress"]["current_iteration"] == 7
    batch, seen = found["batch"], Failing()
    seen.batch = 8
    train(seen, RandomData(), None, StopAt(batch=8), total_steps=3)
    assert batch["samples"] == seen.ids[7]
    assert (batch["of_the_run"], batch["of_the_epoch"]) == (7, 2)
    assert (batch["rows"], batch["rows_without_padding"]) == (4, 4)
    assert "Broken: on purpose" in (folder / "traceback.txt").read_text()
    assert "in train_step" in (folder / "traceback.txt").read_text()
    assert set(found["values"]) == {"rng"}
    assert set(found["values"]["rng"]) == {"python", "numpy", "torch"}
    environment = found["environment"]
    assert environment["arguments"] == sys.orig_argv[1:]
    assert environment["folder"] == os.getcwd()
    assert environment["variables"]["OMP_NUM_THREADS"] == "1"
    assert "A_SECRET" not in (folder / "bundle.json").read_text()
    # The package's, to which `torch.__version__` may add what it is built for.
    version = importlib.metadata.version("torch")
    assert found["identity"]["versions"]["torch"] == version
    assert found["checkpoint"] == "checkpoint/random_epoch_1_iter_5"


def test_bundle_keeps_the_checkpoint_when_the_run_deletes_it(tmp_path):
    folder = fail(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    kept = read_checkpoint(folder / read_bundle(folder)["checkpoint"])
    assert kept.record["progress"]["current_iteration"] == 5


def test_bundle_of_a_resumed_run_has_what_that_took_up(tmp_path):
    with pytest.raises(Broken):
        train(Failing(), RandomData(), tmp_path / "checkpoints", **OPTIONS)
    folder = fail(tmp_path, chkpt_frequency=None)
    assert read_bundle(folder)["checkpoint"] == "checkpoint/random_epoch_1_iter_5"
    folder = fail(tmp_path, chkpt_frequency=None, resume="never")
    assert read_bundle(folder)["checkpoint"] is None


def test_batch_is_in_the_bundle_where_it_is_wanted(tmp_path):
    folder = fail(tmp_path, crash_bundle="batch")
    ids, inputs, targets = read_bundle(folder)["values"]["batch"]
    assert ids.tolist() == read_bundle(folder)["batch"]["samples"]
    assert inputs.shape == (4, 4)
    assert targets.dtype == torch.float32


def test_batch_that_has_no_stored_form_is_left_out_of_the_bundle(tmp_path, capsys):
    data = RandomData(collate_fn=lambda items: [object(), items])
    folder = fail(tmp_path, FailingAtOnce(), data, crash_bundle="batch")
    assert not folder.exists()
    (folder,) = (tmp_path / "logs").glob("run_crash*")
    assert set(read_bundle(folder)["values"]) == {"rng"}
    assert "the bundle is without the batch" in capsys.readouterr().err


class FailingAtOnce(Failing):
    batch = 0


def test_no_bundle_is_left_where_none_is_wanted_or_no_step_has_failed(tmp_path):
    class FailingHook(helios.Callback):
        def on_training_epoch_end(self, session):
            raise Broken

        on_validation_batch_end = on_training_epoch_end

    fail(tmp_path, crash_bundle=None)
    fail(tmp_path, train_exceptions=[Broken])
    for callback in (FailingHook(),):
        with pytest.raises(Broken):
            train(
                *(RandomModel(), RandomData(), tmp_path, callback),
                **OPTIONS,
                log_root=tmp_path,
            )
    assert not list(tmp_path.rglob("*crash*"))


def test_bundle_that_cannot_be_written_hides_nothing(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file in the way")
    folder = fail(tmp_path)
    said = capsys.readouterr().err
    assert "no crash bundle could be written" in said
    assert "Broken: on purpose" in said
    assert not folder.exists()


def test_bundle_that_cannot_be_written_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run_crash_batch_7_rank_0").write_text("a file in the way")
    fail(tmp_path)
    assert "no crash bundle could be written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [
        "run_crash_batch_7_rank_0"
    ]
    for path in (tmp_path / "checkpoints").rglob("*.json"):
        assert path.stat().st_nlink == 1


def test_samples_of_a_stream_have_no_numbers(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(20))

    class Data(helios.DataModule):
        def setup(self):
            self._add_train_phase(Stream(), {"batch_size": 2})

    class Model(IdModel):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            if state.global_iteration == 7:
                raise Broken

    found = read_bundle(fail(tmp_path, Model(), Data(), valid_frequency=None))
    assert found["batch"]["samples"] is None
    assert found["batch"]["of_the_epoch"] == 7


@pytest.mark.parametrize("damage", ["no bundle", "truncated", "format"])
def test_what_is_no_bundle_is_refused(tmp_path, damage):
    folder = tmp_path
    if damage != "no bundle":
        folder = fail(tmp_path)
        text = (folder / "bundle.json").read_text()
        text = text.replace('"format": 1', '"format": 9') if damage == "format" else "{"
        (folder / "bundle.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a crash bundle"):
        read_bundle(folder)
    done = CliRunner().invoke(main, ["replay", str(folder)])
    assert done.exit_code == 2
    assert "is not a crash bundle" in done.output


SCRIPT = """
import os, sys, pathlib
import torch
import helios
from support import RandomData, RandomModel, train

torch.set_num_threads(1)
root, fails_at, ranks = sys.argv[1:]

class Model(RandomModel):
    norm = torch.nn.LayerNorm
    def setup(self, for_inference=False):
        super().setup(for_inference)
        if int(ranks) > 1:
            self.temperature = torch.ones(())
            self.optimizers = (
                torch.optim.AdamW(self.net.parameters(), lr=0.02), self.optimizers[1]
            )
            self.schedulers = self.schedulers[1:]
    def train_step(self, batch, state):
        is_there = self.engine.rank == int(ranks) - 1 and "CURED" not in os.environ
        if is_there and state.global_iteration == int(fails_at):
            self._noise()
            weight = self.unwrap(self.net)[0].weight.sum().item()
            print("the weights:", weight.hex(), flush=True)
            raise ValueError("on purpose")
        super().train_step(batch, state)

data = RandomData(length=40)
helios.Trainer(
    use_cpu=True, total_steps=3, chkpt_root=root, log_root=root, valid_frequency=1,
    enable_file_logging=True, chkpt_frequency=1, print_banner=False,
    crash_bundle="batch", run_name="failing",
).fit(Model(), data)
"""


def run(command, folder, **env):
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


REPLAY = [sys.executable, "-c", "from helios.cli import main; main()", "replay"]


def files_of(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("batch", [3, 13])
def test_replay_runs_the_step_again_and_writes_nothing(tmp_path, batch):
    (tmp_path / "script.py").write_text(SCRIPT)
    first = run([sys.executable, "script.py", "runs", batch, 1], tmp_path)
    assert first.returncode == 1
    weights = re.search("the weights: .*", first.stdout)[0]
    (bundle,) = tmp_path.glob("runs/failing_crash*")
    assert (bundle / "checkpoint").exists() == (batch == 13)
    # The bundle has its own; what a resume would clean up stays.
    for path in tmp_path.glob("runs/random/random_*"):
        shutil.rmtree(path)
    (tmp_path / "runs" / "random" / ".helios-0123").mkdir(parents=True)
    (tmp_path / "runs" / "random" / ".helios-0123" / "file").touch()
    before = files_of(tmp_path)
    again = run([*REPLAY, bundle], "/", CUDA_VISIBLE_DEVICES="")
    assert again.returncode == 1
    assert weights in again.stdout
    assert "ValueError: on purpose" in again.stderr
    assert "REPLAYED: the step has failed again, to the bit" in again.stderr
    assert files_of(tmp_path) == before
    cured = run([*REPLAY, bundle], tmp_path, CURED="1")
    assert cured.returncode == 0, cured.stderr
    assert "REPLAYED: the step has not failed this time" in cured.stderr
    assert "finished" not in cured.stderr
    assert files_of(tmp_path) == before


def test_replay_that_is_not_the_same_step_says_so(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run([sys.executable, "script.py", "runs", 3, 1], tmp_path)
    (bundle,) = tmp_path.glob("runs/failing_crash*")
    other = SCRIPT.replace("self._noise()", "torch.rand(7)")
    (tmp_path / "script.py").write_text(other)
    again = run([*REPLAY, bundle], tmp_path)
    assert again.returncode == 1
    assert re.search(r"failed again, but `\['rng'\].* is another one", again.stderr)


def test_replay_of_several_ranks_starts_as_many(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    count = ["--nproc-per-node", 2]
    first = run([*launch, *count, "script.py", "runs", 7, 2], tmp_path)
    weights = re.search("the weights: .*", first.stdout)[0]
    bundle = tmp_path / "runs" / "failing_crash_batch_7_rank_1"
    record = json.loads((bundle / "bundle.json").read_text())
    assert record["world_size"] == 2
    again = run([*REPLAY, bundle], tmp_path)
    assert again.returncode == 1
    assert weights in again.stdout
    assert "REPLAYED: the step has failed again, to the bit" in again.stderr


def test_replay_of_a_second_fit_leaves_the_first_one_to_train_as_always(tmp_path):
    script = SCRIPT.replace(
        "helios.Trainer(\n",
        "train(RandomModel('first'), data, root, total_steps=3)\n"
        "print('the first has trained', flush=True)\n"
        "helios.Trainer(\n",
    ).replace('run_name="failing",', "")
    (tmp_path / "script.py").write_text(script)
    first = run([sys.executable, "script.py", "runs", 13, 1], tmp_path)
    weights = re.search("the weights: .*", first.stdout)[0]
    (bundle,) = tmp_path.glob("runs/run_crash*")
    again = run([*REPLAY, bundle], tmp_path)
    assert again.returncode == 1
    assert "the first has trained" in again.stdout
    assert weights in again.stdout
    assert "REPLAYED: the step has failed again, to the bit" in again.stderr


WENT_BACK = """
import math, os, sys, time
import helios
from support import IdModel, IndexData

class Model(IdModel):
    last = None
    def train_step(self, batch, state):
        at = state.global_iteration
        loss = 0.001 * self.net(batch.float()[:, None]).square().mean()
        self.backward(loss * math.nan if at == int(sys.argv[1]) else loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if at == 4 and "STOP" in os.environ:
            self.trainer._session.request_stop("the test")
            time.sleep(1)  # longer than it is given
        was, self.last = self.last, at
        if at == 6 and was == 4:  # behind a batch that is left out
            print("the weight:", self.net.weight.item().hex(), flush=True)
            raise ValueError("on purpose")

trainer = helios.Trainer(
    use_cpu=True, train_unit="iteration", total_steps=int(sys.argv[2]),
    chkpt_frequency=4, chkpt_root="runs", log_root="runs", bad_numbers="rollback",
    print_banner=False, stop_grace_s=0.5,
)
model, data = Model(), IndexData(20)
trainer.fit(model, data)
"""


def went_back(folder, script=WENT_BACK):
    (folder / "script.py").write_text(script)
    first = run([sys.executable, "script.py", 5, 8], folder)
    (bundle,) = folder.glob("runs/run_crash*")
    return first, bundle


def test_replay_leaves_out_what_the_run_has_left_out_since_its_checkpoint(tmp_path):
    first, bundle = went_back(tmp_path)
    weight = re.search("the weight: .*", first.stdout)[0]
    record = json.loads((bundle / "bundle.json").read_text())
    assert record["left_out"] == [5]
    again = run([*REPLAY, bundle], tmp_path)
    assert again.returncode == 1
    assert weight in again.stdout, again.stderr
    assert "REPLAYED: the step has failed again, to the bit" in again.stderr


def test_replay_of_a_failure_that_the_program_survives_goes_on_like_it(tmp_path):
    fails = "trainer.fit(model, data)\n"
    survives = f"""
try:
    {fails}
except ValueError:
    sys.exit(3 if trainer.test(model, data) else 4)
"""
    first, bundle = went_back(tmp_path, WENT_BACK.replace(fails, survives))
    assert first.returncode == 3, first.stderr
    again = run([*REPLAY, bundle], tmp_path)
    assert again.returncode == 3, again.stderr
    assert again.stderr.count("REPLAYED: the step has failed again, to the bit") == 1
    assert "rank 0 failed before" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said", "variables"),
    [
        ("five 8", "the run has failed", {}),
        ("5 5", "training has ended", {}),
        ("5 9", "training was stopped", {"STOP": "1"}),
    ],
)
def test_replay_that_does_not_come_to_the_step_says_so(
    tmp_path, arguments, said, variables
):
    _, bundle = went_back(tmp_path)
    text = (bundle / "bundle.json").read_text()
    arguments = ",".join(f'\n      "{one}"' for one in arguments.split())
    changed = re.sub(r'(?<="script.py",)\s+"5",\s+"8"', arguments, text)
    assert changed != text
    (bundle / "bundle.json").write_text(changed)
    again = run([*REPLAY, bundle], tmp_path, **variables)
    assert again.returncode == 1, again.stderr
    at = "before the step, which is that of batch 6 of the run"
    assert f"NOT REPLAYED: {said} {at}" in again.stderr
    assert again.stderr.count("REPLAYED") == 1
