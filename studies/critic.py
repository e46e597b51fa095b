"""How soon a critic tells real pictures from blurred ones: multi-scale, or heads on an encoder.

There is no generator: "generated" is the real picture under a soft filter, so that all critics face
the same task. Each learns by its own loss beside captions; printed is the area under the ROC curve
(0.5: blind) on batches that it has not learned from, and what a step costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.shards.loader import ShardLoader
from gigagan.config import TrainBaseConfig
from gigagan.models import pretrained
from gigagan.models.layers import pyramid
from gigagan.models.pixels import from_uint8
from gigagan.models.text import TextBranch
from gigagan.training import step
from gigagan.training.augment import Augment
from gigagan.training.captions import CaptionFeatures
from gigagan.training.tasks import task_of

BATCH, HELD_BATCHES = 16, 10
PROJECTED: dict[str, Any] = {
    "discriminator": {"kind": "projected"},
    "loss": {"adversarial": "hinge", "vision": 0, "contrastive": 0, "matching": 0},
    "optimizer": {"r1_weight": 0, "lr": 1e-3},
}
MULTI_SCALE: dict[str, Any] = {
    "loss": {"vision": 0, "contrastive": 0, "matching": 0},
    "optimizer": {"r1_weight": 0, "lr": 2.5e-3},
}
CRITICS: dict[str, dict[str, Any]] = {
    "multi-scale, low-pass": MULTI_SCALE | {"discriminator": {"halving": "low-pass"}},
    "multi-scale, halving by the mean": MULTI_SCALE | {"discriminator": {"halving": "mean"}},
    "projected, bias_std 0": PROJECTED | {"discriminator": {"kind": "projected", "bias_std": 0}},
    "projected": PROJECTED,
    "projected, matching 0.5": PROJECTED | {"loss": PROJECTED["loss"] | {"matching": 0.5}},
}
"""What is compared, as sections of a training."""


class Seen(NamedTuple):
    """How well one critic tells pictures apart after so many steps."""

    auc: dict[int, float]
    milliseconds: float
    """Of processor time a step."""


def soften(images_BCHW: Tensor) -> Tensor:
    """Blurred by [1, 2, 1] / 4 along both sides."""
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images_BCHW, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def learn(config: TrainBaseConfig, loader: ShardLoader, looks: list[int], seed: int) -> Seen:
    """Train a critic on its own and look at it after these numbers of steps."""
    task, captions = (
        task_of(config),
        CaptionFeatures(pretrained.text_encoder("embedded:minilm-l6"), torch.device("cpu")),
    )
    encoder = task.encoder(torch.device("cpu"))
    torch.manual_seed(seed)
    critic = task.discriminator()
    means = captions.means(loader.captions_between(0, 512))
    for module in critic.modules():
        if isinstance(module, TextBranch) and module.is_centred:
            module.centre(*means)
    players = step.Players(
        torch.nn.Module(),  # type: ignore[arg-type]
        critic,
        task.prediction_weights(critic),
        None,
        None,
        Augment(config.augment),
        encoder,
    )
    stream = loader.batches(0)
    levels = critic.config.levels

    def given() -> tuple[step.Inputs, step.Drawn]:
        batch = next(stream)
        real_BCHW = from_uint8(batch.images_BCHW)
        order = batch.captions[1:] + batch.captions[:1]
        pairs = zip(order, batch.captions, strict=True)
        inputs = step.Inputs(
            real=pyramid(real_BCHW, levels),
            captions=batch.captions,
            text=captions(batch.captions),
            z_BZ=torch.zeros(BATCH, 1),
            other_text=captions(order),
            has_other_B=tuple(other != own for other, own in pairs),
        )
        return inputs, step.Drawn(pyramid(soften(real_BCHW), levels))

    held = [given() for _ in range(HELD_BATCHES)]
    optimizer = torch.optim.Adam(critic.parameters(), lr=config.optimizer.lr, betas=(0.0, 0.99))
    found: dict[int, float] = {}
    spent = 0.0
    for number in range(1, max(looks) + 1):
        inputs, drawn = given()
        started = time.process_time()
        optimizer.zero_grad()
        step.discriminator_loss(
            players, config, inputs, drawn, auxiliary_strength=0.0
        ).loss.backward()
        optimizer.step()
        spent += time.process_time() - started
        if number in looks:
            found[number] = _auc(players, held)
    return Seen(found, 1e3 * spent / max(looks))


@torch.no_grad()
def _auc(players: step.Players, held: list[tuple[step.Inputs, step.Drawn]]) -> float:
    """Share of pairs of a real and a blurred picture in which the real one has the larger logit."""
    critic = step.critic_of(players)
    real = torch.cat([critic.judge(inputs.real, inputs) for inputs, _ in held])
    fake = torch.cat([critic.judge(drawn, inputs) for inputs, drawn in held])
    return float((real[:, None] > fake).double().mean())


def main() -> None:
    """A line for each critic."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="folder such as shards/032")
    parser.add_argument("--looks", type=int, nargs="+", default=[50, 100, 200], metavar="STEPS")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, changes in CRITICS.items():
        config = TrainBaseConfig.model_validate({**changes, "batch_size": BATCH})
        seen = [
            learn(config, ShardLoader(args.shards, batch_size=BATCH, seed=seed), args.looks, seed)
            for seed in range(args.seeds)
        ]
        shown = "  ".join(
            f"{look}: {' '.join(f'{one.auc[look]:.3f}' for one in seen)}" for look in args.looks
        )
        cost = statistics.mean(one.milliseconds for one in seen)
        print(f"{name:34} AUC after {shown}   {cost:.0f} ms a step", flush=True)


if __name__ == "__main__":
    main()
