"""Train, kill, start again: does an interrupted run end with the same bits?

    python examples/demo.py [--seed N] [--epochs N] [--folder runs/demo]

Trains `digits.py` undisturbed. Then trains it once more, ends it by SIGKILL at a random
moment, starts the same command again, kills that too, and lets the third one finish.
Compares all that the two runs left behind, and exits with 0 if it is identical.
"""

import argparse
import hashlib
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helios.checkpoint import find_last_checkpoint, read_checkpoint

LIMIT_S = 300  # for each wait; on two cores none takes longer than 15 s
LOGGED = re.compile(r"epoch (\d+)  step (\d+)  ")
RESUMED = re.compile(r"resumed from (\S+): epoch \d+, step (\d+)")


class Run:
    """A training run: one process, or several one after the other."""

    def __init__(self, folder, epochs):
        self.folder, self.epochs = folder, epochs
        self.child = None
        self.kills = []  # epochs and steps logged last, name of the last checkpoint
        self.resumes = []  # name and step of the checkpoint, by the log

    def start(self):
        """Start the command, the same one every time."""
        self.folder.mkdir(exist_ok=True)
        self.log_begin = len(self._log())
        script = Path(__file__).with_name("digits.py")
        options = ["--runs", self.folder, "--epochs", str(self.epochs)]
        with (self.folder / "console.txt").open("a") as console:
            self.child = subprocess.Popen(
                [sys.executable, script, *options],
                # The last bits of a sum depend on how many threads share it.
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo alone
            )

    def finish(self):
        """Wait for the end of the process."""
        if self.child.wait(LIMIT_S) != 0:
            sys.exit(f"The training failed: see {self.folder / 'console.txt'}")
        self.resumes += RESUMED.findall(self._log()[self.log_begin :]) or [None]

    def kill(self, step, pause_s):
        """Kill the process a moment after it has logged this step, or a later one."""
        deadline = time.monotonic() + LIMIT_S
        while self._logged()[1] < step and self.child.poll() is None:
            if time.monotonic() > deadline:
                sys.exit(f"The training did not reach step {step} in {LIMIT_S} s")
            time.sleep(0.002)
        time.sleep(pause_s)
        self.child.kill()
        if self.child.wait(LIMIT_S) != -signal.SIGKILL:
            sys.exit(f"Not killed, as it had ended: see {self.folder / 'console.txt'}")
        last = find_last_checkpoint(self.folder / "checkpoints")
        self.kills.append((*self._logged(), last and last.name))
        self.resumes += RESUMED.findall(self._log()[self.log_begin :]) or [None]

    def curves(self):
        """What TensorBoard shows: by name, events with `step` and `value`."""
        events = EventAccumulator(str(self.folder / "logs" / "digits"), {"scalars": 0})
        events.Reload()
        return {name: events.Scalars(name) for name in events.Tags()["scalars"]}

    def digests(self):
        """The SHA-256 of the weights and of the optimizer's state, at the end."""
        checkpoint = read_checkpoint(find_last_checkpoint(self.folder / "checkpoints"))
        model = checkpoint.tree("training")["model"]
        return digest(model["networks"]), digest(model["optimizers"])

    def _log(self):
        path = self.folder / "logs" / "digits.log"
        return path.read_text() if path.exists() else ""

    def _logged(self):
        found = LOGGED.findall(self._log()[self.log_begin :]) or [(0, 0)]
        return int(found[-1][0]), int(found[-1][1])


def digest(tree):
    """SHA-256 of names, dtypes, shapes and bytes of tensors, and of plain values."""
    sha = hashlib.sha256()

    def add(name, value):
        if isinstance(value, dict | list | tuple):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in pairs:
                add(f"{name}.{key}", item)
        elif isinstance(value, torch.Tensor):
            sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(f"{name} {value!r}\n".encode())

    add("tree", tree)
    return sha.hexdigest()


def train(whole, parts, rng):
    """Train once as a whole, once in parts."""
    whole.start()
    print("training undisturbed", flush=True)
    whole.finish()
    # Kill it anywhere but in the last tenth: it must not have ended before.
    losses = whole.curves().get("train/loss", [])
    if len(losses) < 2:
        sys.exit("TensorBoard shows no curve of the undisturbed training")
    interval_s = (losses[-1].wall_time - losses[0].wall_time) / (len(losses) - 1)
    steps = range(1, int(0.9 * (losses[-1].step - 30)))
    for step in sorted(rng.sample(steps, 2)):
        parts.start()
        print("training, until it is killed", flush=True)
        parts.kill(step, rng.random() * interval_s)
    parts.start()
    print("training to the end", flush=True)
    parts.finish()


