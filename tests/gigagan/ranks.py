"""What each of two processes does in the tests of distributed training.

They are in an environment such as torchrun makes; a failed assertion is an exit status.
"""

import copy
import os
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # an optimizer imports it when it is made, which takes seconds
import torch.nn.functional as F
from torch import nn

from gigagan.config import ProjectedConfig, TextConfig
from gigagan.models.heads import ProjectedHeads
from gigagan.training.distributed.optimizer import ShardedAdamW, consolidate, make_optimizer
from gigagan.training.distributed.reducer import GradientReducer
from gigagan.training.distributed.world import World, join
from gigagan.training.step import synthesize

BETAS = (0.0, 0.99)


def network(width=5):
    """Convolutions (in both layouts) and matrices of distinct sizes, double differentiable."""
    torch.manual_seed(7)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.Softplus(), nn.Conv2d(width, 2, 3), nn.Softplus(),
        nn.Flatten(), nn.Linear(2 * 2 * 3, 11), nn.Softplus(), nn.Linear(11, 1),
    )  # fmt: skip
    net[2].weight.data = net[2].weight.data.contiguous(memory_format=torch.channels_last)
    net.register_parameter("sometimes", nn.Parameter(torch.randn(3)))
    net.register_parameter("never", nn.Parameter(torch.randn(2)))
    return net.double()


def images(step=0):
    """A batch of both ranks, 6 3 4 5."""
    random = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, 4, 5, generator=random, dtype=torch.float64)


def loss(net, x, *, sometimes=False):
    return net(x).square().mean() + (net.sometimes.square().sum() if sometimes else 0)


def penalty(net, x):
    """R1: a double backward."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def gradients(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def same(ours, theirs):
    """Equal to rounding; None only where the other is."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def reducer(world, folder):
    net, whole = network(), network()
    frozen = network()
    reducers = [GradientReducer(world, net, bucket_mb=mb) for mb in (2e-4, 25)]
    GradientReducer(world, frozen)
    assert len(reducers[0]._buckets) > 2
    assert len(reducers[1]._buckets) == 1
    for bucket in reducers[0]._buckets:
        assert (bucket._shared is not None) == world.shares_memory
    x = images()
    mine = world.share(x)

    for reduce in reducers:
        # One backward.
        net.zero_grad()
        whole.zero_grad()
        reduce.arm()
        loss(net, mine).backward()
        reduce.finish()
        loss(whole, x).backward()
        same(gradients(net), gradients(whole))
        for p in net.parameters():
            assert p.grad is None or p.grad.stride() == p.stride()
        overlapped = gradients(net)

        # The same without overlap, to the bit.
        net.zero_grad()
        loss(net, mine).backward()
        reduce.finish()
        for a, b in zip(overlapped, gradients(net), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)

        # Two micro-batches, then a double backward, then frozen for the other network's step.
        net.zero_grad()
        whole.zero_grad()
        for part in mine.split([1, 2]):
            (len(part) / 3 * loss(net, part)).backward()
        reduce.arm()
        (0.3 * penalty(net, mine)).backward()
        reduce.finish()
        loss(whole, x).backward()
        (0.3 * penalty(whole, x)).backward()
        same(gradients(net), gradients(whole))
        net.requires_grad_(False)
        through = mine.clone().requires_grad_()
        loss(net, through).backward()
        assert through.grad is not None
        same(gradients(net), gradients(whole))
        net.requires_grad_(True)

        # A gradient on one rank only.
        net.zero_grad()
        whole.zero_grad()
        reduce.arm()
        loss(net, mine, sometimes=world.rank == 1).backward()
        reduce.finish()
        loss(whole, x).backward()
        whole.sometimes.grad = whole.sometimes.detach().clone()
        same(gradients(net), gradients(whole))

        # A second backward is refused where the first one's gradients have gone.
        reduce.arm()
        loss(net, mine).backward()
        with pytest.raises(RuntimeError, match="second backward"):
            loss(net, mine).backward()
        reduce.finish()
        world.barrier()


