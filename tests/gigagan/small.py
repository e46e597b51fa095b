"""Networks that are small enough to draw with in milliseconds."""

from gigagan.config import GeneratorConfig, UpsamplerConfig

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
