"""How near a picture is to the one that it should be: PSNR, SSIM, LPIPS, pair by pair.

Shape letters: N pictures, H W image, C colour.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LUMA = (0.299, 0.587, 0.114)


def psnr(made_NHWC: np.ndarray, target_NHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio [N] in dB over all pixels and colours of uint8 pictures.

    10 log₁₀(255² / mean squared difference); equal pictures get 100, as infinity has no mean.
    """
    _check(made_NHWC, target_NHWC)
    gap = made_NHWC.astype(np.float64) - target_NHWC
    error_N = np.square(gap).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(255.0**2 / error_N), 100.0)


def ssim(made_NHWC: np.ndarray, target_NHWC: np.ndarray) -> np.ndarray:
    """Structural similarity [N] of uint8 pictures' luma (Wang et al. 2004).

    Gaussian window of 11 pixels, σ 1.5, K₁ 0.01, K₂ 0.03, population moments, mean over all places
    where the window lies inside. Raises ValueError for pictures smaller than the window.
    """
    _check(made_NHWC, target_NHWC)
    if min(made_NHWC.shape[1:3]) < 11:
        raise ValueError(f"SSIM's window is 11 px, the pictures are {made_NHWC.shape[1:3]}")
    window = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def smooth(x_N1HW: Tensor) -> Tensor:
        x_N1HW = F.conv2d(x_N1HW, window.view(1, 1, 11, 1))
        return F.conv2d(x_N1HW, window.view(1, 1, 1, 11))

    x, y = (_luma(pictures) for pictures in (made_NHWC, target_NHWC))
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    map_N1HW = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    found: np.ndarray = map_N1HW.mean(dim=(1, 2, 3)).numpy()
    return found


def lpips_pairs(made_NHWC: np.ndarray, target_NHWC: np.ndarray, network: nn.Module) -> np.ndarray:
    """LPIPS [N] of uint8 pictures by one of `pretrained.lpips`; smaller is nearer."""
    _check(made_NHWC, target_NHWC)
    device = next(network.parameters()).device
    made, target = (
        torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).to(device) / 127.5 - 1
        for x in (made_NHWC, target_NHWC)
    )
    with torch.no_grad():
        found: np.ndarray = network(made, target).flatten().cpu().numpy()
    return found


def _luma(pictures_NHWC: np.ndarray) -> Tensor:
    luma_NHW = pictures_NHWC.astype(np.float64) @ np.array(_LUMA)
    return torch.from_numpy(luma_NHW)[:, None]


def _check(made_NHWC: np.ndarray, target_NHWC: np.ndarray) -> None:
    if made_NHWC.shape != target_NHWC.shape or made_NHWC.ndim != 4:
        raise ValueError(
            f"pictures of shapes {made_NHWC.shape} and {target_NHWC.shape}: give pairs [N, H, W, 3]"
        )
