"""Several devices on paper: the forms of a sum over ranks, and bytes against a base that is taken apart."""

import json

import pytest

import fastpeft as fp
from fastpeft.cli import app
from fastpeft.cost.several_devices import Links, all_gather_seconds, all_reduce_seconds


def test_the_forms_of_a_sum():
    """4 GB over 4 devices at 1 GB/s: six rounds of 1 GB. Over 2 x 2 with a network of 0.5 GB/s: in two levels 2 x (2 GB at 1 GB/s) and
    2 x (2 GB at 0.5 GB/s)."""
    assert all_reduce_seconds(4e9, 4, 1, Links(1e9, latency=0.0)) == pytest.approx(6)
    assert all_gather_seconds(4e9, 4, 1, Links(1e9, latency=0.0)) == pytest.approx(3)
    assert all_reduce_seconds(4e9, 4, 2, Links(1e9, 0.5e9, 0.0)) == pytest.approx(
        12
    )  # each level 2 (k - 1) n / (k speed); a ring, 2 x 3 x 2
    assert all_reduce_seconds(4e9, 4, 2, Links(100e9, 0.5e9, 0.0)) == pytest.approx(8 + 0.04)
    assert all_reduce_seconds(0, 64, 8, Links(1e9, 1e9, 1e-5)) == pytest.approx(2 * (7 + 7) * 1e-5)  # a ring starts 126 messages
    assert all_reduce_seconds(1e9, 1, 1, Links(1e9)) == 0.0
    times = [all_reduce_seconds(1e8, 8 * nodes, nodes, Links(3e11, 5e10)) for nodes in (1, 2, 4, 8)]
    assert times == sorted(times)


@pytest.mark.parametrize("world, nodes", [(1, 1), (2, 1), (64, 8)])
def test_bytes_of_each_rank(world, nodes):
    whole = fp.estimate("llama-tiny", "LoRA", batch_size=2)
    trained = whole.gradient_bytes
    found = fp.estimate("llama-tiny", "LoRA", batch_size=2, world=world, nodes=nodes, shard="base").ranks
    if world == 1:
        assert found["weight_bytes"] == whole.weight_bytes and found["gathered_bytes"] == found["gradient_bytes_sent"] == 0
        return
    assert found["weight_bytes"] - trained <= 1.1 * (whole.weight_bytes - trained) / world
    assert found["gradient_bytes_sent"] == 2 * (world - 1) * trained // world
    assert found["batch_size"] == 2 * world and "step_seconds" not in found


def test_what_is_gathered_is_what_a_base_in_pieces_gathers(ranks, tmp_path):
    from torch import device

    from fastpeft.ranks import ranks_here
    from fastpeft.train.sharding import shard_base, sharded_bytes

    def work(rank):
        model = fp.adapt(fp.build("llama-tiny"), "LoRA")
        shard_base(model, device("cpu"), ranks_here())
        return model.gathered_bytes, sharded_bytes(model)

    on_paper = fp.estimate("llama-tiny", "LoRA", batch_size=2, world=2, shard="base")
    for gathered, held in ranks.run(2, work, tmp_path):
        assert gathered == on_paper.ranks["gathered_bytes"]
        assert held + on_paper.gradient_bytes == pytest.approx(on_paper.ranks["weight_bytes"], rel=1e-3)  # and buffers


def test_the_command_says_seconds_where_it_knows_speeds(capsys):
    how = "--model llama-tiny --plan LoRA --batch-size 2 --world 8 --nodes 2 --link 300GB --network 25GB --tflops 2 --json"
    app(["estimate", *how.split()], standalone_mode=False)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ranks"]["compute_seconds"] == pytest.approx(2 * found["flops_per_sample"] / 2e12)
    assert found["ranks"]["step_seconds"] == pytest.approx(found["ranks"]["compute_seconds"] + found["ranks"]["gradient_seconds"])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"world": 6, "nodes": 4}, "the same number of ranks on each node"),
        ({"world": 0}, "world=0"),
        ({"world": 2, "shard": "all"}, "shard must be base, not 'all'"),
        ({"world": 4, "nodes": 2, "links": Links(1e9)}, "need the network's speed"),
    ],
)
def test_impossible_numbers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        fp.estimate("llama-tiny", "LoRA", batch_size=2, **given)
