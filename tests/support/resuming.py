"""Runs that are stopped, and compared in bits with one that is not."""

from helios.checkpoint import find_last_checkpoint, read_checkpoint
from support.data import RandomData
from support.models import RandomModel
from support.runs import StopAt, digest, train


class Outcome:
    """All that two runs are compared by."""

    def __init__(self, model, root, recorder):
        self.weights = digest(model.state_dict())
        self.history = [value.hex() for value in model.history]
        self.ids = list(model.ids)
        self.logged = list(recorder.logged)
        checkpoint = read_checkpoint(find_last_checkpoint(root))
        self.state = digest(checkpoint.tree("training"))
        own = checkpoint.tree("rank_0")
        without_times(own["reading"])
        self.rank = digest(own)
        progress = checkpoint.record["progress"]
        self.progress = {k: progress[k] for k in progress if "time" not in k}

    def __eq__(self, other):
        return vars(self) == vars(other)


def without_times(reading):
    """Take out what no two runs have in common: the seconds that streams took."""
    for part in (reading.get("cursor") or {}).get("parts", []):
        part[-1] = 0.0


class Case:
    """A kind of run: its model and data are made anew for each part."""

    def __init__(self, model=RandomModel, data=RandomData, **options):
        self.model, self.data, self.options = model, data, options

    def run(self, root, *callbacks):
        model = self.model()
        is_finished, recorder = train(
            model, self.data(), root, *callbacks, **self.options
        )
        return is_finished, model, recorder

    def uninterrupted(self, root, *callbacks):
        # With a callback, if the interrupted runs have one: a resume asks for the same.
        is_finished, model, recorder = self.run(root, *callbacks)
        assert is_finished
        return Outcome(model, root, recorder)

    def interrupted(self, root, *stops):
        """Run once for each stop, then to the end; ids and logs of all runs joined."""
        ids, logged = [], []
        for stop in stops:
            is_finished, model, recorder = self.run(root, stop)
            assert not is_finished
            ids += model.ids
            logged += recorder.logged
        is_finished, model, recorder = self.run(root, StopAt())
        assert is_finished
        model.ids[:0] = ids
        recorder.logged[:0] = logged
        return Outcome(model, root, recorder)

    def check(self, root, stops=None):
        """Hold each chain of stops, or a stop at any batch, against a run of none."""
        whole = self.uninterrupted(root / "whole", StopAt())
        stops = every_batch(len(whole.ids)) if stops is None else stops
        for number, chain in enumerate(stops):
            parts = self.interrupted(root / f"parts_{number}", *chain)
            for name, value in vars(whole).items():
                where = name, [vars(stop) for stop in chain]
                assert getattr(parts, name) == value, where


def every_batch(count):
    return [[StopAt(batch=batch)] for batch in range(count)]
