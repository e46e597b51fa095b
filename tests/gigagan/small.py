"""Networks small enough to draw with in milliseconds, and a training of them in a second or two."""

import contextlib
import hashlib
from unittest import mock

import torch
import torch.nn.functional as F

from gigagan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimizerConfig,
    TextConfig,
    TrainBaseConfig,
    UpsamplerConfig,
)
from gigagan.models import pretrained
from gigagan.models.encoders import TextEncoder, TextFeatures

GENERATOR = GeneratorConfig(
    channels=(8, 8, 8),
    kernels=(1, 2, 2),
    blocks=(1, 1, 1),
    attention=(0, 1, 0),
    head_width=8,
    latent_dim=5,
    style_dim=12,
)
UPSAMPLER = UpsamplerConfig(
    input_resolution=8,
    down_channels=(8,),
    up_channels=(8, 8),
    kernels=(1, 1),
    blocks=(1, 1),
    attention=(0, 0),
    latent_dim=5,
    style_dim=12,
)
TEXT = TextConfig(encoder="test:words", encoder_width=11, pooled_width=11, width=16, head_width=8)
"""A branch over what `WordEncoder` says."""
BASE = TrainBaseConfig(
    generator=GeneratorConfig(
        channels=(8, 8), kernels=(1, 2), blocks=(1, 1), attention=(0, 1), head_width=8,
        latent_dim=5, style_dim=12, text=TEXT,
    ),
    discriminator=DiscriminatorConfig(
        channels=(8, 8), levels=2, blocks=(1, 0), attention=(0, 1), head_width=8, text=TEXT
    ),
    loss=LossConfig(level_weights=(0.6, 0.4), contrastive=0, vision=0),
    optimizer=OptimizerConfig(r1_every=2, warmup_images=8, ema_half_life_images=20),
    total_images=48, batch_size=4, checkpoint_images=8, sample_images=24, log_images=8,
)  # fmt: skip
"""Twelve steps at 8 px, with a checkpoint after every other."""


class WordEncoder(TextEncoder):
    """Each word is a fixed random vector: real enough to tell captions apart, without weights."""

    name = "test:words"
    width = pooled_width = 11
    max_tokens = 8

    def count_tokens(self, caption):
        return len(caption.split())

    def encode(self, captions):
        rows = [torch.stack([self._vector(w) for w in c.split()]) for c in captions]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        return TextFeatures(tokens, mask, torch.stack([r.mean(0) for r in rows]))

    @staticmethod
    def _vector(word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        return torch.randn(11, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def quick_inception():
    """Random sums of pixels for Inception's features, which take a third of a second a picture."""
    matrix = torch.randn(3 * 16 * 16, 2048, generator=torch.Generator().manual_seed(0)) / 16

    def features(x_BCHW):
        assert x_BCHW.shape[1:] == (3, 299, 299)
        return (F.adaptive_avg_pool2d(x_BCHW / 128.0 - 1, 16).flatten(1) @ matrix).relu()

    with mock.patch.object(pretrained, "inception", return_value=features):
        yield
