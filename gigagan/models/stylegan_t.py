"""StyleGAN-T's generator: latent z and a caption's vector → one image (Sauer et al. 2023).

"Code" is github.com/autonomousvision/stylegan-t. What it has in common with GigaGAN's generator
(modulated convolution, resampling, equalized layers, mapping) is that of `layers`.

Shape letters in this file:
    B batch, Z latent, S style, T text width, C O I maps, H W image, P positions, L layers of one
    resolution, N values of all noise inputs of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.config.networks import StyleConfig
from gigagan.config.stylegan_t import START, UPPER_FROM, StyleTConfig, TrainedPart
from gigagan.models.generator import Late
from gigagan.models.layers import (
    ACTIVATION_GAIN,
    AdaptiveConv,
    EqualLinear,
    MappingNetwork,
    activate,
    add_residual,
    full_precision,
    upsample,
    without_autocast,
)
from gigagan.models.text import Features, Text, vector_branch
from gigagan.models.tower import TextTower


class SecondOrderStyle(nn.Module):
    """s = s₁ ⊙ s₂ + s₃ with (s₁, s₂, s₃) = A w, biases 1 at the start (code, `StyleSplit`)."""

    def __init__(self, style_dim: int, maps: int) -> None:
        super().__init__()
        self.parts = EqualLinear(style_dim, 3 * maps, bias=1.0)

    def forward(self, style_BS: Tensor) -> Tensor:
        """Style w → scales of the maps: B S → B C."""
        first_BC, second_BC, third_BC = self.parts(style_BS).chunk(3, dim=1)
        return torch.addcmul(third_BC, first_BC, second_BC)


class SecondOrderConv(AdaptiveConv):
    """A modulated convolution (StyleGAN2, equations 1 to 3) whose scales are `SecondOrderStyle`."""

    def __init__(
        self,
        in_maps: int,
        out_maps: int,
        *,
        style_dim: int,
        size: int = 3,
        demodulate: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__(
            in_maps,
            out_maps,
            style_dim=style_dim,
            num_kernels=1,
            size=size,
            demodulate=demodulate,
            gain=gain,
        )
        self.to_scale = SecondOrderStyle(style_dim, in_maps)  # type: ignore[assignment]


class FourierInput(nn.Module):
    """8 × 8 maps of waves that w may turn and shift (StyleGAN3's `SynthesisInput`).

    M sin 2π(f_c R · (p − t) + φ_c), with positions p in (−½, ½)² and fixed frequencies f_c in
    cycles per side: in all directions, |f| = bandwidth · exp(−r² / 4) with the r of a normal draw
    in two dimensions. The rotation R and shift t are affine in w and at the start the identity; M
    mixes the maps. StyleGAN3's damping of frequencies beyond the band has nothing to do: |f| is at
    most the bandwidth, and a rotation keeps it.
    """

    frequencies: Tensor
    phases: Tensor
    positions: Tensor

    def __init__(self, maps: int, *, style_dim: int, bandwidth: float) -> None:
        super().__init__()
        draws_C2 = torch.randn(maps, 2)
        radius_C1 = draws_C2.norm(dim=1, keepdim=True)
        damped_C2 = draws_C2 / radius_C1 * (-radius_C1.square() / 4).exp()
        self.register_buffer("frequencies", bandwidth * damped_C2)
        self.register_buffer("phases", torch.rand(maps) - 0.5)
        line = (torch.arange(START) + 0.5) / START - 0.5
        # x runs along the width and is the first coordinate.
        positions_P2 = torch.cartesian_prod(line, line).flip(1)
        self.register_buffer("positions", positions_P2, persistent=False)
        self.to_pose = EqualLinear(style_dim, 4)
        nn.init.zeros_(self.to_pose.weight)
        assert self.to_pose.bias is not None
        with torch.no_grad():
            self.to_pose.bias[0] = 1.0
        self.mix = EqualLinear(maps, maps, bias=None)

    def forward(self, style_BS: Tensor) -> Tensor:
        """Style w → B C 8 8, of which the pose is (cos, sin, right, down) before normalisation."""
        with without_autocast(style_BS.device):  # a wave's phase needs its digits
            pose_B4 = self.to_pose(full_precision(style_BS))
            cos_B, sin_B = F.normalize(pose_B4[:, :2], dim=1).unbind(1)
            rotation_B22 = torch.stack([cos_B, -sin_B, sin_B, cos_B], dim=1).unflatten(1, (2, 2))
            waves_BC2 = self.frequencies @ rotation_B22
            shifted_BP2 = self.positions - pose_B4[:, None, 2:]
            cycles_BPC = shifted_BP2 @ waves_BC2.transpose(1, 2) + self.phases
            maps_BPC = self.mix((2 * math.pi * cycles_BPC).sin())
        # Lies in memory with channels last, which ordinary convolutions read faster.
        return maps_BPC.unflatten(1, (START, START)).permute(0, 3, 1, 2)


class SynthesisLayer(nn.Module):
    """g · lrelu(modulated convolution of the maps + strength · noise + bias) (StyleGAN2).

    The gain g is multiplied into what is before the activation, as everywhere here; the strength
    of the noise, one number, is 0 at the start.
    """

    def __init__(self, in_maps: int, out_maps: int, *, style_dim: int, gain: float) -> None:
        super().__init__()
        self.conv = SecondOrderConv(in_maps, out_maps, style_dim=style_dim, gain=gain)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.gain = gain

    def forward(self, x_BIHW: Tensor, style_BS: Tensor, noise_B1HW: Tensor) -> Tensor:
        """B I H W → B O H W."""
        y_BOHW = self.conv(x_BIHW, style_BS)
        strength = (self.noise_strength * self.gain).to(y_BOHW.dtype)
        return activate(torch.addcmul(y_BOHW, noise_B1HW.to(y_BOHW.dtype), strength))


class ResidualLayer(nn.Module):
    """√2 · (x + γ ⊙ layer(GroupNorm(x))) with LayerScale γ (code, `SynthesisLayer`).

    A layer's gain of 1 leaves leaky ReLU's loss of variance, which √2 restores for trunk and branch
    at once.
    """

    def __init__(self, maps: int, *, config: StyleTConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(config.groups, maps), maps)
        self.layer = SynthesisLayer(maps, maps, style_dim=config.style_dim, gain=1.0)
        self.gamma = nn.Parameter(torch.full((maps,), config.layer_scale))

    def forward(self, x_BCHW: Tensor, style_BS: Tensor, noise_B1HW: Tensor) -> Tensor:
        """B C H W → the same."""
        normal_BCHW = self.norm(full_precision(x_BCHW)).to(x_BCHW.dtype)
        y_BCHW = self.layer(normal_BCHW, style_BS, noise_B1HW)
        weight_CHW = (ACTIVATION_GAIN * self.gamma)[:, None, None].to(y_BCHW.dtype)
        return add_residual(x_BCHW, y_BCHW * weight_CHW, ACTIVATION_GAIN)


class SynthesisBlock(nn.Module):
    """All layers at one resolution; and `to_rgb`, for its part of the image.

    But at 8 px the first layer takes the maps of the resolution below, enlarged. The code enlarges
    behind that convolution, which is the same but at the border, where `upsample` repeats the
    pixels that the code takes to be zero.
    """

    def __init__(self, in_maps: int | None, out_maps: int, *, config: StyleTConfig) -> None:
        super().__init__()

        def layer(maps: int, gain: float) -> SynthesisLayer:
            return SynthesisLayer(maps, out_maps, style_dim=config.style_dim, gain=gain)

        self.layers = nn.ModuleList()
        if in_maps is not None:
            self.layers.append(layer(in_maps, ACTIVATION_GAIN))
        for _ in range(config.blocks):
            self.layers.append(layer(out_maps, 1.0))
            self.layers.append(ResidualLayer(out_maps, config=config))
        self.to_rgb = SecondOrderConv(
            out_maps, 3, style_dim=config.style_dim, size=1, demodulate=False
        )
        with torch.no_grad():
            self.to_rgb.bank.mul_(config.rgb_scale)

    def forward(self, x_BIHW: Tensor, style_BS: Tensor, noise_BLHW: Tensor) -> Tensor:
        """Maps at this resolution and a channel of noise for each layer → new maps B O H W."""
        for layer, noise_B1HW in zip(self.layers, noise_BLHW.split(1, dim=1), strict=True):
            x_BIHW = layer(x_BIHW, style_BS, noise_B1HW)
        return x_BIHW


class StyleGANT(nn.Module):
    """G: x = G̃([M(z), c], noise) with the vector c of a caption (Sauer et al. 2023)."""

    style_mean: Tensor
    """x̄ in its first Z numbers, for truncation: a moving mean over z in training."""
    noise_const: Tensor
    """What all pictures take for noise in evaluation: N."""

    def __init__(self, config: StyleTConfig) -> None:
        super().__init__()
        self.config = config
        self.text = vector_branch(config.text, config.classes)
        self.tower: TextTower | None = None
        if config.own_text_encoder and config.text is not None:
            self.tower = TextTower(config.text.encoder)
        self.mapping = MappingNetwork(
            StyleConfig(
                latent_dim=config.latent_dim,
                style_dim=config.latent_dim,
                mapping_layers=config.mapping_layers,
                mapping_lr_multiplier=config.mapping_lr_multiplier,
                linear_style=True,
                text=None,  # c by-passes M
            )
        )
        self.register_buffer("style_mean", torch.zeros(config.style_dim))
        self.register_buffer("noise_const", torch.randn(config.noise_dim))
        self.input = FourierInput(
            config.channels[0], style_dim=config.style_dim, bandwidth=config.bandwidth
        )
        self.levels = nn.ModuleList(
            SynthesisBlock(in_maps, out_maps, config=config)
            for in_maps, out_maps in zip((None, *config.channels), config.channels, strict=False)
        )

    def trained_in(self, trains: TrainedPart) -> Iterator[nn.Parameter]:
        """The parameters that a phase of a training trains (code: `--train-mode`)."""
        if trains == "text_encoder":
            if self.tower is not None:
                yield from self.tower.parameters()
            return
        for name, parameter in self.named_parameters():
            is_upper = name.startswith("levels.") and (
                START << int(name.split(".")[1]) > UPPER_FROM or ".to_rgb." in name
            )
            if not name.startswith("tower.") and (trains == "all" or is_upper):
                yield parameter

    def read(self, features: Features) -> Text:
        """Frozen features (or class numbers B, or None) → t_global alone: c, of unit rms."""
        text: Text = self.text(features)
        return text

    def style(self, z_BZ: Tensor, text: Text) -> Tensor:
        """w = [x, c] with x = M(z): B Z → B S. In training x̄ follows the batch's mean of x."""
        with without_autocast(z_BZ.device):
            x_BZ: Tensor = self.mapping(z_BZ, None)
        if self.training:
            self._follow(x_BZ)
        return x_BZ if text.global_BT is None else torch.cat([x_BZ, text.global_BT], dim=1)

    @torch.no_grad()
    def _follow(self, x_BZ: Tensor) -> None:
        """x̄ ← β x̄ + (1 − β) mean x."""
        mean_Z = self.style_mean[: self.config.latent_dim]
        mean_Z.lerp_(x_BZ.mean(0).to(mean_Z.dtype), 1 - self.config.style_mean_decay)

    def truncate(self, style_BS: Tensor, text: Text, psi: float) -> Tensor:
        """x' = x̄ + ψ (x − x̄), c as it is: towards the mean style of the caption.

        As c by-passes M, [x̄, c] is the mean over z for that caption: no other need be known.
        """
        Z = self.config.latent_dim
        x_BZ = self.style_mean[:Z].expand_as(style_BS[:, :Z]).lerp(style_BS[:, :Z], psi)
        return torch.cat([x_BZ, style_BS[:, Z:]], dim=1)

    def synthesize(
        self,
        style_BS: Tensor,
        text: Text,
        late: Late | None = None,
        noise_BN: Tensor | None = None,
    ) -> list[Tensor]:
        """Style → the image in [−1, 1] (roughly), the only one of the list.

        The caption is in the style; of `text` and of `late.text` nothing is read, and `late.level`
        0 is 8 px. Noise N(0, 1) that is not given is drawn by torch's own generator in training,
        where a run that shall be resumed to the bit gives it; in evaluation it is `noise_const`.
        """
        if late is not None and late.level == 0:  # the input is of the first level
            style_BS = late.style_BS
        x = self.input(style_BS)
        image_BCHW: Tensor | None = None
        noises = self._by_level(self._noise(len(style_BS)) if noise_BN is None else noise_BN)
        for number, (level, noise_BLHW) in enumerate(zip(self.levels, noises, strict=True)):
            assert isinstance(level, SynthesisBlock)
            if late is not None and number >= late.level:
                style_BS = late.style_BS
            if image_BCHW is not None:
                x = upsample(x)
            x = level(x, style_BS, noise_BLHW)
            rgb_BCHW = full_precision(level.to_rgb(x, style_BS))
            image_BCHW = rgb_BCHW if image_BCHW is None else upsample(image_BCHW) + rgb_BCHW
        assert image_BCHW is not None
        return [image_BCHW]

    def _noise(self, B: int) -> Tensor:
        """New noise for every picture in training, one row for all in evaluation."""
        if not self.training:
            return self.noise_const[None]
        return self.noise_const.new_empty(B, self.config.noise_dim).normal_()

    def _by_level(self, noise_BN: Tensor) -> list[Tensor]:
        """B N → B L H W for each resolution."""
        shapes = [(count, START << i, START << i) for i, count in enumerate(self.config.layers)]
        parts = noise_BN.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward(
        self, z_BZ: Tensor, features: Features, noise_BN: Tensor | None = None
    ) -> list[Tensor]:
        """Latents and what the network is conditioned on → the image, the only one of the list."""
        text = self.read(features)
        return self.synthesize(self.style(z_BZ, text), text, noise_BN=noise_BN)
