"""What `helios port --write` tells of objects that a resume makes anew."""

from pathlib import Path

import pytest

from helios.porting.writing import write_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """\
import numpy as np
import torch
from accelerate import Accelerator
from mine import AverageMeter, EarlyStopping, make_meter
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm
{classes}
{module}
def main():
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, optimizer)
    train_loader, eval_loader = accelerator.prepare(DataLoader(a), DataLoader(b))
    {before}
    for epoch in range(9):
        {start}
        for step, batch in enumerate(train_loader):
            accelerator.backward(model(batch))
            {step}
        for batch in eval_loader:
            {valid}
        {end}
"""
PLACES = ("classes", "module", "before", "start", "step", "valid", "end")
COUNTER = """\
class Stopper{base}:
    def __init__(self):
        self.n = 0
    def check(self):
        {check}
{more}
"""


def script(**lines):
    return SCRIPT.format(**{place: lines.get(place, "pass") for place in PLACES})


def told(**lines):
    """By line of the script, what is left to do."""
    text = script(**lines)
    rows, left = text.splitlines(), write_port(text, "runs/x").left
    found = [line.partition(": ")[::2] for line in left]
    return {rows[int(at.split()[1]) - 1].strip(): what for at, what in found}


def stopper(check="self.n += 1", base="", more=""):
    return COUNTER.format(check=check, base=base, more=more)


PASS = "pass it to the session, as `x=x`"
EITHER = f"{PASS}, or name it in `carry`"
MOVE = "make it a variable of the function, and name it in `carry`"
# What makes `x`, where, what changes it, where, and what is told.
CHANGED = [
    ("torch.zeros(2)", "module", "x.data.add_(loss)", "step", MOVE),
    ("make_meter()", "before", "x.update(loss)", "step", EITHER),
    ("AverageMeter()", "before", "x.update(loss)", "step", PASS),
    ("AverageMeter()", "module", "x.update(loss)", "step", PASS),
    ("AverageMeter()", "start", "x.update(loss)", "step", PASS),
    ("EarlyStopping()", "before", "if x(loss): break", "end", PASS),
    (
        "torch.optim.SGD(other)",
        "before",
        "x.step()",
        "step",
        "prepare it with the others",
    ),
    (
        "torch.Generator().manual_seed(1)",
        "before",
        "z = torch.randn(3, generator=x)",
        "step",
        PASS,
    ),
    ("np.random.default_rng(1)", "before", "z = x.normal()", "end", PASS),
]


@pytest.mark.parametrize("case", CHANGED, ids=lambda case: f"{case[0]} {case[1]}")
def test_objects_that_change_in_the_loops_are_told_of(case):
    value, place, change, where, expected = case
    found = told(**{place: f"x = {value}", where: change})
    assert found == {f"x = {value}": f"`x` begins anew at a resume: {expected}"}


@pytest.mark.parametrize(
    ("value", "change", "where"),
    [
        ("np.zeros(24)", "x[step] = 1", "step"),
        ("torch.zeros(2)", "x[0] += 1", "end"),
        ("torch.zeros(2)", "x.add_(loss)", "step"),
        ("torch.zeros(2)", "x.data.add_(loss)", "step"),
        ("{k: v for k, v in f()}", "x[k].mul_(0.9).add_(v)", "step"),
        ("[p.clone() for p in f()]", "x[0].lerp_(v, 0.1)", "step"),
    ],
)
def test_arrays_that_change_in_the_loops_are_carried(value, change, where):
    lines = {"before": f"x = {value}", where: change}
    port = write_port(script(**lines), "runs/x")
    assert ('session.epochs(9, carry=["x"])' in port.text, port.left) == (True, [])


@pytest.mark.parametrize("place", ["module", "before"])
@pytest.mark.parametrize(
    ("check", "more"),
    [
        ("self.n += 1", ""),
        ("self.seen.append(1)", ""),
        ("self.seen[1] = 1", ""),
        ("for p, q in zip(self.p, self.q): p.lerp_(q, 1)", ""),
        ("self.n += 1", "    def state_dict(self):\n        return {}"),
    ],
)
def test_objects_of_own_classes_are_told_of_wherever_made(place, check, more):
    lines = {"classes": stopper(check, more=more), "end": "x.check()"}
    found = told(**lines, **{place: "x = Stopper()"})
    expected = f"`x` begins anew at a resume: {PASS}"
    assert found == {"x = Stopper()": expected}


