"""Which variables of a training loop its Session has to carry on."""

import ast
from collections.abc import Iterator, Mapping

from helios.porting.carried import Change, exposed_by, names_in, turn_of
from helios.porting.objects import left_behind
from helios.porting.placing import saved_by
from helios.porting.values import Values, appends, is_drawn

_MOVE = "make it a variable of the function, and name it in `carry`"
_SESSION = "make it before the session, and pass it, as `{0}={0}`, if it has a state"


class Keeper:
    """Finds what the two loops of a training carry on.

    That is what their turns read before they set it, and change; what they set, and is
    read behind them, as a resume may find no turn left; and what an epoch sets before
    its batches, and would be another value at a resume, which runs that again.
    """

    def __init__(
        self,
        above: Mapping[ast.AST, ast.AST],
        scope: ast.AST,
        loops: tuple[ast.For, ast.For],
        passed: set[str],
    ) -> None:
        """`passed` has the names of what the Session's call gets."""
        self._above, self._scope = above, scope
        self._epoch, self._loop = loops
        *_, tree = self._ancestors(self._loop)
        assert isinstance(tree, ast.Module)
        self._tree, self._saved = tree, saved_by(tree) | passed
        self._values = Values(scope, self._ancestors(scope))
        self._carried = set[str]()
        self._told = set[str]()
        self.left: list[str] = []  # what is not carried

    def keep(self) -> list[str]:
        """The names of what is to be carried, in the order of the script."""
        behind = exposed_by(self._following(self._epoch, self._scope))
        inside = exposed_by(self._following(self._loop, self._epoch))
        turns = [
            (self._epoch, turn_of(self._epoch), behind),
            (self._loop, turn_of(self._loop), inside),
        ]
        for loop, turn, later in turns:
            for name in sorted(
                turn.changes.keys() & (turn.exposed | later - turn.known)
            ):
                if name.partition(".")[0] not in self._saved:
                    self._judge(name, turn.changes[name], loop)
        for _, turn, later in turns:
            for name in sorted(turn.changes.keys() & later):
                self._judge_last(name, turn.changes[name])
        self._judge_first()
        loops = self._epoch, self._loop
        handled = self._told | self._carried
        for name, line, advice in left_behind(self._tree, self._scope, loops, handled):
            if advice or not self._values.is_own(name):
                self._tell(name, line, advice or _MOVE)
            else:
                self._carried.add(name)
        return sorted(self._carried, key=self._place)

    def _judge(self, name: str, changes: list[Change], loop: ast.For) -> None:
        """Carry, or tell of, what turns read before they set it, and change."""
        values, line = self._values, changes[0].node.lineno
        may_be_plain, is_plain = values.may_be_plain(name), values.are_plain(name)
        if all(change.value is None for change in changes):
            is_list = appends(changes) and ("." in name or may_be_plain)
            if not is_plain and not is_list:
                return  # an object's own business
        else:
            is_set = any(line < loop.lineno for line, _ in values.of(name))
            is_set |= any(change.adds for change in changes) or name in values.given
            if not is_set and "." not in name:
                # The first turn sets it before it reads it.
                if may_be_plain and values.is_own(name):
                    self._carried.add(name)
                return
        if "." in name:
            told = "make it a variable, and name it in `carry`; or pass its object to "
            self._tell(name, line, f"{told}the session")
        elif not values.is_own(name):
            self._tell(name, line, _MOVE)
        elif values.are_read(name):
            told = "no checkpoint holds it; make it anew, by `session.state`"
            self._tell(name, line, told)
        elif values.are_live(name) or not (is_plain or may_be_plain):
            self._tell(name, line, _SESSION.format(name))
        else:
            self._carried.add(name)

    def _judge_last(self, name: str, changes: list[Change]) -> None:
        """What the last turn sets for what is behind it, where a resume may be."""
        is_set = any(change.value is not None for change in changes)
        if is_set and self._values.is_own(name) and self._is_new(name):
            if self._values.may_be_plain(name):
                self._carried.add(name)
            else:
                told = "a resume behind the loop has none; carry a plain value of it"
                self._tell(name, changes[-1].node.lineno, told)

    def _judge_first(self) -> None:
        """What an epoch sets before its batches, and would be another at a resume."""
        behind = self._following(self._loop, self._epoch)
        wanted = exposed_by([self._loop, *behind]) - names_in(self._loop.iter)
        nodes = [n for n in ast.walk(self._epoch) if isinstance(n, ast.Assign)]
        for node in sorted(nodes, key=lambda node: node.lineno):
            above = [n.test for n in self._ancestors(node) if isinstance(n, ast.If)]
            uses = set[str]().union(*map(names_in, [node.value, *above]))
            is_another = is_drawn(node.value) or uses & self._carried
            if is_another and node.lineno < self._loop.lineno:
                for name in set[str]().union(*map(names_in, node.targets)) & wanted:
                    if self._is_new(name) and self._values.may_be_plain(name):
                        self._carried.add(name)

    def _is_new(self, name: str) -> bool:
        known = self._saved | self._told | self._carried
        return "." not in name and name not in known

    def _following(self, node: ast.AST, top: ast.AST) -> Iterator[ast.stmt]:
        """The statements that are run behind a loop, within what is around it."""
        yield from getattr(node, "orelse", [])
        while node is not top:
            above = self._above[node]
            for part in ("body", "orelse", "finalbody"):
                block = getattr(above, part, [])
                if node in block:
                    yield from block[block.index(node) + 1 :]
            node = above

    def _ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while (above := self._above.get(node)) is not None:
            yield above
            node = above

    def _place(self, name: str) -> tuple[int, int]:
        """Where it is first named."""
        names = [n for n in ast.walk(self._scope) if isinstance(n, ast.Name | ast.arg)]
        of_it = [n for n in names if name == getattr(n, "id", getattr(n, "arg", ""))]
        return min((node.lineno, node.col_offset) for node in of_it)

    def _tell(self, name: str, line: int, advice: str) -> None:
        if name not in self._told:
            self._told.add(name)
            self.left.append(f"line {line}: `{name}` begins anew at a resume: {advice}")