def report(whole, parts):
    """Print what happened; return whether the two runs are identical."""
    is_same = True
    print("\nThe interrupted run")
    for (epoch, step, last), found in zip(parts.kills, parts.resumes[1:], strict=True):
        name = found and found[0]
        print(f"  killed in epoch {epoch}, after step {step}: ", end="")
        print(f"resumed from {name}" if name else "began anew, with no checkpoint yet")
        if name != last:
            print(f"    THE LAST CHECKPOINT WAS {last}")
            is_same = False
    ours, theirs = (
        {name: [(e.step, e.value) for e in events] for name, events in run.items()}
        for run in (whole.curves(), parts.curves())
    )
    accuracy = [f"{run['test/accuracy'][-1][1]:.2%}" for run in (ours, theirs)]
    weights, optimizer = zip(whole.digests(), parts.digests(), strict=True)
    for title, pair in (
        ("Test accuracy", accuracy),
        ("Weights, SHA-256", weights),
        ("Optimizer state, SHA-256", optimizer),
    ):
        print(f"\n{title}\n  undisturbed  {pair[0]}\n  interrupted  {pair[1]}")
        is_same &= pair[0] == pair[1]
    print("\nLogged values, as TensorBoard shows them")
    for name in sorted({*ours, *theirs}):
        is_equal = ours.get(name) == theirs.get(name)
        result = "equal in every bit" if is_equal else "DIFFERENT"
        print(f"  {name:<14}  {len(theirs.get(name, [])):>3} values  {result}")
        is_same &= is_equal
    print(f"\nVerdict: {'IDENTICAL' if is_same else 'DIFFERENT'}")
    return is_same


def draw(whole, parts, path):
    """Draw the undisturbed run broad and light, and the other one over it."""
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for run, width, kind, *colours in (
        (whole.curves(), 7, "undisturbed", "#bcd9ee", "#fdd0a2", "#c7e9c0"),
        (parts.curves(), 1.2, "killed twice", "#08519c", "#a63603", "#006d2c"),
    ):
        names = (loss, "train/loss"), (loss, "valid/loss"), (accuracy, "valid/accuracy")
        for (panel, name), colour in zip(names, colours, strict=True):
            steps = [event.step for event in run.get(name, [])]
            values = [event.value for event in run.get(name, [])]
            label = f"{name.split('/')[0]}, {kind}"
            panel.plot(steps, values, color=colour, linewidth=width, label=label)
    kills = list(zip(parts.kills, parts.resumes[1:], strict=True))
    for panel, title in ((loss, "Loss"), (accuracy, "Accuracy")):
        for number, ((_, step, _), found) in enumerate(kills):
            hidden = "_" * number  # in the legend once only
            resumed = int(found[1]) if found else 0
            label = f"{hidden}trained again"
            panel.axvspan(resumed, step, color="#fbd5d5", linewidth=0, label=label)
            panel.axvline(
                step, color="#cb181d", linestyle="--", label=f"{hidden}SIGKILL"
            )
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.25)
        panel.legend(framealpha=0.9, edgecolor="none")
    figure.savefig(path, dpi=130)


def prepare(folder):
    """Make the folder, or empty it if an earlier demo made it."""
    marker = folder / ".helios-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        sys.exit(f"{folder} holds other things than a demo's; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in ("undisturbed", "interrupted"):
        shutil.rmtree(folder / name, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs", "demo"))
    parser.add_argument("--seed", type=int, help="of the kills; random by default")
    parser.add_argument("--epochs", type=int, default=30, help="5 or more")
    args = parser.parse_args()
    if args.epochs < 5:
        parser.error("`--epochs` must be at least 5, to leave room for two kills")
    seed = random.randrange(10**6) if args.seed is None else args.seed
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each resume
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("ended before it was done"))
    began = time.monotonic()
    print(f"Helios's demo; the kills' seed is {seed}")
    prepare(args.folder)
    whole = Run(args.folder / "undisturbed", args.epochs)
    parts = Run(args.folder / "interrupted", args.epochs)
    try:
        train(whole, parts, random.Random(seed))
    finally:
        for run in (whole, parts):
            if run.child is not None:
                run.child.kill()
                run.child.wait()
    is_same = report(whole, parts)
    draw(whole, parts, args.folder / "curves.png")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    if tensorboard.is_relative_to(Path.cwd()):
        tensorboard = tensorboard.relative_to(Path.cwd())
    print(f"\nTook         {time.monotonic() - began:.0f} s")
    print(f"Picture      {args.folder / 'curves.png'}")
    print(f"TensorBoard  {tensorboard} --logdir {args.folder}")
    sys.exit(not is_same)


if __name__ == "__main__":
    main()
