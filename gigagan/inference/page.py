"""A page to play with a model: one Gradio form on this machine, and nothing kept after it.

Gradio is imported only when the page is built. Files of the page live in one folder that goes with
it; prompts and sizes are bounded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from gigagan.common.pictures import as_rgb
from gigagan.inference.editing import Edit
from gigagan.inference.pictures import read_about, save_picture
from gigagan.inference.prompts import PromptError

if TYPE_CHECKING:
    from gigagan.inference.sampler import Sampler

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_PROMPT = 400
"""Characters of a prompt on the page."""
MAX_SIDE = 1024
"""Side in pixels of a picture that is uploaded."""
HISTORY = 24
"""Pictures that the page remembers."""
MAX_SEED = 2**31 - 1
NOTHING, MIX, BLEND, STYLE = "nothing", "its fine levels", "a blend", "the style of another seed"
CHANGE_OF = {None: NOTHING, "mix": MIX, "interpolate": BLEND, "style": STYLE}
"""What the page calls no edit and each kind of `Edit`."""
_CSS = """
#result img { width: 100%; height: 100%; object-fit: contain; }
"""
"""Gradio shows a picture of 128 px in its own pixels."""


@dataclass(frozen=True)
class Controls:
    """What the page's controls say, in their order; numbers are None where a field is empty."""

    prompt: str
    seed: float | None
    truncation: float
    change: str
    second: str
    """The second prompt."""
    amount: float
    """Of a blend: 0 is the first prompt, 1 the second."""
    crossover: float
    """The first level of the second prompt or style."""
    style_seed: float | None
    upscale: bool

    def edit(self) -> Edit | None:
        """The change asked for; raises ValueError with what to change."""
        if self.change == NOTHING:
            return None
        if self.change == STYLE:
            seed = _seed(self.style_seed)
            return Edit(how="style", seed=seed, crossover=int(self.crossover))
        if not self.second.strip():
            raise PromptError("the second prompt is empty: say what to mix in, or change nothing")
        second = _bounded(self.second)
        if self.change == BLEND:
            return Edit(second, "interpolate", amount=float(self.amount))
        return Edit(second, "mix", crossover=int(self.crossover))


