"""The shape of the library: who may import whom, sizes, names, the command."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE_LIMIT_LINES = 400
# Each part by itself: "library" is all that has no limit of its own, and stays a thin
# adapter. The data are long because every kind of data set needs a way in, checkpoints
# because of what can be stored, tensors that are shared out over ranks among it;
# launching is another program's work, before a run; health is about the runs whose
# numbers go bad, failures about those that fail, sizing about batches that fit into
# memory; no training imports the last three.
# Stopping has threads, signals and deadlines of its own; evaluations are a loop of
# their own, that tests have, too.
# Porting reads other programs' text, and needs nothing of the library. Loops by hand
# are for who has one: the Trainer needs neither those, nor loaders that were not made
# for Helios, nor trees without a run; nor batches in blocks, which are Accelerate's.
# A longer name counts before a shorter one.
LIMITS_LINES = {
    "library": 3000,
    "data": 2413,
    "checkpoint": 1050,
    "saving": 306,
    "retention": 90,
    "background": 140,
    "sharding": 150,
    "watchdog": 152,
    "launching": 100,
    "elastic": 80,
    "adopting": 90,
    "voting": 60,
    "wires": 130,
    "launcher": 130,
    "health": 457,
    "health.numbers": 70,
    "failures": 473,
    "verifying": 550,
    "verifying.forgotten": 120,
    "verifying.frames": 95,
    "verifying.starts": 45,
    "verifying.causes": 200,
    "sizing": 145,
    "trials": 80,
    "stopping": 596,
    "stopping.clocks": 60,
    "lastwords": 30,
    "evaluation": 120,
    "cli": 400,
    "testing": 400,
    "interchange": 300,
    "exporting": 110,
    "porting": 570,
    "porting.objects": 160,
    "porting.writing": 275,
    "porting.carried": 158,
    "porting.keeping": 135,
    "porting.values": 140,
    "porting.placing": 120,
    "porting.command": 90,
    "handwritten": 740,
    "handwritten.faults": 66,
    "handwritten.late": 95,
    "handwritten.variables": 260,
    "data.adopting": 300,
    "data.dealing": 30,
    "checkpoint.trees": 80,
    "checkpoint.records": 100,
}

# A module may import modules of its own layer and of those below. The longest
# name that fits counts: `data.samplers` stands in layer 1, the rest of `data` in 3.
LAYERS = {
    # plain values
    "_version": 0,
    "errors": 0,
    "registry": 0,
    "state": 0,
    # pure mechanisms
    "rng": 1,
    "differences": 1,
    "fingerprint": 1,
    "sharding": 1,
    "adopting": 1,
    "wires": 1,
    "voting": 1,
    "bars": 1,
    "determinism": 1,
    "background": 1,
    "workers": 1,
    "data.permutation": 1,
    "data.samplers": 1,
    "data.weighted": 1,
    "data.lengths": 1,
    "data.replay": 1,
    "data.batches": 1,
    "data.seeding": 1,
    "data.gathering": 1,
    "data.fetching": 1,
    "data.packages": 1,
    "data.parts": 1,
    "data.streams": 1,
    "data.requests": 1,
    "data.dealing": 1,
    "data.params": 1,
    "data.loader": 1,
    "data.feed": 1,
    "data.adopting": 3,
    "checkpoint.types": 1,
    "checkpoint.tensors": 1,
    "checkpoint.codec": 1,
    "checkpoint.reading": 1,
    "checkpoint.records": 1,
    # Accelerate; folders
    "engine": 2,
    "checkpoint": 2,
    "checkpoint.store": 2,
    "checkpoint.trees": 2,
    # what users subclass or attach; one execution
    "model": 3,
    "data": 3,
    "callbacks.base": 3,
    "loggers": 3,
    "retention": 3,
    "saving": 3,
    "session": 3,
    "journal": 3,
    "watchdog": 3,
    "health": 3,
    "failures": 3,
    "verifying": 3,
    "stopping": 3,
    "lastwords": 3,
    # the loops
    "evaluation": 4,
    "loop": 4,
    "callbacks": 4,
    "launching": 4,
    "elastic": 4,
    "health.rollback": 4,
    # configuration; other programs' checkpoints
    "arguments": 5,
    "interchange": 5,
    "exporting": 5,
    "sizing": 5,
    "trials": 4,
    "trainer": 5,
    "handwritten": 5,
    # the command; what users' tests call
    "cli": 6,
    "launcher": 6,
    "porting": 6,
    "failures.command": 6,
    "verifying.command": 6,
    "testing": 6,
}

NOT_IMPORTED = {"_pickle", "cloudpickle", "dill", "pickle", "joblib"}
NOT_CALLED = {"torch.load", "torch.save"}
# Other programs' files are torch's: they are read without running code.
INTERCHANGE = ("interchange", "exporting")


@dataclass
class Module:
    """One file of the library, as its syntax tree shows it."""

    name: str  # without "helios.": "data.samplers"; the package itself is ""
    path: Path
    tree: ast.Module
    n_lines: int
    n_filled: int  # lines of code, docstrings and comments
    # (dotted name, line, whether it runs when the module is imported)
    imports: list[tuple[str, int, bool]] = field(default_factory=list)

    @property
    def package(self) -> str:
        """The package that relative imports start from, with "helios"."""
        name = f"helios.{self.name}".rstrip(".")
        return name if self.path.name == "__init__.py" else name.rpartition(".")[0]


def scan(library: Path) -> dict[str, Module]:
    """Reads every file of the library; nothing is imported."""
    modules = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        lines = text.splitlines()
        n_filled = sum(1 for line in lines if line.strip())
        modules[name] = Module(name, path, tree, len(lines), n_filled)
    for module in modules.values():
        module.imports.extend(imports_of(module, module.tree, True))
    return modules


def imports_of(
    module: Module, node: ast.AST, at_import: bool
) -> Iterator[tuple[str, int, bool]]:
    """Yields what runs or may run: all but the bodies of `if TYPE_CHECKING`."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from imports_of(module, child, at_import)
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, node.lineno, at_import
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = module.package.split(".")
            above = above[: len(above) - (node.level - 1)]
            base = ".".join([*above, *([base] if base else [])])
        for alias in node.names:
            yield f"{base}.{alias.name}", node.lineno, at_import
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from imports_of(module, child, at_import and not is_function)


