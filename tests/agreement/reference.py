"""The networks and their losses once more, naively, for the fast ones to be compared with.

Written from the equations of GigaGAN (arXiv 2303.05511) and StyleGAN2 for double precision: one
sample, one level, one caption, one head and one query at a time, every filter written out. The
project's modules are never called: they are asked for their parameters and configuration alone.

Nothing has a batch dimension here but what enters and leaves a network. Shape letters:
    B batch, C I O maps, H W image, h w filter, S style, Z latent, T text width, L queries, M keys,
    D head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-8
SQRT2 = math.sqrt(2)
"""Gain of leaky ReLU."""


class Caption(NamedTuple):
    local_MT: Tensor | None
    """t_local without padding; None where there is no text."""
    global_T: Tensor | None
    """t_global; None in an unconditional network."""


# Layers


def activate(x):
    return torch.where(x > 0, x, 0.2 * x)


def normalize(x_C):
    return x_C / (x_C.square().mean() + EPSILON).sqrt()


def normalize_rows(x_LC):
    return torch.stack([normalize(row_C) for row_C in x_LC])


def linear(layer, x, *, gain=1.0, lr_multiplier=1.0):
    """gain · (W x / √fan_in + b), both in units of the learning rate's multiplier."""
    y = x @ layer.weight.T * lr_multiplier / math.sqrt(layer.weight.shape[1])
    if layer.bias is not None:
        y = y + layer.bias * lr_multiplier
    return gain * y


def convolve(layer, x_IHW, *, gain=1.0, padding):
    """gain · (W * x / √fan_in + b)."""
    fan_in = layer.weight[0].numel()
    y_OHW = F.conv2d(x_IHW[None], layer.weight / math.sqrt(fan_in), padding=padding)[0]
    if layer.bias is not None:
        y_OHW = y_OHW + layer.bias[:, None, None]
    return gain * y_OHW


def upsample(x_CHW):
    """Twice the side: every pixel becomes 3/4 itself and 1/4 its neighbour; the border repeats."""
    for dim in (1, 2):
        line = x_CHW.unbind(dim)
        last = len(line) - 1
        doubled = []
        for i, pixel in enumerate(line):
            doubled.append((line[max(i - 1, 0)] + 3 * pixel) / 4)
            doubled.append((3 * pixel + line[min(i + 1, last)]) / 4)
        x_CHW = torch.stack(doubled, dim)
    return x_CHW


def downsample(x_CHW):
    """Half the side by [1, 3, 3, 1]; at the border the weights that are left sum to 1."""
    for dim in (1, 2):
        line = x_CHW.unbind(dim)
        halved = []
        for i in range(0, len(line), 2):
            taps = {i - 1: 1, i: 3, i + 1: 3, i + 2: 1}
            inside = {place: tap for place, tap in taps.items() if 0 <= place < len(line)}
            total = sum(tap * line[place] for place, tap in inside.items())
            halved.append(total / sum(inside.values()))
        x_CHW = torch.stack(halved, dim)
    return x_CHW


