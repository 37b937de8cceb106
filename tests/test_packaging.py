"""What `pip install helios-ml` gets: the package alone, and a working command."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    run(*build, cwd=ROOT)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"helios/py.typed", "helios/porting/table.toml"} <= set(names)
    assert {n.split("/")[0].split("-")[0] for n in names} == {"helios", "helios_ml"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "helios").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == sources


@pytest.mark.slow
def test_installed_command_runs_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / "bin"
    python = binaries / "python"
    # The dependencies come from this environment, the package from the wheel.
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = run(
        python, "-c", "import site; print(*site.getsitepackages())", cwd=tmp_path
    ).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = run(python, "-c", "import helios; print(helios.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path / "env"))
    version = run(binaries / "helios", "--version", cwd=tmp_path)
    assert wheel.name.split("-")[1] in version
