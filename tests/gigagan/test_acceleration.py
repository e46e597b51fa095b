import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gigagan import losses
from gigagan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    SystemConfig,
    TextConfig,
    UpsamplerConfig,
)
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import pyramid
from gigagan.models.upsampler import Upsampler
from gigagan.training import acceleration

TEXT = TextConfig(encoder="test:words", encoder_width=11, pooled_width=11, width=16, head_width=8)
KINDS = ("generator", "discriminator", "upsampler")
B = 3


def make(kind, *, blocks=(1, 2, 1)):
    torch.manual_seed(5)
    if kind == "generator":
        config = GeneratorConfig(
            channels=(16, 8, 8), kernels=(1, 2, 2), blocks=blocks, attention=(0, 1, 0),
            head_width=8, latent_dim=5, style_dim=12, text=TEXT,
        )  # fmt: skip
        return Generator(config).double()
    if kind == "discriminator":
        config = DiscriminatorConfig(
            channels=(8, 16, 16), levels=2, blocks=(2, 1, 0), attention=(0, 1, 0), head_width=8,
            text=TEXT,
        )  # fmt: skip
        return Discriminator(config).double()
    config = UpsamplerConfig(
        input_resolution=8, down_channels=(8, 16), up_channels=(16, 16, 8), blocks=(1, 1, 1),
        attention=(1, 0, 0), kernels=(2, 1, 1), head_width=8, latent_dim=5, style_dim=12,
        text=TEXT,
    )  # fmt: skip
    return Upsampler(config).double()


def draw():
    random = torch.Generator().manual_seed(9)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    text = TextFeatures(normal(B, 4, 11), mask, normal(B, 11))
    return SimpleNamespace(
        text=text, z=normal(B, 5), image=normal(B, 3, 16, 16), small=normal(B, 3, 8, 8)
    )


def forward(network):
    x = draw()
    if isinstance(network, Generator):
        return network(x.z, x.text)
    if isinstance(network, Discriminator):
        return network(pyramid(x.image, 2), x.text)
    return network(x.small, x.small.flip(0), x.z, x.text)


def loss(network):
    return sum(((i + 1) * y.square()).mean() for i, y in enumerate(forward(network)))


def r1(network):
    x = draw()
    real = [level.requires_grad_() for level in pyramid(x.image, 2)]
    logits = network(real, x.text, double_backward=True)
    return losses.r1_penalty(logits, [1 / len(logits)] * len(logits), real)