def adaptive_convolution(layer, x_IHW, style_S, *, gain=1.0, demodulate=True):
    """K = Σ_n softmax(W_f w + b_f)_n K_n, modulated by W_m w + b_m and demodulated."""
    if layer.to_select is None:
        kernel_OIhw = layer.bank[0]
    else:
        select_N = linear(layer.to_select, style_S).exp()
        select_N = select_N / select_N.sum()
        kernel_OIhw = sum(a * k for a, k in zip(select_N, layer.bank, strict=True))
    kernel_OIhw = kernel_OIhw * linear(layer.to_scale, style_S)[None, :, None, None]
    if demodulate:
        kernel_OIhw = torch.stack([k / (k.square().sum() + EPSILON).sqrt() for k in kernel_OIhw])
    else:
        kernel_OIhw = kernel_OIhw / math.sqrt(kernel_OIhw[0].numel())
    y_OHW = F.conv2d(x_IHW[None], kernel_OIhw, padding=kernel_OIhw.shape[-1] // 2)[0]
    return gain * (y_OHW + layer.bias[:, None, None])


def add_residual(trunk, branch, gain):
    """(trunk + gain · branch) / √(1 + gain²)."""
    return (trunk + gain * branch) / math.sqrt(1 + gain**2)


def adaptive_block(block, x_IHW, style_S, gain):
    hidden = activate(adaptive_convolution(block.first, x_IHW, style_S, gain=SQRT2))
    if block.second is None:
        return hidden
    branch = activate(adaptive_convolution(block.second, hidden, style_S, gain=SQRT2))
    return add_residual(x_IHW if len(x_IHW) == len(hidden) else hidden, branch, gain)


def mapping(network, config, z_Z, condition_T):
    """w = M(z, t): the parts of the input have an equal share of its energy."""
    parts = [z_Z] if condition_T is None else [z_Z, condition_T]
    share = sum(map(len, parts)) / len(parts)
    x = torch.cat([normalize(part) * math.sqrt(share / len(part)) for part in parts])
    slow = {"lr_multiplier": config.mapping_lr_multiplier}
    *layers, last = network.layers
    for layer in layers:
        x = activate(linear(layer, x, gain=SQRT2, **slow))
    if config.linear_style:
        return linear(last, x, **slow)
    return activate(linear(last, x, gain=SQRT2, **slow))


# Attention and text


def attend(score, q_LC, k_MC, v_MC, D):
    """For every head and query Σ_m softmax_m(score(q, k_m)) v_m."""
    heads = []
    for start in range(0, q_LC.shape[1], D):
        q_LD, k_MD, v_MD = (x[:, start : start + D] for x in (q_LC, k_MC, v_MC))
        rows = []
        for q_D in q_LD:
            weight_M = score(q_D, k_MD).exp()
            rows.append((weight_M / weight_M.sum()) @ v_MD)
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1)


def scaled_product(q_D, k_MD):
    return (q_D * k_MD).sum(1) / math.sqrt(len(q_D))


def self_attention(layer, x_LC, style_S, *, head_width, scale=None):
    """Softmax of −σ ‖q − k‖² with one matrix for q and k; the style is one more key and value."""
    sigma = 1 / head_width if scale is None else scale
    x_LC = normalize_rows(x_LC)
    tokens_MC = x_LC
    if layer.style_token is not None:
        tokens_MC = torch.cat([x_LC, normalize(linear(layer.style_token, style_S))[None]])
    mixed_LC = attend(
        lambda q_D, k_MD: -sigma * (q_D - k_MD).square().sum(1),
        linear(layer.to_qk, x_LC),
        linear(layer.to_qk, tokens_MC),
        linear(layer.to_v, tokens_MC),
        head_width,
    )
    return linear(layer.to_out, mixed_LC)


def cross_attention(layer, x_LC, text_MT, *, head_width):
    mixed_LC = attend(
        scaled_product,
        linear(layer.to_q, normalize_rows(x_LC)),
        linear(layer.to_k, text_MT),
        linear(layer.to_v, text_MT),
        head_width,
    )
    return linear(layer.to_out, mixed_LC)


def feed_forward(layer, x_LC):
    hidden = activate(linear(layer.expand, normalize_rows(x_LC), gain=SQRT2))
    return linear(layer.contract, hidden)


def attention_block(block, config, x_CHW, style_S=None, text_MT=None):
    C, H, W = x_CHW.shape
    gain, width = config.attention_gain, config.head_width
    x = torch.stack([x_CHW[:, row, column] for row in range(H) for column in range(W)])
    attended = self_attention(
        block.self_attention, x, style_S, head_width=width, scale=config.attention_scale
    )
    x = add_residual(x, attended, gain)
    x = add_residual(x, feed_forward(block.self_mlp, x), gain)
    if block.cross_attention is not None:
        attended = cross_attention(block.cross_attention, x, text_MT, head_width=width)
        x = add_residual(x, attended, gain)
        x = add_residual(x, feed_forward(block.cross_mlp, x), gain)
    return x.T.reshape(C, H, W)


