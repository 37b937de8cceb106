"""What `helios port` finds in scripts: uses, traps, and no false alarms."""

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import helios
from helios.cli import main
from helios.porting import TRAPS, USES, read_script
from helios.porting.placing import keyword_for
from helios.porting.writing import write_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/porting.md"
SCRIPTS = {p.stem: p for p in (ROOT / "tests/fixtures/accelerate_scripts").glob("*.py")}
HEAD = """\
import random
import numpy as np
import torch
import torch.optim.lr_scheduler as lrs
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, Dataset
"""
LOOP = """
accelerator = Accelerator()
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data))
for step, batch in enumerate(loader):
    loss = model(batch)
    accelerator.backward(loss)
    optimizer.step()
    {}
"""
WINDOW = """
accelerator = Accelerator(gradient_accumulation_steps={})
model, loader = accelerator.prepare(model, DataLoader(data))
for step, batch in enumerate(loader):
    with accelerator.accumulate(model):
        accelerator.backward(model(batch))
        {}
        optimizer.step()
"""
SCHEDULE = """
loader = DataLoader(data)
{}
optimizer, loader, scheduler = accelerator.prepare(optimizer, loader, scheduler)
for epoch in range(9):
    for batch in loader:
        accelerator.backward(model(batch))
        scheduler.step()
"""
SHUFFLE = """
accelerator = Accelerator({})
loader = accelerator.prepare(DataLoader(data, {}))
{}
"""
SEEDED = f"set_seed(0){SHUFFLE}"
CONFIG = "dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)"
SAMPLES = """
accelerator = Accelerator()
class Data(Dataset):
    def __init__(self):
        self.rng = np.random.default_rng(0)
    def jitter(self, x):
        return x + torch.rand(3)
    def __getitem__(self, index):
        {}
"""
EVALUATION = """
accelerator = Accelerator()
model, loader = accelerator.prepare(model, DataLoader(data))
model.eval()
n, seen, found = 0, 0, []
for x, y in loader:
    with torch.no_grad():
        out = model(x).argmax(-1)
    {}
{}
"""

