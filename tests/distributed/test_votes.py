"""Votes over any number of ranks, among other messages."""

import pytest
from support import run_ranks

SCRIPT = """
import random
import torch
from torch import distributed
from helios.voting import Votes

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank, ranks = distributed.get_rank(), distributed.get_world_size()
votes, shared = Votes(), random.Random(1)
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


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_yes_of_any_rank_is_known_to_all(tmp_path, ranks):
    (tmp_path / "script.py").write_text(SCRIPT)
    run_ranks(tmp_path / "script.py", ranks, cwd=tmp_path)
