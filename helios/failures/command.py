"""``helios replay``: the command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
def replay(bundle: Path) -> None:
    """Run the step again whose failure has left the folder BUNDLE.

    The command of that run is started again, in its folder and with its variables. It
    goes on from the checkpoint before the step, or begins anew where there was none,
    and writes nothing.

    Exit status: that of the command, such as 1 where the step has failed again, 0 where
    it has not, or 2 where BUNDLE cannot be read.
    """
    # Imported here: `helios --help` must not wait for torch.
    from helios.errors import CheckpointError
    from helios.failures import replay

    try:
        status = replay.start(bundle)
    except (CheckpointError, OSError) as error:
        raise click.UsageError(str(error)) from error
    raise click.exceptions.Exit(status)
