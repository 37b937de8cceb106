"""How ranks share a stream's batches: in turn, or in blocks as Accelerate does."""

from itertools import chain

import pytest
from accelerate.data_loader import IterableDatasetShard

from helios.data.dealing import Deal
from helios.data.parts import StreamSettings

SIZE = 4  # of each rank's batches


def dealt(count, ranks, in_blocks):
    """By rank, its samples of a batch, and how many are no padding."""
    for rank in range(ranks):
        deal = Deal(StreamSettings(SIZE, False, 1, rank, ranks, in_blocks))
        for sample in range(count):
            deal.show(sample)
        assert deal.count == count
        yield deal.end()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_blocks_of_a_full_batch_are_those_of_accelerate(ranks):
    samples = range(SIZE * ranks)
    shards = [
        list(IterableDatasetShard(samples, SIZE, False, ranks, rank))
        for rank in range(ranks)
    ]
    assert list(dealt(len(samples), ranks, True)) == [(own, SIZE) for own in shards]


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_all_ranks_have_as_many_samples_and_each_of_them_is_real_once(ranks, in_blocks):
    for count in range(1, SIZE * ranks + 1):
        parts = list(dealt(count, ranks, in_blocks))
        assert {len(items) for items, _ in parts} == {-(-count // ranks)}
        real = [items[:n] for items, n in parts]
        together = list(chain(*real))
        assert sorted(together) == list(range(count))
        if in_blocks:
            assert together == list(range(count))
        else:
            assert real == [list(range(count))[rank::ranks] for rank in range(ranks)]
        padding = {item for items, n in parts for item in items[n:]}
        assert padding <= {count - 1}
