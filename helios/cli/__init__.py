"""The ``helios`` command."""

import click

from helios._version import __version__
from helios.cli.checkpoint import checkpoint
from helios.cli.env import env
from helios.failures.command import replay
from helios.launcher import launch
from helios.porting.command import port
from helios.verifying.command import verify_resume


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="helios")
def main() -> None:
    """Resumable training on Accelerate."""


main.add_command(checkpoint)
main.add_command(env)
main.add_command(launch)
main.add_command(port)
main.add_command(replay)
main.add_command(verify_resume)
