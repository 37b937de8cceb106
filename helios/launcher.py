"""``helios launch``: what `accelerate launch` reads, started without its traps."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


@click.command(
    context_settings={
        "ignore_unknown_options": True,  # they are Accelerate's
        "allow_interspersed_args": False,  # those after the script are the script's
    }
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, required=True)
def launch(arguments: tuple[str, ...]) -> None:
    """Start the ranks of a script.

    ARGUMENTS are options of `accelerate launch`, the script, and its own arguments.
    `accelerate launch --help` lists the options; the file of `accelerate config`, or
    that of --config_file, is honoured.

    Other than with `accelerate launch`, --num_processes starts so many ranks on the CPU
    too; signals reach the script; --max_restarts starts a single process anew, too;
    ranks on one host choose a port by themselves; and the exit status is the script's,
    or that of the rank that failed first.
    """
    from helios.errors import LaunchError

    try:
        _launch(arguments)
    except (LaunchError, ValueError, AssertionError, OSError) as error:
        raise click.UsageError(str(error)) from error


def _launch(arguments: Sequence[str]) -> NoReturn:
    # Imported here: `helios --help` must not wait for torch.
    from accelerate.commands import launch as accelerates
    from accelerate.utils import ComputeEnvironment, prepare_simple_launcher_cmd_env

    parser = accelerates.launch_command_parser()
    parser.error = _refuse
    given = parser.parse_args(arguments)
    args, defaults, _ = accelerates._validate_launch_command(given)
    sagemaker = ComputeEnvironment.AMAZON_SAGEMAKER
    is_remote = getattr(defaults, "compute_environment", None) == sagemaker
    if args.use_deepspeed or args.tpu or is_remote or args.mpirun_hostfile:
        # Helios trains in none of these ways. For other scripts they are as they were.
        command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
        os.execv(sys.executable, command)
    if max(args.num_processes or 1, args.num_machines or 1) > 1 or args.max_restarts:
        _start_ranks(args)
    command, environment = prepare_simple_launcher_cmd_env(args)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)  # signals are the script's own


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; `accelerate launch --help` lists the options")


def _start_ranks(args: Any) -> NoReturn:
    from accelerate.utils import prepare_multi_gpu_env
    from torch.distributed.run import config_from_args, get_args_parser

    from helios import elastic

    on_cpu = _check_numbers(args)
    is_alone = args.num_machines == 1
    if is_alone:
        args.main_process_port = 0
    os.environ.update(prepare_multi_gpu_env(args))
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # What torch's launcher has no word for is Accelerate's, and in the environment.
    own = vars(get_args_parser().parse_args(["--", args.training_script]))
    own |= {name: value for name, value in vars(args).items() if name in own}
    if is_alone:
        ports = elastic.on_one_host()
        own |= ports | {"rdzv_id": ports["run_id"]}
    elif args.max_restarts and args.rdzv_backend == "static":
        # With that one, ranks of a second attempt would read the first one's addresses.
        own["rdzv_backend"], is_host = "c10d", args.machine_rank == 0
        own["rdzv_endpoint"] = f"{args.main_process_ip}:{args.main_process_port}"
        own["rdzv_conf"] = f"is_host={is_host},{args.rdzv_conf or ''}".rstrip(",")
    with elastic.log_folder() as folder:
        own["log_dir"] = own["log_dir"] or folder
        config, program, rest = config_from_args(type(args)(**own))
        if args.num_processes == 1:  # else it would be wrapped as one of many
            unset = [part for name in _OF_A_RANK for part in ("-u", name)]
            program, rest = "env", [*unset, program, *rest]
        elastic.run_ranks(config, program, *rest)


def _check_numbers(args: Any) -> bool:
    """Complete the numbers of ranks and hosts; whether the ranks are to use the CPU."""
    import torch

    from helios.errors import LaunchError

    ranks = args.num_processes = args.num_processes or 1
    hosts = args.num_machines = args.num_machines or 1
    args.machine_rank = int(args.machine_rank or 0)
    if ranks % hosts:
        raise LaunchError(
            f"`--num_processes` is {ranks}, which {hosts} hosts cannot share out "
            "evenly; it is the number of all ranks, on all hosts together"
        )
    if hosts > 1 and args.main_process_ip is None:
        raise LaunchError(
            f"`--num_machines` is {hosts}, and `--main_process_ip` is not given; it is "
            "the address of the host with `--machine_rank 0`"
        )
    if hosts > 1 and not 0 <= args.machine_rank < hosts:
        raise LaunchError(
            f"`--machine_rank` is {args.machine_rank}; of {hosts} hosts it is one "
            f"from 0 to {hosts - 1}"
        )
    shown = torch.cuda.device_count()
    if args.cpu or args.use_cpu or not torch.accelerator.is_available():
        if args.use_fsdp:  # Accelerate would train with DDP, without a word
            raise LaunchError("FSDP is asked for, and works on GPUs only")
        return True
    if args.gpu_ids not in (None, "all"):
        chosen = str(args.gpu_ids).split(",")
        is_known = "CUDA_VISIBLE_DEVICES" in os.environ  # which numbers them anew
        for gpu in [] if is_known else chosen:
            if gpu.strip().isdecimal() and int(gpu) >= shown:
                raise LaunchError(
                    f"`--gpu_ids` is {args.gpu_ids}; this machine shows {shown} GPUs, "
                    "from 0 on"
                )
        shown = len(chosen)
    if torch.cuda.is_available() and ranks // hosts > shown:
        raise LaunchError(
            f"{ranks // hosts} ranks are asked for on this host, which shows {shown} "
            "GPUs; lower `--num_processes`, or add `--cpu`"
        )
    return False
