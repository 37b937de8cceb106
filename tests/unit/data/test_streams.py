"""Streams: the same batches whatever reads them, from wherever they are begun."""

import random
import time
from itertools import chain, islice

import numpy as np
import pytest
import torch
from support import digest
from torch.utils.data import IterableDataset, get_worker_info

from helios.checkpoint.codec import Encoder, decode
from helios.data import sample_rng
from helios.data.loader import create_dataloader
from helios.errors import DataError, HeliosError, ResumeError
from helios.rng import capture_rng, seed_rngs

LENGTH = 17


def drawn(index):
    """A sample: its number, and a number of each generator."""
    numpy, generator = sample_rng()
    own = numpy.random() + torch.rand((), generator=generator).item()
    return index, random.gauss(0, 1), np.random.normal(), torch.rand(()).item(), own


class Whole(IterableDataset):
    """Gives all to each who asks; its length is random."""

    def __init__(self, length=LENGTH):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def mine(self):
        order = list(range(self.length))
        random.Random(self.epoch).shuffle(order)
        return order

    def __iter__(self):
        for index in self.mine():
            if index % 5 != 4 or random.random() < 0.8:
                yield drawn(index)


class Fixed(Whole):
    """As long in every epoch."""

    def __iter__(self):
        return map(drawn, self.mine())


class Shards(Fixed):
    """Gives a part to each who asks."""

    def mine(self):
        info, order = get_worker_info(), super().mine()
        return order if info is None else order[info.id :: info.num_workers]


class Plain:
    """No torch class, and without epochs."""

    def __iter__(self):
        return map(drawn, range(LENGTH))


class Stateful(Fixed):
    """Can say where it is; its next epoch depends on how the last one ended."""

    def __init__(self, length=LENGTH):
        super().__init__(length)
        self.position, self.sum = 0, 0.0

    def __iter__(self):
        mine = self.mine()
        while self.position < len(mine):
            self.position += 1
            self.sum = 0.5 * self.sum + random.random()
            yield *drawn(mine[self.position - 1]), self.sum
        self.position = 0

    def state_dict(self):
        # The epoch too, as users may: that of a new epoch must win.
        return {"position": self.position, "sum": self.sum, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.position, self.sum = state["position"], state["sum"]
        self.epoch = state["epoch"]


class Spent(Stateful):
    """Stays at its end, where the state of an epoch's end has taken it."""

    def __iter__(self):
        mine = self.mine()
        while self.position < len(mine):
            self.position += 1
            yield drawn(mine[self.position - 1])


class StatefulShards(Stateful, Shards):
    """Each part can say where it is."""


class Itself(Stateful):
    """Its own iterator, which begins anew whenever it is asked for one."""

    def __iter__(self):
        self.position = 0
        return self

    def __next__(self):
        mine = self.mine()
        if self.position == len(mine):
            raise StopIteration
        self.position += 1
        return drawn(mine[self.position - 1])


class Steps:
    """An iterator that can say where it is, in a state that changes as it goes on."""

    def __init__(self, order, at_end=int):
        self.order, self.at_end, self.state = order, at_end, {"position": 0}

    def __iter__(self):
        return self

    def __next__(self):
        if self.state["position"] == len(self.order):
            self.at_end()
            raise StopIteration
        self.state["position"] += 1
        return drawn(self.order[self.state["position"] - 1])

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Iterated(Fixed):
    """Its iterators can say where they are."""

    def __iter__(self):
        return Steps(self.mine())


class Both(Iterated):
    """Says how many epochs there were, and its iterators where they are."""

    def __init__(self):
        super().__init__()
        self.state = {"ended": 0}

    def end(self):
        self.state["ended"] += 1

    def __iter__(self):
        return Steps([self.state["ended"] * 100 + i for i in self.mine()], self.end)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Lookahead(Stateful):
    """Its iterator has the next sample in hand, and no state of that one."""

    def __iter__(self):
        reader = super().__iter__()
        return chain([next(reader)], reader) if self.position else reader


KINDS = {
    "whole": Whole,
    "fixed": Fixed,
    "shards": Shards,
    "plain": Plain,
    "stateful": Stateful,
    "spent": Spent,
    "stateful_shards": StatefulShards,
    "itself": Itself,
    "iterated": Iterated,
    "both": Both,
    "lookahead": Lookahead,
}
SHARED = {"shards", "stateful_shards"}


def collate(items):
    return items, random.random(), np.random.random(), torch.rand(()).item()


def make(dataset, **options):
    options = {"batch_size": 3, "collate_fn": collate, "streams": 6, **options}
    return create_dataloader(dataset, seed=3, **options)[0]


def contents(loader):
    return [loaded[:-1] for loaded in loader.fetch()]


def indices(batches):
    return [item[0] for batch in batches for item in batch.data[0]]


def stored(cursor):
    """What a checkpoint makes of it."""
    encoder = Encoder()
    return decode(encoder.encode(cursor, file="rank_0"), encoder.files)


def epochs(loader, count=3):
    """The batches of some epochs, the last fields being cursors; how each one ends."""
    return [(list(loader.fetch()), loader.plan.next_epoch()) for _ in range(count)]


def plain(batches):
    return [batch[:-1] for batch in batches]


@pytest.fixture(scope="module")
def whole():
    """Three epochs of each kind, read in the main process."""
    return {name: epochs(make(kind())) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 2},
        {"num_workers": 3, "prefetch_factor": 1},
        {"num_workers": 2, "persistent_workers": True},
    ],
    ids=["1", "2", "3", "persistent"],
)
def test_batches_are_the_same_whatever_reads_them(whole, name, options):
    loader = make(KINDS[name](), **options)
    for batches, _ in whole[name]:
        assert contents(loader) == plain(batches)