# By trap, what has it.
WRONG = {
    "save-state-on-main": [
        "a = Accelerator()\nif a.is_main_process and n % 5 == 0:\n"
        "    a.save_state('x')",
        "a = Accelerator()\nif a.process_index == 0:\n    a.save_state('x')",
        "a = Accelerator()\nis_main = a.is_local_main_process\n"
        "if not is_main:\n    sys.exit()\nelse:\n    a.save_state('x')",
        "def save(accelerator: Accelerator):\n"
        "    if not accelerator.is_main_process:\n        return\n"
        "    accelerator.save_state('x')",
        "a = Accelerator()\ndef save():\n    a.save_state('x')\n"
        "if a.is_main_process:\n    save()",
        "accelerator = Accelerator()\n"
        "@accelerator.on_main_process\ndef save():\n    accelerator.save_state('x')",
        "class Run:\n"
        "    def __init__(self):\n        self.acc = Accelerator()\n"
        "    def save(self):\n"
        "        if self.acc.is_main_process:\n            self.acc.save_state('x')",
    ],
    "skip-first-batches": [
        "a = Accelerator()\nfor batch in a.skip_first_batches(loader, 3):\n    pass",
        "from accelerate import skip_first_batches as skip\nloader = skip(loader, 3)",
    ],
    "scheduler-per-rank": [
        SCHEDULE.format(
            "accelerator = Accelerator()\n"
            "loader = accelerator.prepare(loader)\n"
            "scheduler = lrs.OneCycleLR(optimizer, 0.1, len(loader) * 9)"
        ),
        "accelerator = Accelerator()\n"
        "scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)\n"
        "model, scheduler = accelerator.prepare(model, scheduler)\n"
        "def train():\n"
        "    for batch in loader:\n        accelerator.backward(model(batch))\n"
        "for epoch in range(90):\n    train()\n    scheduler.step()",
        "from transformers import get_scheduler\na = Accelerator()\n"
        "loader = a.prepare(DataLoader(data))\ntotal = 3 * len(loader)\n"
        "s = a.prepare_scheduler(get_scheduler('linear', optimizer, 10, total))",
    ],
    "shuffle-not-seedable": [
        SEEDED.format("", "shuffle=True", "accelerator.save_state('x')"),
        SEEDED.format(
            "cpu=True",
            "sampler=torch.utils.data.RandomSampler(data)",
            "accelerator.load_state('x')",
        ),
        SEEDED.format(CONFIG, "shuffle=True", "accelerator.load_state('x')"),
    ],
    "late-seed": [
        SHUFFLE.format("", "shuffle=True", "set_seed(0)"),
        "def seed_all(n):\n    random.seed(n)\n    torch.manual_seed(n)\n"
        "def main():\n"
        + SHUFFLE.format("", "shuffle=True", "seed_all(1)").replace("\n", "\n    "),
    ],
    "no-seed": [
        SHUFFLE.format("", "shuffle=True", ""),
        SHUFFLE.format("", "shuffle=True", "np.random.seed(1)\nrandom.seed(1)"),
        SHUFFLE.format("", "shuffle=True, generator=torch.Generator()", ""),
        SHUFFLE.format("", "sampler=torch.utils.data.RandomSampler(data)", ""),
        SHUFFLE.format("", "shuffle=True", "torch.Generator().manual_seed(1)"),
        "def load():\n    return DataLoader(data, shuffle=True)\nloader = load()",
    ],
    "random-getitem": [
        SAMPLES.format("return random.random()"),
        SAMPLES.format("return np.random.rand(3)"),
        SAMPLES.format("return torch.empty(3).uniform_()"),
        SAMPLES.format("return self.rng.normal()"),
        SAMPLES.format("return self.jitter(1)"),
        SAMPLES.format("generator = self.rng\n        return generator.normal()"),
    ],
    "clip-in-window": [
        WINDOW.format(4, "accelerator.clip_grad_norm_(model.parameters(), 1)"),
        WINDOW.format(4, "torch.nn.utils.clip_grad_norm_(model.parameters(), 1)"),
        "STEPS = 2\n"
        + WINDOW.format("STEPS", "if norm > 0: accelerator.clip_grad_value_(p, 1)"),
    ],
    "ungathered-metrics": [
        EVALUATION.format("n += (out == y).sum()", "print(n / len(data))"),
        EVALUATION.format("metric.add_batch(predictions=out, references=y)", ""),
        EVALUATION.format("found.append(out)", "print(torch.cat(found))"),
        "accelerator = Accelerator()\n@torch.no_grad()\ndef valid(net, batches):\n"
        "    for x, y in batches:\n        metric.update(net(x), y)\n"
        "valid(model, accelerator.prepare(DataLoader(data)))",
    ],
    "item-every-step": [
        LOOP.format("losses.append(loss.item())"),
        LOOP.format("bar.set_postfix(loss=float(loss.detach()))"),
        LOOP.format("if accelerator.is_main_process: total += loss.item()"),
        LOOP.format("mean = accelerator.gather(loss).mean()\n    print(mean.item())"),
    ],
}
# By trap, what may have it.
DOUBTFUL = {
    "save-state-on-main": "a = Accelerator()\nif a.is_main_process or args.each:\n"
    "    a.save_state('x')",
    "skip-first-batches": SEEDED.format(
        CONFIG,
        "shuffle=True",
        "loader.set_epoch(1)\nloader = accelerator.skip_first_batches(loader, 2)",
    ),
    "scheduler-per-rank": SCHEDULE.format(
        "accelerator = Accelerator()\nscheduler = lrs.CosineAnnealingLR(opt, 1000)"
    ),
    "shuffle-not-seedable": SEEDED.format(
        "dataloader_config=config()", "shuffle=True", "accelerator.load_state('x')"
    ),
    "no-seed": "def load():\n    return DataLoader(data, shuffle=True)",
    "clip-in-window": WINDOW.format("args.n", "accelerator.clip_grad_norm_(params, 1)"),
    "ungathered-metrics": EVALUATION.format(
        "found.append(accelerator.gather(out))", "print(torch.cat(found))"
    ),
    "item-every-step": LOOP.format(
        "if args.verbose and accelerator.is_main_process: print(loss.item())"
    ),
}
# By trap, what looks like it.
RIGHT = {
    "save-state-on-main": [
        "a = Accelerator()\nif a.is_main_process:\n    print(1)\na.save_state('x')",
        "a = Accelerator()\nif a.is_main_process:\n    a.save_model(model, 'x')",
        "a = Accelerator()\nif step % 5 == 0:\n    a.wait_for_everyone()\n"
        "    a.save_state('x')",
        "import mine\na = Accelerator()\nif a.is_main_process:\n"
        "    mine.Trainer().save_state('x')",
    ],
    "skip-first-batches": [
        "a = Accelerator()\ndef skip_first_batches(loader, n):\n    return loader\n"
        "skip_first_batches(loader, 3)",
        "from mine import skip_first_batches\nskip_first_batches(loader, 3)",
        "from accelerate import skip_first_batches",
    ],
    "scheduler-per-rank": [
        SCHEDULE.format(
            "accelerator = Accelerator()\n"
            "n = len(loader) * 9\nscheduler = lrs.OneCycleLR(optimizer, 0.1, n)"
        ),
        SCHEDULE.format(
            "accelerator = Accelerator(step_scheduler_with_optimizer=False)\n"
            "scheduler = lrs.StepLR(optimizer, 30)"
        ),
        SCHEDULE.format(
            "accelerator = Accelerator(split_batches=True)\n"
            "scheduler = lrs.StepLR(optimizer, 30)"
        ),
        SCHEDULE.format(
            "accelerator = Accelerator()\n"
            "scheduler = lrs.StepLR(optimizer, 30 * accelerator.num_processes)"
        ),
        "a = Accelerator()\nscheduler = lrs.StepLR(optimizer, 30)\n"
        "optimizer = a.prepare(optimizer)\nfor e in range(9):\n    scheduler.step()",
    ],
    "shuffle-not-seedable": [
        SEEDED.format("", "shuffle=True", "print(1)"),  # nothing is resumed
        SEEDED.format("", "shuffle=False", "accelerator.save_state('x')"),
        SEEDED.format(
            CONFIG, "shuffle=True", "loader.set_epoch(1)\naccelerator.save_state('x')"
        ),
    ],
    "late-seed": [
        "a = Accelerator()\nloader = DataLoader(data, shuffle=True)\n"
        "set_seed(1)\nloader = a.prepare(loader)",
        "set_seed(1)\n" + SHUFFLE.format("", "shuffle=True", "set_seed(2)"),
        SHUFFLE.format("", "batch_size=2", "set_seed(2)"),
        "def seed():\n    set_seed(1)\n"
        + SHUFFLE.format("", "shuffle=True", "torch.Generator().manual_seed(2)"),
        SHUFFLE.format("", "shuffle=True", "env.seed(2)\nnp.random.seed(2)"),
    ],
    "no-seed": [
        SEEDED.format("", "shuffle=True", ""),
        SHUFFLE.format("", "batch_size=2", ""),
        SHUFFLE.format("", "shuffle=False", ""),
        "import mine\nmine.seed_all()" + SHUFFLE.format("", "shuffle=True", ""),
        "if args.seed is not None:\n    torch.manual_seed(args.seed)"
        + SHUFFLE.format("", "shuffle=True", ""),
        SHUFFLE.format("", "shuffle=True", "helios.Session(random_seed=1)"),
    ],
    "random-getitem": [
        SAMPLES.format(
            "rng = np.random.default_rng(index)\n        return rng.normal()"
        ),
        SAMPLES.format(
            "g = torch.Generator().manual_seed(index)\n"
            "        return torch.rand(3, generator=g)"
        ),
        SAMPLES.format("torch.manual_seed(index)\n        return torch.rand(3)"),
        SAMPLES.format("return self.data[index]\nnoise = torch.rand(3)"),
        SAMPLES.format("return random.Random(index).random()"),
    ],
    "clip-in-window": [
        WINDOW.format(
            4, "if accelerator.sync_gradients: accelerator.clip_grad_norm_(p, 1)"
        ),
        WINDOW.format(1, "accelerator.clip_grad_norm_(p, 1)"),
        WINDOW.format(
            4,
            "if not accelerator.sync_gradients: continue\n"
            "        accelerator.clip_grad_norm_(p, 1)",
        ),
        LOOP.format("accelerator.clip_grad_norm_(p, 1)"),
    ],
    "ungathered-metrics": [
        EVALUATION.format(
            "out, y = accelerator.gather_for_metrics((out, y))\n"
            "    n += (out == y).sum()\n    seen += len(y)",
            "",
        ),
        EVALUATION.format(
            "found.append(out)", "accelerator.gather_for_metrics(torch.cat(found))"
        ),
        EVALUATION.format(
            "found.append(accelerator.gather(out))", "torch.cat(found)[: len(data)]"
        ),
        EVALUATION.format("bar.update(1)\n    n += 1\n    t += time() - t0", ""),
        EVALUATION.replace(
            "model, loader = accelerator.prepare(model, ", "loader = ("
        ).format("n += (out == y).sum()", ""),  # each rank has all samples
        LOOP.format("n += (out == y).sum()"),
    ],
    "item-every-step": [
        LOOP.format("if step % 10 == 0: print(loss.item())"),
        LOOP.format("total += loss.detach()\nprint(total.item())"),
        LOOP.format("if step % 10:\n        continue\n    print(loss.item())"),
        LOOP.format("if step == last: print(float(loss))"),
        LOOP.format("n += batch['n'].item()"),
        LOOP.format("glossary.item()"),
        EVALUATION.format("print(loss_of(out, y).item())", ""),
    ],
}
# By trap, the script, what is replaced in it, and by what.
MUTATIONS = {
    "save-state-on-main": (
        "classifier",
        "        accelerator.save_state(",
        "        if accelerator.is_main_process:\n            accelerator.save_state(",
    ),
    "skip-first-batches": (
        "classifier",
        "enumerate(train_loader)",
        "enumerate(accelerator.skip_first_batches(train_loader, 2))",
    ),
    "scheduler-per-rank": ("gpt", "Accelerator(split_batches=True)", "Accelerator()"),
    "shuffle-not-seedable": ("accumulation", "sampler=True", "sampler=False"),
    "late-seed": (
        "gan",
        "    set_seed(7, device_specific=True)\n",
        "",
        "    n_steps = 0\n",
        "    set_seed(7)\n    n_steps = 0\n",
    ),
    "no-seed": ("classifier", "    set_seed(args.seed)\n", ""),
    "random-getitem": ("classifier", ", generator=generator)", ")"),
    "clip-in-window": ("accumulation", "if accelerator.sync_gradients:", "if True:"),
    "ungathered-metrics": (
        "gpt",
        "self.accelerator.gather_for_metrics(repeated)",
        "repeated",
    ),
    "item-every-step": ("gan", "return loss.detach()", "return loss.item()"),
}


