"""Runs: train with little ado, stop where one likes, and compare in bits."""

import hashlib

import torch

import helios


class RecordingCallback(helios.Callback):
    """Keeps what is logged, as exact numbers, with the step."""

    def __init__(self):
        self.logged = []
        self.saved = []

    def on_log(self, session, values):
        step = session.state.current_iteration
        self.logged += [(step, name, value.hex()) for name, value in values.items()]

    def on_checkpoint_saved(self, session, path):
        self.saved.append(path.name)


class TraceCallback(helios.Callback):
    """Writes down every hook that is called, into the list of a TraceModel."""

    def __init__(self, trace, mark="callback"):
        self.trace, self.mark = trace, mark

    def write(self, *words):
        self.trace.append(" ".join([self.mark, *map(str, words)]))

    def on_training_start(self, session):
        self.write("on_training_start")

    def on_training_epoch_start(self, session):
        self.write("on_training_epoch_start", session.state.global_epoch)

    def on_training_batch_end(self, session):
        self.write("on_training_batch_end", session.state.global_iteration)

    def on_training_epoch_end(self, session):
        self.write("on_training_epoch_end", session.state.global_epoch)

    def on_validation_start(self, session):
        self.write("on_validation_start", session.state.validation_cycles)

    def on_validation_batch_end(self, session, step):
        self.write("on_validation_batch_end", step)

    def on_validation_end(self, session):
        self.write("on_validation_end", session.state.validation_cycles)

    def on_log(self, session, values):
        self.write("on_log", *values)

    def on_checkpoint_saved(self, session, path):
        self.write("on_checkpoint_saved", path.name)

    def on_training_end(self, session):
        self.write("on_training_end")

    def on_exception(self, session, error):
        self.write("on_exception", type(error).__name__)


class StopAt(helios.Callback):
    """Asks to stop when so many batches, or batches of a validation, are done."""

    def __init__(self, batch=None, validation=None, valid_step=0):
        self.batch, self.validation, self.valid_step = batch, validation, valid_step

    def on_training_start(self, session):
        if self.batch == 0:
            session.request_stop("the test")

    def on_training_batch_end(self, session):
        if session.state.global_iteration == self.batch:
            session.request_stop("the test")

    def on_validation_batch_end(self, session, step):
        at = session.state.validation_cycles, step
        if at == (self.validation, self.valid_step):
            session.request_stop("the test")


def _feed(hasher, value):
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(data.numpy().tobytes())
    elif isinstance(value, dict):
        for key in value:
            hasher.update(repr(key).encode())
            _feed(hasher, value[key])
    elif isinstance(value, list | tuple):
        for member in value:
            _feed(hasher, member)
    elif hasattr(value, "tobytes"):
        hasher.update(value.tobytes())
    else:
        hasher.update(repr(value).encode())


def digest(tree):
    """A hash of every bit of a tree."""
    hasher = hashlib.sha256()
    _feed(hasher, tree)
    return hasher.hexdigest()


def train(model, data, root, *callbacks, **options):
    """Run a trainer on the CPU, quietly; whether it finished, and what it logged."""
    recorder = RecordingCallback()
    trainer = helios.Trainer(
        **{
            "use_cpu": True,
            "chkpt_root": root,
            "print_banner": False,
            "enable_progress_bar": False,
            "callbacks": [recorder, *callbacks],
            **options,
        }
    )
    return trainer.fit(model, data), recorder
