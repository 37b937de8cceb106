"""Run by test_sharded.py on each rank: a loop by hand, with FSDP2.

Arguments: a folder, in JSON a list of runs, each with the folder of its checkpoints and
the batch at which it is stopped, and the Accelerator's options.
"""

import contextlib
import json
import pathlib
import sys

import torch
from accelerate.utils import set_seed
from distributed.sharded_script import Network, make_accelerator, whole
from support import AugmentedDataset, digest
from torch.utils.data import DataLoader

import helios

torch.set_num_threads(1)


def train(root, accelerator, stop_at):
    set_seed(4)
    net = Network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    loader = DataLoader(AugmentedDataset(26), batch_size=2, shuffle=True)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    session = helios.Session(accelerator, root, loader, net=net, opt=optimizer)
    if stop_at == "carried":
        return refusal(session, net)
    with contextlib.suppress(helios.RunStopped), session:
        for _ in session.epochs(2):
            net.train()
            for _, inputs, targets in session.batches():
                with accelerator.accumulate(net):
                    loss = (net(inputs) - targets).square().mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(net.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                session.log({"loss": loss})
                if session.state.global_iteration == stop_at:
                    session.request_stop("the test")
    state = whole({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    accelerator.free_memory()
    return {
        "finished": session.stop_reason is None,
        "weights": digest(state),
        "type": type(next(net.parameters())).__name__,
    }


def refusal(session, net):
    """What is said of a variable of which each rank has a piece."""
    averages = {name: p.detach().clone() for name, p in net.named_parameters()}
    try:
        with session:
            for _ in session.epochs(1, carry=["averages"]):
                next(session.batches())
    except TypeError as error:
        return str(error), len(averages)
    return None


folder, runs = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
accelerator = make_accelerator(**json.loads(sys.argv[3]))
results = [train(folder / root, accelerator, stop) for root, stop in runs]
(folder / f"rank_{accelerator.process_index}.json").write_text(json.dumps(results))
accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
