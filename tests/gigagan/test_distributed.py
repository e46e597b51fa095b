import copy
import os

import pytest
import torch
from torch import nn

from gigagan.training.distributed.optimizer import _owners, consolidate, make_optimizer
from gigagan.training.distributed.reducer import GradientReducer, batched
from gigagan.training.distributed.world import World, _keep_to_core, join

from . import ranks
from .forks import RAISED, ROOT, Server


@pytest.fixture(scope="module")
def two_ranks():
    """Exit statuses and last words of two gloo processes; the second is ended after the first."""
    server = Server(ranks.__name__)

    def start(name, folder, num_local=2):
        argv, groups = [name, str(folder)], {"num_ranks": 2, "num_local": num_local}
        statuses, words = server.ranks(argv, folder, **groups, seconds=(120, 5))
        return statuses, [text[-3000:] for text in words]

    yield start
    server.close()


@pytest.fixture
def cores(monkeypatch):
    """Pretend that cores 2, 3 and 5 are ours; returns those that we keep to in the end."""
    kept = {2, 3, 5}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(kept))
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda pid, chosen: (kept.clear(), kept.update(chosen))
    )
    monkeypatch.delenv("GIGAGAN_CORES", raising=False)
    return kept


def test_a_rank_keeps_to_the_core_that_it_is_given(cores, monkeypatch):
    monkeypatch.setenv("GIGAGAN_CORES", "5,3")
    _keep_to_core(1, 2)
    assert cores == {3}


def test_ranks_share_out_the_cores_where_there_are_as_many(cores):
    _keep_to_core(1, 3)
    assert cores == {3}


@pytest.mark.parametrize(("asked", "num_ranks"), [("off", 3), ("", 2)])
def test_ranks_may_use_all_cores_where_it_is_asked_for_or_some_are_left_over(
    cores, monkeypatch, asked, num_ranks
):
    monkeypatch.setenv("GIGAGAN_CORES", asked)
    _keep_to_core(0, num_ranks)
    assert cores == {2, 3, 5}


@pytest.mark.parametrize("asked", ["2", "2,3,5", "2,4", "2,x"])
def test_cores_that_do_not_fit_the_ranks_are_named(cores, monkeypatch, asked):
    monkeypatch.setenv("GIGAGAN_CORES", asked)
    with pytest.raises(ValueError, match=f"GIGAGAN_CORES={asked} .* each of 2 ranks.* 2,3,5"):
        _keep_to_core(0, 2)


@pytest.mark.parametrize("name", ["reducer", "gather", "heads", "options"])
def test_two_ranks_equal_one_process(two_ranks, name, tmp_path):
    status, words = two_ranks(name, tmp_path)
    assert status == [0, 0], words


def test_ranks_of_two_machines_share_no_memory_and_equal_one_process(two_ranks, tmp_path):
    status, words = two_ranks("reducer", tmp_path, num_local=1)
    assert status == [0, 0], words


@pytest.mark.slow
def test_divided_optimizer_state_equals_adamw_and_goes_on_in_one_process(two_ranks, tmp_path):
    status, words = two_ranks("sharded", tmp_path)
    assert status == [0, 0], words
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    network = ranks.network(29)
    network.load_state_dict(saved["network"])
    optimizer = ranks.optimizer_of(network, World(), True)
    optimizer.load_state_dict(saved["optimizer"])
    ranks.steps(network, optimizer, 5, 7)
    for name, weights in torch.load(tmp_path / "after.pt", weights_only=True).items():
        assert torch.equal(network.state_dict()[name], weights), name


@pytest.mark.slow
def test_the_others_end_with_an_error_when_a_rank_dies(two_ranks, tmp_path):
    status, words = two_ranks("dies", tmp_path)
    assert status == [RAISED, 3]
    assert "by peer" in words[0]  # closed or reset


@pytest.mark.slow
def test_the_others_end_with_an_error_when_a_rank_hangs(two_ranks, tmp_path):
    status, words = two_ranks("hangs", tmp_path)
    assert status[0] == RAISED
    assert "Timed out waiting 2000ms" in words[0]


def test_a_single_process_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join(timeout_s=3)
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    reducer = GradientReducer(world, layer)
    reducer.arm()
    layer(x.to(world.device)).sum().backward()
    reducer.finish()
    assert layer.weight.grad is not None
    assert world.gather_with_gradient(x) is x
    assert world.any(True)
    assert not world.any(False)
    assert torch.equal(world.mean(x.requires_grad_()), x)
    assert not world.mean(x).requires_grad
    consolidate(make_optimizer([{"params": [layer.weight]}], world, lr=1, betas=(0.0, 0.9)))
    world.leave()


def test_the_rth_contiguous_part_of_a_batch_is_a_ranks_share():
    batch = torch.arange(12).reshape(6, 2)
    parts = [World(rank=r, size=3).share(batch) for r in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat(parts), batch)
    with pytest.raises(ValueError, match="multiple of the number of ranks"):
        World(rank=0, size=4).share(batch)


def test_buckets_keep_the_order_and_their_size_and_never_mix_types():
    sizes = [3, 5, 2, 40, 7]
    parameters = [nn.Parameter(torch.zeros(n)) for n in sizes]
    parameters.append(nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    buckets = list(batched(parameters, 40e-6))  # ten float32
    assert [[p.numel() for p in b] for b in buckets] == [[3, 5, 2], [40], [7], [1]]
    assert list(batched([], 1.0)) == []


def test_parameters_are_divided_evenly_and_alike_on_every_rank():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (2, 11, 3, 7, 5, 10)]
    owner = _owners(parameters, 2)
    assert owner == _owners(parameters, 2)
    loads = [sum(p.numel() for p in parameters if owner[p] == rank) for rank in (0, 1)]
    assert sorted(loads) == [19, 19]


def test_moments_loaded_from_another_layout_update_the_same_elements():
    def make(memory_format):
        torch.manual_seed(3)
        weight = torch.randn(7, 5, 3, 3).contiguous(memory_format=memory_format)
        parameter = nn.Parameter(weight)
        optimizer = make_optimizer([{"params": [parameter]}], World(), lr=0.1, betas=(0.3, 0.9))
        return parameter, optimizer

    def step(parameter, optimizer, seed):
        random = torch.Generator().manual_seed(seed)
        parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(torch.randn(parameter.shape, generator=random))
        optimizer.step()

    ours, optimizer = make(torch.contiguous_format)
    step(ours, optimizer, 0)
    theirs, resumed = make(torch.channels_last)
    theirs.data.copy_(ours)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(ours, optimizer, seed)
        step(theirs, resumed, seed)
    torch.testing.assert_close(ours, theirs)


def test_only_one_folder_talks_to_torch_distributed():
    talks = {
        path.parent.relative_to(ROOT).as_posix()
        for room in ("gigagan", "data", "flows")
        for path in (ROOT / room).rglob("*.py")
        if any(words in path.read_text() for words in ("torch.distributed as", "from torch.distr"))
    }
    assert talks == {"gigagan/training/distributed"}
