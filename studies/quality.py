"""Pictures of gigagan-pytorch and of ours, judged by the same rules.

- `train-rival` trains gigagan-pytorch for a given processor time on our shards, without text.
- `draw` draws from a snapshot of ours with captions of the training shards.
- `compare` prints distances of such sets of pictures to real ones, as `gigagan.evaluation` does.

Sets of pictures are files `*.npz` with `images`: uint8, N H W C. Nothing of gigagan-pytorch is
changed: losses, optimizers, penalties and the average of G's weights are its trainer's defaults.

Shape letters: N pictures, B batch, C colour, H W image, Z latent, D features.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import rivals
from data.shards.loader import ShardLoader
from gigagan.evaluation.heldout import read_heldout
from gigagan.evaluation.judges.distances import frechet_distance, kernel_distance, prdc
from gigagan.evaluation.judges.features import Picture, extract, extractor, square
from gigagan.seeds import derived

LAYOUTS = tuple(layout for layout, side in rivals.GENERATORS if side == 32)
DEFAULT_LAYOUT = "gigagan_pytorch.large"
LINE_SECONDS = 30  # all three of processor time spent in steps
SAVE_SECONDS = 300
SAMPLE_SECONDS = 900
NUM_SAMPLES = 512
DRAW_BATCH = 16
SHEET_SIDE = 8
NEIGHBOURS = 5
KID = {"subset_size": 100, "num_subsets": 50}


# Training the other implementation.


class Run:
    """A training of gigagan-pytorch in a folder, with a clock of the processor time in steps."""

    def __init__(self, out: Path, layout: str, side: int, *, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.out, self.batch, self.seed = out, batch, seed
        self.trainer = rivals.trainer(layout, side, **rivals.settings(layout))
        self.cpu_seconds = 0.0
        self.about = {"layout": layout, "side": side, "batch": batch, "seed": seed}
        out.mkdir(parents=True, exist_ok=True)
        if (out / "state.json").is_file():
            self._restore()
        _drop_lines_after(out / "log.jsonl", self.cpu_seconds)

    @property
    def steps(self) -> int:
        """Steps done; its own counter starts at 1."""
        return int(self.trainer.steps.item()) - 1

    @property
    def images_seen(self) -> int:
        """Real images seen by D."""
        return self.steps * self.batch

    def step(self, images: Iterator[Tensor]) -> dict[str, float]:
        """What its loop does for one batch; the clock runs, loading the batch included."""
        started = time.process_time()
        own = self.trainer
        penalize = int(own.steps.item()) % own.apply_gradient_penalty_every == 0
        losses = rivals.step(own, images, self.batch, penalize=penalize)
        own.steps += 1
        self.cpu_seconds += time.process_time() - started
        return losses

    def save(self) -> None:
        """Write its own state file and, when that is complete, our note of it."""
        file = self.out / f"state-{self.images_seen:09d}.ckpt"
        self.trainer.save(file)
        note = self.about | {"file": file.name, "cpu_seconds": self.cpu_seconds}
        partial = self.out / "state.json.partial"
        partial.write_text(json.dumps(note))
        partial.replace(self.out / "state.json")
        for old in self.out.glob("state-*.ckpt"):
            if old != file:
                old.unlink()

    def _restore(self) -> None:
        note = json.loads((self.out / "state.json").read_text())
        for name, value in self.about.items():
            if note[name] != value:
                raise ValueError(
                    f"{self.out} holds a run with {name} = {note[name]}, not {value}: give another "
                    "--out, or the same settings"
                )
        self.trainer.load(self.out / note["file"], strict=True)
        self.cpu_seconds = float(note["cpu_seconds"])
        torch.manual_seed(derived(self.seed, self.images_seen))

    def sample(self, num: int) -> np.ndarray:
        """Pictures of the averaged generator from fixed latents: uint8 N H W C."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # its layers draw noise of their own
            parts = [
                self.trainer.generate(batch_size=min(DRAW_BATCH, num - start))
                for start in range(0, num, DRAW_BATCH)
            ]
        images_NCHW = torch.cat(parts).clamp(0, 1)  # it works in [0, 1]
        return (images_NCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()


def train_rival(
    shards: Path,
    out: Path,
    *,
    cpu_minutes: float,
    seed: int = 0,
    batch: int = 16,
    layout: str = DEFAULT_LAYOUT,
    num_samples: int = NUM_SAMPLES,
) -> None:
    """Train until the processor time in steps reaches the limit; the same command goes on."""
    loader = ShardLoader(shards, batch_size=batch, seed=seed)
    run = Run(out, layout, loader.resolution, batch=batch, seed=seed)
    counts = (f"{n} {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for n, m in _named(run))
    print(f"{layout}: {', '.join(counts)}; {loader.num_samples:,} pictures", flush=True)
    images = (b.images_BCHW.float() / 255 for b in loader.batches(run.images_seen))
    limit, sums, number = cpu_minutes * 60, defaultdict[str, float](float), 0
    while run.cpu_seconds < limit:
        before = run.cpu_seconds
        for name, value in run.step(images).items():
            sums[name] += value
        number += 1
        is_done = run.cpu_seconds >= limit

        def is_due(every: float, before: float = before, is_done: bool = is_done) -> bool:
            return is_done or run.cpu_seconds // every > before // every

        if is_due(LINE_SECONDS):
            _log(run, {name: total / number for name, total in sums.items()})
            sums.clear()
            number = 0
        if is_due(SAMPLE_SECONDS):
            name = f"samples-{run.cpu_seconds / 60:04.0f}"
            write_pictures(out / f"{name}.npz", run.sample(num_samples))
            print(f"wrote {out / name}.npz", flush=True)
        if is_due(SAVE_SECONDS):
            run.save()


def _named(run: Run) -> list[tuple[str, torch.nn.Module]]:
    return [("G", run.trainer.G), ("D", run.trainer.D)]


def _log(run: Run, losses: dict[str, float]) -> None:
    """A line on the screen, and one in log.jsonl."""
    line = {"images": run.images_seen, "cpu_seconds": round(run.cpu_seconds, 1), **losses}
    with (run.out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items() if value)
    print(f"{run.images_seen:,} images  {run.cpu_seconds:.0f} s of CPU  {shown}", flush=True)


def _drop_lines_after(path: Path, cpu_seconds: float) -> None:
    """Forget what an attempt wrote after its last saved state."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = (line for line in lines if json.loads(line)["cpu_seconds"] <= cpu_seconds + 0.1)
        path.write_text("".join(kept))


# Pictures.


def write_pictures(path: Path, images_NHWC: np.ndarray) -> None:
    """A set as .npz and, beside it, the first of it as one picture."""
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, images=images_NHWC)
    partial.replace(path)
    side = min(SHEET_SIDE, int(len(images_NHWC) ** 0.5))
    rows = images_NHWC[: side * side].reshape(side, side, *images_NHWC.shape[1:])
    sheet = np.concatenate(np.concatenate(rows, axis=1), axis=1)  # rows of pictures side by side
    image = Image.fromarray(sheet)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(
        path.with_suffix(".png")
    )


def read_pictures(path: Path) -> list[Picture]:
    """A set that `write_pictures` wrote.

    Raises:
        ValueError: it holds something else.
    """
    with np.load(path) as content:
        images_NHWC = content["images"]
    if images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3 or images_NHWC.dtype != np.uint8:
        raise ValueError(
            f"{path}: images is {images_NHWC.dtype} {images_NHWC.shape}, not uint8 N H W 3"
        )
    return list(images_NHWC)


def real_pictures(path: Path, num: int, seed: int) -> list[Picture]:
    """At most `num` distinct pictures of a folder of shards, or of a held-out set."""
    if (path / "index.json").is_file():
        found = _of_shards(path, num, seed)
        return [image for image, _ in found]
    pictures = read_heldout(path).all_pictures
    order = np.random.default_rng(seed).permutation(len(pictures))[:num]
    return [pictures[i] for i in order]


def _of_shards(shards: Path, num: int, seed: int) -> list[tuple[np.ndarray, str]]:
    """The first pictures of the order that training with this seed would take, with captions."""
    loader = ShardLoader(shards, batch_size=1, seed=seed)
    batches = itertools.islice(loader.batches(), min(num, loader.num_samples))
    return [(b.images_BCHW[0].permute(1, 2, 0).numpy(), b.captions[0]) for b in batches]


def captions_of(paths: Sequence[Path], num: int, seed: int) -> list[str]:
    """A seeded sample of captions: of shards, of a COCO file or folder, or lines of a text."""
    captions: list[str] = []
    for path in paths:
        if (path / "index.json").is_file():
            captions += [caption for _, caption in _of_shards(path, num, seed)]
        elif path.suffix == ".txt":
            captions += path.read_text().splitlines()
        else:
            captions += read_heldout(path).captions
    order = np.random.default_rng(seed).permutation(len(captions))
    return [captions[i] for i in itertools.islice(itertools.cycle(order), num)]


def draw(snapshot: Path, captions: Sequence[Path], out: Path, *, num: int, seed: int) -> None:
    """Pictures of a snapshot of ours, one for each sampled caption, without truncation."""
    from gigagan.inference.sampler import load

    prompts = captions_of(captions, num, seed)
    pictures = load(snapshot).sample(prompts, seed=seed)
    write_pictures(out, np.stack([np.asarray(picture) for picture in pictures]))
    out.with_suffix(".txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    print(f"wrote {out}: {len(pictures)} pictures")


# Distances.


def compare(
    real: Sequence[Path],
    sets: Sequence[tuple[str, Path]],
    *,
    px: int,
    num: int = NUM_SAMPLES,
    seed: int = 0,
) -> str:
    """A Markdown table for each real set; a row of real pictures says what no set can go below.

    Of a real set twice `num` pictures are drawn and split into reference and floor; one with fewer
    is the reference as a whole (up to `num`), and the floor is between its halves.
    """
    features = {name: _features(read_pictures(p), px) for name, p in sets}
    tables = []
    for path in real:
        real_ND = _features(real_pictures(path, 2 * num, seed), px)
        reference_ND, halves = real_ND[:num], (real_ND[:num], real_ND[num:])
        if len(real_ND) < 2 * num:
            cut = len(reference_ND) // 2
            halves = (reference_ND[:cut], reference_ND[cut:])
        rows = [_row("real, two disjoint parts", *halves)]
        rows += [_row(name, reference_ND, found_ND) for name, found_ND in features.items()]
        tables.append("\n".join([_title(path, px, reference_ND), *HEAD, *rows]))
    return "\n\n".join(tables)


def _features(pictures: Sequence[Picture], px: int) -> np.ndarray:
    """Inception's features [N, 2048] of pictures brought to `px`."""
    judge = extractor("inception-2015-12-05/clean")
    with tempfile.TemporaryDirectory() as folder:
        found = extract(
            pictures,
            [judge],
            transform=lambda picture: square(picture, px),
            folder=Path(folder),
            progress=_progress,
        )
        return np.array(found[judge.name])


HEAD = (
    "| set | N | N real | KID ×10³ | its spread | FID | precision | recall |",
    "|---|---|---|---|---|---|---|---|",
)


def _title(path: Path, px: int, reference_ND: np.ndarray) -> str:
    return (
        f"Against {len(reference_ND)} pictures of `{path.name}`, both sides at {px} px; KID "
        f"unbiased over all samples, spread over {KID['num_subsets']} subsets of "
        f"{KID['subset_size']}; precision and recall with {NEIGHBOURS} neighbours.\n"
    )


def _row(name: str, real_ND: np.ndarray, found_ND: np.ndarray) -> str:
    kid = kernel_distance(found_ND, real_ND, **KID)
    cells = [
        name,
        str(len(found_ND)),
        str(len(real_ND)),
        f"{kid.value * 1e3:.2f}",
        f"± {kid.subset_std * 1e3:.2f}",
        f"{frechet_distance(found_ND, real_ND):.1f}",
    ]
    if min(len(real_ND), len(found_ND)) > NEIGHBOURS:
        found = prdc(real_ND, found_ND, neighbours=NEIGHBOURS)
        cells += [f"{found.precision:.3f}", f"{found.recall:.3f}"]
    else:
        cells += ["–", "–"]
    return f"| {' | '.join(cells)} |"


def _progress(what: str, done: int, total: int | None) -> None:
    if done == total:
        print(f"{what}: {done}", flush=True)


# The command line.


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FILE.npz")
    return name, Path(path)


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    root = argparse.ArgumentParser(description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)

    p = commands.add_parser("train-rival", help="train gigagan-pytorch on our shards")
    p.add_argument("--shards", type=Path, required=True, help="folder such as shards/032")
    p.add_argument("--out", type=Path, required=True, help="state, log and samples go here")
    p.add_argument("--cpu-minutes", type=float, required=True, help="processor time in steps")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--layout", choices=LAYOUTS, default=DEFAULT_LAYOUT)
    p.add_argument("--num-samples", type=int, default=NUM_SAMPLES)
    p.add_argument("--seed", type=int, default=0)

    p = commands.add_parser("draw", help="draw from a snapshot of ours")
    p.add_argument("--snapshot", type=Path, required=True)
    p.add_argument("--captions", type=Path, nargs="+", required=True, help="shards, COCO or .txt")
    p.add_argument("--out", type=Path, required=True, help="FILE.npz")
    p.add_argument("--num", type=int, default=NUM_SAMPLES)
    p.add_argument("--seed", type=int, default=1, help="not that of compare: other captions")

    p = commands.add_parser("compare", help="distances to real pictures, as Markdown")
    p.add_argument("--real", type=Path, nargs="+", required=True, help="shards or held-out sets")
    p.add_argument("--sets", type=_named_file, nargs="+", required=True, metavar="NAME=FILE.npz")
    p.add_argument("--px", type=int, default=32, help="side to which both sides are brought")
    p.add_argument("--num", type=int, default=NUM_SAMPLES, help="real pictures of a reference")
    p.add_argument("--seed", type=int, default=0)
    return root


def main() -> None:
    """Do what was asked for."""
    arguments = vars(parser().parse_args())
    command = arguments.pop("command")
    if command == "train-rival":
        train_rival(arguments.pop("shards"), arguments.pop("out"), **arguments)
    elif command == "draw":
        draw(**arguments)
    else:
        print(compare(arguments.pop("real"), arguments.pop("sets"), **arguments))


if __name__ == "__main__":
    main()
