"""The code in the README and the pages runs, and the commands in them exist."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helios.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAKE = re.compile(r"`make ([a-z-]+)")
LINK = re.compile(r"\]\(([\w./-]+)[)#]")


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks, each behind so many empty lines that its errors show where."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        if match[1] in languages:
            yield "\n" * text.count("\n", 0, match.start(2)) + match[2]


def named(paths: list[Path]) -> dict[str, Path]:
    return {str(path.relative_to(ROOT)): path for path in paths}


@pytest.fixture(autouse=True)
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reader in an empty folder, who can import the examples and contenders."""
    monkeypatch.chdir(tmp_path)
    for folder in ("examples", "benchmarks/contenders"):
        monkeypatch.syspath_prepend(ROOT / folder)
    before, threads = set(sys.modules), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("digits", "steps"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("page", named(PAGES).values(), ids=named(PAGES))
def test_python_blocks_of_a_page_run_one_after_the_other(page: Path) -> None:
    namespace = {"__name__": "__main__"}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), namespace)


def test_readme_has_a_program_of_less_than_forty_lines() -> None:
    (program,) = blocks(ROOT / "README.md", "python")
    assert len(program.strip().splitlines()) < 40


def test_program_of_the_readme_goes_on_when_it_is_started_again() -> None:
    (program,) = blocks(ROOT / "README.md", "python")
    code = compile(program, ROOT / "README.md", "exec")
    files = []
    for _ in range(2):
        exec(code, {"__name__": "__main__"})
        files.append({f: f.stat().st_mtime_ns for f in Path("runs").rglob("*.json")})
    assert len(files[0]) == 3
    assert files[0] == files[1]


@pytest.mark.parametrize("page", named(TEXTS).values(), ids=named(TEXTS))
def test_commands_of_a_page_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = MAKE.findall(page.read_text())
    for block in blocks(page, "sh", "bash", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                asked += [word for word in words[1:] if "=" not in word]
            if words[:1] == ["helios"]:
                assert words[1] in {*main.commands, "--version", "--help"}, line
            scripts = [w for w in words if w.startswith(("examples/", "benchmarks/"))]
            assert [s for s in scripts if not (ROOT / s).exists()] == [], line
    assert set(asked) - set(targets) == set()


@pytest.mark.parametrize("page", named(TEXTS).values(), ids=named(TEXTS))
def test_files_that_a_page_links_to_exist(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "." in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_files_that_are_named_exist() -> None:
    names = set()
    for page in TEXTS:
        names |= set(
            re.findall(r"`((?:tests|helios|examples)/[\w./]*)`", page.read_text())
        )
    assert sorted(name for name in names if not (ROOT / name).exists()) == []
