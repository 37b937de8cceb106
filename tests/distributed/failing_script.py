"""Run by test_failing_ranks.py: two ranks for each hook, of which one raises in it.

There is no launcher that would end the other one. Ranks are forked, as importing torch
takes longer than a run.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import time

import torch
import torch._dynamo  # which the first optimizer imports: here, not in each fork
from support import IdModel, IndexData, IndexDataset, RecordingCallback, StopAt, train

import helios

torch.set_num_threads(1)
TIMEOUT_S = 60
MODEL = [
    *("setup", "train", "eval", "train_step", "valid_step", "test_step"),
    *("batch_to_device", "load_for_testing", "have_metrics_improved"),
    *("should_training_stop", "should_save_checkpoint", "should_advance_dataset_phase"),
    *("append_metadata_to_chkpt_name", "append_to_banner"),
    *("state_dict", "load_state_dict", "user_state_dict", "load_user_state_dict"),
]
MODEL += [name for name in vars(helios.Model) if name.startswith("on_")]
DATA = ["prepare_data", "setup", "teardown", "train_dataloader", "valid_dataloader"]
DATA += ["test_dataloader", "advance_train_phase", "state_dict", "load_state_dict"]
CALLBACK = [name for name in vars(helios.Callback) if not name.startswith("_")]
# What only the main rank does.
ON_MAIN = {"prepare_data", "append_to_banner", "append_metadata_to_chkpt_name"}
ON_MAIN |= {"on_log", "on_checkpoint_saved", "state_dict", "user_state_dict"}
KINDS = {"model": MODEL, "data": DATA, "callback": CALLBACK}
CASES = [(kind, name) for kind, names in KINDS.items() for name in names]


def raises_on(hook):
    """The rank that raises in a hook: the second one, if it has it."""
    return 0 if hook in ON_MAIN else 1


class Phases(IndexData):
    """Data in two phases."""

    def setup(self):
        super().setup()
        self._add_train_phase(IndexDataset(self.length), self.params)


class Advancing(IdModel):
    """Goes on to the next phase, and overrides what is not asked otherwise."""

    def should_training_stop(self):
        return False

    def should_advance_dataset_phase(self):
        return self.trainer._session.state.dataset_phase == 0

    def batch_to_device(self, batch, phase):
        return batch


class Counter(RecordingCallback):
    """Has a state."""

    def state_dict(self):
        return {"saved": len(self.saved)}


def failing(base, hook, rank, folder):
    """The class, one rank of which raises in a hook."""
    real = getattr(base, hook)

    def raising(self, *args, **kwargs):
        if int(os.environ["RANK"]) == rank:
            (folder / "failed_at_s").write_text(str(time.monotonic()))
            raise ValueError(f"on purpose in {hook}")
        return real(self, *args, **kwargs)

    return type(base.__name__, (base,), {hook: raising})


def job(folder, case, stop=None):
    """Train, and test; from a checkpoint or, to make one, until a stop."""
    kinds = {"model": Advancing, "data": Phases, "callback": Counter}
    if case is not None:
        kind, name = case
        rank = raises_on(name)
        kinds[kind] = failing(kinds[kind], name, rank, folder)
        if name == "on_exception":  # which another one has to come before
            kinds["model"] = failing(kinds["model"], "on_training_end", rank, folder)
    model, data = kinds["model"](), kinds["data"](8, batch_size=2)
    options = {"total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1}
    options |= {"print_frequency": 1, "print_banner": True}
    options |= {"log_root": folder / "logs", "enable_file_logging": True}
    train(model, data, folder / "runs", kinds["callback"](), StopAt(stop), **options)
    if stop is None:
        options = {"use_cpu": True, "enable_progress_bar": False, "print_banner": False}
        options |= {"log_root": folder / "logs", "enable_file_logging": True}
        trainer = helios.Trainer(callbacks=[kinds["callback"]()], **options)
        trainer.test(kinds["model"](), kinds["data"](8, batch_size=2))


def pair(folder, case, stop=None):
    """Run a job on two ranks; of each its exit status, and how long after the failure.

    None: it did not end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids, began_s, ends, codes = [], time.monotonic(), {}, {}
    for rank in range(2):
        if (pid := os.fork()) == 0:
            output = os.open(folder / f"output_{rank}", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
            job(folder, case, stop)
            sys.exit()  # with all that happens at an exit
        pids.append(pid)
    while len(ends) < 2 and time.monotonic() - began_s < TIMEOUT_S:
        for rank, pid in enumerate(pids):
            if rank not in ends:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    ends[rank] = time.monotonic()
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for rank in {0, 1} - set(ends):
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
    marker = folder / "failed_at_s"
    failed_s = float(marker.read_text()) if marker.exists() else began_s
    return [
        [codes[rank], ends[rank] - failed_s] if rank in ends else None
        for rank in range(2)
    ]


def main():
    root, report = pathlib.Path(sys.argv[1]), {}
    (root / "half").mkdir()
    pair(root / "half", None, stop=2)
    wanted = sys.argv[2:]
    for kind, name in CASES:
        if wanted and f"{kind}.{name}" not in wanted:
            continue
        folder = root / f"{kind}.{name}"
        shutil.copytree(root / "half" / "runs", folder / "runs")
        report[f"{kind}.{name}"] = pair(folder, (kind, name))
        print(kind, name, report[f"{kind}.{name}"], flush=True)
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
