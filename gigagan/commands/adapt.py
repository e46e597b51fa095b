"""`python -m gigagan adapt` and `unlearn`: a few pictures, or a thing to forget, to an adapter."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigagan.commands.options import Commands
from gigagan.common.exits import PROGRESS, tell
from gigagan.config import AdaptConfig

if TYPE_CHECKING:
    from gigagan.evaluation.adapted import Asked, Draw
    from gigagan.training.adapt import Drawing, Lessons

ADAPTER, UNLEARN = "adapter.safetensors", "unlearn.safetensors"
REPORT, SHEET = "report.json", "before-after.png"
_SHOWN = 6
_EXAMPLES = """examples:
  python -m gigagan adapt --set pictures=mine --out adapted
  python -m gigagan adapt --base base.safetensors --set pictures=mine \\
      --set old_captions=old.txt --set rank=8 --out adapted
  python -m gigagan unlearn --concept padlock --out unlearned
  python -m gigagan unlearn --concept padlock --replacement "a key" --out unlearned
  python -m gigagan sample "…" --adapter adapted/adapter.safetensors:0.7

Without --base the package's network is adapted, and what it knows must stay."""


def add(commands: Commands) -> None:
    """Add both commands with their arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    for name, help in {
        "adapt": "teach a base new pictures by a small file of updates",
        "unlearn": "make a base forget a thing, likewise",
    }.items():
        command = commands.add_parser(name, help=help, epilog=_EXAMPLES, formatter_class=raw)
        command.add_argument("--base", type=Path, help="snapshot of a base (the package's)")
        command.add_argument("--heldout", type=Path, help="COCO captions: what must stay")
        command.add_argument("--config", type=Path, help="JSON or YAML of a section adapt")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
        command.add_argument("--out", type=Path, required=True, help="folder of the results")
        if name == "unlearn":
            command.add_argument("--concept", required=True, help="as captions call it")
            command.add_argument("--replacement", help="what stands for it (something)")


def run(args: argparse.Namespace) -> None:
    """Train, measure before and after, and write the adapter with its report."""
    from gigagan.common.settings import load

    told = {"unlearn": "concept", "replacement": "replacement"}
    given = {key: getattr(args, name, None) for key, name in told.items()}
    given = {key: value for key, value in given.items() if value is not None}
    config = load(AdaptConfig, "adapt", args.config, args.set, **given)
    report = adapt(config, args.base, args.heldout, args.out)
    print(json.dumps(report, indent=2))
    print(f"{args.out / SHEET} shows it")


def adapt(
    config: AdaptConfig, base_path: Path | None, heldout: Path | None, out: Path
) -> dict[str, Any]:
    """The whole of it; what the report says.

    Raises:
        ValueError: pictures, captions or the base are no good.
    """
    from gigagan.inference.sampler import PUBLISHED, or_published
    from gigagan.models import adapters, snapshot
    from gigagan.models.upsampler import Upsampler
    from gigagan.training import adapt as training

    given = Path(config.base) if config.base else base_path
    path = or_published(given, None)[0]
    base, _ = snapshot.load(path)
    if isinstance(base, Upsampler):
        raise snapshot.SnapshotError(f"{path} is the snapshot of an upsampler: give a base's")
    known = Path(config.old_captions) if config.old_captions else heldout
    if known is None and given is None:
        known = PUBLISHED / "trained_on.json"
    if known is None:
        raise ValueError("nothing says what must stay: give --heldout, or adapt.old_captions")
    taught = training.lessons(config, training.read_captions(known), base.config.resolution)
    draw = training.Drawing(base)
    print(f"{len(taught.asked):,} new captions, {len(taught.old):,} that stay", flush=True)

    def progress(what: str, done: int, total: int | None) -> None:
        print(f"{done}/{total} {what}", flush=True)
        tell(PROGRESS, [what, done, total])

    out.mkdir(parents=True, exist_ok=True)
    adapter, seconds = training.train(config, draw, taught, out, progress=progress)
    file = out / (ADAPTER if config.unlearn is None else UNLEARN)
    kind = "adapter" if config.unlearn is None else "unlearn"
    about = {"images_seen": config.total_images, "seed": config.seed, "pictures": config.pictures}
    described = adapters.About(
        kind, adapters.digest(base), config.rank, config.layers, config.unlearn, about
    )
    adapters.save(file, adapter, described)
    after: Draw = partial(draw, weights=adapters.merged(base, [(adapter, 1.0)]))
    found = _measured(config, draw, after, taught, heldout, out)
    size = {"parameters": adapter.num_parameters, "bytes": file.stat().st_size}
    report = {**found, **size, "seconds": round(seconds, 1)}
    (out / REPORT).write_text(json.dumps(report, indent=2))
    return report


def _measured(
    config: AdaptConfig,
    before: Drawing,
    after: Draw,
    taught: Lessons,
    heldout: Path | None,
    out: Path,
) -> dict[str, Any]:
    """Rates, KID and how far pictures moved, on what is new and on what is old; and a sheet."""
    from gigagan.evaluation import adapted
    from gigagan.evaluation.heldout import read_heldout
    from gigagan.training.adapt import mentions, read_pictures

    count, base = config.measure_captions, before.base.config
    everything = read_heldout(heldout) if heldout else None
    if everything is not None and everything.gallery is not None:
        whole = adapted.of_gallery(everything.gallery, base.resolution)
    else:
        step = max(1, len(taught.old) // count)
        forgotten = taught.asked if config.unlearn else []
        whole = adapted.of_captions(
            [*forgotten[:count], *taught.old[::step][:count]], before, base.latent_dim
        )
    sets: dict[str, Asked] = {}
    if config.unlearn is not None:
        concept = config.unlearn
        sets["new"] = whole.only(lambda caption: mentions(caption, concept), count)
    else:
        folder = config.measure_pictures or config.pictures
        assert folder is not None
        sets["new"] = adapted.of_pictures(read_pictures(Path(folder)), count, base.resolution)
    kept = set(taught.old)
    sets["old"] = whole.only(lambda caption: caption in kept, count)
    found: dict[str, Any] = {}
    rows = []
    for name, asked in sets.items():
        first, second = (
            adapted.drawn(draw, asked.captions, base.latent_dim, seed=0) for draw in (before, after)
        )
        found[name] = adapted.compared(asked, first, second, out / "features" / name)
        shown = range(0, len(asked.places), max(1, len(asked.places) // _SHOWN))
        rows += [(asked.captions[i], [first[i], second[i]]) for i in list(shown)[:_SHOWN]]
    _sheet(out / SHEET, rows)
    return found


def _sheet(path: Path, rows: list[tuple[str, list[Any]]]) -> None:
    """A caption a row: what is drawn before, and after."""
    from PIL import Image

    from gigagan.evaluation.report.results import caption_grid

    images = [(caption, [Image.fromarray(x) for x in pair]) for caption, pair in rows]
    caption_grid(images, title="before, and after", cell_px=96, columns=2).save(path)