def gather(world, folder):
    torch.manual_seed(1)
    layer = nn.Linear(7, 5).double()
    whole = copy.deepcopy(layer)
    x = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def contrast(e_BE):
        e_BE = F.normalize(e_BE)
        return F.cross_entropy(3 * e_BE @ e_BE.T.roll(1, 0), torch.arange(len(e_BE)))

    ours = world.gather_with_gradient(layer(world.share(x)))
    assert torch.equal(ours, layer(x)) or torch.allclose(ours, layer(x), rtol=1e-14)
    contrast(ours).backward()
    GradientReducer(world, layer).finish()
    contrast(whole(x)).backward()
    same(gradients(layer), gradients(whole))

    assert world.any(world.rank == 1)
    assert not world.any(False)
    assert torch.equal(
        world.mean(torch.tensor([1.0, 4.0]) * (world.rank + 1)), torch.tensor([1.5, 6])
    )
    assert list(world.rows(6)) == [3 * world.rank + i for i in range(3)]


def optimizer_of(net, world, shard):
    convolutions = [p for p in net.parameters() if p.dim() == 4]
    others = [p for p in net.parameters() if p.dim() != 4]
    groups = [
        {"params": others, "weight_decay": 0.02},
        {"params": convolutions, "weight_decay": 0.3},
    ]
    return make_optimizer(groups, world, lr=0.1, betas=BETAS, shard=shard)


def steps(net, optimizer, first, last, skip=None):
    """Steps with the whole batch: gradients are equal on all ranks without any exchange."""
    for step in range(first, last):
        optimizer.zero_grad(set_to_none=True)
        loss(net, images(step), sometimes=step % 2 == 1).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.found_inf = torch.tensor(float(step == skip))
        optimizer.step()


def identical(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def held_bytes(optimizer):
    """Of the moments on this rank."""
    states = optimizer._inner.state.values()
    return sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in states)


def sharded(world, folder):
    net, whole = network(29), network(29)
    ours, plain = optimizer_of(net, world, True), optimizer_of(whole, world, False)
    assert isinstance(ours, ShardedAdamW)
    assert isinstance(plain, torch.optim.AdamW)
    steps(net, ours, 0, 5, skip=3)
    steps(whole, plain, 0, 5, skip=3)
    identical(net, whole)

    # Each rank holds about half; together all, once.
    everything = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in plain.state.values())
    held = torch.tensor(float(held_bytes(ours)))
    assert 0.35 < held.item() / everything < 0.65
    assert 2 * world.mean(held).item() == everything

    # To the plain format on rank 0, and from there on in divided and undivided runs.
    path = folder / "state.pt"
    consolidate(ours, plain)
    if world.is_main:
        torch.save({"optimizer": ours.state_dict(), "network": net.state_dict()}, path)
        expect = plain.state_dict()
        saved = torch.load(path, weights_only=True)["optimizer"]
        assert saved["param_groups"] == expect["param_groups"]
        assert saved["state"].keys() == expect["state"].keys()
        for i, state in expect["state"].items():
            assert state.keys() == saved["state"][i].keys()
            assert all(torch.equal(state[name], saved["state"][i][name]) for name in state)
    with pytest.raises(RuntimeError, match="consolidate"):
        ours.state_dict()  # once only: later it would be stale
    world.barrier()
    for shard in (True, False):
        saved = torch.load(path, weights_only=True)
        again = network(29)
        again.load_state_dict(saved["network"])
        resumed = optimizer_of(again, world, shard)
        resumed.load_state_dict(saved["optimizer"])
        assert resumed.param_groups[0]["lr"] == 0.1 / 5
        steps(again, resumed, 5, 7)
        if shard:
            steps(whole, plain, 5, 7)
            assert held_bytes(resumed) == int(held)
        identical(again, whole)
    if world.is_main:
        torch.save(whole.state_dict(), folder / "after.pt")
    saved["optimizer"]["param_groups"].pop()
    with pytest.raises(ValueError, match="groups"):
        optimizer_of(network(29), world, True).load_state_dict(saved["optimizer"])


