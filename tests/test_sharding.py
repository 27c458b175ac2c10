"Threads, what a launcher may ask for, and a network in parts on two processes."

import copy

import pytest
import torch
import torch.distributed as dist
from processes import two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sdpo_nb import sharding
from sdpo_nb.models import load_policy
from sdpo_nb.sharding import check_gathered, full_tensor, gathered, load_optimizer_state, optimizer_state, split_as

REFUSED = [
    (dict(ACCELERATE_USE_DEEPSPEED="true"), "ACCELERATE_USE_DEEPSPEED is true, but .* choose multi-GPU, or FSDP"),
    (dict(ACCELERATE_USE_MEGATRON_LM="true"), "ACCELERATE_USE_MEGATRON_LM is true, but it steps and scales gradients"),
    (dict(ACCELERATE_USE_FSDP="true"), "FSDP_VERSION is 1, .* --fsdp_version 2"),
    (dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"), "FSDP_VERSION is 1, .* --fsdp_version 2"),
    *(
        (dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", **{name: value}), f"{name} is {value}, which does not work")
        for name, value in (
            ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
            ("FSDP_OFFLOAD_PARAMS", "true"),
            ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
        )
    ),
]


# --- threads


@pytest.fixture
def threads(monkeypatch):
    "threads(number, cores, **variables): a process of so many threads; what it sets them to is noted in the answer"

    def start(number, cores, **variables):
        noted = [number]
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sharding, "_asked", [])
        monkeypatch.setattr("os.cpu_count", lambda: cores)
        monkeypatch.setattr("os.sched_getaffinity", lambda process: range(cores), raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: noted[-1])
        monkeypatch.setattr(torch, "set_num_threads", noted.append)
        return noted

    return start


def test_an_embedded_policy_uses_one_thread_and_says_so_once(threads, capfd):
    for number, cores in ((2, 2), (8, 8), (4, 8)):  # torch takes the cores, with or without a second thread on each
        noted = threads(number, cores)
        load_policy("tiny", device="cpu")
        load_policy("tiny", device="cpu")
        assert noted == [number, 1]
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"One thread instead of {number}") and "OMP_NUM_THREADS, or call torch.set_num" in line
        noted.append(number)  # the user wants them all the same
        load_policy("tiny", device="cpu")
        assert noted[-1] == number


@pytest.mark.parametrize(
    "number, variables", [(8, {"OMP_NUM_THREADS": "8"}), (8, {"MKL_NUM_THREADS": "8"}), (3, {}), (1, {})]
)
def test_a_number_of_threads_that_was_chosen_stays(threads, capfd, number, variables):
    noted = threads(number, 8, **variables)
    load_policy("tiny", device="cpu")
    assert noted == [number] and capfd.readouterr().err == ""


def test_larger_policies_keep_their_threads(threads, pipeline):
    noted = threads(8, 8)
    load_policy(pipeline, device="cpu")
    assert noted == [8]


# --- what a launcher may ask for


@pytest.mark.parametrize("variables, sentence", REFUSED, ids=[str([*variables][-1]) for variables, _ in REFUSED])
def test_ways_of_sharing_that_do_not_work(monkeypatch, variables, sentence):
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        sharding.check_launch()


@pytest.mark.parametrize("version", ["TRANSFORMER_BASED_WRAP", "NO_WRAP"])
def test_the_way_that_works(monkeypatch, version):
    for name, value in (("USE_FSDP", "true"), ("USE_DEEPSPEED", "false")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", version)
    sharding.check_launch()
    assert sharding.launched_with("FSDP") and not sharding.launched_with("DEEPSPEED")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert sharding.own_device() == "cuda:0"
    for rank, device in (("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert sharding.own_device() == device


# --- two processes


def network(mesh=None):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    for module in (made[0], made) if mesh else ():  # the root keeps a layer, as in every denoiser
        fully_shard(module, mesh=mesh)
    return made, torch.optim.AdamW(made.parameters(), lr=0.1)


def learn(network, optimizer, steps):
    "The same samples on all processes"
    for step in range(steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        network(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def near(one, other):
    "Up to the rounding of float32, which two processes do in another order"
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def share_a_network():
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    assert sharding.launched_processes() == 2
    one, of_one = network()
    two, of_two = network(mesh)
    learn(one, of_one, 2)
    learn(two, of_two, 2)
    for whole, part in zip(one.parameters(), two.parameters()):  # some have an odd number of rows
        assert part.to_local().numel() < whole.numel() and near(full_tensor(part), whole)
        assert torch.equal(full_tensor(split_as(full_tensor(part).detach(), part)), full_tensor(part))
    with pytest.raises(RuntimeError, match="saving needs all weights"):
        check_gathered(two, "saving")
    with gathered(two), torch.no_grad():
        check_gathered(two, "saving")
        if rank == 0:  # the other process makes no call
            assert near(two(torch.ones(1, 3)), one(torch.ones(1, 3)))
    expected, kept = of_one.state_dict()["state"], optimizer_state(of_two, keep=rank == 0)["state"]
    assert len(kept) == (4 if rank == 0 else 0)
    for index, values in kept.items():
        assert all(near(value, expected[index][name]) for name, value in values.items())
    state = copy.deepcopy(optimizer_state(of_two))  # the count of steps is the optimiser's own
    learn(two, of_two, 1)
    again, of_again = network(mesh)
    learn(again, of_again, 2)
    for values in of_again.state.values():
        values["exp_avg"].zero_()
    load_optimizer_state(of_again, state)
    learn(again, of_again, 1)
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(again.parameters(), two.parameters()))
    dist.destroy_process_group()
    return rank


def test_two_processes_share_a_network(tmp_path):
    "Parts, all of it for a while, and an optimiser's state that goes on bit by bit"
    assert two_processes(share_a_network, folder=tmp_path) == [0, 1]
