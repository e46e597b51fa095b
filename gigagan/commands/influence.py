"""`python -m gigagan influence`: what each training picture did to a trained base, as Parquet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from gigagan.commands.options import Commands, device
from gigagan.common.files import filled_aside, sha256_of

if TYPE_CHECKING:
    from gigagan.training.influence import Influence, Pairs

_EXAMPLES = """examples:
  python -m gigagan influence --run runs/store/train-base/… --shards …/filter/…/shards/032 \\
      --out influence.parquet
  python -m flows run --set filter.influence=influence.parquet --set filter.drop_influence=0.05

A run keeps checkpoints of its averaged network where train_base.snapshot_images is set; without
them there is the last one alone."""
BY = {
    "neighbours": "disagreement",
    "heldout": "tracin",
    "self": "self_influence",
    "loss": "loss",
}
"""Choice of `--by` → the column that `influence` repeats."""
WORST, COLUMNS = 32, 8
ENTRY = b"influence"


def add(commands: Commands) -> None:
    """Add the command `influence` with its arguments."""
    command = commands.add_parser(
        "influence",
        help="which training pictures a base learned against the others: wrong captions, mostly",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    networks = command.add_mutually_exclusive_group(required=True)
    networks.add_argument("--run", type=Path, help="folder of a training of the base")
    networks.add_argument("--base", type=Path, nargs="+", help="snapshots of one training")
    command.add_argument(
        "--shards", type=Path, required=True, help="what it was trained on, of its resolution"
    )
    command.add_argument("--heldout", type=Path, help="good pairs: COCO captions file or folder")
    command.add_argument("--out", type=Path, required=True, help="a .parquet; a .png is put beside")
    command.add_argument(
        "--by", choices=BY, default="neighbours",
        help="what `influence` is: disagreement with pairs of like captions (the default), TracIn "
        "against --heldout, self-influence, or the loss",
    )  # fmt: skip
    command.add_argument(
        "--layers", nargs="+", metavar="NAME", help="linear layers that are compared (style_input)"
    )
    command.add_argument(
        "--neighbours", type=int, help="pairs of like captions that each is held against (4)"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1… (the first CUDA device, or the CPU)")


def run(args: argparse.Namespace) -> None:
    """Write the scores and a sheet of the worst pairs."""
    from gigagan.common.console import shown
    from gigagan.training import influence

    if args.by == "heldout" and args.heldout is None:
        raise ValueError("--by heldout compares with good pairs: give --heldout")
    if args.out.suffix != ".parquet":
        raise ValueError(f"--out {args.out}: the name must end in .parquet")
    if args.neighbours is not None and args.neighbours < 1:
        raise ValueError(f"--neighbours {args.neighbours}: give 1 or more")
    checkpoints = args.base or _checkpoints(args.run)
    pairs, side = influence.read_pairs(args.shards)
    layers = tuple(args.layers or influence.LAYERS)
    count = args.neighbours or influence.NEIGHBOURS
    with shown() as progress:
        found = influence.influence(
            checkpoints,
            pairs,
            heldout=influence.heldout_pairs(args.heldout, side) if args.heldout else None,
            layers=layers,
            num_neighbours=count,
            device=device(args),
            progress=progress,
        )
    about = {
        "by": args.by,
        "layers": layers,
        "neighbours": count,
        "checkpoints": {path.name: sha256_of(path) for path in checkpoints},
        "shards": sha256_of(args.shards / "index.json"),
    }
    write(args.out, pairs, found, about)
    _sheet(args.out, pairs)
    compared = f"{len(pairs.keys):,} pictures at {len(checkpoints)} checkpoint(s)"
    print(f"{args.out}: {compared}; the worst are in {args.out.with_suffix('.png')}")


def _checkpoints(folder: Path) -> list[Path]:
    """The averaged networks that a training left, the last one too, each position once."""
    from gigagan.models import snapshot

    last = folder / "snapshot.safetensors"
    if not last.is_file():
        raise ValueError(f"{folder} has no snapshot.safetensors: give the folder of a training")
    found = sorted((folder / "snapshots").glob("images-*.safetensors"))
    seen = (snapshot.read_about(last) or {}).get("images_seen")
    return [path for path in found if path.stem != f"images-{seen:010d}"] + [last]


def write(path: Path, pairs: Pairs, found: Influence, about: dict[str, object]) -> None:
    """Parquet of key, influence and what it was chosen from; `about` in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "disagreement": found.disagreement_N,
        "tracin": found.tracin_N,
        "self_influence": found.self_influence_N,
        "loss": found.loss_N,
    }
    known = {name: x.double().cpu().numpy() for name, x in columns.items() if x is not None}
    table = pa.table({"key": pairs.keys, "influence": known[BY[str(about["by"])]], **known})
    table = table.replace_schema_metadata({ENTRY: json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(path) as partial:
        pq.write_table(table, partial)


def _sheet(path: Path, pairs: Pairs) -> None:
    """The pairs of the greatest influence, with their captions, beside the Parquet file."""
    import pyarrow.parquet as pq
    from PIL import Image

    from gigagan.evaluation.report.results import caption_grid

    values = pq.read_table(path)["influence"].to_numpy()
    rows = []
    for place in (-values).argsort()[:WORST]:
        picture = Image.fromarray(pairs.images_NCHW[place].permute(1, 2, 0).contiguous().numpy())
        rows.append((f"{values[place]:.3g} {pairs.captions[place]}", [picture]))
    grid = caption_grid(rows, title="greatest influence first", columns=COLUMNS)
    grid.save(path.with_suffix(".png"))
