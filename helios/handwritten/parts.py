"""Objects and loaders of any making, in the place of a Model and a DataModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from helios import fingerprint, rng
from helios.data.adopting import AdoptedLoader, adopt, check_loader
from helios.data.datamodule import DataModule, Dataset, DatasetSplit
from helios.data.packages import is_stream
from helios.data.params import DataLoaderParams
from helios.determinism import settle_buckets
from helios.engine import Accelerator, Engine, inner_optimizer
from helios.errors import ModelError
from helios.handwritten.late import registered_with
from helios.handwritten.variables import Variables, into
from helios.model import holdings
from helios.model.model import Model

TRAIN = "train"  #: the name of the loader that is trained on


class Held(Model):
    """The user's objects, in the place of a Model: the loop is theirs."""

    def __init__(
        self, save_name: str, objects: dict[str, Any], accelerator: Accelerator
    ) -> None:
        super().__init__(save_name)
        registered = registered_with(accelerator)
        own = {holdings.REGISTERED: registered} if registered else {}
        self.objects = {**objects, **own}
        self.notes, self.variables = dict[str, Any](), Variables()

    def setup(self, for_inference: bool = False) -> None:
        """They are made already."""

    def train(self) -> None:
        """The user's loop says which mode a network is in."""

    def user_state_dict(self) -> dict[str, Any]:
        return {"notes": self.notes, "variables": self.variables.read()}

    def load_user_state_dict(self, state: dict[str, Any], for_inference: bool) -> None:
        saved = {k: into(self.notes.get(k), v) for k, v in state["notes"].items()}
        self.notes.clear()
        self.notes.update(saved)
        self.variables.load_of_main(state.get("variables", {}))

    def _holdings(self) -> holdings.Holdings:
        return holdings.find(self.objects)

    def prepare(self) -> set[str]:
        """Have Accelerate prepare them, if it has none of them; the names to use anew.

        Raises:
            ModelError: the ranks would train each its own.
        """
        engine, found = self.engine, self._holdings()
        nets, accelerator = found.networks, self.engine.accelerator
        if found.has_strangers():
            raise ModelError(
                "an optimizer trains parameters that are in none of the networks that "
                "were passed, so that they would not be saved; pass that network, too"
            )
        if _is_prepared(found, accelerator):
            self._check_prepared(found, accelerator)
            engine._networks = list(nets.values())
            for net in engine._networks if engine.world_size > 2 else []:
                settle_buckets(getattr(net, "_orig_mod", net))
            return set()
        if found.parameters and engine.world_size > 1:
            raise ModelError(
                f"the parameters {sorted(found.parameters)} are in no network, and the "
                "ranks would train each its own; put them into one"
            )
        kinds = (nets, found.optimizers, found.schedulers)
        by = engine.prepare(*(list(kind.values()) for kind in kinds))
        self.objects = holdings.replace(self.objects, by)
        return {
            path.partition(".")[0]
            for kind in kinds
            for path, one in kind.items()
            if by.get(id(one), one) is not one
        }

    def _check_prepared(self, found: holdings.Holdings, accelerator: Any) -> None:
        optimizers = map(inner_optimizer, found.optimizers.values())
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        trained = {id(p) for group in groups for p in group["params"]}
        for name, net in found.networks.items() if self.engine.world_size > 1 else ():
            is_shared = isinstance(net, nn.parallel.DistributedDataParallel)
            is_shared = is_shared or any(net is one for one in accelerator._models)
            if not is_shared and any(id(p) in trained for p in net.parameters()):
                raise ModelError(
                    f"`{name}` is trained, and was not prepared with the others, so "
                    "that each rank would train its own; pass what `prepare` returns"
                )


