"""The engine: the one module that calls Accelerate.

Its wrappers of optimizers and schedulers are used only where they do something, as they
cost more than a step of a small network. Batches are placed by the loop: a prepared
loader would fetch one batch ahead of the cursor.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import Accelerator as Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    recursively_apply,
)
from accelerate.utils import find_executable_batch_size as find_executable_batch_size
from accelerate.utils import send_to_device as send_to_device
from torch import nn

from helios.determinism import settle_buckets
from helios.errors import LaunchError
from helios.voting import Votes

if TYPE_CHECKING:
    from helios.data.batches import Loaded

#: Where a torch optimizer does its own work, unless there is a scaler.
_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
_EXIT_S = 0.2
#: How values of several batches and ranks become one.
REDUCTIONS = ("mean", "sum", "max", "min")


class Engine:
    """Placement, precision, accumulation and agreement, by Accelerate.

    ``None`` means "as the launcher says". Raises a LaunchError where the environment
    asks for several ranks and Accelerate sees one.
    """

    _own: ClassVar[Accelerator | None] = None
    _waits_at_exit: ClassVar[bool] = False

    def __init__(
        self,
        *,
        accelerator: Accelerator | None = None,
        use_cpu: bool | None = None,
        device_index: int | None = None,
        mixed_precision: str | None = None,
        accumulation_steps: int | None = None,
        log_with: Any = None,
        project_dir: str | None = None,
    ) -> None:
        if accelerator is None:
            self._forget_own()
            steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
            if device_index is not None:
                torch.cuda.set_device(device_index)
            accelerator = Engine._own = Accelerator(
                cpu=bool(use_cpu),
                mixed_precision=mixed_precision,
                log_with=log_with,
                project_dir=project_dir,
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=accumulation_steps or int(steps),
                    sync_with_dataloader=False,
                ),
            )
        _refuse_what_cannot_be_saved(accelerator)
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.local_rank: int = accelerator.local_process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.mixed_precision: str = accelerator.mixed_precision
        self.accumulation_steps: int = accelerator.gradient_accumulation_steps
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks > 1 and self.world_size == 1:
            raise LaunchError(
                f"the environment asks for {ranks} ranks (WORLD_SIZE), and Accelerate "
                "sees one, so each would train alone; on CPUs pass `use_cpu=True` "
                "under torchrun, or start with `helios launch`; leave out an "
                "`accelerator` of your own, or let it see RANK and LOCAL_RANK"
            )
        self.votes = Votes(self.device) if self.world_size > 1 else None
        if self.world_size > 1 and not Engine._waits_at_exit:
            # A thread of gloo may still hold the last collective's tensors. To let go
            # of them it needs Python, and aborts the process where that has ended.
            Engine._waits_at_exit = True
            atexit.register(time.sleep, _EXIT_S)
        if self.mixed_precision == "fp16" and self.device.type == "cpu":
            # Accelerate takes fp16 on the CPU and trains in fp32. torch can do it.
            accelerator.native_amp = True
            options: dict[str, Any] = getattr(
                accelerator.scaler_handler, "to_kwargs", dict
            )()
            accelerator.scaler = torch.amp.GradScaler("cpu", **options)
        self.scaler: Any = accelerator.scaler
        self.is_sharded: bool = getattr(accelerator, "is_fsdp2", False)  #: by rank
        self._is_plain = accelerator.distributed_type in map(DistributedType, _PLAIN)
        self._is_bare = (
            self._is_plain and self.scaler is None and self.accumulation_steps == 1
        )
        plugin = accelerator.gradient_state.plugin_kwargs
        self._sums_each = self.is_sharded or plugin.get("sync_each_batch", False)
        self._networks: list[nn.Module] = []
        self.loaded: Loaded | None = None  #: the batch in work, or done last
        self._batch, self._is_first, self._is_last = 0, True, True
        # Chosen once: on the CPU nothing is placed; without scaling, torch can do.
        self.place: Callable[[Any], Any] = self._place
        if self.device.type == "cpu":
            self.place = lambda batch: batch
        self.backward: Callable[..., None] = accelerator.backward
        if self._is_bare:
            self.backward = torch.Tensor.backward

    @classmethod
    def _forget_own(cls) -> None:
        """Let a second run in this process have another precision or device.

        Accelerate's settings are process-wide. Only what an engine made is reset.
        """
        if cls._own is not None and AcceleratorState._shared_state:
            is_alone = not torch.distributed.is_initialized()
            AcceleratorState._reset_state(reset_partial_state=is_alone)
            GradientState._reset_state()
        cls._own = None

    def identity(self) -> dict[str, Any]:
        """What of it decides on the course and the bits of a training."""
        names = ("world_size", "mixed_precision", "accumulation_steps")
        facts = {name: getattr(self, name) for name in names}
        return {"device_type": self.device.type, **facts}

    def prepare(
        self, networks: list[Any], optimizers: list[Any], schedulers: list[Any]
    ) -> dict[int, Any]:
        """Place and wrap what a model holds; every rank must call.

        Networks without a trainable parameter are placed, not wrapped; those that the
        user wrapped are left alone. Returns what to put in the place of each object,
        by the object's ``id``.
        """
        out: dict[int, Any] = {}
        subjects: list[Any] = []
        for net in networks:
            parameters = list(net.parameters())
            if isinstance(net, nn.parallel.DistributedDataParallel):
                out[id(net)] = net
            elif any(p.requires_grad for p in parameters):
                subjects.append(net)
            else:
                out[id(net)] = net.to(self.device)
                # A frozen network; a loss is only placed, and FSDP takes no frozen one.
                if parameters and not self.is_sharded:
                    placed = self.accelerator.prepare_model(net, evaluation_mode=True)
                    out[id(net)] = placed
        if self.is_sharded and len(subjects) != 1:
            raise LaunchError(
                f"FSDP shards one network with parameters to train, and the model has "
                f"{len(subjects)}; put them into one module, or use DDP"
            )
        subjects += [] if self._is_bare else optimizers
        # One call, as FSDP demands. The Nones have it return a tuple in any case.
        done = self.accelerator.prepare(*subjects, None, None)[:-2]
        out.update({id(a): b for a, b in zip(subjects, done, strict=True)})
        for optimizer in optimizers if self.accumulation_steps > 1 else []:
            self._put_in_window(out[id(optimizer)])
        self._networks = [net for net in out.values() if isinstance(net, nn.Module)]
        for net in self._networks if self.world_size > 2 else []:
            settle_buckets(getattr(net, "_orig_mod", net))
        for scheduler in [] if self._is_bare else schedulers:
            own = getattr(scheduler, "optimizer", None)
            drivers = [out[id(o)] for o in optimizers if own in (o, None)]
            # split_batches: one step a step, whatever the number of ranks.
            wrapped = AcceleratedScheduler(scheduler, drivers, split_batches=True)
            out[id(scheduler)] = wrapped
        return out

    def _place(self, batch: Any) -> Any:
        return send_to_device(batch, self.device, non_blocking=True)

    def _put_in_window(self, optimizer: Any) -> None:
        """Let ``zero_grad`` act once a window, called before backward or after step."""
        # Accelerate's, called before backward, would clear what a window has gathered.
        step, stepped_in = optimizer.step, -1

        def stepping(*args: Any, **kwargs: Any) -> None:
            nonlocal stepped_in
            stepped_in = self._batch
            step(*args, **kwargs)

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            if self._is_last if stepped_in == self._batch else self._is_first:
                inner_optimizer(optimizer).zero_grad(*args, **kwargs)

        optimizer.step, optimizer.zero_grad = stepping, zero_grad

    @contextlib.contextmanager
    def batch(self, *, is_first: bool, is_step: bool) -> Iterator[None]:
        """The context of one batch of an accumulation window."""
        self._batch, self._is_first, self._is_last = self._batch + 1, is_first, is_step
        self.accelerator.sync_gradients = is_step
        with contextlib.ExitStack() as stack:
            # Sharded gradients are summed up over the ranks with each batch: torch
            # keeps what is to be summed up later where nobody can save it.
            if not is_step and self.world_size > 1 and not self._sums_each:
                for net in self._networks:
                    stack.enter_context(self.accelerator.no_sync(net))
            yield

    def clip_gradients(
        self, parameters: Any, optimizer: Any, max_norm: float, norm_type: float = 2.0
    ) -> Any:
        """Clip to a total norm, in unscaled units; None inside a window."""
        if not self.accelerator.sync_gradients:
            return None
        if self.scaler is not None and self._is_plain and optimizer is not None:
            # Accelerate would unscale all optimizers' gradients, also missing ones.
            self.accelerator.unscale_gradients(optimizer)
            return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        return self.accelerator.clip_grad_norm_(parameters, max_norm, norm_type)

    def unwrap(self, module: nn.Module) -> Any:
        """The user's module."""
        # Accelerate looks for packages on the disk each time, while training waits.
        is_wrapped = isinstance(module, nn.parallel.DistributedDataParallel)
        is_compiled = any("_orig_mod" in part._modules for part in module.modules())
        if self._is_plain and not (is_wrapped or is_compiled):
            return module
        return self.accelerator.unwrap_model(module, keep_torch_compile=False)

    def reduce_mean(self, values: dict[str, Any]) -> dict[str, Any]:
        """The mean over the ranks, by name; every rank must call."""
        if self.world_size == 1:
            return values
        tensors = {k: torch.as_tensor(v).detach().float() for k, v in values.items()}
        tensors = {k: v.to(self.device) for k, v in tensors.items()}
        return dict(self.accelerator.reduce(tensors, reduction="mean"))

    def reduce(self, values: dict[str, Any], how: Mapping[str, str]) -> dict[str, Any]:
        """One of `REDUCTIONS` over the ranks, each by name; every rank must call."""
        if self.world_size == 1 or not values:
            return values
        means = {name: value for name, value in values.items() if how[name] == "mean"}
        others = [name for name in values if name not in means]
        found = self.reduce_mean(means) if means else {}
        if others:
            own = [torch.as_tensor(values[n]).detach().reshape(()) for n in others]
            rows = torch.stack([v.to(self.device, torch.float64) for v in own])
            ranks = self.accelerator.gather(rows[None])  # a row of each rank
            found |= {
                name: getattr(ranks[:, i], how[name])() for i, name in enumerate(others)
            }
        return found

    def gather_for_metrics(self, values: Any) -> Any:
        """The values of all ranks, in rank order, without those of padded rows.

        Tensors, in any nest of lists, tuples and dicts, are cut where their first
        dimension is the batch's, and otherwise gathered whole. A list of anything else
        has an item a row. Every rank must call.

        Raises:
            TypeError: it is neither.
        """
        others = _kinds_beside_tensors(values)
        is_list = type(values) is list and not any(map(torch.is_tensor, values))
        batch = self.loaded
        has_rows = batch is None or not is_list or len(values) == batch.rows
        if others and not (is_list and has_rows):
            # Accelerate would gather the keys of a dict, without a word.
            raise TypeError(
                "`gather_for_metrics` takes tensors, alone or in lists, tuples and "
                "dicts, or a list with an item a row of anything else, got "
                f"{type(values).__name__} with {', '.join(sorted(others))}"
            )
        if self.world_size == 1:
            return values
        if batch is None or batch.is_full:
            return self.accelerator.gather_for_metrics(values)
        rows, real = batch.rows, batch.real

        def gather(tensor: torch.Tensor) -> Any:
            # Whether to cut is agreed on: a rank alone could mistake another tensor.
            is_cut = tensor.ndim > 0 and len(tensor) == rows
            own = torch.tensor([[real, is_cut]], device=self.device)
            counts, cuts = self.accelerator.gather(own).T.tolist()
            if not all(cuts):
                return self.accelerator.gather(tensor)
            padded = self.accelerator.pad_across_processes(tensor[:real])
            parts = self.accelerator.gather(padded).split(len(padded))
            return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])

        if others:
            return gather_object(list(values)[:real])
        return recursively_apply(gather, values)

    def agree(self, flag: bool) -> bool:
        """Whether any rank says yes; every rank must call."""
        return self.agree_each(flag)[0]

    def agree_each(self, *flags: bool) -> list[bool]:
        """As :meth:`agree`, of several questions at once; every rank must call."""
        return list(flags) if self.votes is None else self.votes.any_of(flags)

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable value of every rank, in rank order; every rank must call."""
        return [value] if self.world_size == 1 else list(gather_object([value]))

    def broadcast(self, value: Any, rank: int = 0) -> Any:
        """A picklable value of one rank, for all; every rank must call."""
        return broadcast_object_list([value], from_process=rank)[0]

    def barrier(self) -> None:
        """Wait for all ranks; every rank must call."""
        self.accelerator.wait_for_everyone()

    def state_dict(self) -> dict[str, Any]:
        """The gradient scaler's state, and which optimizers it made skip a step."""
        if self.scaler is None:
            return {}
        skipped = [o._is_overflow for o in self.accelerator._optimizers]
        return {"scaler": self.scaler.state_dict(), "skipped": skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
            optimizers = self.accelerator._optimizers
            skipped = state.get("skipped", [False] * len(optimizers))  # from elsewhere
            for optimizer, was_skipped in zip(optimizers, skipped, strict=True):
                optimizer._is_overflow = was_skipped

    def close(self) -> None:
        """Leave no window open."""
        self.accelerator.sync_gradients = True


def _refuse_what_cannot_be_saved(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and not getattr(accelerator, "is_fsdp2", False):
        raise LaunchError(
            "FSDP is asked for in its first version, which Helios cannot save; set "
            "`fsdp_version` to 2"
        )
    if kind not in (*map(DistributedType, _PLAIN), DistributedType.FSDP):
        raise LaunchError(
            f"{kind.value} holds weights and optimizers where Helios cannot save them; "
            "use FSDP, with `fsdp_version` 2, or DDP"
        )
    state = accelerator.gradient_state
    if accelerator is not Engine._own and not state.sync_with_dataloader:
        raise LaunchError(
            "`sync_with_dataloader=False`: windows end with an epoch here; leave it out"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise LaunchError(
            "tensor, context and sequence parallelism give several ranks the same "
            f"samples, which Helios does not: got {parallel}; use FSDP or DDP"
        )


def _kinds_beside_tensors(values: Any) -> set[str]:
    """The types of what is no tensor in a nest of lists, tuples and dicts."""
    if isinstance(values, torch.Tensor):
        return set()
    if not isinstance(values, list | tuple | Mapping):
        return {type(values).__name__}
    inner = values.values() if isinstance(values, Mapping) else values
    return set().union(*map(_kinds_beside_tensors, inner))


def inner_optimizer(optimizer: Any) -> Any:
    """The torch optimizer below Accelerate's wrapper."""
    is_wrapper = isinstance(optimizer, AcceleratedOptimizer)
    return inner_optimizer(optimizer.optimizer) if is_wrapper else optimizer


def is_scheduler(value: object) -> bool:
    """Whether it is a scheduler of torch's kind, wrapped or not."""
    torch_kind = torch.optim.lr_scheduler.LRScheduler
    return isinstance(value, torch_kind | AcceleratedScheduler)