class Table:
    """What the page's controls do, without a page: settings to a file with its picture."""

    def __init__(self, sampler: Sampler, folder: Path) -> None:
        if not sampler.condition.example:
            raise ValueError(
                "the network is unconditional, and the page is for prompts: use "
                "`python -m gigagan sample --count 16`"
            )
        self.sampler = sampler
        self.folder = folder
        self._number = 0
        self._lock = threading.Lock()

    def draw(self, controls: Controls) -> Path:
        """Draw one picture; raises ValueError with what to change."""
        edit, prompt = controls.edit(), _bounded(controls.prompt)
        seed, truncation = _seed(controls.seed), float(controls.truncation)
        with self._lock:
            (picture,) = self.sampler.sample(
                [prompt], seed=seed, truncation=truncation, edit=edit, upscale=controls.upscale
            )
        about = {"prompt": prompt, "upscaled": controls.upscale}
        about |= {"seed": seed, "truncation": truncation}
        return self._keep(picture, about if edit is None else about | {"edit": edit.told()})

    def controls_of(self, path: Path) -> Controls:
        """What `draw` took, as a picture's file says it; of an enlarged one prompt and seed."""
        about = read_about(path) or {}
        edit = about.get("edit", {})
        return Controls(
            prompt=about.get("prompt", ""),
            seed=about.get("seed", 0),
            truncation=about.get("truncation", 1.0),
            change=CHANGE_OF[edit.get("how")],
            second=edit.get("prompt", ""),
            amount=edit.get("amount", 0.5),
            crossover=edit.get("crossover", len(self.sampler.base.levels) // 2),
            style_seed=edit.get("seed", 1),
            upscale=about.get("upscaled", self.sampler.upsampler is not None),
        )

    def enlarge(self, picture: Image.Image | None, prompt: str, seed: float) -> Path:
        """Enlarge an uploaded picture by the upsampler's factor."""
        if picture is None:
            raise ValueError("no picture: choose one to enlarge")
        if max(picture.size) > MAX_SIDE:
            raise ValueError(
                f"the picture is {picture.width}×{picture.height} px, the page takes up to "
                f"{MAX_SIDE}: `python -m gigagan upscale` takes larger ones"
            )
        prompt = _bounded(prompt)
        with self._lock:
            (large,) = self.sampler.upscale([as_rgb(picture)], [prompt], seed=_seed(seed))
        return self._keep(large, {"prompt": prompt, "seed": _seed(seed), "enlarged": True})

    def _keep(self, picture: Image.Image, about: dict[str, Any]) -> Path:
        """A file for the page to show and to download; old ones go."""
        with self._lock:
            self._number += 1
            number = self._number
        path = self.folder / f"picture-{number:05d}.png"
        save_picture(path, picture, about)
        (self.folder / f"picture-{number - 2 * HISTORY:05d}.png").unlink(missing_ok=True)
        return path


def _bounded(prompt: str) -> str:
    if not prompt.strip():
        raise PromptError("the prompt is empty: say what to draw")
    if len(prompt) > MAX_PROMPT:
        raise PromptError(f"the prompt has {len(prompt)} characters, the page takes {MAX_PROMPT}")
    return prompt


def _seed(value: float | None) -> int:
    if value is None or int(value) != value or not 0 <= value <= MAX_SEED:
        raise ValueError(f"the seed is {value}: give a whole number from 0 to {MAX_SEED}")
    return int(value)


def prepare(folder: Path, host: str = "127.0.0.1") -> None:
    """Keep Gradio's own files in `folder`, and it from calling anybody; before it is imported.

    It asks the page on `host` whether it is there: not through a proxy.
    """
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    spared = ",".join(filter(None, (spared, *LOOPBACK, host)))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = spared
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")  # Gradio imports it
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def build(table: Table) -> Any:
    """The page, not yet served."""
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ValueError("the page needs the package gradio: `pip install -e .[use]`") from error

    sampler = table.sampler
    with gr.Blocks(title="GigaGAN", analytics_enabled=False) as blocks:
        gr.Markdown(f"# GigaGAN\nOne pass from words to a picture of {sampler.resolution} px.")
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                controls, draw = _add_controls(gr, sampler)
            with gr.Column(scale=2, min_width=300):
                result, gallery = _add_pictures(gr)
        drawn = _answering(gr, lambda *given: table.draw(Controls(*given)))
        prompt, seed, *_ = controls
        for trigger in (draw.click, prompt.submit):
            trigger(drawn, [*controls, history], [result, history], api_visibility="private")
        if sampler.upsampler is not None:
            with gr.Accordion("Enlarge a picture of yours", open=False):
                upload = gr.Image(
                    label=f"Up to {MAX_SIDE} px", type="pil", sources=["upload"], height=240
                )
                gr.Button("Enlarge; the prompt above says what it shows").click(
                    _answering(gr, table.enlarge),
                    [upload, prompt, seed, history],
                    [result, history],
                    api_visibility="private",
                )

        def restored(paths: list[str], event: gr.SelectData) -> tuple[Any, ...]:
            path = paths[event.index]
            return *astuple(table.controls_of(Path(path))), path

        restored.__annotations__["event"] = gr.SelectData  # Gradio looks there for what to pass
        history.change(lambda paths: paths, history, gallery, api_visibility="private")
        gallery.select(restored, history, [*controls, result], api_visibility="private")
    return blocks.queue(max_size=16, default_concurrency_limit=1)


def _answering(gr: Any, draw: Callable[..., Path]) -> Callable[..., tuple[str, list[str]]]:
    """An event's function: the picture drawn and the history with it, or a message why not."""

    def answer(*given: Any) -> tuple[str, list[str]]:
        *settings, history = given
        try:
            path = str(draw(*settings))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return path, [path, *history][:HISTORY]

    return answer


def _add_controls(gr: Any, sampler: Sampler) -> tuple[list[Any], Any]:
    """The fields in the order of `Controls`, and the button that draws."""
    levels, can_upscale = len(sampler.base.levels), sampler.upsampler is not None
    prompt = gr.Textbox(
        label="Prompt",
        value=sampler.condition.example,
        max_length=MAX_PROMPT,
        lines=2,
        elem_id="prompt",
    )
    with gr.Row():
        seed = gr.Number(label="Seed", value=0, precision=0, elem_id="seed")
        another = gr.Button("Another seed", elem_id="new-seed")
    another.click(
        lambda: int.from_bytes(os.urandom(4)) & MAX_SEED, None, seed, api_visibility="private"
    )
    truncation = gr.Slider(
        0, 1, 1.0, step=0.05, label="Truncation", info="Lower: typical, less varied."
    )
    with gr.Accordion("Change it", open=False):
        changes = [
            gr.Radio(
                list(CHANGE_OF.values()), value=NOTHING, label="Take from a second prompt or seed"
            ),
            gr.Textbox(label="Second prompt", max_length=MAX_PROMPT, elem_id="second"),
            gr.Slider(0, 1, 0.5, step=0.05, label="Blend", info="1: the second."),
            gr.Slider(
                *(0, levels, levels // 2),
                step=1,
                label="Fine from level",
                info="0 is the coarsest; each level doubles the side.",
            ),
            gr.Number(label="Seed of the style", value=1, precision=0),
        ]
    upscale = gr.Checkbox(label="Upsample", value=can_upscale, interactive=can_upscale)
    draw = gr.Button("Draw", variant="primary", elem_id="draw")
    return [prompt, seed, truncation, *changes, upscale], draw


def _add_pictures(gr: Any) -> tuple[Any, Any]:
    """Where the last picture is shown, and those before it."""
    result = gr.Image(
        label="Picture",
        type="filepath",
        format="png",
        interactive=False,
        elem_id="result",
        buttons=["download", "fullscreen"],
        height=560,
    )
    gallery = gr.Gallery(
        label="History: click to take up again",
        columns=6,
        height=200,
        allow_preview=False,
        object_fit="contain",
        fit_columns=False,
        elem_id="history",
    )
    return result, gallery


def serve(table: Table, *, host: str, port: int) -> str:
    """Serve in a thread that does not keep the process; returns the address."""
    page = build(table)
    import gradio as gr

    # Fonts of the machine: a web font would be a request to somebody else.
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or None,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inbrowser=False,
        allowed_paths=[str(table.folder)],
        max_file_size="20mb",
        theme=theme,
        css=_CSS,
        footer_links=[],
        enable_monitoring=False,
    )
    return str(address)
