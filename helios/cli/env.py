"""``helios env``: what a bug report needs to say about a machine."""

import os
import platform
import sys

import click

_LAUNCH = ("ACCELERATE_", "CUDA_", "NCCL_", "GLOO_", "OMP_", "SLURM_", "TORCH")
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _report() -> dict[str, dict[str, str]]:
    # Imported here: `helios --help` must not wait for torch.
    import torch

    from helios.fingerprint import versions

    devices = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used"}
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 2**30:.0f} GiB"
        devices[f"cuda:{index}"] = f"{found.name}, {size}, CUDA {torch.version.cuda}"
    names = [n for n in sorted(os.environ) if n in _RANKS or n.startswith(_LAUNCH)]
    return {
        "packages": versions(),
        "devices": devices,
        "system": {"platform": platform.platform(), "executable": sys.executable},
        "launch environment": {name: os.environ[name] for name in names},
    }


@click.command()
def env() -> None:
    """Report versions, devices and the launch environment."""
    for title, rows in _report().items():
        click.echo(title if rows else f"{title}: none")
        for name, value in rows.items():
            click.echo(f"  {name:<{max(map(len, rows))}}  {value}")
