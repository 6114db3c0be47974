"""Two processes: DDP and FSDP2 of optimised models give the gradients of one process on the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_steps import DOUBLE, SINGLE, bert, llama, same, scattered, sentences, step, text

import fastpeft as fp

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
KINDS = {"llama": (llama, text, ["q_proj", "v_proj", "down_proj"], SINGLE), "bert": (bert, sentences, ["query", "output.dense"], DOUBLE)}
ROWS = 4


def adapted(kind):
    make, _, targets, _ = KINDS[kind]
    return scattered(peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)))


def batch_of(kind, rank=None):
    """The whole batch, or one process's half; every row has as many labels, so that halves weigh the same."""
    batch = KINDS[kind][1](ROWS, 9)
    if kind == "llama":
        batch["labels"] = torch.where(torch.arange(9) < 4, batch["input_ids"], -100)
    return batch if rank is None else {name: t[rank::2] for name, t in batch.items()}


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for name, module in list(model.named_modules()):
        if name.endswith(("layers.0", "layers.1", "layer.0", "layer.1")):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAP = {"DDP": ddp, "FSDP2": fsdp}


def work(rank, port, results):
    """Every case in one pair of processes: starting them costs more than what they compute."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        kind, wrapper, order = case
        model = adapted(kind)
        if order == "before":
            fp.optimize(model)
        wrapped = WRAP[wrapper](model)
        if order == "after":
            fp.optimize(wrapped)
        grads = {}
        for _ in range(2):  # the second step finds what the first has left behind
            grads = step(wrapped, batch_of(kind, rank))
        grads.pop("loss")
        found[case] = {n.removeprefix("module."): g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    if rank == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()


CASES = [(kind, wrapper, order) for kind in KINDS for wrapper in WRAP for order in ("before", "after")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("two") / "found.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, (port, str(file)), nprocs=2, start_method="fork")
    return torch.load(file)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_gradients_of_two_processes_are_those_of_one(results, case):
    kind, _, _ = case
    want = step(adapted(kind), batch_of(kind))
    same({"loss": want["loss"], **results[case]}, want, **KINDS[kind][-1])
