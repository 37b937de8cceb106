"""How data are to be loaded: what may be said, and what is refused."""

import pytest
from torch.utils.data import RandomSampler

from helios.data import DataLoaderParams, ResumableSamplerType, create_dataloader


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be >= 1, got 0"),
        ({"batch_size": True}, TypeError, "`batch_size` must be int, got True"),
        ({"batch_size": 2.0}, TypeError, "`batch_size` must be int, got 2.0"),
        ({"random_seed": "1"}, TypeError, r"`random_seed` must be int \| None"),
        ({"shuffle": 1}, TypeError, "`shuffle` must be bool, got 1"),
        ({"is_distributed": 0}, TypeError, r"`is_distributed` must be bool \| None"),
        ({"num_workers": -1}, ValueError, "`num_workers` must be >= 0"),
        ({"collate_fn": 3}, TypeError, "`collate_fn` must be callable, got 3"),
        ({"sampler": "random"}, TypeError, "`sampler` must be .*SamplerType"),
        ({"sampler": iter([1])}, TypeError, "iterated again and again, got <list_iter"),
        ({"sampler": 3}, TypeError, "iterated again and again, got 3"),
        *[
            (
                {"sampler": sampler, "shuffle": True},
                ValueError,
                "`shuffle` must be False with a `sampler`.*leave out one of the two",
            )
            for sampler in (ResumableSamplerType.RANDOM, RandomSampler([1]), [1], [])
        ],
        ({"prefetch_factor": 2}, ValueError, "`prefetch_factor` needs `num_workers`"),
        ({"persistent_workers": True}, ValueError, "`persistent_workers` needs"),
        ({"timeout": 3}, ValueError, "`timeout` needs `num_workers` >= 1, got 3"),
        ({"timeout": -1, "num_workers": 1}, ValueError, "`timeout` must be >= 0"),
        ({"timeout": float("nan"), "num_workers": 1}, ValueError, "`timeout` must be"),
        ({"timeout": "1"}, TypeError, r"`timeout` must be int \| float, got '1'"),
        ({"multiprocessing_context": "fork"}, ValueError, "needs `num_workers`"),
        (
            {"multiprocessing_context": "x", "num_workers": 1},
            ValueError,
            r"`multiprocessing_context` must be one of \[.*'spawn'.*\], got 'x'",
        ),
        ({"prefetch_factor": 0, "num_workers": 1}, ValueError, "`prefetch_factor`"),
    ],
)
def test_wrong_params_are_errors_when_made(options, error, message):
    with pytest.raises(error, match=message):
        DataLoaderParams(**options)
    with pytest.raises(error, match=message):
        create_dataloader([1, 2], DataLoaderParams(), seed=1, **options)


def test_params_go_through_a_dictionary():
    params = DataLoaderParams(batch_size=3, sampler=ResumableSamplerType.RANDOM)
    assert DataLoaderParams.from_dict(params.to_dict()) == params
    assert list(params.to_dict()) == [
        "random_seed",
        "batch_size",
        "shuffle",
        "num_workers",
        "pin_memory",
        "drop_last",
        "is_distributed",
        "sampler",
        "collate_fn",
        "prefetch_factor",
        "persistent_workers",
        "pin_memory_device",
        "timeout",
        "multiprocessing_context",
        "debug_mode",
    ]


@pytest.mark.parametrize(
    ("name", "nearest"), [("batchsize", "batch_size"), ("workers", "num_workers")]
)
def test_unknown_parameter_is_an_error_that_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"`{name}` is no .* nearest: `{nearest}`"):
        DataLoaderParams.from_dict({name: 1})


def test_unknown_parameter_beside_known_ones_is_an_error():
    with pytest.raises(ValueError, match="nearest: `shuffle`"):
        DataLoaderParams.from_dict({"batch_size": 3, "shufle": True})
    with pytest.raises(ValueError, match="nearest: `num_workers`"):
        create_dataloader([1, 2], {"batch_size": 2}, num_worker=3)


@pytest.mark.parametrize("key", [3, None, ""])
def test_key_that_is_no_name_is_an_error(key):
    with pytest.raises(ValueError, match=f"`{key}` is no loader parameter"):
        DataLoaderParams.from_dict({key: 1})


def test_settings_of_workers_are_taken_with_workers():
    options = {"prefetch_factor": 1, "timeout": 2.5, "persistent_workers": True}
    params = DataLoaderParams(num_workers=1, multiprocessing_context="fork", **options)
    loader, _ = create_dataloader([1, 2], params, seed=1)
    assert {name: getattr(loader, name) for name in options} == options
    assert loader.multiprocessing_context.get_start_method() == "fork"