def traps_of(text):
    return [(f.name, f.is_certain) for f in read_script(text) if f.kind == "trap"]


def cases(table):
    return [
        pytest.param(name, text, id=f"{name}-{number}")
        for name, texts in table.items()
        for number, text in enumerate([texts] if isinstance(texts, str) else texts)
    ]


@pytest.mark.parametrize(("name", "text"), cases(WRONG))
def test_a_trap_is_found(name, text):
    assert set(traps_of(HEAD + text)) - {("skip-first-batches", True)} <= {(name, True)}
    assert (name, True) in traps_of(HEAD + text)


@pytest.mark.parametrize(("name", "text"), cases(DOUBTFUL))
def test_what_cannot_be_decided_may_be_a_trap(name, text):
    assert set(traps_of(HEAD + text)) == {(name, False)}


@pytest.mark.parametrize(("name", "text"), cases(RIGHT))
def test_what_only_looks_like_a_trap_is_none(name, text):
    assert traps_of(HEAD + text) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_right_scripts_have_no_traps(name):
    assert traps_of(SCRIPTS[name].read_text()) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_trap_is_found_in_a_whole_script(name):
    script, *changes = MUTATIONS[name]
    text = SCRIPTS[script].read_text()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    assert {found for found, _ in traps_of(text)} == {name}


def test_every_trap_is_tested():
    assert set(WRONG) == set(RIGHT) == set(MUTATIONS) == set(TRAPS)
    assert all(len(texts) >= 2 for table in (WRONG, RIGHT) for texts in table.values())