def heads(world, folder):
    """A critic's heads: spectral norm is of weights alone, batch norm of four neighbours."""
    text = TextConfig(encoder="test:words", encoder_width=8, pooled_width=8, width=8, depth=0)
    config = ProjectedConfig(side=32, maps=4, virtual_batch=4, text=text)
    torch.manual_seed(3)
    net = ProjectedHeads(config, (5, 6, 7, 8)).double()
    whole = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (net, whole)]
    reduce = GradientReducer(world, net)
    random = torch.Generator().manual_seed(world.size)

    def stages(share):
        """Real and generated: two sets."""
        sets = [[share(x) for x in one] for one in made]
        return [torch.cat(pair) for pair in zip(*sets, strict=True)]

    def hinge(net, share):
        logits = net(stages(share), share(captions).repeat(2, 1), num_sets=2)
        halves = [x.chunk(2) for x in logits]
        return sum((1 - a).relu().mean() + (1 + b).relu().mean() for a, b in halves)

    for _ in range(3):
        made = [
            [torch.randn(8, c, 4, 4, generator=random).double() for c in (5, 6, 7, 8)]
            for _ in range(2)
        ]
        captions = torch.randn(8, 8, generator=random).double()
        net.zero_grad()
        whole.zero_grad()
        reduce.arm()
        hinge(net, world.share).backward()
        reduce.finish()
        hinge(whole, lambda x: x).backward()
        # Batch norm and logits are computed in float32.
        for a, b in zip(gradients(net), gradients(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    vectors = {name: x for name, x in net.state_dict().items() if "_u" in name or "_v" in name}
    assert vectors
    for name, x in vectors.items():
        torch.testing.assert_close(x, whole.state_dict()[name], rtol=1e-3, atol=1e-4)
        assert torch.equal(world.mean(x), x)  # the same on both


def options(world, folder):
    """Terms beside the losses: what compares a batch sees all of it, what is told of it a share."""
    from .test_options import TEXT, d_loss, g_loss, given_to, players

    # AdaptiveMix pairs the pictures of a rank: other pairs than one process would have.
    own = TEXT.options.model_copy(update={"adaptive_mix": 0.0})
    config = TEXT.model_copy(update={"options": own, "batch_size": 8})
    ours, alone = players(config, world), players(config)
    inputs, everything = given_to(config, ours, world), given_to(config, alone, World())
    for side, loss in (("discriminator", d_loss), ("generator", g_loss)):
        net, whole = getattr(ours, side), getattr(alone, side)
        reduce = GradientReducer(world, net)
        for made in (ours, alone):
            made.discriminator.requires_grad_(side == "discriminator")
        reduce.arm()
        loss(ours, config, inputs, synthesize(ours.generator, inputs)).loss.backward()
        reduce.finish()
        fakes = synthesize(alone.generator, everything)
        loss(alone, config, everything, fakes).loss.backward()
        for (name, a), b in zip(net.named_parameters(), whole.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def dies(world, folder):
    x = torch.ones(5)
    for step in range(100):
        if world.rank == 1 and step == 3:
            os._exit(3)
        world.mean(x)


def hangs(world, folder):
    if world.rank == 1:
        time.sleep(30)
    world.mean(torch.ones(5))


def perform(argv):
    name, folder = argv
    world = join(timeout_s=2 if name == "hangs" else 60)
    assert (world.size, world.device.type) == (2, "cpu")
    assert isinstance(world, World)
    assert world.shares_memory == (os.environ["LOCAL_WORLD_SIZE"] == "2")
    acts = {f.__name__: f for f in (reducer, gather, heads, options, sharded, dies, hangs)}
    acts[name](world, Path(folder))
    world.leave()
    return 0
