"""What a model holds: its networks, optimizers, schedulers and other state, by path.

A path is the attribute's name, with keys and positions of containers behind a dot:
``"net"``, ``"nets.0"``, ``"parts.head"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from helios import rng
from helios.engine import inner_optimizer, is_scheduler
from helios.errors import ResumeError
from helios.sharding import all_like, is_sharded, like

#: Under this name stands what was registered with an accelerator for its checkpoints.
REGISTERED = "registered"
Unwrap: TypeAlias = Callable[[nn.Module], nn.Module]


@dataclasses.dataclass
class Holdings:
    """What was found among a model's attributes, each by its path."""

    networks: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizers: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedulers: dict[str, Any] = dataclasses.field(default_factory=dict)
    others: dict[str, Any] = dataclasses.field(default_factory=dict)

    def all_parameters(self) -> list[nn.Parameter]:
        """Every parameter of the networks, then those outside of them, once."""
        found = [p for net in self.networks.values() for p in net.parameters()]
        found += self.parameters.values()
        return list({id(p): p for p in found}.values())

    def buffers(self) -> dict[str, torch.Tensor]:
        """What the networks save besides their parameters, by path: live tensors."""
        found = {}
        for path, net in self.networks.items():
            saved = net.state_dict().keys()  # whose values may be copies
            for name, buffer in net.named_buffers(remove_duplicate=False):
                if name in saved:
                    found[f"{path}.{name}"] = buffer
        return found

    def has_strangers(self) -> bool:
        """Whether an optimizer trains what no attribute holds, and so is not saved."""
        known = {id(p) for p in self.all_parameters()}
        optimizers = map(inner_optimizer, self.optimizers.values())
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return any(id(p) not in known for group in groups for p in group["params"])

    def _stateful(self, unwrap: Unwrap) -> dict[str, dict[str, Any]]:
        networks = {k: unwrap(v) for k, v in self.networks.items()}
        return {
            **vars(self),
            "networks": {k: v for k, v in networks.items() if _get(v)},
        }

    def capture(self, unwrap: Unwrap) -> dict[str, dict[str, Any]]:
        """The state of everything, by kind and path, as a tree of live tensors.

        That of the networks is under their own names.
        """
        kinds = {**vars(self), "networks": {}}
        found = {kind: {k: _get(v) for k, v in kinds[kind].items()} for kind in kinds}
        return {**found, "networks": self.capture_networks(unwrap)}

    def capture_networks(self, unwrap: Unwrap) -> dict[str, Any]:
        """The states of the networks that have one, under their own names."""
        states = {k: _get(unwrap(v)) for k, v in self.networks.items()}
        return {k: state for k, state in states.items() if state}

    def restore(
        self, tree: Mapping[str, Any], unwrap: Unwrap, for_inference: bool = False
    ) -> None:
        """Put a captured state back; for inference the networks and parameters only.

        Raises:
            ResumeError: the model holds more or less than what was saved.
        """
        kinds = self._stateful(unwrap)
        tree, registered = _by_registration(tree, kinds)
        for kind in ("networks", "parameters") if for_inference else kinds:
            have, saved = kinds[kind], tree.get(kind, [])
            if isinstance(saved, list):  # from elsewhere: without names, in this order
                for path in [path for path in have if path in registered]:
                    _restore(path, have[path], registered[path])
                have = {k: v for k, v in have.items() if k not in registered}
                if not saved:
                    continue
                if len(saved) != len(have):
                    raise ResumeError(
                        f"the model holds the {kind} {list(have)}, and {len(saved)} "
                        f"were imported, without names; name them with `--{kind}`"
                    )
                saved = dict(zip(have, saved, strict=True))
            left_over = set() if for_inference else set(saved) - set(have)
            if left_over or set(have) - set(saved):
                raise ResumeError(
                    f"the model holds the {kind} {sorted(have)}, and the checkpoint "
                    f"{sorted(saved)}; resume with the code that saved it, or start "
                    'afresh with `resume="never"`'
                )
            for path, value in have.items():
                _restore(path, value, saved[path])