SPELLINGS = {
    "class": "from accelerate import Accelerator\nacc = Accelerator()\n{}",
    "module": "import torch, accelerate as hf\nacc = hf.Accelerator()\n{}",
    "submodule": "from accelerate.accelerator import Accelerator as A\nacc: A = A()\n"
    "{}",
    "parameter": "from accelerate import Accelerator\ndef f(acc: Accelerator):\n    {}",
    "named alike": "import accelerate\nacc = accelerate.Accelerator()\n"
    "def f(acc):\n    {}",
    "attribute": "import accelerate\nclass T:\n    def g(self):\n        self.f()\n"
    "    def f(self):\n        acc = self.acc\n        {}\n"
    "    def __init__(self):\n        self.acc = accelerate.Accelerator()",
    "argument": "import accelerate\ndef f(other):\n    acc = other\n    {}\n"
    "f(accelerate.Accelerator())",
    "optional": "from accelerate import Accelerator\ndef f(acc=None):\n"
    "    acc = acc or Accelerator()\n    {}",
    "field": "from accelerate import Accelerator\nclass T:\n"
    "    acc: Accelerator | None\n    def f(self):\n        self.{}",
    "late import": "def f():\n    from accelerate import Accelerator\n"
    "    with open('x'):\n        acc = Accelerator()\n        {}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_accelerator_is_known_under_any_name(spelling):
    text = SPELLINGS[spelling].format("acc.unwrap_model(model).f()")
    found = {f.name: f.line for f in read_script(text)}
    line = text[: text.index("unwrap_model")].count("\n") + 1
    assert found["unwrap_model"] == line


@pytest.mark.parametrize("name", USES)
def test_every_use_is_reported_with_its_counterpart(name):
    if name.endswith("="):
        text = f"from accelerate import Accelerator\n\nAccelerator({name}1)"
    elif name == "DataLoader":
        text = f"import accelerate, torch.utils.data\n\ntorch.utils.data.{name}(x)"
    elif name[0].isupper() or name in {"set_seed", "get_logger", "notebook_launcher"}:
        text = f"import accelerate\n\naccelerate.utils.{name}()"
    else:
        text = f"import accelerate\n\nx = accelerate.Accelerator().{name}"
    found = [f for f in read_script(text) if f.name == name]
    rows = [(f.line, f.kind, f.session, f.trainer) for f in found]
    assert rows == [(3, "use", USES[name]["session"], USES[name]["trainer"])]


def check_names(text):
    """Assert that the names of Helios in a text exist."""
    members = {
        r"(?:self|Model|DataModule)": {*dir(helios.Model), *dir(helios.DataModule)},
        "Callback": {*dir(helios.Callback)},
        "Trainer": {*dir(helios.Trainer)},
    }
    sources = map(inspect.getsource, helios.Session.__mro__[:2])
    of_self = re.findall(r"\bself\.(\w+)\b", "".join(sources))
    members["session"] = {*dir(helios.Session), *of_self}
    for owner, known in members.items():
        assert set(re.findall(rf"\b{owner}\.(\w+)", text)) <= known, text
    signature = inspect.signature(helios.Session)
    for arguments in re.findall(r"\bSession\(([^()]*)", text):
        assert set(re.findall(r"(\w+)=", arguments)) <= {*signature.parameters}, text
    for kind in helios.Trainer, helios.DataLoaderParams, helios.KeepBest:
        known = {field.name for field in dataclasses.fields(kind)}
        for arguments in re.findall(rf"\b{kind.__name__}\(([^()]*)", text):
            assert set(re.findall(r"(\w+)=", arguments)) <= known, text


def test_counterparts_exist():
    for row in [*USES.values(), *TRAPS.values()]:
        check_names(row["session"])
        check_names(row["trainer"])


def test_these_tests_find_names_that_do_not_exist():
    for wrong in "session.flush()", "Session(every=1)", "self.fly()", "Trainer(x=1)":
        with pytest.raises(AssertionError):
            check_names(wrong)


def test_what_the_page_tells_users_of_other_trainers_exists():
    _, _, section = PAGE.read_text().partition("\n## From other trainers\n")
    parts = section.split("\n### ")
    assert len(parts) == 4
    for part in parts:
        rows = [line for line in part.splitlines() if line.startswith("| `")]
        assert part is parts[0] or len(rows) > 12
        for line in rows or [part]:
            check_names(line.rpartition(" | ")[2])


def test_an_unknown_member_has_no_counterpart():
    text = "import accelerate\naccelerate.Accelerator().fly()"
    found = next(f for f in read_script(text) if f.name == "fly")
    assert "no counterpart" in found.trainer
    assert found.session.startswith("stays, if ")


def test_functions_that_call_one_another_without_end_are_read():
    calls = "".join(f"def f{n}():\n    f{n + 1}()\n    f{n + 1}()\n" for n in range(40))
    assert read_script(f"import accelerate\n{calls}def f40():\n    f0()\nf0()") == []


def test_a_long_chain_of_calls_is_read_in_no_time():
    chain = "x" + ".f()" * 200
    assert read_script(f"import accelerate\ny = {chain}") == []


# The command.


def run(*arguments):
    return CliRunner().invoke(main, ["port", *map(str, arguments)])


def test_the_command_names_lines_and_ends_with_0_without_traps():
    done = run(SCRIPTS["gan"])
    assert done.exit_code == 0
    text = SCRIPTS["gan"].read_text()
    line = text[: text.index("accelerator.reduce")].count("\n") + 1
    assert f"{SCRIPTS['gan']}:{line}: reduce\n  Session: stays\n" in done.output
    assert "Traps: none known\n" in done.output
    numbers = [int(n) for n in re.findall(r"\.py:(\d+): ", done.output)]
    assert numbers == sorted(numbers)
    first, second = (
        n for n, row in enumerate(text.splitlines(), 1) if ".device" in row
    )
    assert f".py:{second}: device: as in line {first}\n" in done.output
    assert done.output.count("  Trainer: self.device; ") == 1


def test_the_report_fits_a_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(HEAD + "\n".join(t for t, *_ in WRONG.values()))
    lines = run("train.py").output.splitlines()
    assert len(lines) > 60
    assert [line for line in lines if len(line) > 80] == []


def test_the_command_ends_with_1_where_there_are_traps(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(HEAD + LOOP.format("print(loss.item())"))
    done = run(script)
    assert done.exit_code == 1
    line = len(script.read_text().splitlines())
    assert f"{script}:{line}: item-every-step\n  a loss is read" in done.output
    assert "  Session: session.log(values)" in done.output
    assert "  Trainer: self.log(name, loss)" in done.output
    assert done.output.endswith("4 names used; traps: 1, and 0 may be\n")
    script.write_text(HEAD + DOUBTFUL["item-every-step"])
    done = run(script)
    assert (done.exit_code, "every-step\n  may be: a loss" in done.output) == (1, True)


def test_the_command_writes_json(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(HEAD + LOOP.format("print(loss.item())"))
    done = run(script, "--json")
    report = json.loads(done.output)
    trap = report["findings"][-1]
    assert (done.exit_code, report["script"]) == (1, str(script))
    assert trap["line"] == len(script.read_text().splitlines())
    assert (trap["kind"], trap["name"]) == ("trap", "item-every-step")
    assert trap["is_certain"] is True
    assert {k: trap[k] for k in ("why", "session", "trainer")} == TRAPS[trap["name"]]
    assert run(SCRIPTS["gan"], "--json").exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"import torch\n", "does not import accelerate"),
        (b"from accelerated import x\n", "does not import accelerate"),
        (b"import accelerate\nfor\n", "invalid syntax"),
        (b"import accelerate\n\xff\n", "cannot be ported"),
        (b"import accelerate\n" + b"(" * 100000, "cannot be ported"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_accelerate_script_ends_with_2(content, message, tmp_path):
    script = tmp_path / "train.py"
    if content is not None:
        script.write_bytes(content)
    done = run(script)
    assert (done.exit_code, message in done.output) == (2, True), done.output


def test_porting_imports_neither_torch_nor_accelerate():
    script = (
        "import sys; from helios.porting import read_script\n"
        "read_script('import accelerate; accelerate.Accelerator()')\n"
        "print([m for m in ('torch', 'accelerate', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "[]\n"


def test_the_page_has_the_traps_and_names_that_are_known():
    page, _, _ = PAGE.read_text().partition("\n## From other trainers\n")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted([*USES, *TRAPS])


def test_the_page_says_what_the_report_says():
    page, _, _ = PAGE.read_text().partition("\n## From other trainers\n")
    table = {**USES, **TRAPS}
    for line in page.splitlines():
        if line.startswith("| `"):
            names, *cells = line.strip("| ").split(" | ")
            for name in re.findall(r"`([^`]+)`", names):
                texts = [text.replace("`", "") for text in table[name].values()]
                found = [cell.replace("`", "") for cell in cells]
                if name in TRAPS:  # whole sentences
                    texts = [f"{text[0].upper()}{text[1:]}." for text in texts]
                    found = [f"{cell[0].upper()}{cell[1:]}" for cell in found]
                assert found == texts


PORTED = """\
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

accelerator = Accelerator()
model, optimizer = accelerator.prepare(model, optimizer)
train_loader, eval_dl = accelerator.prepare(DataLoader(data), DataLoader(other))
for epoch in range(start, 9):
    for step, batch in enumerate(tqdm(train_loader)):
        accelerator.backward(model(batch))
        if step % 9 == 0:  # ä
            accelerator.save_state("out")
    for batch in eval_dl:
        model(batch)
"""


def test_first_version_of_a_port_is_the_script_with_a_session():
    port = write_port(PORTED, "runs/x")
    changes = {
        "from tqdm import tqdm\n": "from tqdm import tqdm\n\nimport helios\n",
        "for epoch in range(start, 9):\n": (
            "session = helios.Session("
            'accelerator, "runs/x", train_loader, save_every=500)\n'
            "for epoch in session.epochs(9):\n"
        ),
        "tqdm(train_loader))": (
            "tqdm(session.batches(train_loader)), session.state.dataset_iter)"
        ),
        'accelerator.save_state("out")': "pass  # save_state: the session does it",
        "for batch in eval_dl:": "for batch in session.batches(eval_dl):",
    }
    expected = PORTED
    for old, new in changes.items():
        assert expected.count(old) == 1
        expected = expected.replace(old, new)
    assert port.text == expected
    assert port.left == []


CARRYING = ROOT / "tests/fixtures/carrying_script.py"
ACTIVE = """\
    if resumed:
        active = accelerator.skip_first_batches(train_loader, 3)
    else:
        active = train_loader
    for step, batch in enumerate(active, 1):
"""
BAR = """\
    bar = tqdm(train_loader, total=7)
    for step, batch in enumerate(bar):
"""


@pytest.mark.parametrize(
    ("loop", "changes"),
    [
        (
            ACTIVE,
            {
                "enumerate(active, 1)": (
                    "enumerate(session.batches(train_loader), "
                    "session.state.dataset_iter + 1)"
                )
            },
        ),
        (
            BAR,
            {
                "tqdm(train_loader": "tqdm(session.batches(train_loader)",
                "enumerate(bar)": "enumerate(bar, session.state.dataset_iter)",
            },
        ),
    ],
)
def test_training_loader_may_have_another_name_or_a_bar_around_it(loop, changes):
    text = PORTED.replace(
        "    for step, batch in enumerate(tqdm(train_loader)):\n", loop
    )
    assert text != PORTED
    for old, new in changes.items():
        loop = loop.replace(old, new)
    assert loop in write_port(text, "runs/x").text


@pytest.mark.parametrize(
    ("start", "count"),
    [
        ("", "session.state.dataset_iter"),
        (", 0", "session.state.dataset_iter"),
        (", first", "session.state.dataset_iter + first"),
        (", 1 if a else 2", "session.state.dataset_iter + (1 if a else 2)"),
        (", start=1", "start=session.state.dataset_iter + 1"),
    ],
)
def test_numbers_of_batches_go_on_from_where_the_script_starts_them(start, count):
    text = PORTED.replace("tqdm(train_loader)", f"train_loader{start}")
    line = f"enumerate(session.batches(train_loader), {count}):"
    assert line in write_port(text, "runs/x").text


def test_session_is_made_behind_what_is_registered():
    text = PORTED.replace(
        "for epoch in", "accelerator.register_for_checkpointing(ema)\nfor epoch in"
    )
    port = write_port(text, "runs/x")
    registered = port.text.index("accelerator.register_for_checkpointing(ema)\n")
    assert registered < port.text.index("helios.Session(")
    assert port.left == []


def test_sessions_in_a_loop_need_folders_of_their_own():
    head, _, rest = PORTED.partition("accelerator = ")
    lines = [f"    {line}\n" for line in f"accelerator = {rest}".splitlines()]
    port = write_port(f"{head}for fold in range(3):\n{''.join(lines)}", "runs/x")
    assert [line.partition(";")[0] for line in port.left] == [
        "line 9: sessions are made in a loop: give each a folder of its own"
    ]


def test_functions_that_read_a_loader_and_do_not_see_the_session_are_told_of():
    text = "def check(eval_dl):\n    for batch in eval_dl:\n        f(batch)\n"
    assert write_port(text + PORTED, "runs/x").left == []
    inside = "".join(f"    {line}\n" for line in PORTED.splitlines())
    port = write_port(f"{text}def main():\n{inside}", "runs/x")
    assert port.left == ["line 2: pass `session` to `check`"]


def test_batches_that_were_skipped_are_skipped_by_the_session():
    text = PORTED.replace(
        "tqdm(train_loader)", "accelerator.skip_first_batches(train_loader, 3)"
    )
    port = write_port(text, "runs/x")
    assert "enumerate(session.batches(train_loader), session.state.dataset_iter)" in (
        port.text
    )


def test_what_a_script_did_to_go_on_is_told():
    text = PORTED.replace(
        "for epoch in", "if path:\n    accelerator.load_state(path)\nfor epoch in"
    ).replace(
        "        if step % 9", "        skip_first_batches(a, 3)\n        if step % 9"
    )
    text += "    a.n += 1\nfor x in []:\n    a.n += 1\n"
    port = write_port(text, "runs/x")
    assert "    pass  # load_state: the session does it\n" in port.text
    line, behind = port.left  # in their order
    assert behind.startswith("line 19: `a.n` begins anew")
    assert line.startswith("line 10: `load_state` is gone, and a path that is given")
    assert ", `skip_first_batches` in line 14; for old" in line


def test_what_is_left_to_do_fits_a_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(carrying(end="    a.x = f(a.x)\n"))
    rows = run("--write", "train.py").output.splitlines()
    assert max(map(len, rows)) <= 80
    assert rows[1].startswith("left to do: line 16: `a.x` begins anew at a resume")
    assert rows[2] == "            it in `carry`; or pass its object to the session"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PORTED.replace("backward", "forward"), "0 loops train on batches"),
        (PORTED.replace("for epoch in range(start, 9)", "if x"), "1 loop trains on ba"),
    ],
)
def test_why_there_is_no_first_version_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        write_port(text, "runs/x")


def test_what_a_first_version_leaves_to_do_is_told():
    text = PORTED.replace("range(start, 9)", "numbers").replace(
        'accelerator.save_state("out")', 'path = accelerator.save_state("out")'
    )
    port = write_port(text, "runs/x")
    assert [line.partition(":")[0] for line in port.left] == ["line 9", "line 13"]


def test_script_without_one_training_loop_gets_no_first_version(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PORTED.replace("backward", "forward"))
    done = CliRunner().invoke(main, ["port", "--write", str(script)])
    assert done.exit_code == 2
    assert "0 loops train on batches" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PORTED)
    for code in (0, 2):
        done = CliRunner().invoke(main, ["port", "--write", str(script)])
        assert done.exit_code == code, done.output
    assert "train_helios.py is there already" in done.output
    ast.parse((tmp_path / "train_helios.py").read_text())