KEPT = {
    "is registered": {
        "before": "x = AverageMeter(); accelerator.register_for_checkpointing(x)",
        "step": "x.update(loss)",
    },
    "is prepared": {"before": "x = accelerator.prepare(x)", "step": "x.step()"},
    "only looks on": {"before": "x = tqdm(9)", "step": "x.update(1)"},
    "writes logs": {"before": "x = SummaryWriter()", "step": "x.add_scalar('a', 1)"},
    "adds noise to samples": {
        "before": "x = mine.DDPMScheduler()",
        "step": "y = x.add_noise(batch, z, 1)",
    },
    "is a schedule of noise": {
        "module": "from diffusers import DDIMScheduler",
        "before": "x = DDIMScheduler.from_pretrained('a')",
        "valid": "y = x.step(z, 1, y)",
    },
    "is sent elsewhere": {"before": "x = Tokenizer()", "end": "x.push_to_hub('a')"},
    "is Accelerate's": {
        "before": "x = accelerator.get_tracker('a')",
        "step": "x.update(1)",
    },
    "is not changed": {
        "before": "x = AverageMeter()",
        "step": "y = x.mean() + x[0] + f(x)",
    },
    "counts an evaluation": {
        "before": "x = evaluate.load('glue')",
        "valid": "x.add_batch(batch)",
        "end": "x.compute()",
    },
    "is made for an evaluation": {
        "start": "x = AverageMeter()",
        "valid": "x.update(batch)",
    },
    "is made in each turn": {
        "before": "x = torch.zeros(1)",
        "step": "x = torch.zeros(1); x.add_(loss)",
    },
    "is seeded in each turn": {
        "before": "x = torch.Generator()",
        "step": "x.manual_seed(step)",
    },
    "is a data set": {
        "classes": stopper(base="(torch.utils.data.Dataset)"),
        "before": "x = Stopper()",
        "step": "x.check()",
    },
    "is a data set of the script's own class": {
        "classes": stopper(base="(Own)") + "class Own(torch.utils.data.Dataset): pass",
        "before": "x = Stopper()",
        "step": "x.check()",
    },
    "is another variable of the same name": {
        "module": "x = AverageMeter()",
        "before": "x = f",
        "step": "x.update(loss)",
    },
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_saved_or_begins_anew_anyway_is_not_told_of(kind):
    assert told(**KEPT[kind]) == {}


@pytest.mark.parametrize(
    "made",
    [
        "AveragedModel(model)",
        "torch.optim.swa_utils.AveragedModel(model)",
        "SWALR(optimizer, 0.1)",
        "torch.amp.GradScaler()",
        "torch.cuda.amp.GradScaler()",
    ],
)
def test_objects_of_torch_with_a_state_are_passed(made):
    lines = {"before": f"x = {made}", "step": "x.step(); x.update_parameters(model)"}
    port = write_port(script(**lines), "runs/x")
    assert port.left == []
    assert f"    x = {made}\n    session = helios.Session(" in port.text
    assert "save_every=500, x=x" in port.text


def test_attributes_of_objects_that_are_passed_are_not_told_of():
    assert told(before="x = SWALR(optimizer, 0.1)", step="x.n += 1") == {}
    assert len(told(before="x = f()", step="x.n += 1")) == 1


def test_averaged_model_of_the_module_is_told_of():
    found = told(module="x = AveragedModel(model)", step="x.update_parameters(model)")
    assert [
        "would not be saved: make it before" in what for what in found.values()
    ] == [True]


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "examples/porting").glob("*_accelerate.py")),
    ids=lambda path: path.stem,
)
def test_nothing_is_left_to_do_in_the_examples(path):
    assert write_port(path.read_text(), "runs/x").left == []