def text_layer(layer, x_LT, head_width):
    q, k, v = linear(layer.to_qkv, normalize_rows(x_LT)).split(x_LT.shape[1], dim=1)
    x_LT = x_LT + linear(layer.to_out, attend(scaled_product, q, k, v, head_width))
    return x_LT + feed_forward(layer.mlp, x_LT)


def caption(branch, config, features, b):
    """What a network's branch makes of sample b: the pooled vector is the first of the tokens."""
    if config.text is not None:
        tokens_MD = features.tokens_BLD[b][features.mask_BL[b]]
        if branch.from_tokens is None:
            tokens_MD = ()  # nobody reads them
        pooled_D = features.pooled_BD[b]
        if config.text.centred:
            pooled_D = pooled_D - branch.mean_pooled_P
            tokens_MD = [row - branch.mean_token_D for row in tokens_MD]
        x = [linear(branch.from_pooled, normalize(pooled_D))]
        x = torch.stack(x + [linear(branch.from_tokens, normalize(row)) for row in tokens_MD])
        for layer in branch.layers:
            x = text_layer(layer, x, config.text.head_width)
        x = normalize_rows(x)
        return Caption(x[1:], x[0])
    if config.classes is not None:
        return Caption(None, normalize(branch.vectors[features[b]]))
    return Caption(None, None)


# Networks


def synthesis_level(level, config, x_CHW, style_S, text):
    for block in level.blocks:
        x_CHW = adaptive_block(block, x_CHW, style_S, config.residual_gain)
    for block in level.attention:
        x_CHW = attention_block(block, config, x_CHW, style_S, text.local_MT)
    return x_CHW


def generate(g, style_S, text):
    """One sample's pyramid, largest first."""
    config = g.config
    image, images = None, []
    x = g.constant if config.constant_input else 0.0
    if config.style_input:
        x = activate(x + linear(g.style_input, style_S).reshape(-1, 4, 4))
    for level in g.levels:
        x = x if image is None else upsample(x)
        x = synthesis_level(level, config, x, style_S, text)
        rgb = adaptive_convolution(level.to_rgb, x, style_S, demodulate=False)
        rgb = rgb * 0.5 / math.sqrt(len(config.channels))
        image = rgb if image is None else upsample(image) + rgb
        images.insert(0, image)
    return images


def generator(g, z_BZ, features):
    """The pyramid, largest first, each level B C H W."""
    samples = []
    for b, z_Z in enumerate(z_BZ):
        text = caption(g.text, g.config, features, b)
        samples.append(generate(g, mapping(g.mapping, g.config, z_Z, text.global_T), text))
    return [torch.stack(level) for level in zip(*samples, strict=True)]


def down_block(block, x_IHW, gain):
    hidden = activate(convolve(block.first, x_IHW, gain=SQRT2, padding=1))
    branch = activate(convolve(block.second, downsample(hidden), gain=SQRT2, padding=1))
    return add_residual(convolve(block.trunk, downsample(x_IHW), padding=0), branch, gain)


def enlarge(u, small_CHW, noise_CHW, style_S, text):
    """One sample's pyramid, largest first, down to the size of `small_CHW`."""
    config = u.config
    noisy = small_CHW + config.noise_augmentation * noise_CHW
    skips = [activate(convolve(u.from_rgb, noisy, gain=SQRT2, padding=1))]
    for block in u.down_blocks:
        skips.append(down_block(block, skips[-1], config.residual_gain))
    x, images = None, []
    for i, level in enumerate(u.levels):
        x = None if x is None else upsample(x)
        if i < len(skips):
            skip = skips[-1 - i]
            x = skip if x is None else torch.cat([x, skip])
            x = convolve(u.merges[i], x, padding=0)
        x = synthesis_level(level, config, x, style_S, text)
        if x.shape[-1] >= config.input_resolution:
            rgb = 0.5 * adaptive_convolution(level.to_rgb, x, style_S, demodulate=False)
            images.insert(0, rgb + (upsample(images[0]) if images else small_CHW))
    return images