@pytest.mark.parametrize("name", KINDS)
def test_resume_at_every_batch_equals_the_rest(whole, name):
    for epoch, (batches, end) in enumerate(whole[name]):
        for done in range(1, len(batches) + 1):
            loader = make(KINDS[name]())
            loader.seek(epoch, done, stored(batches[done - 1].cursor))
            assert contents(loader) == plain(batches[done:])
        for following, _ in whole[name][epoch + 1 :][:1]:
            assert contents(loader) == plain(following)
            loader = make(KINDS[name]())
            loader.seek(epoch + 1, 0, stored(end))
            assert contents(loader) == plain(following)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_workers", [2, 3])
def test_resume_with_workers_equals_the_rest(whole, name, num_workers):
    batches, _ = whole[name][1]
    loader = make(KINDS[name](), num_workers=num_workers, persistent_workers=True)
    for done in 1, 4:
        loader.seek(1, done, stored(batches[done - 1].cursor))
        found = list(loader.fetch())
        assert plain(found) == plain(batches[done:])
        loader.seek(1, done + 1, stored(found[0].cursor))
        assert contents(loader) == plain(batches[done + 1 :])
        assert contents(loader) == plain(whole[name][2][0])


@pytest.mark.parametrize("name", KINDS)
def test_loader_can_be_sought_back(whole, name):
    loader = make(KINDS[name]())
    batches, _ = whole[name][0]
    iterator = loader.fetch()
    next(iterator), next(iterator)
    for _ in range(2):
        loader.seek(0)
        assert contents(loader) == plain(batches)
        loader.seek(0, 2, batches[1].cursor)
        assert contents(loader) == plain(batches[2:])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", KINDS)
def test_reading_leaves_the_random_numbers_of_training_alone(name, num_workers):
    seed_rngs(1)
    random.gauss(0, 1), np.random.standard_normal()
    before = digest(capture_rng())
    for _ in make(KINDS[name](), num_workers=num_workers):
        assert digest(capture_rng()) == before


@pytest.mark.parametrize("name", sorted(SHARED))
def test_all_that_is_drawn_differs_by_stream_position_and_epoch(whole, name):
    items = [i for batches, _ in whole[name] for b in batches for i in b.data[0]]
    assert len(items) == 3 * LENGTH
    for draws in list(zip(*items, strict=True))[1:5]:
        # The first samples of the six streams draw the same, before they are known.
        assert len(set(draws)) == 3 * (LENGTH - 5)
    collated = [b.data[1:] for batches, _ in whole[name] for b in batches]
    assert len(set(chain(*collated))) == 3 * len(collated)