def carrying(before="", start="", step="", end=""):
    """A script with these lines before its epochs, and in them."""
    text = PORTED.replace("for epoch in", f"{before}for epoch in")
    text = text.replace("    for step,", f"{start}    for step,")
    return text.replace("        if step % 9", f"{step}        if step % 9") + end


def ported(*lines, **named):
    return write_port(carrying(*lines, **named), "runs/x")


def carry_of(port):
    """The variables that a port carries, of which no other line is changed."""
    found = re.search(r"\(9, carry=\[(.*)\]\):\n", port.text)
    own = {*PORTED.splitlines(), *ported().text.splitlines()}
    assert "notes" not in port.text
    rest = [line for line in port.text.splitlines() if line not in own]
    return found and found[1].replace('"', "").split(", "), [
        line for line in rest if "epochs(9" not in line
    ]


# Lines before the epochs, at the start of each, in each batch, and behind the batches.
CARRIED = {
    "a best score": ("x = float('inf')\n", "", "", "    x = min(x, f())\n"),
    "a counter of batches": ("x: int = 0\n", "", "        x += 1  # of all\n", ""),
    "a history": ("x = []\n", "", "", "    x.append(\n        f()\n    )\n"),
    "parts of a dict": ("x = dict()\n", "", "", "    x[epoch] = f()\n"),
    "lists in a dict": ("x = {}\n", "", "", "    x.setdefault(1, []).append(f())\n"),
    "a stack": ("x = [1]\n", "", "", "    y = x.pop()\n"),
    "what some epochs set": ("x = ''\n", "", "", "    if f():\n        x = 1\nf(x)\n"),
    "what some batches set": (
        "",
        "    x = 0\n",
        "        if f():\n            x = 1\n",
        "    print(x)\n",
    ),
    "the sum of an epoch": ("", "    x = 0\n", "        x += 1\n", ""),
    "what the start of an epoch changes": ("x = 0\n", "    x += 1\n", "", ""),
    "what has no first value": ("", "", "        x += 1\n", ""),
    "what has one in some cases": ("if a:\n    x = 0\n", "", "", "    x += 1\n"),
    "what comes from elsewhere": ("x = args.x\n", "", "", "    x = f(x)\n"),
    "what shares its line": ("x = 0\n", "", "", "    if f(): x += 1\n"),
    "what stands before another": ("x = 0\n", "", "", "    x += 1; f()\n"),
    "what `with` surrounds": ("x = 0\n", "", "", "    with f():\n        x += 1\n"),
    "the best weights": (
        "x = None\n",
        "",
        "",
        "    f(x)\n    x = copy.deepcopy(model.state_dict())\n",
    ),
    "an array": ("x = torch.zeros(3)\n", "", "        x[1] += 1\n", ""),
    "an array in place": ("x = torch.zeros(3)\n", "", "        x.add_(1)\n", ""),
    "what a first batch sets": ("", "", "        if f(x):\n            x = 1\n", ""),
    "the last loss": ("", "", "        x = f()\n", "    print(x.item())\n"),
    "the last loss of all": ("", "", "        x = f()\n", "print(x.item())\n"),
    "the last result": ("x = 0\n", "", "", "    x = f()\nprint(x)\n"),
    "what `:=` sets": ("x = 0\n", "", "", "    if (x := max(x, 1)) > 9: break\n"),
    "what is drawn for an epoch": (
        "",
        "    x = torch.randn(3)\n",
        "        f(x)\n",
        "",
    ),
}


