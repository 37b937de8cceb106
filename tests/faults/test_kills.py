"""SIGKILL at random moments: every run comes to its end, and to the same bits."""

import json
import random
import time

import pytest
from support import RandomData, RandomModel, digest, train
from support.children import TIMEOUT_S, child, receive

KILLS = 25  # of each run or runs; there are four
EVERY = 3  # steps between checkpoints
OPTIONS = {
    "train_unit": "iteration",
    "total_steps": 60,
    "valid_frequency": 7,
    "chkpt_frequency": EVERY,
    "accumulation_steps": 2,
    "keep_last": 2,
}


class Counted(RandomModel):
    """Counts its batches in a file, which outlives the process."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def train_step(self, batch, state):
        super().train_step(batch, state)
        with open(self.file, "a") as file:
            file.write(json.dumps([state.global_iteration, self.ids[-1]]) + "\n")


def run(pipe, root, workers, options):
    model = Counted(root / "batches")
    data = RandomData(24, num_workers=workers)  # six batches: three steps an epoch
    is_finished, _ = train(model, data, root / "runs", **OPTIONS, **options)
    pipe.send((is_finished, digest(model.state_dict())))


def batches(root):
    file = root / "batches"
    lines = file.read_text().splitlines() if file.exists() else []
    # One that was cut off is that of a batch which was lost.
    return [json.loads(line) for line in lines if line.endswith("]]")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_run_that_is_killed_at_random_moments_ends_with_the_same_bits(tmp_path, seed):
    moments = random.Random(seed)
    workers, options = 2 * (seed % 2), {"async_save": seed < 2}
    (tmp_path / "whole").mkdir()
    began_s = time.monotonic()
    with child(run, tmp_path / "whole", workers, options) as (_, pipe):
        is_finished, state = receive(pipe)
    took_s = time.monotonic() - began_s
    expected = batches(tmp_path / "whole")
    assert is_finished
    assert len(expected) == 120
    kills, ends, lost, number = 0, 0, [], 0
    root = tmp_path / "run 0"
    root.mkdir()
    before = 0
    while kills < KILLS or ends < number + 1:
        with child(run, root, workers, options) as (process, pipe):
            wait_s = moments.uniform(0, 0.8 * took_s) if kills < KILLS else TIMEOUT_S
            process.join(wait_s)
            has_ended = not process.is_alive() or pipe.poll(0)
            if has_ended:
                is_finished, found = receive(pipe)
        done = batches(root)
        if done[before:]:
            # From where it went on: the number of the first batch of this life.
            lost.append(max((b[0] for b in done[:before]), default=-1) + 1)
            lost[-1] -= done[before][0]
            assert done[before:] == expected[done[before][0] :][: len(done) - before]
        before = len(done)
        if not has_ended:
            kills += 1
            continue
        assert is_finished
        assert found == state
        ends += 1
        if kills < KILLS:  # on to the next run
            number, before = number + 1, 0
            root = tmp_path / f"run {number}"
            root.mkdir()
    print(f"{kills} kills, {ends} runs, at most {max(lost)} batches lost: {lost}")
    # An interval, of two batches a step, and what came while a checkpoint was written.
    assert max(lost) <= 2 * EVERY * (1 + options["async_save"])
