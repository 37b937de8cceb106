"""Two hosts of two ranks each: one is lost, comes back, and nothing has changed."""

import json
import os
import pathlib
import sys
import time

import pytest
from support.hosts import end, two_hosts

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "hosts_script.py"
OPTIONS = {"total_steps": 3, "chkpt_frequency": 1}
TIMEOUT_S = 90


def torchrun(hosts, number, port):
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{hosts[0].name}:{port}", "--rdzv-id", "run"),
    ]


def static_torchrun(hosts, number, port):
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(number)),
        *("--master-addr", hosts[0].address, "--master-port", str(port)),
    ]


def accelerate_launch(hosts, number, port):
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_machines", "2", "--num_processes", "4", "--machine_rank", str(number)),
        *("--main_process_ip", hosts[0].address, "--main_process_port", str(port)),
    ]


def start(hosts, launcher, root, how="plain", **options):
    """Start the job on both hosts; root is where each of them has its disk."""
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    clean = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    clean |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = [how, hosts[0].folder, root, json.dumps({**OPTIONS, **options})]
    port = hosts[0].free_port()
    return [
        host.start(*launcher(hosts, number, port), SCRIPT, *arguments, env=clean)
        for number, host in enumerate(hosts)
    ]


def run(hosts, launcher, root, **options):
    """Run the job on both hosts to its end; the reports of the ranks, the output."""
    outputs = []
    for process in start(hosts, launcher, root, **options):
        code, output = end(process, TIMEOUT_S)
        assert code == 0, output
        outputs.append(output)
    return reports(hosts[0].folder), outputs


def reports(folder):
    found = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(4)]
    for path in folder.glob("rank_*"):
        path.unlink()
    return found