@pytest.mark.parametrize("name", ["whole", "fixed", "plain", "stateful", "both"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_global_batches_of_a_whole_stream(name, ranks):
    alone = make(KINDS[name](), batch_size=6)
    loaders = [
        make(KINDS[name](), batch_size=6 // ranks, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    for _ in range(2):
        parts = [list(loader.fetch()) for loader in loaders]
        for together, *shares in zip(alone.fetch(), *parts, strict=True):
            count = together.rows
            assert {share.rows for share in shares} == {-(-count // ranks)}
            assert sum(share.real for share in shares) == count
            assert {share.is_full for share in shares} == {count % ranks == 0}
            for rank, share in enumerate(shares):
                assert share.data[0][: share.real] == together.data[0][rank::ranks]
                padding = [together.data[0][-1]] * (share.rows - share.real)
                assert share.data[0][share.real :] == padding
            assert len({share.data[1:] for share in shares}) == ranks


@pytest.mark.parametrize("name", sorted(SHARED))
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("streams", [1, 2])
def test_ranks_share_the_shards_without_repeats(name, ranks, streams):
    found = []
    for rank in range(ranks):
        loader = make(KINDS[name](), rank=rank, world_size=ranks, streams=streams)
        batches = list(loader.fetch())
        assert not any(batch.is_full for batch in batches)
        assert loader.plan.is_sharded
        found += indices(batches)
    assert sorted(found) == list(range(LENGTH))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_rank_resumes_at_every_batch(name, ranks):
    options = {"rank": ranks - 1, "world_size": ranks, "streams": 2, "batch_size": 2}
    batches, _ = epochs(make(KINDS[name](), **options))[1]
    for done in range(1, len(batches) + 1):
        loader = make(KINDS[name](), **options)
        loader.seek(1, done, stored(batches[done - 1].cursor))
        assert contents(loader) == plain(batches[done:])


@pytest.mark.parametrize(
    ("dataset", "ranks", "streams", "sizes"),
    [
        (Fixed, 1, 1, [3] * 5),
        (Fixed, 2, 1, [3] * 2),
        (Shards, 1, 2, [3] * 5),  # of nine and eight samples
        (Shards, 1, 6, [3] * 5),  # of three samples, the last one of two
        (Shards, 2, 1, [3] * 3),
    ],
)
def test_drop_last_leaves_short_batches_out(dataset, ranks, streams, sizes):
    loader = make(dataset(), world_size=ranks, streams=streams, drop_last=True)
    for _ in range(2):
        assert [batch.rows for batch in loader.fetch()] == sizes


def test_streams_of_different_lengths_are_read_to_their_ends():
    class Uneven(IterableDataset):
        def __iter__(self):
            info = get_worker_info()
            yield from range(info.id * 100, info.id * 100 + (7, 0, 2)[info.id])

    for num_workers in 0, 3:
        loader = make(Uneven(), collate_fn=list, streams=3, num_workers=num_workers)
        found = list(loader.fetch())
        assert [b.data for b in found] == [[0, 1, 2], [200, 201], [3, 4, 5], [6]]
        assert all(batch.is_full for batch in found)  # there are no other ranks


def test_stream_that_yields_nothing_has_no_batches():
    for dataset in Fixed(0), Shards(0), Stateful(0), iter_of([]):
        loader = make(dataset, num_workers=2)
        assert [contents(loader) for _ in range(2)] == [[], []]


def iter_of(values):
    """A stream of values; exceptions among them are raised."""

    class Values(IterableDataset):
        def __iter__(self):
            for value in values:
                if isinstance(value, Exception):
                    raise value
                yield value

    return Values()


def text_of(error):
    return "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_error_of_a_sample_names_it(num_workers):
    loader = make(iter_of([0, 1, 2, 3, OSError("disk")]), num_workers=num_workers)
    loader.seek(4)
    iterator = loader.fetch()
    next(iterator)
    with pytest.raises(OSError, match="disk") as error:
        next(iterator)
    assert "Helios: in sample 4 of the stream (epoch 4)" in text_of(error)


def test_error_of_a_sample_of_a_shard_names_the_stream():
    class Broken(Shards):
        def __iter__(self):
            yield get_worker_info().id
            if get_worker_info().id == 3:
                raise OSError("disk")

    loader = make(Broken(), rank=1, world_size=2, streams=2)
    with pytest.raises(OSError, match="disk") as error:
        list(loader)
    assert "Helios: in sample 1 of stream 3 (epoch 0)" in text_of(error)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_in_collating_names_the_shapes(num_workers):
    items = [torch.zeros(2)] * 3 + [{"a": torch.zeros(2), "b": [torch.zeros(1), 3]}] * 3
    loader = make(iter_of(items), collate_fn=torch.stack, num_workers=num_workers)
    with pytest.raises(TypeError) as error:
        list(loader)
    text = text_of(error)
    assert "in collating samples of the stream, the last of them number 5" in text
    assert "[{'a': (2,), 'b': [(1,), 'int']}" in text
    assert "(epoch 0, batch 1)" in text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stop_iteration_in_collating_does_not_end_the_epoch(num_workers):
    def stop(items):
        raise StopIteration

    loader = make(Fixed(), collate_fn=stop, num_workers=num_workers)
    with pytest.raises(DataError, match="StopIteration in collating samples"):
        list(loader)


def test_stream_has_no_length():
    loader = make(Fixed())
    assert loader.batches_per_epoch is loader.num_samples is None
    with pytest.raises(TypeError, match="length of a stream is not known"):
        len(loader)
    with pytest.raises(TypeError, match="no items by index"):
        loader.dataset[0]


def test_stream_cannot_be_entered_without_its_cursor():
    with pytest.raises(ValueError, match="batch 2 of a stream needs its cursor"):
        make(Fixed()).seek(0, 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_replay_of_a_stream_that_got_shorter_is_an_error(num_workers):
    batches = list(make(Fixed()).fetch())
    loader = make(Fixed(5), num_workers=num_workers)
    loader.seek(0, 2, batches[1].cursor)
    with pytest.raises(
        ResumeError, match="yields 5 samples in epoch 0, and 6 of them had been read"
    ):
        list(loader)


@pytest.mark.parametrize("name", ["fixed", "shards"])
def test_replay_says_how_many_samples_and_how_long(monkeypatch, name):
    clock_s = [0.0]

    class Slow(KINDS[name]):
        def __iter__(self):
            for item in super().__iter__():
                clock_s[0] += 1.0
                yield item

    monkeypatch.setattr(time, "perf_counter", lambda: clock_s[0])
    cursors = [batch.cursor for batch in make(Slow()).fetch()]
    loader = make(Slow())
    for done in 3, 4:
        loader.seek(0, done, cursors[done - 1])
        assert loader.plan.replayed() == (3 * done, 3.0 * done)
        # That was not spent once more by reading it again.
        assert next(loader.fetch()).cursor == cursors[done]
    loader.seek(1)
    assert loader.plan.replayed() == (0, 0.0)


@pytest.mark.parametrize("name", ["stateful", "stateful_shards", "iterated", "both"])
def test_stream_that_says_where_it_is_is_not_replayed(whole, name):
    loader = make(KINDS[name]())
    loader.seek(0, 3, whole[name][0][0][2].cursor)
    assert loader.plan.replayed() == (0, 0.0)


def test_stream_at_its_end_is_not_replayed():
    class Uneven(Shards):
        def mine(self):
            return list(range((2, 9)[get_worker_info().id]))

    batches = list(make(Uneven(), streams=2).fetch())
    loader = make(Uneven(), streams=2)
    loader.seek(0, 3, batches[2].cursor)
    assert loader.plan.replayed()[0] == 6
    assert contents(loader) == plain(batches[3:])


@pytest.mark.parametrize("name", ["whole", "stateful", "iterated", "both"])
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(name):
    loader = make(KINDS[name](), batch_size=6)
    (first, end), (second, _) = epochs(loader, 2)
    points = (0, first[0].cursor, first[1:]), (1, end, second)
    for epoch, cursor, rest in *points, (1, second[1].cursor, second[2:]):
        done = 0 if cursor is end else rest[0].number
        for rank in range(3):
            loader = make(KINDS[name](), batch_size=2, rank=rank, world_size=3)
            loader.seek(epoch, done, stored(cursor))
            shares = [batch.data[0][: batch.real] for batch in loader.fetch()]
            assert shares == [batch.data[0][rank::3] for batch in rest]


def test_shards_go_to_another_number_of_ranks_at_an_epoch_s_start_only():
    ((batches, end),) = epochs(make(Shards(), streams=2), 1)
    loader = make(Shards(), streams=1, rank=1, world_size=2)
    with pytest.raises(ResumeError, match=r"1 rank\(s\) with 2 worker.* go on with 1"):
        loader.seek(0, 1, batches[0].cursor)
    loader.seek(1, 0, stored(end))
    other = make(Shards(), streams=1, rank=0, world_size=2)
    other.seek(1, 0, stored(end))
    found = indices(other.fetch()) + indices(loader.fetch())
    assert sorted(found) == list(range(LENGTH))


@pytest.mark.parametrize("streams", [1, 2])
def test_states_of_shards_are_refused_by_another_number_of_ranks(streams):
    ((batches, end),) = epochs(make(StatefulShards(), streams=2), 1)
    loader = make(StatefulShards(), streams=streams, rank=1, world_size=2)
    for epoch, done, cursor in (0, 1, batches[0].cursor), (1, 0, end):
        with pytest.raises(ResumeError, match=r"gave its shards to 1 rank\(s\)"):
            loader.seek(epoch, done, stored(cursor))


def test_shards_of_another_number_of_workers_are_refused():
    batches = list(make(Shards(), streams=2).fetch())
    with pytest.raises(
        ResumeError, match=r"with 2 worker\(s\) each, and now to 1 with 3"
    ):
        make(Shards(), streams=3).seek(0, 1, batches[0].cursor)


@pytest.mark.parametrize("name", ["stateful", "spent", "itself", "iterated"])
def test_epoch_s_own_number_counts_and_not_that_of_an_old_state(whole, name):
    for (batches, _), (expected, _) in zip(whole[name], whole["fixed"], strict=True):
        assert indices(batches) == indices(expected)


def test_next_epoch_begins_as_the_state_of_the_last_one_says(whole):
    for epoch, (batches, _) in enumerate(whole["both"]):
        assert sorted(i - 100 * epoch for i in indices(batches)) == list(range(LENGTH))


class UncountedShards(StatefulShards):
    """Is told of no epochs."""

    set_epoch = property()  # it has none


@pytest.mark.parametrize("kind", [StatefulShards, UncountedShards])
def test_epoch_that_another_rank_ended_is_gone_on_with_if_it_has_no_number(kind):
    def fresh():
        return make(kind(), streams=2, rank=1, world_size=2)

    def whole(epoch):
        loader = fresh()
        loader.seek(epoch)
        return sorted(indices(loader.fetch()))

    loader = fresh()
    batches = loader.fetch()
    first, _ = next(batches), next(batches)  # the second one is read, not trained on
    cursor = stored(loader.plan.next_epoch(first.cursor))
    loader, again = fresh(), fresh()
    loader.seek(1, 0, cursor)
    found = list(loader.fetch())
    again.seek(1, 2, stored(found[1].cursor))
    assert contents(again) == plain(found[2:])
    done = [first] if kind is UncountedShards else []
    assert sorted(indices([*done, *found])) == whole(1)
    # Nothing is left to the next epoch by one that came to its end.
    loader.seek(2, 0, stored(loader.plan.next_epoch(found[-1].cursor)))
    assert sorted(indices(loader.fetch())) == whole(2)


class Numbered(UncountedShards):
    """Shuffles by a count of its own epochs."""

    ended = 0

    def __iter__(self):
        yield from ((*item, self.ended) for item in super().__iter__())
        self.ended += 1

    def state_dict(self):
        return {**super().state_dict(), "ended": self.ended}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.ended = state["ended"]


def test_epoch_that_is_ended_at_its_last_sample_is_not_begun_again():
    loader = make(Numbered(), batch_size=LENGTH, streams=1)
    for epoch in range(3):
        (batch,) = loader.fetch()
        numbers = {item[-1] for item in batch.data[0]}
        assert numbers == {epoch}
        # As where another rank has ended the epoch: the end was not read.
        fresh = make(Numbered(), batch_size=LENGTH, streams=1)
        fresh.seek(epoch + 1, 0, stored(fresh.plan.next_epoch(batch.cursor)))
        (following,) = fresh.fetch()
        assert {item[-1] for item in following.data[0]} == {epoch + 1}


class Ahead(UncountedShards):
    """Makes four samples at once, and has no state before it is read."""

    batched, is_read = True, False

    def __iter__(self):
        self.is_read = True
        reader = super().__iter__()
        while group := list(islice(reader, 4)):
            yield from group

    def state_dict(self):
        if not self.is_read:
            raise RuntimeError("not read yet")
        return super().state_dict()


def test_stream_that_draws_ahead_and_has_no_state_at_first_is_read_again():
    whole = list(make(Ahead(), streams=1).fetch())
    for done in range(1, len(whole)):
        loader = make(Ahead(), streams=1)
        loader.seek(0, done, stored(whole[done - 1].cursor))
        assert contents(loader) == plain(whole[done:])


class Sharded(Shards):
    """Says how many shards it has, as `datasets` does."""

    def __init__(self, shards):
        super().__init__()
        self.num_shards = shards


@pytest.mark.parametrize(
    ("shards", "workers", "ranks", "streams"),
    [
        (1, 2, 1, 1),
        (4, 2, 2, 2),
        (4, 4, 2, 2),
        (3, 8, 2, 1),
        (2, 1, 3, 1),
        (6, 2, 3, 2),
    ],
)
def test_streams_are_no_more_than_the_shards(shards, workers, ranks, streams):
    found = []
    for rank in range(ranks):
        loader = make(
            Sharded(shards),
            streams=None,
            num_workers=workers,
            rank=rank,
            world_size=ranks,
        )
        assert loader.plan.streams == streams
        batches = list(loader.fetch())
        is_whole = shards % ranks > 0 or streams * ranks == 1
        assert (batches[0].cursor["kind"] == "whole") == is_whole
        for batch in batches:
            found += [item[0] for item in batch.data[0][: batch.real]]
    assert sorted(found) == list(range(LENGTH))


def test_data_set_with_fewer_shards_than_before_is_refused():
    batches = list(make(Sharded(4), streams=2).fetch())
    loader = make(Sharded(1), streams=2)
    loader.seek(0, 1, batches[0].cursor)
    with pytest.raises(ResumeError, match=r"in 2 parts before .* now has 1 shards"):
        list(loader)


def test_data_set_that_cannot_be_copied_needs_its_workers():
    class Uncopied(StatefulShards):
        def __deepcopy__(self, memo):
            raise TypeError("a handle")

    expected = contents(make(StatefulShards(), streams=2, num_workers=2))
    assert contents(make(Uncopied(), streams=2, num_workers=2)) == expected
    with pytest.raises(ResumeError, match="go on with `num_workers=2`"):
        list(make(Uncopied(), streams=2))
    uncopied = Fixed()
    uncopied.handle = (i for i in ())  # has no copy; the data set needs none
    assert contents(make(uncopied)) == contents(make(Fixed()))


@pytest.mark.parametrize("name", ["shuffle", "sampler"])
def test_order_of_a_stream_is_its_own(name):
    value = {"shuffle": True, "sampler": [0, 1]}[name]
    with pytest.raises(ValueError, match=f"`{name}` must be left out .*Fixed"):
        make(Fixed(), **{name: value})


def test_state_without_a_stored_form_is_an_error_that_names_it():
    class Odd(Stateful):
        def state_dict(self):
            return {"set": object()}

        def load_state_dict(self, state):
            pass

    cursor = next(make(Odd()).fetch()).cursor
    with pytest.raises(
        HeliosError, match=r"`parts\[0\]\[1\].dataset.set` is a .*object"
    ):
        stored(cursor)
