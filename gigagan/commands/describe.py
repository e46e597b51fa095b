"""`python -m gigagan describe PRESET`: a preset's layers, shapes and sizes."""

from __future__ import annotations

import argparse
import sys

from gigagan.commands.options import Commands
from gigagan.config import GeneratorConfig, StyleTConfig, TrainBaseConfig, UpsamplerConfig
from gigagan.config.presets import PRESETS, PUBLISHED, preset


def add(commands: Commands) -> None:
    """Add the command `describe` with its arguments."""
    command = commands.add_parser(
        "describe", help="a preset's layers, shapes, parameters and multiply-adds"
    )
    command.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))


def run(args: argparse.Namespace) -> None:
    """Print a table for each network of the preset."""
    from rich.console import Console
    from rich.table import Table

    from gigagan.models.summary import summarize

    config = preset(args.preset)
    drawing = config.generator if isinstance(config, TrainBaseConfig) else config.upsampler
    # Where it is no terminal there is no width to keep to.
    print(f"Conditioned on {_condition(drawing)}.")
    console = Console(width=None if sys.stdout.isatty() else 120)
    for network in (drawing, config.discriminator):
        found = summarize(network)
        table = Table(title=f"{args.preset}: {found.network}", title_justify="left")
        for column in ("layer", "kind", "output"):
            table.add_column(column)
        for column in ("parameters", "multiply-adds"):
            table.add_column(column, justify="right")
        for row in found.rows:
            numbers = f"{row.parameters:,}", f"{row.multiply_adds:,}"
            table.add_row(row.name, row.kind, row.shapes, *numbers)
        table.add_section()
        table.add_row("all", "", "", f"{found.parameters:,}", f"{found.multiply_adds:,}")
        without_text = found.parameters - found.parameters_of_text
        if found.parameters_of_text:
            table.add_row("all but text", "", "", f"{without_text:,}", "")
        published = PUBLISHED.get(args.preset, {}).get(found.network)
        if published:
            ours = without_text if found.network == "Generator" else found.parameters
            difference = f"ours {ours / published - 1:+.2%}"
            table.add_row("paper", "", "", f"{published:,.0f}", difference)
        console.print(table)
    print(
        "Multiply-adds of one image's forward pass: convolutions and matrix products; without the "
        "frozen encoders."
    )


def _condition(network: GeneratorConfig | StyleTConfig | UpsamplerConfig) -> str:
    if network.text is not None:
        return f"captions, by {network.text.encoder}"
    classes = network.classes
    return "nothing" if classes is None else f"{classes.number:,} classes"
