"""``helios checkpoint``: look at checkpoints, compare them, thin them out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from helios.bars import clock, reading
from helios.cli.output import errors, print_json, size, table

# What imports torch is imported in the commands: `helios --help` must not wait for it.

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_ROOT = click.argument("root", type=_FOLDER)
_PATH = click.argument("path", type=_FOLDER)
_JSON = click.option("--json", "as_json", is_flag=True, help="For other programs.")


@click.group()
def checkpoint() -> None:
    """Look at checkpoints, compare them, thin them out.

    PATH is the folder of a checkpoint, ROOT one that has some in it or in its folders,
    such as a run's chkpt_root.

    Exit status: 0, or 1 where something is damaged or differs, or 2 where the command
    could not be carried out.
    """


@checkpoint.command("list")
@_ROOT
@_JSON
def list_(root: Path, as_json: bool) -> None:
    """List the checkpoints, newest first."""
    found = _found(root)
    rows = [
        {
            "path": path.name if path == root else str(path.relative_to(root)),
            "created": f"{record['created']:%Y-%m-%d %H:%M:%S}",
            "epoch": record["progress"].get("global_epoch"),
            "step": record["progress"].get("current_iteration"),
            "size_bytes": sum(f["size_bytes"] for f in record["files"].values()),
            "is_best": bool(record.get("is_best")),
            "metrics": {k: float(v) for k, v in record.get("metrics", {}).items()},
        }
        for path, record in found.items()
    ]
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("no checkpoints")
    table(
        {
            "checkpoint": row["path"],
            "created (UTC)": row["created"],
            "epoch": row["epoch"],
            "step": row["step"],
            "size": size(row["size_bytes"]),
            "": "best" if row["is_best"] else "",
            "metrics": "  ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items()),
        }
        for row in ([] if as_json else rows)
    )
    damaged = [path for path in _candidates(root) if path not in found]
    for path in damaged:
        click.echo(f"{path} has a record that cannot be read", err=True)
    if damaged:
        raise click.exceptions.Exit(1)


@checkpoint.command()
@_PATH
@click.option("--tensors", is_flag=True, help="List every tensor too.")
@_JSON
def show(path: Path, tensors: bool, as_json: bool) -> None:
    """Say what a checkpoint holds, without reading its tensors."""
    from helios.checkpoint import read_checkpoint

    with errors():
        found = read_checkpoint(path, verify=False)
    record = dict(found.record)
    del record["trees"]
    record["tensors"] = {
        group: {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
            for name, t in members.items()
        }
        for group, members in found.tensors.items()
    }
    record["created"] = record["created"].isoformat()
    if as_json:
        print_json(record)
        return
    best = ", the best one" if record.get("is_best") else ""
    click.echo(f"{path}, created {record['created']}, format {record['format']}{best}")
    for title in ("progress", "metrics", "identity", "imported"):
        click.echo(title)
        for name, value in record.get(title, {}).items():
            click.echo(f"  {name}  {value}")
    click.echo("files")
    table(
        {"": " ", "file": name, "size": size(entry["size_bytes"])}
        for name, entry in record["files"].items()
    )
    click.echo("tensors")
    for group, members in record["tensors"].items():
        count = sum(tensor.numel() for tensor in found.tensors[group].values())
        click.echo(f"  {group}  {len(members)}, of {count} numbers")
        for name, tensor in members.items() if tensors else ():
            click.echo(f"    {name}  {tensor['dtype']} {tensor['shape']}")


@checkpoint.command()
@_ROOT
@_JSON
def verify(root: Path, as_json: bool) -> None:
    """Compare all files with their checksums, and name what is damaged."""
    from helios.checkpoint import find_damage
    from helios.errors import CheckpointError

    paths = _candidates(root)
    report: dict[str, dict[str, str]] = {}
    with reading(paths) as advance:
        for path in paths:
            try:
                report[str(path)] = find_damage(path, advance=advance)
            except CheckpointError as error:
                report[str(path)] = {"helios.json": str(error)}
    if as_json:
        click.echo(json.dumps(report))
    for name, damage in {} if as_json else report.items():
        click.echo(f"{name}: {'DAMAGED' if damage else 'whole'}")
        for file, why in damage.items():
            click.echo(f"  {file}: {why}")
    if not report:
        raise click.UsageError(f"there is no checkpoint in {root}")
    if any(report.values()):
        raise click.exceptions.Exit(1)


@checkpoint.command()
@click.argument("first", type=_FOLDER)
@click.argument("second", type=_FOLDER)
@click.option(
    "--most", type=click.IntRange(0), default=20, show_default=True, help="Lines."
)
@_JSON
def diff(first: Path, second: Path, most: int, as_json: bool) -> None:
    """Name the first values and tensors that differ, bit by bit."""
    from itertools import islice

    from helios.checkpoint import read_checkpoint
    from helios.differences import differences

    with errors():
        with reading([first, second]) as advance:
            one, two = (read_checkpoint(p, advance=advance) for p in (first, second))
        found = []
        groups = {**one.record["trees"], **two.record["trees"]}
        # "model" and "training" before the ranks.
        for group in sorted(groups, key=lambda g: (g.startswith("rank"), g)):
            missing = [c.path for c in (one, two) if group not in c.record["trees"]]
            if missing:
                found.append((group, f"not in {missing[0]}", ""))
                continue
            left, right = (c.tree(group, has_classes=False) for c in (one, two))
            with clock("comparing"):
                found += islice(differences(left, right, group), most + 1)
        for name in ("progress", "metrics"):
            pair = [dict(c.record.get(name, {})) for c in (one, two)]
            for values in pair:
                values.pop("average_iter_time", None)  # it is measured
            found += islice(differences(pair[0], pair[1], name), most)
    shown = found[:most]
    if as_json:
        rows = [{"path": p, "first": f"{a}", "second": f"{b}"} for p, a, b in shown]
        click.echo(json.dumps(rows))
    else:
        for path, left, right in shown:
            click.echo(f"{path}: {left!r:.80} / {right!r:.80}")
        if len(found) > most:
            click.echo("and more")
        if not found:
            click.echo("the same, bit by bit")
    if found:
        raise click.exceptions.Exit(1)


@checkpoint.command()
@_ROOT
@click.option("--keep-last", type=click.IntRange(1), required=True)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@_JSON
def prune(root: Path, keep_last: int, dry_run: bool, as_json: bool) -> None:
    """Delete what is older than the newest whole checkpoints of each folder.

    Damaged ones don't count, and stay if they are newer. The best one stays.
    """
    from helios.checkpoint import CheckpointStore, find_damage

    doomed = list[Path]()
    for folder in _folders(root):
        store, whole = CheckpointStore(folder), 0
        for path, record in store.records().items():
            if whole < keep_last:
                with reading([path]) as advance:
                    whole += not find_damage(path, advance=advance)
            elif not record.get("is_best"):
                doomed.append(path)
                with errors():
                    if not dry_run:
                        store.remove(path)
                if not as_json:
                    click.echo(f"{'would delete' if dry_run else 'deleted'} {path}")
    if as_json:
        click.echo(json.dumps([str(path) for path in doomed]))


@checkpoint.command()
@_PATH
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--accelerate",
    is_flag=True,
    help="Make OUT a folder that Accelerator.load_state reads.",
)
@click.option(
    "--shard-bytes",
    type=click.IntRange(1),
    help="Make OUT a folder of such shards with an index, as on the Hugging Face Hub.",
)
@_JSON
def export(
    path: Path, out: Path, accelerate: bool, shard_bytes: int | None, as_json: bool
) -> None:
    """Write the networks' weights to OUT, one safetensors file without the rest."""
    import shutil

    from helios import exporting
    from helios.checkpoint import read_checkpoint

    if out.exists():
        raise click.UsageError(f"{out} exists; remove it, or choose another name")
    if accelerate and shard_bytes:
        raise click.UsageError("`--accelerate` and `--shard-bytes` exclude each other")
    partial = out.with_name(f".{out.name}.partial")
    try:
        with errors():
            with reading([path]) as advance:
                found = read_checkpoint(path, advance=advance)
            with clock("writing"):
                if accelerate:
                    partial.mkdir()
                    left_out = exporting.to_accelerate(found, partial)
                else:
                    tensors, left_out = exporting.weights(found)
                    exporting.save_weights(tensors, partial, shard_bytes)
        partial.rename(out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    if as_json:
        print_json({"path": str(out), "left_out": left_out})
        return
    for name in left_out:
        click.echo(f"not in there: {name}", err=True)
    click.echo(f"written to {out}")


@checkpoint.command("import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--save-name", required=True, help="The model's name.")
@click.option("--epoch", type=click.IntRange(0), help="Epochs that are done.")
@click.option("--step", type=click.IntRange(0), help="Steps that are done.")
@click.option("--batch", type=click.IntRange(0), help="Batches of the next epoch done.")
@click.option("--networks", help="Their attributes, by commas, in the order of files.")
@click.option("--optimizers", help="Likewise.")
@click.option("--schedulers", help="Likewise.")
@click.option("--others", help="Likewise, of what was registered for checkpointing.")
@_JSON
def import_(
    source: Path,
    root: Path,
    save_name: str,
    epoch: int | None,
    step: int | None,
    batch: int | None,
    as_json: bool,
    **names: str | None,
) -> None:
    """Make a checkpoint of SOURCE in ROOT, from which a run goes on.

    SOURCE is a folder of Accelerate's save_state, or the .pth file of an older Helios.
    ROOT is the run's chkpt_root. What the files cannot tell is listed.
    """
    from helios.interchange import take_over

    given = {"global_epoch": epoch, "current_iteration": step, "dataset_iter": batch}
    progress = {name: value for name, value in given.items() if value is not None}
    attributes = {kind: text.split(",") for kind, text in names.items() if text}
    with errors(), clock("importing"):
        found = take_over(source, progress, attributes)
        path = found.write(root, save_name)
    if as_json:
        click.echo(json.dumps({"path": str(path), "unknown": found.unknown}))
        return
    click.echo(f"written to {path}")
    for line in found.unknown:
        click.echo(f"not known: {line}")


def _is_checkpoint(path: Path) -> bool:
    return (path / "helios.json").exists() or any(path.glob("*.safetensors"))


def _candidates(root: Path) -> list[Path]:
    """The checkpoints in a folder and its folders, or the one that it is."""
    from helios.checkpoint import CheckpointStore

    if _is_checkpoint(root):
        return [root]
    return [
        p for folder in _folders(root) for p in CheckpointStore(folder).candidates()
    ]


def _found(root: Path) -> dict[Path, dict[str, Any]]:
    """Those whose record can be read, newest first, and their records."""
    from helios.checkpoint.records import read_record
    from helios.errors import CheckpointError

    found = dict[Path, dict[str, Any]]()
    for path in _candidates(root):
        with contextlib.suppress(CheckpointError):
            found[path] = read_record(path)
    newest_first = sorted(found.items(), key=lambda f: f[1]["created"], reverse=True)
    return dict(newest_first)


def _folders(root: Path) -> list[Path]:
    """A folder and its folders; a link is another name of one, such as "latest"."""
    return [root, *(p for p in sorted(root.glob("[!.]*/")) if not p.is_symlink())]
