"""Pairs of an Accelerate script and its port: the same bits, in few changed lines."""

import difflib
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import run_ranks

from helios.cli import main

pytestmark = pytest.mark.timeout(400)  # whole scripts, several of them in a test

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "porting"
STOPPED = Path(__file__).with_name("stopped_script.py")
OPTIONS = ("--cpu", "--epochs", "2")
PAIRS = sorted(
    path.stem.removesuffix("_accelerate") for path in FOLDER.glob("*_accelerate.py")
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)


def runs(quick=False):
    """Each pair on one rank and on two; the latter may be quick."""
    for pair in PAIRS:
        for ranks in (1, 2):
            marks = [] if quick and ranks == 2 else [pytest.mark.slow]
            marks += [needs_transformers] if pair == "transformers" else []
            yield pytest.param(pair, ranks, marks=marks)


def script(pair, kind):
    return FOLDER / f"{pair}_{kind}.py"


def train(path, ranks, folder):
    run_ranks(path, ranks, folder / "run", *OPTIONS, cwd=folder)


def weights(folder):
    """The final ones of each network, byte by byte."""
    final = folder / "run" / "final"
    files = sorted(final.rglob("*.safetensors"))
    assert files
    return {str(file.relative_to(final)): file.read_bytes() for file in files}


def code(path):
    """The lines below the docstring that are not empty."""
    lines = path.read_text().split('"""', 2)[2].splitlines()
    return [line for line in lines if line.strip()]


def sizes(pair):
    """Lines before and after, and how many of the latter are changed or added."""
    old, new = (code(script(pair, kind)) for kind in ("accelerate", "session"))
    added = [line for line in difflib.ndiff(old, new) if line.startswith("+ ")]
    return len(old), len(new), len(added)


@pytest.mark.parametrize("pair", PAIRS)
def test_port_has_six_changed_lines_at_most(pair):
    before, after, changed = sizes(pair)
    assert 0 < changed <= 6
    assert after <= before + 3


def test_page_says_how_many_lines_each_pair_has():
    page = (ROOT / "docs" / "porting.md").read_text()
    rows = re.findall(
        r"^\| (\w+): .*\| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE
    )
    found = {pair: tuple(map(int, numbers)) for pair, *numbers in rows}
    assert found == {pair: sizes(pair) for pair in PAIRS}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The folder of a script's run before it was ported, by pair and ranks."""

    @functools.cache
    def folder(pair, ranks):
        made = tmp_path_factory.mktemp("originals")
        train(script(pair, "accelerate"), ranks, made)
        return made

    return folder


@pytest.mark.parametrize(("pair", "ranks"), [*runs(quick=True)])
def test_weights_before_and_after_porting_are_bit_identical(
    tmp_path, originals, pair, ranks
):
    train(script(pair, "session"), ranks, tmp_path)
    assert weights(tmp_path) == weights(originals(pair, ranks))


@pytest.mark.parametrize(("pair", "ranks"), [*runs()])
def test_port_that_is_stopped_by_a_signal_ends_with_the_same_weights(
    tmp_path, originals, pair, ranks
):
    for batch in (7, 21)[ranks - 1 :]:
        command = batch, script(pair, "session"), tmp_path / "run", *OPTIONS
        run_ranks(STOPPED, ranks, *command, cwd=tmp_path)
    assert not (tmp_path / "run" / "final").exists()
    train(script(pair, "session"), ranks, tmp_path)
    assert weights(tmp_path) == weights(originals(pair, ranks))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "epoch", "batch"), [(1, 0, 20), (2, 1, 8)])
def test_port_takes_up_what_the_original_has_saved_inside_an_epoch(
    tmp_path, originals, ranks, epoch, batch
):
    saved = originals("classifier", ranks) / "run" / "step_20"
    words = ["checkpoint", "import", saved, tmp_path, "--save-name", "run"]
    words += ["--epoch", epoch, "--batch", batch]
    done = CliRunner().invoke(main, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    train(script("classifier", "session"), ranks, tmp_path)
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"resumed from run_epoch_{epoch}_iter_20" in log
    assert weights(tmp_path) == weights(originals("classifier", ranks))