class Loaders(DataModule):
    """The user's loaders, in the place of a DataModule's data."""

    def __init__(
        self, loaders: Mapping[str, DataLoader[Any]], engine: Engine, seed: int
    ) -> None:
        super().__init__()
        self.names = list(loaders)
        # What may be in the user's hands: these, and later what Accelerate has.
        self._known: list[tuple[Any, str]] = [(one, n) for n, one in loaders.items()]
        self._places = {name: place for place, name in enumerate(self.names)}
        self._engine, self._run_seed = engine, seed
        self._given, self._made = dict[str, Any](), dict[str, AdoptedLoader]()
        self._counts: dict[str, int] = {}
        for name, loader in loaders.items():
            # Accelerate says who has which batches; a stream it would read on one rank.
            if not is_stream(loader.dataset):
                loader = engine.accelerator.prepare_data_loader(loader)
            self._given[name] = loader
            self._known.append((loader, name))
        train = self._given[TRAIN]
        params = DataLoaderParams(num_workers=train.num_workers)
        self._train_phases = [Dataset(train.dataset, params)]

    def setup(self) -> None:
        """They are there already."""

    def name_of(self, loader: str | DataLoader[Any]) -> str:
        """The name of a loader: the one that it was given, or of what is prepared.

        Raises:
            ValueError: there is no such loader.
        """
        if isinstance(loader, str) and loader in self.names:
            return loader
        names = [name for one, name in self._known if one is loader]
        prepared = self._engine.accelerator._dataloaders
        for place in (n for n, one in enumerate(prepared) if one is loader):
            if not names:
                names = [f"prepared {place}"]
                check_loader(loader, names[0])
                self._known.append((loader, names[0]))
                self._given[names[0]] = loader
                self._places[names[0]] = len(self.names) + place
        if not names:
            raise ValueError(
                f"`loader` must be in {self.names}, one of these loaders, or another "
                f"that Accelerate has prepared, got {loader!r:.100}"
            )
        return names[0]

    def open(self, name: str) -> AdoptedLoader:
        """The loader of that name."""
        if name not in self._made:
            split = DatasetSplit.TRAIN if name == TRAIN else DatasetSplit.VALID
            place = 0 if name == TRAIN else self._places[name]
            key = rng.derive_key(self._run_seed, split.value, place)
            given, streams = self._given[name], self._streams.get(name)
            made = self._made[name] = adopt(given, key, f"loaders[{name!r}]", streams)
            made.gradient_state = self._engine.accelerator.gradient_state
            self._streams[name] = made.plan.streams
        return self._made[name]

    def length(self, name: str) -> int:
        """The batches of the user's loader on this rank; a TypeError for a stream."""
        return len(self._given[name])

    def count(self, name: str) -> int:
        """How often a loader was read before, counting this time from now on."""
        self._counts[name] = self._counts.get(name, -1) + 1
        return self._counts[name]

    def adopt_streams(self, counts: Mapping[str, int]) -> None:
        super().adopt_streams(counts)
        self._made.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = dict(state["counts"])

    def _loader(
        self, data: Dataset | None, split: DatasetSplit, phase: int = 0
    ) -> tuple[AdoptedLoader, None] | None:
        return None if data is None else (self.open(TRAIN), None)


def check_ranks(session: Any) -> None:
    """Raise a LaunchError where the ranks do not run the same; all must call."""
    facts = {**vars(session.schedule), **session.identity["train_data"]}
    facts |= {"objects": sorted(session._held.objects)}
    facts |= {"loaders": session._loaders.names}
    fingerprint.check_agreement(session.engine.gather_objects(facts))


def _is_prepared(found: holdings.Holdings, accelerator: Any) -> bool:
    """Whether Accelerate has prepared any of these."""
    known = accelerator._models + accelerator._optimizers + accelerator._schedulers
    kinds = (found.networks, found.optimizers, found.schedulers)
    ours = [one for kind in kinds for one in kind.values()]
    return any(one is other for one in ours for other in known)


def engine_for(found: holdings.Holdings, accelerator: Accelerator) -> Engine:
    """The engine of an accelerator that may have prepared some of these.

    Raises:
        ValueError: it has done so in a way that Helios's own would contradict.
    """
    is_half = accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    if is_half and _is_prepared(found, accelerator):
        raise ValueError(
            '`accelerator` has `mixed_precision="fp16"` on the CPU, where Accelerate '
            'prepares for float32; use "bf16" or "no", or pass what is not prepared'
        )
    engine = Engine(accelerator=accelerator)
    if engine.is_sharded:  # for `accumulate`: see the engine's `batch`
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    return engine
