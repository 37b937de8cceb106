"""Kinds of differences: what each comes from, likely, and what cures it."""

from __future__ import annotations

from typing import NamedTuple


class Advice(NamedTuple):
    """Why a difference comes to be, and what to do."""

    cause: str
    cure: str


class Kind(NamedTuple):
    """A kind of difference: what it is called, and what to say of it."""

    name: str
    paths: str  # a pattern of those of the state that are of this kind
    model: Advice  # to who has a Model
    loop: Advice  # to who has a loop, on a Session


_UNSAVED = Advice(
    "the step depends on something that is not saved, such as an attribute, a global "
    "or a count (that of `enumerate`, for instance) that training changes",
    "return it from `user_state_dict`, or give it `state_dict` and `load_state_dict` "
    "and make it an attribute of the model",
)
_PASS = (
    "pass an object with `state_dict` and `load_state_dict` to the session, or to "
    "`accelerator.register_for_checkpointing` before it is made"
)
_CARRY = (
    "name a variable in `session.epochs(..., carry=[...])`, or keep its value in "
    "`session.notes`"
)
_GENERATOR = (
    "keep `generator.get_state()` of a `torch.Generator` that the loop draws from in "
    "`session.notes`"
)
_UNSAVED_BY_LOOP = Advice(
    "the loop depends on something that is not saved: a variable, which begins anew at "
    "a resume (a count, that of `enumerate`, for instance), an object that the session "
    "does not know, or a generator of its own",
    f"{_CARRY}; count by `session.state`; {_PASS}; {_GENERATOR}",
)
END = Kind(
    "the epoch of the batch",
    "",
    Advice(
        "an epoch has ended after another batch: how many there are depends on "
        "something that is not saved",
        "compute it from the epoch; or give a stream `state_dict` and "
        "`load_state_dict`",
    ),
    Advice(
        "an epoch has ended after another batch, by `break` for instance, whose "
        "condition depends on a variable, or an object, that is not saved",
        f"{_CARRY}, or count by `session.state`; {_PASS}; or give a stream "
        "`state_dict` and `load_state_dict`",
    ),
)
_ORDER_CAUSE = (
    "a sampler, or the data set, has an order of its own, from a generator or a "
    "counter that is not saved"
)
ORDER = Kind(
    "the samples of the batch",
    "",
    Advice(
        _ORDER_CAUSE,
        "let the loader shuffle; or compute the order from the epoch, as a "
        "`ResumableSampler` does; or give a stream `state_dict` and `load_state_dict`",
    ),
    Advice(
        _ORDER_CAUSE,
        "let the loader shuffle; or compute the order from what `set_epoch` was given; "
        "or give a stream `state_dict` and `load_state_dict`",
    ),
)
_DRAWING = Advice(
    "the data set, a transform or the collate function draws from a generator of its "
    "own, or depends on what came before, on time or on the process",
    "draw from `torch`, `random` or `numpy.random`, which are seeded for each sample, "
    "or from `helios.data.sample_rng()`",
)
DATA = Kind("the values of the same samples", "", _DRAWING, _DRAWING)
RNG = Kind(
    "random numbers",
    r"rank\.rng",
    Advice(
        "the step, or a hook, has drawn more or fewer random numbers than before: it "
        "depends on something that is not saved",
        "save what it depends on: return it from `user_state_dict`",
    ),
    Advice(
        "the loop has drawn more or fewer random numbers than before: it depends on "
        "something that is not saved",
        f"save what it depends on: {_CARRY}, or count by `session.state`; {_PASS}; "
        f"{_GENERATOR}",
    ),
)
LOSS = Kind(
    "a loss or a score", r"rank\.books\.(?!variables\.)", _UNSAVED, _UNSAVED_BY_LOOP
)
VARIABLE = Kind(
    "a variable of the loop",
    r"(rank\.books|training\.model\.user)\.variables\.\w+\.values\.",
    _UNSAVED,
    Advice(
        "it is carried, but is computed from something that is not saved: another "
        "variable, which begins anew at a resume, an object that the session does not "
        "know, or a generator of its own",
        _UNSAVED_BY_LOOP.cure,
    ),
)
RATE = Kind(
    "a learning rate or a scheduler",
    r"training\.model\.(optimizers\..*\.param_groups\.\d+\.|schedulers\.)",
    Advice(
        "it is set by something that is not saved, such as an attribute or a count of "
        "steps",
        "compute it from `state.current_iteration`; or let a scheduler of torch set "
        "it, which is an attribute of the model",
    ),
    Advice(
        "it is set by something that is not saved, such as a variable that counts "
        "steps, or a scheduler of your own",
        "compute it from `session.state.current_iteration`; or let a scheduler set it "
        "that is prepared, or passed to the session, with `state_dict` and "
        "`load_state_dict`",
    ),
)
WEIGHTS = Kind("weights", r"model\.", _UNSAVED, _UNSAVED_BY_LOOP)
STATE = Kind("the state of the training", "", _UNSAVED, _UNSAVED_BY_LOOP)
#: Of what is saved, in the order in which one comes from the other within a batch.
KINDS = (RNG, LOSS, VARIABLE, RATE, WEIGHTS, STATE)
LOGGED = Kind("what was logged", "", _UNSAVED, _UNSAVED_BY_LOOP)
UNEQUAL = Kind(
    "the number of batches",
    "",
    Advice(
        "the end of the training depends on something that is not saved, such as an "
        "attribute in `should_training_stop`, or in a hook",
        _UNSAVED.cure,
    ),
    Advice(
        "the loop has ended elsewhere, by `break` for instance, whose condition "
        "depends on a variable, or an object, that is not saved: a patience, a best "
        "score, a count",
        f"{_CARRY}; or count by `session.state`; {_PASS}",
    ),
)
FINISHED = Kind(
    "the finished run, started again",
    "",
    Advice(
        "what stands behind the training needs what only training sets: a run that "
        "is finished trains no more when it is started again",
        "return it from `user_state_dict`, or do without it where there is none",
    ),
    Advice(
        "what stands behind the loop reads a variable that only the loop sets: a run "
        "that is finished has no turn left when it is started again",
        "name it in `session.epochs(..., carry=[...])`, or set it before the loop",
    ),
)
LONGER = Kind(
    FINISHED.name,
    "",
    Advice(
        "how long it trains depends on something that is not saved, or on how often "
        "it was started",
        "give the Trainer the same `total_steps` at each start",
    ),
    Advice(
        "how many epochs there are depends on something that is not saved, or on how "
        "often it was started",
        "give `session.epochs` the same total at each start",
    ),
)


def advice(kind: Kind, *, is_repeatable: bool, is_cuda: bool, is_loop: bool) -> Advice:
    """What to say of a first difference.

    Args:
        kind: of the difference.
        is_repeatable: two runs without a stop are the same.
        is_cuda: they are on a GPU.
        is_loop: the user has written the loop, on a Session.
    """
    cause, cure = kind.loop if is_loop else kind.model
    if is_repeatable:
        return Advice(cause, cure)
    if kind in (ORDER, DATA):
        return Advice("a generator without a seed, or what changes with time", cure)
    if is_cuda:
        cause = "kernels whose results depend on the order in which threads come"
        cure = "pass `enable_deterministic=True` to the Trainer"
        if is_loop:
            cure = (
                "call `torch.use_deterministic_algorithms(True)` before the session is "
                "made, and set `CUBLAS_WORKSPACE_CONFIG=:4096:8`"
            )
        return Advice(cause, cure)
    cure = "pass it to the session" if is_loop else "make it an attribute of the model"
    return Advice(
        "a generator without a seed, or what changes with time or threads",
        f"seed it, or {cure}, which saves it",
    )