def target_of(dotted: str, modules: dict[str, Module]) -> str | None:
    """The module of the library that a dotted name stands in; None: not ours."""
    if dotted != "helios" and not dotted.startswith("helios."):
        return None
    name = dotted.removeprefix("helios").removeprefix(".")
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def packages_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def layer_of(name: str) -> int | None:
    for prefix in [name, *reversed(packages_above(name))]:
        if prefix in LAYERS:
            return LAYERS[prefix]
    return None


def upward_imports(modules: dict[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        if module.name == "":  # the top package exports everything
            continue
        own = layer_of(module.name)
        for dotted, line, _ in module.imports:
            target = target_of(dotted, modules)
            if target is None:
                continue
            layer = layer_of(target)
            where = f"{module.path}:{line}: {module.name} (layer {own})"
            if target == "":
                found.append(f"{where} imports the top package, in {dotted}")
            elif own is not None and layer is not None and layer > own:
                found.append(f"{where} imports {target} (layer {layer})")
    return found


def import_cycles(modules: dict[str, Module]) -> list[str]:
    """Cycles among the imports that run when a module is imported.

    Importing `data.samplers` from outside `data` runs `data/__init__.py` first,
    so that is an edge, too.
    """
    edges: dict[str, set[str]] = {name: set() for name in modules if name}
    for name, module in modules.items():
        if name == "":
            continue
        own = {name, *packages_above(name)}
        for dotted, _, at_import in module.imports:
            target = target_of(dotted, modules)
            if not at_import or not target:
                continue
            run = {target, *packages_above(target)} & modules.keys()
            edges[name] |= run - own
    found = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
            return
        if name in done:
            return
        for target in sorted(edges[name]):
            walk(target, [*path, name])
        done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def forbidden(modules: dict[str, Module]) -> list[str]:
    """Uses of pickle, which runs what it reads; and of torch.load, built on it."""
    found = []
    for module in modules.values():
        for dotted, line, _ in module.imports:
            if dotted.split(".")[0] in NOT_IMPORTED or dotted in NOT_CALLED:
                found.append(f"{module.path}:{line}: imports {dotted}")
        safe = set[ast.AST]()
        for node in ast.walk(module.tree):
            if module.name in INTERCHANGE and isinstance(node, ast.Call):
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                name = ast.unparse(node.func)
                if name == "torch.save" or options.get("weights_only") == "True":
                    safe.add(node.func)
            is_called = isinstance(node, ast.Attribute) and node not in safe
            if is_called and ast.unparse(node) in NOT_CALLED:
                found.append(f"{module.path}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return scan(ROOT / "helios")


def test_every_module_has_a_layer(modules: dict[str, Module]) -> None:
    assert [m for m in modules if m and layer_of(m) is None] == []


def test_imports_point_down_only(modules: dict[str, Module]) -> None:
    assert upward_imports(modules) == []


def test_no_module_imports_itself_through_others(modules: dict[str, Module]) -> None:
    assert import_cycles(modules) == []


def test_training_uses_accelerate_through_the_engine_alone(
    modules: dict[str, Module],
) -> None:
    importers = {
        module.name
        for module in modules.values()
        for dotted, _, _ in module.imports
        if dotted.split(".")[0] == "accelerate"
    }
    # The launcher reads what `accelerate launch` does; no training imports it.
    assert importers == {"engine", "launcher"}


def test_nothing_pickles(modules: dict[str, Module]) -> None:
    assert forbidden(modules) == []


def test_files_and_library_stay_small(modules: dict[str, Module]) -> None:
    sizes = {str(m.path.relative_to(ROOT)): m.n_lines for m in modules.values()}
    assert {p: n for p, n in sizes.items() if n > FILE_LIMIT_LINES} == {}
    parts = dict.fromkeys(LIMITS_LINES, 0)
    for module in modules.values():
        names = [module.name, module.name.partition(".")[0], "library"]
        parts[next(name for name in names if name in parts)] += module.n_filled
    assert {p: n for p, n in parts.items() if n > LIMITS_LINES[p]} == {}


def test_every_module_says_what_it_owns(modules: dict[str, Module]) -> None:
    assert [m.name for m in modules.values() if not ast.get_docstring(m.tree)] == []


def test_every_exported_name_exists(modules: dict[str, Module]) -> None:
    missing = []
    for name in modules:
        if name.rpartition(".")[2] == "__main__":  # importing it runs it
            continue
        module = importlib.import_module(f"helios.{name}".rstrip("."))
        exported = getattr(module, "__all__", [])
        missing += [f"{name}.{n}" for n in exported if not hasattr(module, n)]
    assert missing == []


def test_top_package_says_what_it_exports() -> None:
    helios = importlib.import_module("helios")
    assert {"Model", "Trainer", "__version__"} <= set(helios.__all__)


@pytest.mark.parametrize("argument", ["--version", "env"])
def test_command_runs(argument: str) -> None:
    script = "import sys; from helios.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert importlib.import_module("helios").__version__ in done.stdout


FAULTS = {
    "upward": ({"errors": "def f():\n    from .trainer import Trainer"}, "layer 5"),
    "relative": ({"data.samplers": "from ..model import base"}, "imports model"),
    "top": ({"rng": "from helios import Trainer"}, "top package"),
    "cycle": ({"loop": "from helios.callbacks import x"}, "callbacks -> loop"),
    "through_package": (
        {"engine": "from helios.data.seeding import x", "data": "from .. import model"},
        "engine -> data -> model",
    ),
    "accelerated": ({"rng": "import torch\ntorch.save(1)"}, "torch.save"),
    "pickled": ({"rng": "from pickle import loads"}, "pickle.loads"),
    "typing_only": (
        {"errors": "if TYPE_CHECKING:\n    from .trainer import Trainer"},
        None,
    ),
    "submodule": ({"trainer": "from helios import errors"}, None),
}


@pytest.mark.parametrize(("files", "message"), FAULTS.values(), ids=FAULTS)
def test_these_tests_find_faults(
    files: dict[str, str], message: str | None, tmp_path: Path
) -> None:
    sound = {
        "": "from .trainer import Trainer",
        "errors": "",
        "rng": "import random",
        "data": "from .samplers import x",
        "data.samplers": "from ..errors import x",
        "data.seeding": "",
        "engine": "import accelerate",
        "model": "from .base import x",
        "model.base": "from helios.engine import x",
        "callbacks": "import helios.loop",
        "loop": "from .model.base import x",
        "trainer": "from .loop import x",
    }
    packages = {"", "data", "model", "callbacks"}
    for name, text in (sound | files).items():
        path = tmp_path.joinpath(*name.split("."))
        path = path / "__init__.py" if name in packages else path.with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    tree = scan(tmp_path)
    found = upward_imports(tree) + import_cycles(tree) + forbidden(tree)
    if message is None:
        assert found == []
    else:
        assert any(message in line for line in found), found