def _by_registration(
    tree: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """What came from elsewhere as registered, by path, and what else there is.

    An accelerator numbers it in the order of registration, whatever it is.
    """
    states = tree.get("others", [])
    paths = [path for kind in kinds.values() for path in kind]
    paths = [path for path in paths if path.startswith(f"{REGISTERED}.")]
    if not isinstance(states, list) or not states or len(states) != len(paths):
        return tree, {}
    paths.sort(key=lambda path: int(path.split(".")[1]))
    return {**tree, "others": []}, dict(zip(paths, states, strict=True))


def _restore(path: str, value: Any, state: Any) -> None:
    try:
        _set(value, state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ResumeError(
            f"what was saved does not fit the model's `{path}`: {error}"
        ) from error


def _get(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return value.detach()
    if isinstance(value, rng.GENERATORS):
        return rng.generator_state(value)
    return value.state_dict()


def _set(value: Any, state: Any) -> None:
    if isinstance(value, nn.Parameter):
        value.data.copy_(state)
    elif isinstance(value, rng.GENERATORS):
        rng.set_generator_state(value, state)
    else:
        if isinstance(value, nn.Module) and type(state) is dict:  # from elsewhere
            state = _with_tied(value, state)
        if isinstance(value, nn.Module) and any(map(is_sharded, value.parameters())):
            state = all_like(value.state_dict(), state)
        if isinstance(value, torch.optim.Optimizer):
            state = _cut(inner_optimizer(value), state)
        value.load_state_dict(state)
    if isinstance(value, torch.optim.Optimizer):
        _keep_dtypes(inner_optimizer(value), state["state"])


def _cut(optimizer: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Cut what belongs to a sharded parameter as that is cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {name: like(parameters[index], v) for name, v in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _with_tied(network: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give a tied tensor all its names: what Accelerate saves has one of them."""
    live = dict(network.named_parameters(remove_duplicate=False))
    known = {id(live[name]): name for name in live.keys() & state.keys()}
    twins = {n: known.get(id(live[n])) for n in live.keys() - state.keys()}
    return {**state, **{n: state[twin] for n, twin in twins.items() if twin}}


def _keep_dtypes(optimizer: Any, saved: Mapping[int, Any]) -> None:
    """Undo torch's cast of a parameter's state to the dtype of the parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in saved.items():
        state = optimizer.state[parameters[index]]
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and state[name].dtype != value.dtype:
                state[name] = value.to(parameters[index].device)


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """The keys and members of a container; None for anything else."""
    if isinstance(value, Mapping) or type(value) is nn.ModuleDict:
        return list(value.items())
    if isinstance(value, list | tuple) or type(value) is nn.ModuleList:
        return list(enumerate(value))
    return None


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    members = _items(value)
    if members is None:
        yield path, value
    for key, member in members or ():
        yield from _walk(member, f"{path}.{key}", seen)


def find(attributes: Mapping[str, Any]) -> Holdings:
    """Sort a model's attributes into what is prepared and saved.

    An object that is there twice counts once; a module inside another one that was
    found belongs to that one.
    """
    holdings, seen = Holdings(), set[int]()
    for name, attribute in attributes.items():
        for path, value in _walk(attribute, name, seen):
            if isinstance(value, nn.Module):
                holdings.networks[path] = value
            elif isinstance(value, torch.optim.Optimizer):
                holdings.optimizers[path] = value
            elif is_scheduler(value):
                holdings.schedulers[path] = value
            elif isinstance(value, nn.Parameter):
                holdings.parameters[path] = value
            elif _has_state(value):
                holdings.others[path] = value
    nets = holdings.networks
    inside = {id(m) for net in nets.values() for m in net.modules() if m is not net}
    holdings.networks = {k: v for k, v in nets.items() if id(v) not in inside}
    return holdings


def _has_state(value: Any) -> bool:
    if isinstance(value, rng.GENERATORS):
        return True
    names = ("state_dict", "load_state_dict")
    return all(callable(getattr(value, name, None)) for name in names)


def replace(value: Any, by: Mapping[int, Any]) -> Any:
    """The same value with each member that ``by`` names (by ``id``) replaced.

    Lists, dicts and module containers are changed in place; tuples are made anew.
    """
    if id(value) in by:
        return by[id(value)]
    changed = [(key, replace(member, by)) for key, member in _items(value) or ()]
    if isinstance(value, tuple) and changed:
        members = [member for _, member in changed]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    for key, member in changed:
        if member is not value[key]:
            value[key] = member
    return value