@pytest.mark.parametrize("kind", CARRIED)
def test_variables_of_the_loop_are_carried_and_nothing_else_is_changed(kind):
    port = ported(*CARRIED[kind])
    (names, rest), lines = carry_of(port), "".join(CARRIED[kind]).splitlines()
    assert (names, port.left) == (["x"], [])
    assert rest == [line for line in rest if line in lines]


def test_number_of_the_last_batch_is_carried_for_what_is_behind_it():
    assert carry_of(ported(end="    print(step)\n")) == (["step"], ["    print(step)"])


def test_what_an_epoch_computes_from_a_carried_variable_is_carried():
    lines = "n = 0\n", "    first = n\n", "        n += 1\n", "    print(n - first)\n"
    assert carry_of(ported(*lines))[0] == ["n", "first"]


def test_long_lists_of_variables_are_folded_as_a_formatter_does():
    names = ["loss_of_all_batches", "best_accuracy", "epochs_without_it", "history_tot"]
    for n_names, expected in (
        (3, f'(\n    9, carry=["{names[0]}", "{names[1]}", "{names[2]}"]\n)'),
        (
            4,
            f'(\n    9,\n    carry=["{names[0]}", "{names[1]}", "{names[2]}", '
            f'"{names[3]}"],\n)',
        ),
    ):
        used = names[:n_names]
        before = "".join(f"{name} = 0\n" for name in used)
        port = ported(before, end="".join(f"    {name} += 1\n" for name in used))
        assert f"\nfor epoch in session.epochs{expected}:\n" in port.text
    used = [f"{name}_{n}" for n in range(2) for name in names]
    before = "".join(f"{name} = 0\n" for name in used)
    port = ported(before, end="".join(f"    {name} += 1\n" for name in used))
    rows = "".join(f'        "{name}",\n' for name in used)
    expected = f"session.epochs(\n    9,\n    carry=[\n{rows}    ],\n):\n"
    assert expected in port.text


def test_lines_are_as_long_as_those_of_the_script():
    comment = f"# {'a' * 108}\n"
    text = carrying(
        "best_of_all_the_epochs = 0\nn_bad_epochs_since_then = 0\n",
        end=("    best_of_all_the_epochs += 1\n    n_bad_epochs_since_then += 1\n"),
    )
    line = (
        "for epoch in session.epochs("
        '9, carry=["best_of_all_the_epochs", "n_bad_epochs_since_then"]):\n'
    )
    assert line not in write_port(text, "runs/x").text
    assert line in write_port(comment + text, "runs/x").text


ATTRIBUTE = "make it a variable, and name it in `carry`; or pass its object to the "
OBJECT = "make it before the session, and pass it, as `x=x`, if it has a state"
TOLD = {
    "a network": (
        ("x = None\n", "", "", "    print(x)\n    x = copy.deepcopy(model)\n"),
        OBJECT,
    ),
    "an object": (("x = None\n", "", "", "    x = x or Meter()\n"), OBJECT),
    "what is asked as an object is": (
        ("x = f()\n", "", "", "    x = x.best(f())\n"),
        OBJECT,
    ),
    "an iterator": (
        ("x = iter(a)\n", "", "", "    y = next(x)\n    x = iter(a)\n"),
        "no checkpoint holds it; make it anew, by `session.state`",
    ),
    "an attribute": (
        ("", "", "", "    self.x = min(self.x, f())\n"),
        f"{ATTRIBUTE}session",
    ),
    "a list that is an attribute": (
        ("", "", "", "    self.x.append(f())\n"),
        f"{ATTRIBUTE}session",
    ),
    "the last output": (
        ("", "", "        x = model(batch)\n", "    print(x.logits)\n"),
        "a resume behind the loop has none; carry a plain value of it",
    ),
}


