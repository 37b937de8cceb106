"""``helios env``: what a bug report needs to say about a machine."""

import importlib.metadata
import json
import os
import platform
import sys

import click

from helios._version import __version__

__all__ = ["env"]

_PACKAGES = ("torch", "accelerate", "numpy", "safetensors", "tensorboard", "click")
_PREFIXES = ("ACCELERATE_", "CUDA_", "NCCL_", "GLOO_", "OMP_", "SLURM_", "TORCH")
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _report() -> dict[str, dict[str, str]]:
    # Imported here: `helios --help` must not wait for torch.
    import torch

    packages = {"helios-ml": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    devices = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used"}
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 2**30:.0f} GiB"
        devices[f"cuda:{index}"] = f"{found.name}, {size}, CUDA {torch.version.cuda}"
    launch = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _NAMES or name.startswith(_PREFIXES)
    }
    system = {"platform": platform.platform(), "executable": sys.executable}
    return {
        "packages": packages,
        "devices": devices,
        "system": system,
        "launch environment": launch or {"(none)": "a plain process"},
    }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Report versions, devices and the launch environment."""
    report = _report()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for title, rows in report.items():
        click.echo(title)
        width = max(map(len, rows))
        for name, value in rows.items():
            click.echo(f"  {name:<{width}}  {value}")
