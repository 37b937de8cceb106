"""Where ranks come from: a process that has imported everything, and forks.

A rank that starts from nothing spends seconds on imports. Requests come as lines of
JSON; of each the leader of the ranks' process group is told, and how they have ended.
Ranks have the environment that torchrun would give them. What else differs from
processes of a launcher: the seed of Python's hashes is that of this process, and they
end before the interpreter's own end. Tests of launchers have ranks of the other kind.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
import traceback

import numpy as np

_GRACE_S = 10  # for ranks that are ended because another one has failed


def main():
    import accelerate  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch.distributed.fsdp
    import torch.utils.tensorboard  # noqa: F401

    import helios.handwritten
    import helios.trainer  # noqa: F401
    import support  # noqa: F401

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            _end(functools.partial(_lead, **request))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _lead(script, ranks, arguments, cwd, environment, output):
    """Start the ranks, and wait for them; the first that fails ends all."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, out, out)):
        os.dup2(file, number)
    running, port = {}, os.pipe()
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            _end(functools.partial(_be, rank, ranks, port, script, arguments))
        running[pid] = rank
    from torch.distributed import TCPStore

    # Behind the forks: it has threads.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(port[1], b"%6d" % store.port * ranks)
    code = 0
    while running:
        pid, status = os.wait()
        rank, status = running.pop(pid), os.waitstatus_to_exitcode(status)
        if status and not code:
            code = 1
            print(f"rank {rank} has ended with {status}", file=sys.stderr, flush=True)
            _terminate(running)
    sys.exit(code)


def _terminate(pids):
    for pid in pids:
        os.kill(pid, signal.SIGTERM)

    def kill():
        time.sleep(_GRACE_S)
        for pid in list(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def _be(rank, ranks, port, script, arguments):
    number = int(os.read(port[0], 6))
    os.environ |= {
        **{"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "GROUP_RANK": "0"},
        **{"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": f"{number}"},
        **{"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"},
    }
    random.seed()
    np.random.seed()
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def _end(program):
    """Run a program as a process of its own would, and end; it does not return."""
    code = 0
    faulthandler.enable()  # a SIGABRT shows where it is
    try:
        program()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else bool(ended.code)
    except BaseException:
        try:
            sys.excepthook(*sys.exc_info())
        except BaseException:
            traceback.print_exc()
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