@pytest.mark.parametrize("kind", TOLD)
def test_variables_that_are_not_carried_are_told_of(kind):
    lines, advice = TOLD[kind]
    port = ported(*lines)
    name = "self.x" if "self" in "".join(lines) else "x"
    rows = enumerate(carrying(*lines).splitlines(), 1)
    loop = [(n, row) for n, row in rows if n > 9 and row.startswith("  ")]
    changing = [n for n, row in loop if re.search(r"x( \+?= |\.append)", row)]
    assert port.left == [
        f"line {changing[-1]}: `{name}` begins anew at a resume: {advice}"
    ]
    assert "carry" not in port.text


def test_a_last_batch_is_not_carried_as_it_may_be_of_any_kind():
    head, _, _ = PORTED.partition("    for batch in eval_dl")
    port = write_port(f"{head}    print(batch)\n", "runs/x")
    told = "a resume behind the loop has none; carry a plain value of it"
    assert port.left == [f"line 10: `batch` begins anew at a resume: {told}"]
    assert "carry" not in port.text


STOPPER = """\
class Stopper{}:
    def __init__(self):
        self.n = 0
    def check(self):
        self.n += 1
{}
stopper = Stopper()
"""
SAVING = "    def state_dict(self):\n        return vars(self)\n"
REGISTERED = "accelerator.register_for_checkpointing(stopper)\n"


def test_objects_that_count_are_told_of():
    port = ported(STOPPER.format("", ""), end="    stopper.check()\n")
    assert port.left == [
        "line 15: `stopper` begins anew at a resume: pass it to the session, as "
        "`stopper=stopper`"
    ]


@pytest.mark.parametrize(
    ("base", "method", "end"),
    [
        ("", SAVING, "    stopper.check()\n"),
        ("(torch.nn.Module)", "", "    stopper.check()\n"),
        ("", "", "    check()\n"),  # what no turn uses
    ],
)
def test_objects_that_are_saved_or_not_used_are_left_alone(base, method, end):
    behind = REGISTERED if method else ""
    assert ported(STOPPER.format(base, method) + behind, end=end).left == []


NOT_CARRIED = [
    ("loss = None\n", "", "        loss = f()\n        print(loss)\n", ""),
    ("", "", "        x = f()\n", "    x = 1\n    print(x)\n"),
    ("", "    bar = tqdm(9)\n", "        bar.update(1)\n", "    bar.close()\n"),
    ("", "    x = f()\n", "        g(x)\n", "    g(x)\n"),
    ("", "", "", "    for batch in eval_dl:\n        print(batch)\n"),
    ("", "", "", "    model = model.train()\n"),
    ("", "    found = []\n", "", "    found.append(f())\n    print(found)\n"),
    ("best = 0\n", "", "", "    print(best)\n"),
    ("x = 0\n", "", "", "    if f():\n        x = 1\nx = 2\n"),
    ("bar = tqdm(9)\n", "", "        bar.update(1)\n", ""),
    ("x = 0\n", "", "", "    print([x for x in f()])\n    x = 1\n"),
    ("x = 0\n", "", "", "    if f():\n        continue\n    x = 1\n    print(x)\n"),
    ("x = 0\n", "", "", "    x = 1 if f() else 2\n    g(lambda x: x)\n"),
    (
        "x = 0\n",
        "",
        "",
        "    try:\n        x = f()\n    except E:\n        x = 1\n    print(x)\n",
    ),
    ("x = 0\n", "", "", "    while (x := f()):\n        print(x)\n"),
    ("x = 0\n", "", "", "    with f() as x:\n        print(x)\n"),
]


@pytest.mark.parametrize("lines", NOT_CARRIED)
def test_what_each_turn_sets_anew_is_left_alone(lines):
    port = ported(*lines)
    assert ("carry" in port.text, port.left) == (False, [])


def within(start, end, before=""):
    """A port of the script in a function, with more behind its batches."""
    head, _, rest = PORTED.partition("accelerator = ")
    lines = [f"    {line}\n" for line in f"accelerator = {rest}".splitlines()]
    return write_port(f"{head}{before}{start}{''.join(lines)}{end}", "runs/x")


def test_parameters_and_variables_of_functions_around_are_carried():
    port = within("def main(x=0, seen=None):\n", "        x += 1; seen.append(x)\n")
    assert 'session.epochs(9, carry=["x", "seen"])' in port.text
    end = "        x = max(x, f())\n"
    outer = "def main(x):\n  def train():\n    nonlocal x\n"
    port = within(outer, end)
    assert ('session.epochs(9, carry=["x"])' in port.text, port.left) == (True, [])


def test_parameters_that_are_objects_are_told_of():
    port = within("def main(x):\n", "        x = x.best(f())\n")
    assert [line.partition(": ")[2] for line in port.left] == [
        f"`x` begins anew at a resume: {OBJECT}"
    ]


@pytest.mark.parametrize("end", ["x = max(x, f())", "x.append(f())", "x[0] = f()"])
def test_variables_of_the_module_are_told_of_in_a_function(end):
    start = f"def main():\n{'    global x' if 'max' in end else ''}\n"
    port = within(start, f"        {end}\n", before="x = [0]\n")
    told = "make it a variable of the function, and name it in `carry`"
    assert [line.partition(": ")[2] for line in port.left] == [
        f"`x` begins anew at a resume: {told}"
    ]
    assert "carry" not in port.text


IF_ELSE = """\
if f():
    train_loader = accelerator.prepare(DataLoader(data))
elif g():
    train_loader = accelerator.prepare(DataLoader(data, 2))
else:
    train_loader = accelerator.prepare(DataLoader(other))
"""
MADE = "session = helios.Session("


def test_session_is_made_behind_all_branches_that_prepare():
    text = PORTED.replace("for epoch in", f"{IF_ELSE}for epoch in")
    port = write_port(text, "runs/x")
    assert f"{IF_ELSE}{MADE}" in port.text
    # In another function than the loop, as well.
    head, _, rest = text.partition("for epoch in")
    lines = [f"    {line}\n" for line in f"for epoch in{rest}".splitlines()]
    port = write_port(f"def train():\n{''.join(lines)}{head}train()\n", "runs/x")
    assert f"{IF_ELSE}{MADE}" in port.text
    # What runs in one branch only stays there.
    main = "".join(f"    {line}\n" for line in f"{head}train()".splitlines())
    guard = 'if __name__ == "__main__":\n'
    port = write_port(f"def train():\n{''.join(lines)}{guard}{main}", "runs/x")
    assert f"    {MADE}" in port.text


def test_session_is_made_before_the_loop_whatever_is_prepared_behind_it():
    text = f"{PORTED}test_loader = accelerator.prepare(DataLoader(data))\n"
    port = write_port(text, "runs/x")
    assert port.text.index("helios.Session(") < port.text.index("for epoch in")


