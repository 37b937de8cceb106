"""Two hosts on this machine: network namespaces, joined by a pair of interfaces.

Each has a name, an address, a disk of its own, and a network with the other one on it
and nobody else. The rest of the file system is this machine's, on both.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest

PORT = 29500  # for the job: nobody else is on that network
_TIMEOUT_S = 30
_INTERFACE = "eth0"
# A host's name and its disk are seen by its own processes alone.
_ENTER = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts &&
mount --bind "$2/disk_of_$1" "$2/disk" && shift 2 && exec "$@"
"""


def _run(*command):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def _kill_all(namespace):
    """Kill what runs in a namespace; what is killed is in none any more."""
    until = time.monotonic() + _TIMEOUT_S
    while pids := _run("ip", "netns", "pids", namespace).split():
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < until, pids
        time.sleep(0.01)


def _namespaces():
    """The namespaces of such hosts, and the process of the tests that made each."""
    names = [line.split()[0] for line in _run("ip", "netns").splitlines()]
    return {n: int(n.split("-")[2]) for n in names if n.startswith("helios-tests-")}


def _remove(namespace):
    _kill_all(namespace)
    _run("ip", "netns", "delete", namespace)  # and its interface


class Host:
    """One of the two.

    ``folder`` is seen by both; ``disk``, in it, is another folder on each of them,
    which the test finds at ``own_disk``.
    """

    def __init__(self, folder, number):
        self.name, self.address = f"host{number}", f"10.0.0.{number + 1}"
        # Unlike those of other tests that run at the same time.
        self.namespace = f"helios-tests-{os.getpid()}-{time.monotonic_ns()}-{number}"
        self.folder, self.disk = folder, folder / "disk"
        self.own_disk = folder / f"disk_of_{self.name}"
        self._started = []

    def command(self, *command):
        """The command that runs another one on this host."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        return [*enter, "sh", "-c", _ENTER, "sh", self.name, self.folder, *command]

    def start(self, *command, env):
        """Start a command on this host, for :meth:`end`."""
        # In a file: what outlives the command would keep a pipe open.
        number = len(self._started)
        with open(self.folder / f"output_{number}_of_{self.name}", "w") as output:
            process = subprocess.Popen(
                self.command(*command),
                env={**env, "GLOO_SOCKET_IFNAME": _INTERFACE},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append((process, output.name))

    def is_running(self):
        """Whether what was started last has not ended."""
        return self._started[-1][0].poll() is None

    def end(self, timeout_s):
        """Wait for what was started last; its exit status and its output."""
        process, path = self._started[-1]
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        with open(path, errors="replace") as file:
            output = file.read()
        assert code is not None, f"no end after {timeout_s} s:\n{output}"
        return code, output

    def kill(self):
        """Lose the host: all that runs on it, at once and without a warning."""
        _kill_all(self.namespace)
        for process, _ in self._started:
            process.wait(_TIMEOUT_S)

    def set_link(self, state):
        """Let this host's network be "up" or "down"."""
        _run("ip", "-n", self.namespace, "link", "set", _INTERFACE, state)


def _join(hosts):
    for host in hosts:
        _run("ip", "netns", "add", host.namespace)
    one, other = (["name", _INTERFACE, "netns", host.namespace] for host in hosts)
    _run("ip", "link", "add", *one, "type", "veth", "peer", *other)
    for host in hosts:
        inside = ["ip", "-n", host.namespace]
        _run(*inside, "address", "add", f"{host.address}/24", "dev", _INTERFACE)
        _run(*inside, "link", "set", "lo", "up")
        host.set_link("up")
        _run(*host.command("true"))


@contextlib.contextmanager
def two_hosts(folder):
    """Two hosts, and nothing of them afterwards; skips where they cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("two hosts need network namespaces, and those need root")
    for program in ("ip", "unshare", "mount", "hostname"):
        if shutil.which(program) is None:
            pytest.skip(f"two hosts need the program `{program}`")
    for namespace, pid in _namespaces().items():
        if not os.path.exists(f"/proc/{pid}"):  # tests that were killed left it behind
            with contextlib.suppress(OSError):  # others remove it, too
                _remove(namespace)
    hosts = [Host(folder, number) for number in range(2)]
    for path in (hosts[0].disk, *(host.own_disk for host in hosts)):
        path.mkdir(parents=True)
    lines = [f"{host.address} {host.name}\n" for host in hosts]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    try:
        try:
            _join(hosts)
        except OSError as error:
            pytest.skip(f"two hosts cannot be made here: {error}")
        yield hosts
    finally:
        for host in hosts:
            if host.namespace in _namespaces():
                host.kill()
                _remove(host.namespace)