def upsampler(u, small_BCHW, noise_BCHW, z_BZ, features):
    """The pyramid, largest first, each level B C H W."""
    samples = []
    for b, z_Z in enumerate(z_BZ):
        text = caption(u.text, u.config, features, b)
        style_S = mapping(u.mapping, u.config, z_Z, text.global_T)
        samples.append(enlarge(u, small_BCHW[b], noise_BCHW[b], style_S, text))
    return [torch.stack(level) for level in zip(*samples, strict=True)]


def residual_block(block, x_CHW, gain):
    hidden = activate(convolve(block.first, x_CHW, gain=SQRT2, padding=1))
    branch = activate(convolve(block.second, hidden, gain=SQRT2, padding=1))
    return add_residual(x_CHW, branch, gain)


def standard_deviation(samples):
    """Over the samples of one set, then the mean over maps and pixels: one number."""
    mean_CHW = sum(samples) / len(samples)
    variance_CHW = sum((x - mean_CHW).square() for x in samples) / len(samples)
    return (variance_CHW + EPSILON).sqrt().mean()


def stage(module, config, index, samples):
    """One stage of φ on the samples of one set and one level, one by one."""
    is_last = index == len(config.channels) - 1
    gain = config.residual_gain
    for block in module.blocks:
        samples = [residual_block(block, x, gain) for x in samples]
    for block in module.attention:
        samples = [attention_block(block, config, x) for x in samples]
    if not is_last and config.blocks[index]:
        return [down_block(module.out, x, gain) for x in samples]
    if not is_last:
        samples = [downsample(x) for x in samples]
    elif config.minibatch_std:
        std = standard_deviation(samples)
        samples = [torch.cat([x, std.expand(1, *x.shape[1:])]) for x in samples]
    padding = 0 if is_last else 1
    return [activate(convolve(module.out.conv, x, gain=SQRT2, padding=padding)) for x in samples]


def trunk(d, images, level):
    """φ_{i→j} of one level i alone: stage j → maps of every sample."""
    samples = [activate(convolve(d.from_rgb[level], x, gain=SQRT2, padding=0)) for x in images]
    after = {}
    for j in range(level, len(d.stages)):
        samples = after[j] = stage(d.stages[j], d.config, j, samples)
    return after


def predict(predictor, maps_CHW, condition_T):
    """ψ_j(φ, t_D) + Conv1×1(φ): logits H W."""
    logits = convolve(predictor.unconditional, maps_CHW, padding=0)[0]
    if condition_T is None:
        return logits
    x = maps_CHW
    for layer in predictor.layers:
        x = activate(adaptive_convolution(layer, x, condition_T, gain=SQRT2))
    last = adaptive_convolution(predictor.to_logit, x, condition_T, demodulate=False)
    return logits + last[0]


def discriminator(d, pyramid, features):
    """Logits B H W of every (i, j); the batch is one set, and a level a sequence of images."""
    after = [trunk(d, pyramid[i], i) for i in range(d.config.levels)]
    texts = [caption(d.text, d.config, features, b).global_T for b in range(len(pyramid[0]))]
    conditions = texts
    logits = []
    for i, j in d.config.pairs:
        predictor = d.predictors[str(j)]
        samples = zip(after[i][j], conditions, strict=True)
        logits.append(torch.stack([predict(predictor, x, t_T) for x, t_T in samples]))
    return logits