SCHEDULERS = {
    "a name": ("from torch.optim.lr_scheduler import StepLR\n", "StepLR(opt, 3)"),
    "a module": ("from torch.optim import lr_scheduler\n", "lr_scheduler.StepLR(opt)"),
    "torch": ("", "torch.optim.lr_scheduler.StepLR(opt, 3)"),
    "another name": ("import torch.optim as to\n", "to.lr_scheduler.StepLR(opt, 3)"),
    "transformers": ("from transformers import get_scheduler\n", "get_scheduler(opt)"),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_that_nobody_saves_is_passed(kind):
    line, call = SCHEDULERS[kind]
    text = f"{line}{PORTED}".replace("for epoch in", f"s = {call}\nfor epoch in")
    port = write_port(text, "runs/x")
    assert f"s = {call}\n{MADE}" in port.text
    assert ("save_every=500, s=s" in port.text, port.left) == (True, [])


MAKE = "torch.optim.lr_scheduler.StepLR(opt, 3)"


@pytest.mark.parametrize(
    "lines",
    [
        f"s = {MAKE}\ns = accelerator.prepare(s)\n",
        f"s = {MAKE}\ns = accelerator.prepare_scheduler(s)\n",
        f"s = accelerator.prepare({MAKE})\n",
        f"s = {MAKE}\naccelerator.register_for_checkpointing(s)\n",
    ],
)
def test_scheduler_that_is_saved_is_not_passed_again(lines):
    port = write_port(PORTED.replace("for epoch in", f"{lines}for epoch in"), "runs/x")
    assert ("save_every=500)\n" in port.text, port.left) == (True, [])


def test_schedulers_that_another_one_steps_are_saved_by_that():
    chain = "torch.optim.lr_scheduler.SequentialLR(opt, schedulers=[s], milestones=[])"
    lines = f"s = {MAKE}\nt = {chain}\n"
    port = write_port(PORTED.replace("for epoch in", f"{lines}for epoch in"), "runs/x")
    assert "save_every=500, t=t" in port.text
    assert "s=s" not in port.text


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("self.scheduler", "scheduler=self.scheduler"),
        ("path", "path_=path"),
        ("schedulers", "schedulers_=schedulers"),
        ("registered", "registered_=registered"),
        ("loaders", "loaders_=loaders"),
    ],
)
def test_objects_are_passed_under_names_that_a_session_does_not_have(name, word):
    lines = f"{name} = {MAKE}\n"
    port = write_port(PORTED.replace("for epoch in", f"{lines}for epoch in"), "runs/x")
    assert (re.search(rf"\b{word}\b", port.text) is None, port.left) == (False, [])


def test_no_argument_of_a_session_is_the_name_of_an_object():
    names = set(inspect.signature(helios.Session.__init__).parameters) - {"objects"}
    names |= {"models", "optimizers", "schedulers", "registered"}
    assert {keyword_for(name, []) for name in names} == {f"{name}_" for name in names}


def test_two_objects_of_one_last_name_get_two_names():
    lines = f"a.s = {MAKE}\nb.s = {MAKE}\n"
    port = write_port(PORTED.replace("for epoch in", f"{lines}for epoch in"), "runs/x")
    assert "save_every=500, s=a.s, s_=b.s" in port.text


@pytest.mark.parametrize(
    "lines", [f"if f():\n    s = {MAKE}\n", f"s = None\nif f():\n    s = {MAKE}\n"]
)
def test_scheduler_that_may_not_be_there_is_told_of(lines):
    text = PORTED.replace("for epoch in", f"{lines}for epoch in")
    port = write_port(text, "runs/x")
    number = text[: text.index(MAKE)].count("\n") + 1
    assert port.left == [
        f"line {number}: `s` would not be saved: make it before the session, and pass "
        "it, as `s=s`"
    ]
    assert "s=s" not in port.text


def test_scheduler_that_each_branch_makes_is_passed_behind_them():
    lines = f"if f():\n    s = {MAKE}\nelse:\n    s = {MAKE}\n"
    port = write_port(PORTED.replace("for epoch in", f"{lines}for epoch in"), "runs/x")
    assert f"{lines}{MADE}" in port.text
    assert "save_every=500, s=s" in port.text


KINDS = re.compile("epoch|means of epoch|final|weights")
STOPPING = """\
            if str(session.state.global_iteration) in sys.argv[1:]:
                session.request_stop("the test")
"""


@pytest.mark.slow
def test_port_ends_alike_wherever_it_is_stopped_and_when_it_is_started_again(tmp_path):
    original = CARRYING.read_text()
    step = "            scheduler.step()\n"
    text = write_port(original, "runs/x").text.replace(step, step + STOPPING)
    for name, script in (("original", original), ("port", f"import sys\n{text}")):
        (tmp_path / f"{name}.py").write_text(script)

    def rows(name, stop, code):
        done = subprocess.run(
            [sys.executable, f"{name}.py", str(stop)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return [row for row in done.stdout.splitlines() if KINDS.match(row)]

    expected = rows("original", "", 0)
    found = []
    # Within an epoch, and behind the last batch of one, and of all.
    for stop in (2, 4, 6, 14):
        found += rows("port", stop, 75)
    found += rows("port", "", 0)
    assert found == expected
    assert rows("port", "", 0) == expected[-2:]  # it is finished


@pytest.mark.slow
def test_variables_and_schedulers_of_a_port_go_on_at_a_resume(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(CARRYING.read_text())
    done = CliRunner().invoke(main, ["port", "--write", str(script)])
    assert "left to do" not in done.output
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Within an epoch, behind its last batch, and behind one that changes less.
    stops = [word for n in (3, 5, 11) for word in ("--at", str(n))]
    command = [sys.executable, str(tmp_path / "train_helios.py")]
    options = [*stops, "--keep", "kept"]
    done = CliRunner().invoke(main, ["verify-resume", *options, *command])
    assert done.exit_code == 0, done.output
    printed = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    assert len(printed) == 8
    # Started again when it is finished, it says once more what stands behind the loop.
    for kind, more in ("whole", []), ("parts", printed[-2:]):
        logs = sorted((tmp_path / "kept" / kind).glob("*.log"))
        rows = [row for log in logs for row in log.read_text().splitlines()]
        assert [row for row in rows if KINDS.match(row)] == printed + more


@pytest.mark.slow
def test_first_version_of_an_example_runs_and_resumes_exactly(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    original = ROOT / "examples/porting/classifier_accelerate.py"
    script.write_text(original.read_text())
    assert CliRunner().invoke(main, ["port", "--write", str(script)]).exit_code == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(tmp_path / "train_helios.py"), "out", "--cpu"]
    options = ["--batches", "40", "--stops", "1"]
    done = CliRunner().invoke(main, ["verify-resume", *options, *command])
    assert done.exit_code == 0, done.output
    assert "IDENTICAL" in done.output
