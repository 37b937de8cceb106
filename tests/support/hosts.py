"""Two hosts on this machine: network namespaces, joined by a pair of interfaces.

Each has a name, an address, a disk of its own and a network to the other one, and no
other. Both run on this machine's file system otherwise.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

_TIMEOUT_S = 30
_INTERFACE = "eth0"
# A host's own name and disk are seen by its processes alone.
_ENTER = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts &&
mount --bind "$2/disk_of_$1" "$2/disk" && shift 2 && exec "$@"
"""
_FREE_PORT = "import socket; s = socket.create_server(('', 0)); "
_FREE_PORT += "print(s.getsockname()[1])"


def _ip(*words):
    done = subprocess.run(
        ["ip", *words], capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """One of the two; ``disk`` is the same path on both, and another folder on each."""

    def __init__(self, folder, number):
        self.name, self.address = f"host{number}", f"10.0.0.{number + 1}"
        self.namespace = f"helios-{os.getpid()}-{time.monotonic_ns()}-{number}"
        self.folder, self.disk = folder, folder / "disk"
        self.own_disk = folder / f"disk_of_{self.name}"  # as others see it

    def command(self, *command):
        """The command that runs another one on this host."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        return [*enter, "sh", "-c", _ENTER, "sh", self.name, self.folder, *command]

    def start(self, *command, env):
        """Start a command here, with its output in a file: a pipe could be left open
        by a process that outlives it."""
        output = open(self.folder / f"output_of_{self.name}", "w+")  # noqa: SIM115
        process = subprocess.Popen(
            self.command(*command),
            env={**env, "GLOO_SOCKET_IFNAME": _INTERFACE},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        process.output = output
        return process

    def free_port(self):
        found = subprocess.run(
            self.command(sys.executable, "-c", _FREE_PORT),
            stdout=subprocess.PIPE,
            check=True,
            timeout=_TIMEOUT_S,
        )
        return int(found.stdout)

    def kill(self):
        """Lose the host: every process on it, at once and without a warning."""
        until = time.monotonic() + _TIMEOUT_S
        while pids := _ip("netns", "pids", self.namespace).split():
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < until, pids
            time.sleep(0.01)

    def set_link(self, state):
        """Let the network be "up" or "down"."""
        _ip("-n", self.namespace, "link", "set", _INTERFACE, state)


def end(process, timeout_s):
    """Wait for a process of a host; its exit status and output."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    process.output.seek(0)
    output = process.output.read()
    assert code is not None, f"no end after {timeout_s} s:\n{output}"
    process.output.close()
    return code, output


def _join(hosts):
    for host in hosts:
        _ip("netns", "add", host.namespace)
    words = ["link", "add", _INTERFACE, "netns", hosts[0].namespace, "type", "veth"]
    _ip(*words, "peer", "name", _INTERFACE, "netns", hosts[1].namespace)
    for host in hosts:
        inside = ("-n", host.namespace)
        _ip(*inside, "address", "add", f"{host.address}/24", "dev", _INTERFACE)
        _ip(*inside, "link", "set", "lo", "up")
        host.set_link("up")


@contextlib.contextmanager
def two_hosts(folder: pathlib.Path):
    """Two hosts, and nothing of them afterwards; skips where they cannot be made.

    ``folder`` is what both see; ``folder / "disk"`` is each one's own.
    """
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for program in ("ip", "unshare", "mount", "hostname"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no `{program}` here")
    hosts = [Host(folder, number) for number in range(2)]
    for path in (folder / "disk", *(host.own_disk for host in hosts)):
        path.mkdir(parents=True, exist_ok=True)
    lines = [f"{host.address} {host.name}\n" for host in hosts]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    try:
        try:
            _join(hosts)
            subprocess.run(
                hosts[0].command("true"),
                check=True,
                timeout=_TIMEOUT_S,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            pytest.skip(f"this machine gives no network namespaces: {why}")
        yield hosts
    finally:
        made = {line.split()[0] for line in _ip("netns", "list").splitlines()}
        for host in hosts:
            if host.namespace in made:
                host.kill()
                _ip("netns", "delete", host.namespace)  # the interfaces go with it