def gradients(network, objective):
    network.zero_grad()
    objective(network).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs, tolerance=1e-11):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def saved_bytes(network, objective):
    """Bytes that a forward keeps for its backward, with what checkpoints keep: level inputs."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held: its address is not used again
        return tensor

    def keep_inputs(module, args, kwargs):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                keep(leaf)

    levels = acceleration._outermost(network, acceleration._LEVELS)
    handles = [m.register_forward_pre_hook(keep_inputs, with_kwargs=True) for m in levels]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(network)
    for handle in handles:
        handle.remove()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_levels_give_the_same_gradients_and_keep_less(kind):
    plain, light = make(kind), make(kind)
    assert acceleration.checkpoint_activations(light) == {
        "generator": 3, "discriminator": 3, "upsampler": 4,
    }[kind]  # fmt: skip
    assert light.state_dict().keys() == plain.state_dict().keys()
    assert_equal(gradients(light, loss), gradients(plain, loss), 1e-12)
    assert saved_bytes(light, loss) < 0.6 * saved_bytes(plain, loss)


def test_checkpointed_discriminator_can_be_differentiated_twice():
    plain, light = make("discriminator"), make("discriminator")
    acceleration.checkpoint_activations(light)
    assert_equal(gradients(light, r1), gradients(plain, r1), 1e-12)


def test_a_checkpointed_networks_copy_is_its_own():
    light = make("generator")
    acceleration.checkpoint_activations(light)
    copied = copy.deepcopy(light)
    before = forward(light)[0]
    with torch.no_grad():
        copied.levels[1].blocks[0].first.bank.zero_()
        assert torch.equal(forward(light)[0], before)
        assert not torch.equal(forward(copied)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_filters_compute_the_same(kind):
    plain, laid = make(kind), make(kind)
    acceleration.channels_last(laid)
    for name, p in laid.named_parameters():
        if p.dim() == 4:
            assert p.is_contiguous(memory_format=torch.channels_last), name
    assert any(not p.is_contiguous() for p in laid.parameters()) or kind == "generator"
    for ours, theirs in zip(forward(laid), forward(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_equal(gradients(laid, loss), gradients(plain, loss))
    for p in laid.parameters():
        assert p.grad is None or p.grad.stride() == p.stride()


@pytest.fixture
def fresh_compiler():
    """Compilation is process-wide state; it starts no Pythons beside this one."""
    import torch._inductor.config

    names = ("recompile_limit", "accumulated_recompile_limit")
    before = {name: getattr(torch._dynamo.config, name) for name in names}
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)


@pytest.mark.slow
def test_compiled_parts_keep_keys_and_r1_runs_them_uncompiled(fresh_compiler):
    plain, fast = make("discriminator"), make("discriminator")
    # Traced and differentiated like any compiled code, but without a C++ compiler.
    assert acceleration.compile_parts(fast, backend="aot_eager") == 8
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert_equal(gradients(fast, loss), gradients(plain, loss))
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        gradients(fast, r1)
    with acceleration.uncompiled(fast):
        penalty = r1(fast)
    fast.zero_grad()
    penalty.backward()
    found = {name: p.grad for name, p in fast.named_parameters() if p.grad is not None}
    assert_equal(found, gradients(plain, r1))
    assert_equal(gradients(fast, loss), gradients(plain, loss))


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on CPUs needs a C++ compiler"
)
def test_a_compiled_block_of_the_generator_equals_eager(fresh_compiler):
    plain, fast = (make("generator", blocks=(1, 1, 1)) for _ in range(2))
    assert acceleration.compile_parts(fast.levels[0]) == 1
    for ours, theirs in zip(forward(fast), forward(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert_equal(gradients(fast, loss), gradients(plain, loss), 1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_system_defaults_change_nothing():
    system = SystemConfig()
    assert system.accumulate == 1
    flags = ("shard_optimizer", "channels_last", "compile", "activation_checkpointing")
    assert not any(getattr(system, name) for name in flags)
    with pytest.raises(ValueError, match="accumulate"):
        SystemConfig(accumulate=0)


@pytest.fixture
def process_settings():
    """What PyTorch keeps for the process, put back afterwards."""
    before = (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:4]
    torch.use_deterministic_algorithms(before[4])


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_gpu_repeats_itself_or_is_fast(process_settings, is_exact):
    acceleration.prepare(SystemConfig(deterministic=is_exact), torch.device("cuda"))
    assert torch.backends.cudnn.deterministic == is_exact
    assert torch.backends.cudnn.benchmark != is_exact
    assert torch.are_deterministic_algorithms_enabled() == is_exact
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_float32_matmul_precision() == "high"


def test_nothing_is_set_where_there_is_no_gpu(process_settings):
    torch.set_float32_matmul_precision("medium")
    acceleration.prepare(SystemConfig(), torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "medium"


def test_decoding_threads_are_a_gpus_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(48)))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert acceleration.loader_threads(SystemConfig(), cpu) == 1
    assert acceleration.loader_threads(SystemConfig(), gpu) == 16
    assert acceleration.loader_threads(SystemConfig(), gpu, local_ranks=8) == 6
    assert acceleration.loader_threads(SystemConfig(), gpu, local_ranks=64) == 1
    assert acceleration.loader_threads(SystemConfig(loader_threads=3), cpu) == 3
