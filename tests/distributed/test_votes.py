"""Votes over any number of ranks: among other messages, without wires, to the end."""

import socket

import pytest
from support import run_ranks

START = """
import os, random, socket, sys, time
from datetime import timedelta
import torch
from torch import distributed
from helios import wires
from helios.voting import Votes

torch.set_num_threads(1)
limit = timedelta(seconds=float(sys.argv[1]))
distributed.init_process_group(sys.argv[2], timeout=limit)
rank, ranks = distributed.get_rank(), distributed.get_world_size()

def failure_of(votes):
    try:
        votes.any_of((False,))
    except RuntimeError as error:
        return str(error)
    raise AssertionError("nobody has voted")
"""

VOTE = """
votes, shared = Votes(torch.device("cpu")), random.Random(1)
assert votes.is_wired == is_wired
for number in range(300):
    # Rarely a yes, of one rank or of several: each of them must come to all.
    answers = [[shared.random() < 0.1 for _ in range(8)] for _ in range(ranks)]
    count = shared.randint(1, 8)
    wanted = [any(of_all) for of_all in zip(*answers)][:count]
    other = torch.full((1,), number)
    if number % 3 == 0:  # a message of the program's own, under way meanwhile
        sending = distributed.isend(other, (rank + 1) % ranks)
    assert votes.any_of(tuple(answers[rank][:count])) == wanted, number
    if number % 3 == 0:
        got = torch.zeros_like(other)
        distributed.recv(got, (rank - 1) % ranks)
        sending.wait()
        assert got.item() == number
distributed.barrier()
distributed.destroy_process_group()
"""

# What a rank may meet while it makes its connections.
SETTINGS = {
    "wired": "is_wired = True",
    "one that cannot listen": """
is_wired = False
def refused(*args, **options):
    raise PermissionError("no ports here")
if rank == 1:
    socket.create_server = refused
""",
    "one that cannot connect": """
is_wired, wires._SETUP_S = False, 1
def refused(*args):
    time.sleep(0.5)  # the others have connected to it by then, and one misses nothing
    raise ConnectionRefusedError("a firewall")
if rank == 1:
    socket.create_connection = refused
""",
    "a stranger at the door": """
is_wired, create_server = True, socket.create_server
def with_stranger(address, **options):
    global stranger
    door = create_server(address, **options)
    stranger = socket.socket(door.family)
    stranger.connect(door.getsockname())
    stranger.sendall(bytes(20))
    return door
socket.create_server = with_stranger
""",
    "one that knocks and is silent": """
is_wired, create_server, wires._SETUP_S = False, socket.create_server, 1
def with_stranger(address, **options):
    global stranger
    door = create_server(address, **options)
    stranger = socket.socket(door.family)
    stranger.connect(door.getsockname())
    return door
socket.create_server = with_stranger
""",
}


def run(root, script, ranks, *, timeout_s=60, backend="gloo"):
    (root / "script.py").write_text(START + script)
    return run_ranks(root / "script.py", ranks, timeout_s, backend, cwd=root)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_yes_of_any_rank_is_known_to_all(tmp_path, ranks):
    run(tmp_path, SETTINGS["wired"] + VOTE, ranks)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "wired"])
def test_votes_do_not_need_wires_nor_trust_strangers(tmp_path, setting):
    run(tmp_path, SETTINGS[setting] + VOTE, 5, timeout_s=10)


def test_meeting_by_ipv6(tmp_path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    meeting = 'os.environ["MASTER_ADDR"] = "::1"\n'
    run(tmp_path, meeting + SETTINGS["wired"] + VOTE, 2)


# A loader's worker lives on for a while where its rank was killed.
LOST = """
votes = Votes(torch.device("cpu"))
assert votes.any_of((False,)) == [False]
if rank == 1:
    if os.fork() == 0:
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        time.sleep(15)
    os._exit(0)
began_s, error = time.monotonic(), failure_of(votes)
assert "rank 1" in error, error
assert time.monotonic() - began_s < 5
os._exit(0)
"""

HANGING = """
votes = Votes(torch.device("cpu"))
assert votes.any_of((False,)) == [False]
if rank == 1:
    time.sleep(4)
    os._exit(0)
began_s, error = time.monotonic(), failure_of(votes)
assert "rank 1" in error and "timed out" in error, error
assert 1.5 < time.monotonic() - began_s < 3.5
os._exit(0)
"""


def test_a_rank_that_ends_is_missed_while_its_workers_live(tmp_path):
    run(tmp_path, LOST, 2)


def test_a_rank_that_hangs_is_missed_after_the_time_of_collectives(tmp_path):
    run(tmp_path, HANGING, 2, timeout_s=2)


INTERRUPTED = """
import signal
votes = Votes(torch.device("cpu"))
assert votes.is_wired
if rank == 0:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(1)
    try:
        votes.any_of((True,))
    except KeyboardInterrupt:
        pass
else:
    time.sleep(2)
    assert votes.any_of((False,)) == [True]  # the other had sent it before
failure_of(votes)  # what was sent before is no answer to this
assert "an earlier one failed" in failure_of(votes)
os._exit(0)
"""


def test_no_vote_goes_on_from_one_that_was_interrupted(tmp_path):
    run(tmp_path, INTERRUPTED, 2)


LIMITED = """
votes = Votes(torch.device("cpu"))
assert votes.is_wired and votes.timeout == limit
assert [s.gettimeout() for w in wires._all for s in w._from.values()] == [7]
distributed.destroy_process_group()
"""


def test_votes_have_the_time_of_other_collectives(tmp_path):
    run(tmp_path, LIMITED, 2, timeout_s=7, backend="cpu:gloo,cuda:gloo")
