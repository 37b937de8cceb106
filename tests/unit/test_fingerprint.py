"""What a resume says of the differences between the run and the checkpoint."""

import pytest
import torch
from support import IdModel, IndexData, StopAt, train

from helios import fingerprint
from helios.checkpoint import CheckpointStore
from helios.fingerprint import Cost

COSTS = {
    Cost.EXACTNESS: ["train_data", "accumulation_steps", "mixed_precision"],
    Cost.BITS: ["data_fingerprint", "code", "world_size", "deterministic", "versions"],
    Cost.NOTHING: ["loading"],
}
COSTS[Cost.EXACTNESS].append("device_type")
COSTS[Cost.BITS].append("hardware")
NOW = {name: {"a": 1, "b": 2} for names in COSTS.values() for name in names}


@pytest.mark.parametrize(
    ("name", "cost"), [(name, cost) for cost, names in COSTS.items() for name in names]
)
def test_each_difference_is_one_line_with_its_cost(name, cost):
    assert fingerprint.compare(NOW, NOW) == {}
    saved = {**NOW, name: {"a": 1, "b": 3}}
    ((line, found),) = fingerprint.compare(saved, NOW).items()
    assert found is cost
    assert line.startswith(f"`{name}` was {{'b': 3}}, is {{'b': 2}}: ")
    older = {key: value for key, value in NOW.items() if key != name}
    assert list(fingerprint.compare(older, NOW).values()) == [cost]


def test_all_that_is_recorded_is_compared(tmp_path):
    train(IdModel(), IndexData(), tmp_path, StopAt(batch=2), total_steps=1)
    (path,) = CheckpointStore(tmp_path / "ids").list()
    identity = CheckpointStore(tmp_path / "ids").records()[path]["identity"]
    assert set(identity) == set(NOW)
    assert {"helios-ml", "python", "torch", "accelerate"} <= set(identity["versions"])
    assert identity["hardware"]["threads"] == torch.get_num_threads()


def test_differences_are_told_at_the_resume_and_the_run_goes_on(tmp_path):
    train(IdModel(), IndexData(), tmp_path, StopAt(batch=2), total_steps=1)
    store = CheckpointStore(tmp_path / "ids")
    (path,) = store.list()
    identity = store.records()[path]["identity"]
    changed = {
        "versions": {**identity["versions"], "torch": "1.0"},
        "code": "another commit",
        "world_size": 2,
        "loading": {"num_workers": 7},
    }
    store.amend(path, identity={**identity, **changed})
    options = {"log_root": tmp_path, "enable_file_logging": True, "run_name": "run"}
    assert train(IdModel(), IndexData(), tmp_path, total_steps=1, **options)[0]
    lines = (tmp_path / "run.log").read_text().splitlines()
    told = [line for line in lines if "not as it was saved: " in line]
    assert len(told) == len(changed)
    for name in changed:
        (line,) = [line for line in told if f"`{name}` was" in line]
        assert ("INFO" if name == "loading" else "WARNING") in line
