"""Children: forked, so that they needn't import torch again."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time

from tqdm import tqdm

TIMEOUT_S = 60


def _child(function, pipe, *args):
    os.setsid()  # the leader of a group, as a launcher makes it
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    # A child killed while it writes would keep the lock that it shares with us.
    tqdm.set_lock(threading.RLock())
    function(pipe, *args)


@contextlib.contextmanager
def child(function, *args):
    """A forked process that runs ``function(pipe, *args)``, killed at the end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(function, theirs, *args))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join(TIMEOUT_S)
        process.close()


def receive(pipe):
    assert pipe.poll(TIMEOUT_S), "the child says nothing"
    return pipe.recv()


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.0005)