def vision_head(head, stage_CHW, text_T):
    """Logits H W of one sample and one stage of the frozen image encoder."""
    _, H, W = stage_CHW.shape
    pixels = [normalize(stage_CHW[:, row, column]) for row in range(H) for column in range(W)]
    x = torch.stack([head.projection[:, :, 0, 0] @ pixel_C for pixel_C in pixels])
    x = activate(convolve(head.conv, x.T.reshape(-1, H, W), gain=SQRT2, padding=1))
    return adaptive_convolution(head.to_logit, x, text_T, demodulate=False)[0]


def vision(heads, stages, text_BT):
    """Logits B H W of every stage."""
    return [
        torch.stack([vision_head(head, x, t_T) for x, t_T in zip(stage_BCHW, text_BT, strict=True)])
        for head, stage_BCHW in zip(heads.heads, stages, strict=True)
    ]


# Losses


def softplus(x):
    """log(1 + eˣ) without overflow."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


def prediction_weights(config, level_weights, intermediate):
    """Of every D_ij: its level's weight, times `intermediate` before the last stage; sum 1."""
    last = len(config.channels) - 1
    raw = [level_weights[i] * (1 if j == last else intermediate) for i, j in config.pairs]
    return [weight / sum(raw) for weight in raw]


def logistic(sign, logits, weights, picked=None):
    """Σ_k w_k · mean over samples and patches of softplus(sign · l): −1 as real, +1 as fake.

    Of the samples only those `picked`.
    """
    total = 0.0
    for weight, logits_BHW in zip(weights, logits, strict=True):
        rows = range(len(logits_BHW)) if picked is None else picked
        patches = [softplus(sign * logits_BHW[b]).mean() for b in rows]
        total = total + weight * sum(patches) / len(patches)
    return total


def discriminator_terms(d, weights, real, fake, text, other, has_other_B, matching_images):
    """Real, generated and mismatched loss; a pass of its own for every set and caption.

    The last counts pairs with another caption as fake: the mean over generated ones is added to
    that over real ones if both meet all; "half" is the mean over the first half's real and the
    second half's generated images. An image without another caption adds zero to its mean.
    """
    B = len(has_other_B)
    terms = [
        logistic(-1, discriminator(d, real, text), weights),
        logistic(+1, discriminator(d, fake, text), weights),
    ]
    pairs = {
        "real": [("real", b) for b in range(B)],
        "half": [("real" if b < B // 2 else "fake", b) for b in range(B)],
        "both": [(kind, b) for kind in ("real", "fake") for b in range(B)],
    }[matching_images]
    pairs = [(kind, b) for kind, b in pairs if has_other_B[b]]
    if not pairs:
        return terms
    wrong = {"real": discriminator(d, real, other), "fake": discriminator(d, fake, other)}
    one_by_one = [logistic(+1, wrong[kind], weights, [b]) for kind, b in pairs]
    return [*terms, sum(one_by_one) / B]


def r1(d, pyramid, features, weights):
    """Mean over samples of Σ_levels ‖∂ Σ_k w_k mean l_k / ∂x‖², image by image."""
    B = len(pyramid[0])
    leaves = [[x.detach().requires_grad_() for x in level] for level in pyramid]
    score = 0.0
    for weight, logits_BHW in zip(weights, discriminator(d, leaves, features), strict=True):
        for b in range(B):
            score = score + weight * logits_BHW[b].mean()
    total = 0.0
    for level in leaves[: d.config.levels]:
        for image in level:
            (gradient,) = torch.autograd.grad(score, image, create_graph=True)
            total = total + gradient.square().sum()
    return total / B


def info_nce(images_BE, texts_BE, scale):
    """−mean_b log(e^{s cos(i_b, t_b)} / Σ_b' e^{s cos(i_b, t_b')})."""
    total = 0.0
    for b, image_E in enumerate(images_BE):
        cosines = [image_E @ t_E / (image_E.norm() * t_E.norm()) for t_E in texts_BE]
        total = total - scale * cosines[b] + torch.stack(cosines).mul(scale).exp().sum().log()
    return total / len(images_BE)
