"""Finds what a script uses of Accelerate, and the traps that it has.

What nobody calls is read by itself, at the end. All is read twice, to know the second
time what comes later in the script.
"""

import ast
import re

from helios.porting.findings import Finding, kinds_of, trap, use
from helios.porting.flow import LENGTHS, Call, Flow, Loop, Marks, Value, union

_RESUMING = {"save_state", "load_state", "skip_first_batches"}


def read_script(text: str, path: str = "the script") -> list[Finding]:
    """Find what a script uses of Accelerate, and its traps, in the order of lines.

    Raises:
        SyntaxError: it is no Python.
        ValueError: it does not import Accelerate.
    """
    tree = ast.parse(text, filename=path)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or a.name for n in imports for a in n.names}
    if "accelerate" not in {name.partition(".")[0] for name in names}:
        raise ValueError(f"{path} does not import accelerate")
    reader = _Reader()
    reader.read(tree)
    return sorted(reader.read(tree))


class _Reader(Flow):
    def read(self, tree: ast.Module) -> set[Finding]:
        """Read all; what it has learnt of names, the next reading uses."""
        self._reset()
        self._shuffled: set[tuple[int, bool]] = set()
        self._skips, self._has_epochs = set[int](), False
        self._unseeded: set[tuple[int, bool]] = set()  # loaders that shuffle
        self._has_seed = self._is_uncalled = False
        uppers = [n.upper for n in ast.walk(tree) if isinstance(n, ast.Slice)]
        self._is_cut = any(upper and "len(" in ast.unparse(upper) for upper in uppers)
        self._begin("")
        self._body(tree.body)
        self._end()
        for name, function in list(self._functions.items()):
            if function not in self._walked:
                self._is_uncalled = True
                self._begin(name)
                self._follow(name, [], {})
                self._end()
        seedable = self._option("use_seedable_sampler", "False")
        is_repeated = seedable == "True" and self._has_epochs
        for line in self._skips:
            self._trap("skip-first-batches", line, not is_repeated)
        if _RESUMING & {f.name for f in self.found} and not is_repeated:
            for line, is_sure in self._shuffled:
                self._trap("shuffle-not-seedable", line, is_sure and seedable != "?")
        for line, is_sure in set() if self._has_seed else self._unseeded:
            self._trap("no-seed", line, is_sure)
        sure = {f.name for f in self.found if f.kind == "trap" and f.is_certain}
        once = sure & {"no-seed", "scheduler-per-rank"}  # one line is enough of that
        return {f for f in self.found if f.is_certain or f.name not in once}

    def _begin(self, name: str) -> None:
        """What is read by itself knows nothing of what ran before."""
        is_sample = name.endswith(("__getitem__", "__getitems__"))
        self._ctx: Marks = frozenset({"sample"} if is_sample else ())
        self._returned = Value()
        self._is_seeded = self._has_order = self._is_eval = False
        self._counts: list[tuple[int, int, bool]] = []  # depth, line, is padded

    def _end(self) -> None:
        is_cut = self._is_cut or self._option("even_batches", "True") == "False"
        for _, line, is_padded in self._counts:
            if not (is_padded and is_cut):
                self._trap("ungathered-metrics", line, not is_padded)

    def _trap(self, name: str, line: int, is_certain: bool = True) -> None:
        self.found.add(trap(name, line, is_certain))

    def _option(self, name: str, default: str) -> str:
        """The constant that Accelerate is given, as text; "?" if it isn't known."""
        config = self._options.get("dataloader_config")
        is_hidden = config and not config.name.endswith("DataLoaderConfiguration()")
        if name not in self._options:
            return "?" if is_hidden or None in self._options else default
        found = self._options[name].name
        return found if re.fullmatch(r"\d+|True|False|None", found) else "?"

    def _called(self, call: Call) -> Value:
        node, called, given, named, result = call
        kinds, marks = kinds_of(called.name), result.marks
        self._has_seed |= _seeds(called) or "random_seed" in named
        if "prepare" in kinds:
            done = [self._prepare(v, n) for v, n in zip(given, node.args, strict=True)]
            return done[0] if len(done) == 1 else Value("?", marks, tuple(done))
        if "skip" in kinds:
            self._skips.add(node.lineno)
            return given[0] if given else result
        if "loader" in kinds:
            self.found.add(use("DataLoader", node.lineno))
            shuffle = named.get("shuffle", Value("False")).name
            is_random = "random sampler" in named.get("sampler", Value()).marks
            if is_random or shuffle not in ("False", "None"):
                is_known = is_random or shuffle == "True"
                is_sure = is_known and "generator" not in named
                marks = frozenset({"shuffled", "surely" if is_sure else "perhaps"})
                # Who calls what nobody calls here may have set a seed.
                is_known = is_known and not self._is_uncalled
                self._unseeded.add((node.lineno, is_known))
        elif "scheduler" in marks and "scheduler" not in called.marks:
            # The optimizer may have lengths in it, of its network.
            others = [v for k, v in named.items() if k != "optimizer"]
            marks = frozenset({"scheduler"} | union([*given[1:], *others]) & LENGTHS)
        elif "length" in kinds:
            marks = frozenset({"own length" if "prepared" in marks else "length"})
        elif "backward" in kinds:
            for loop in self._loops[-1:]:
                loop.trains = True
            for argument in node.args:
                if isinstance(argument, ast.Name):
                    value = self._value(argument)
                    self._set(argument.id, value._replace(marks=value.marks | {"loss"}))
        else:
            self._judge(call, kinds)
        return result._replace(marks=marks)

    def _judge(self, call: Call, kinds: Marks) -> None:
        """Look for traps in a call that makes nothing."""
        node, called, given, named, result = call
        line, marks = node.lineno, result.marks
        loop = self._loops[-1] if self._loops else Loop()
        if "save" in kinds and self._ctx & {"rank", "perhaps rank"}:
            self._trap("save-state-on-main", line, "rank" in self._ctx)
        elif kinds & {"gathered", "all gathered"}:
            self._gather("all gathered" in kinds)
        elif "clip" in kinds and "accumulate" in self._ctx:
            steps = self._option("gradient_accumulation_steps", "?")
            steps = self._option("num_steps", steps)
            if not self._ctx & {"sync", "periodic"} and steps != "1":
                self._trap("clip-in-window", line, steps != "?")
        elif "torch seed" in kinds or ("seed" in kinds and "sample" in self._ctx):
            if "generator" in called.marks:
                return
            if self._has_order and not self._is_seeded:
                self._trap("late-seed", line)
            self._is_seeded = True
        elif "epoch" in kinds:
            self._has_epochs = True
        elif kinds & {"eval", "train"} and not given:
            self._is_eval = "eval" in kinds
        elif "step" in kinds and {"scheduler", "prepared"} <= called.marks:
            loop.steps.add(line)
        elif "read" in kinds and "loss" in marks:
            if not self._ctx & {"periodic", "compared"}:
                loop.reads.add(trap("item-every-step", line, "flag" not in self._ctx))
        elif "add" in kinds and "bar" not in called.marks:
            target = node.func.value if isinstance(node.func, ast.Attribute) else node
            # What sums over ranks by itself counts padding, too.
            is_synced = {"gathered"} if "synced" in called.marks else set()
            self._added(target, line, marks | is_synced)
        elif "sample" in self._ctx and not self._is_seeded:
            source = named.get("generator", Value(marks=frozenset({"shared"})))
            is_torch = "torch draw" in kinds and "shared" in source.marks
            if is_torch or "draw" in kinds or {"generator", "shared"} <= called.marks:
                self._trap("random-getitem", line)

    def _prepare(self, value: Value, node: ast.expr) -> Value:
        marks = value.marks
        if "shuffled" in marks:
            self._shuffled.add((value.line or node.lineno, "surely" in marks))
            self._has_order |= "surely" in marks
        if "scheduler" in marks:
            split = self._option("split_batches", "False")
            linked = self._option("step_scheduler_with_optimizer", "True")
            if split == "True" or linked == "False":
                return value
            if not marks & {"ranks", "length"}:
                is_sure = "own length" in marks and "?" not in (split, linked)
                self._trap("scheduler-per-rank", node.lineno, is_sure)
        return value._replace(marks=marks | {"prepared"})

    def _gather(self, is_whole: bool) -> None:
        """What was counted in a loop before is gathered behind it."""
        depth = len(self._loops)
        behind = [count for count in self._counts if count[0] >= depth]
        self._counts = [count for count in self._counts if count[0] < depth]
        if not is_whole:
            self._counts += [(*count[:2], True) for count in behind]

    def _left(self, loop: Loop) -> None:
        for outer in self._loops if loop.trains else ():
            outer.has_training = True
        if loop.trains:
            self.found |= loop.reads
            return
        for line in loop.steps:
            self._trap("scheduler-per-rank", line, loop.has_training)
        if loop.counts:
            self._counts.append((len(self._loops), *loop.counts[0]))

    def _added(self, to: ast.expr, line: int, marks: Marks) -> None:
        loop = self._loops[-1] if self._loops else Loop()
        is_result = "batch" in marks and "all gathered" not in marks
        if loop.evaluates and is_result and self._key(to) not in loop.names:
            loop.counts.append((line, "gathered" in marks))


def _seeds(called: Value) -> bool:
    """Whether a call may set the seed of torch, as that of an unknown helper may."""
    others = "generator" in called.marks or re.match(r"(numpy|random)\.", called.name)
    return "seed" in called.name.rpartition(".")[2].lower() and not others
