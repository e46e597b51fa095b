"""What the records of `scaling` say, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from studies import _law
from studies._queue import BATCH, Record


class Reading(NamedTuple):
    """One measurement of one training."""

    training: str
    width: float
    share: float
    seed: int
    parameters: int
    pictures: int
    images: int
    """Seen until then."""
    compute: float
    """Multiply-adds until then."""
    milliseconds: float
    """Of processor time, an image of training."""
    y: float
    """Held-out loss, or KID."""
    spread: float
    """Its standard error over captions, or over drawn pictures."""


def readings_of(
    records: Sequence[Record], kinds: Collection[str], multiply_adds: Mapping[str, float]
) -> list[Reading]:
    """All readings of these kinds; an image at each width takes so many multiply-adds."""
    found = []
    for record in records:
        about = record["about"]
        if about["kind"] not in kinds:
            continue
        key = (about["width"], about["share"], about["seed"])
        for reading in record["readings"].values():
            seen = -(-reading["images"] // BATCH) * BATCH  # whole steps
            found.append(
                Reading(
                    " ".join([about["kind"], *(f"{part:g}" for part in key)]),
                    *key,
                    record["parameters"],
                    record["data"]["pictures"],
                    seen,
                    multiply_adds[f"{about['width']:g}"] * seen,
                    record["milliseconds"],
                    *_measured(reading),
                )
            )
    return sorted(found, key=lambda one: (one.width, -one.share, one.seed, one.images))


def _measured(reading: Record) -> tuple[float, float]:
    if "loss" in reading:
        return reading["loss"], reading["standard_error"]
    low, high = reading["interval"]
    return reading["kid"], (high - low) / (2 * 1.96)


def points(readings: Sequence[Reading]) -> tuple[np.ndarray, np.ndarray]:
    """(parameters, pictures, images seen) P 3, and what was measured there P."""
    x_P3 = np.array([(one.parameters, one.pictures, one.images) for one in readings], float)
    return x_P3, np.array([one.y for one in readings])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; all columns but the first are figures."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _said(values_R: np.ndarray, form: str) -> str:
    low, high = np.quantile(values_R, [0.025, 0.975])
    return f"{low:{form}} to {high:{form}}"


def of_losses(loss: Sequence[Reading], seen: int) -> str:
    """Every regression after so many images, a row a width; seeds beside each other."""
    last = [one for one in loss if one.images == seen]
    sizes = sorted({one.pictures for one in last}, reverse=True)
    rows = []
    for width in sorted({one.width for one in last}):
        own = [one for one in last if one.width == width]
        cells = [f"× {width:g}", f"{own[0].parameters:,}", f"{own[0].compute / seen / 1e6:.0f}"]
        cells.append(f"{np.median([one.milliseconds for one in own]):.1f}")
        for pictures in sizes:
            cells.append(" · ".join(f"{o.y:.4f}" for o in own if o.pictures == pictures) or "–")
        rows.append(cells)
    heads = ["width", "parameters", "10⁶ multiply-adds an image", "ms an image"]
    errors = [one.spread for one in last]
    about = f"After {seen:,} images. Standard errors over captions, which all share: "
    about += f"{min(errors):.4f} to {max(errors):.4f}."
    return f"{_table([*heads, *(f'{n:,} pictures' for n in sizes)], rows)}\n\n{about}"


def of_law(law_7: np.ndarray, laws_R7: np.ndarray, loss: Sequence[Reading]) -> str:
    """The numbers of the law with their intervals, and how far it is from what it was fitted to."""

    def told(laws: np.ndarray) -> np.ndarray:
        alpha, gamma = laws[..., 4:5], laws[..., 6:7]
        parts = [np.exp(laws[..., :4]), laws[..., 4:], gamma / (alpha + gamma)]
        return np.concatenate(parts, axis=-1)

    names = [*_law.NAMES, "γ ÷ (α + γ)"]
    rows = [
        (name, f"{value:.3f}", _said(values_R, ".3f"))
        for name, value, values_R in zip(names, told(law_7), told(laws_R7).T, strict=True)
    ]
    x_P3, y_P = points(loss)
    error_P = 100 * np.abs(_law.predicted(law_7, x_P3) / y_P - 1)
    about = f"{len(loss)} readings of {len({one.training for one in loss})} trainings, which it "
    about += f"misses by {np.sqrt(np.mean(error_P**2)):.1f} % (root mean square), "
    about += f"{error_P.max():.1f} % at most."
    return f"{_table(['', 'fitted', '95 %'], rows)}\n\n{about}"


def width_left_out(loss: Sequence[Reading]) -> str:
    """The largest width, predicted by a law of the others, and by the next smaller width itself."""
    *_, smaller, largest = sorted({one.width for one in loss})
    law_7 = _law.fitted(*points([one for one in loss if one.width != largest]))
    beside = {(o.share, o.seed, o.images): o.y for o in loss if o.width == smaller}
    left = [one for one in loss if one.width == largest]
    others = [beside.get((one.share, one.seed, one.images), np.nan) for one in left]
    return _held_against(left, law_7, f"× {smaller:g}'s", others)


def lengths_left_out(loss: Sequence[Reading], longest: int) -> str:
    """Longer trainings, predicted by a law of what is no longer than `longest` images.

    Beside them stands the largest width after `longest`, whose compute the last of each have.
    """
    left = [one for one in loss if one.images > longest]
    if not left:
        return "Not measured yet."
    known = [one for one in loss if one.images <= longest]
    largest = max(known, key=lambda one: (one.width, one.share, one.images))
    law_7 = _law.fitted(*points(known))
    return _held_against(left, law_7, f"× {largest.width:g}'s", [largest.y] * len(left))


def _held_against(
    left: Sequence[Reading], law_7: np.ndarray, other: str, others: Sequence[float]
) -> str:
    """What was measured, what a law had predicted, and how near something else comes."""
    said_P = _law.predicted(law_7, points(left)[0])
    y_P = np.array([one.y for one in left])
    errors_2P = 100 * (np.array([said_P, others]) / y_P - 1)
    rows = [
        (
            f"× {one.width:g}",
            f"{one.pictures:,}",
            f"{one.images:,}",
            f"{one.compute / 1e12:.2f}",
            f"{one.y:.4f}",
            f"{said:.4f}",
            *(f"{error:+.1f} %" for error in errors),
        )
        for one, said, errors in zip(left, said_P, errors_2P.T, strict=True)
    ]
    heads = ["width", "pictures", "images seen", "10¹² multiply-adds", "measured", "predicted"]
    by_law, by_other = np.nanmean(np.abs(errors_2P), axis=1)
    about = f"Mean absolute error: {by_law:.1f} % by the law, {by_other:.1f} % by taking {other}."
    return f"{_table([*heads, 'error', f'of taking {other}'], rows)}\n\n{about}"


def of_kids(kid: Sequence[Reading]) -> str:
    """KID × 10³ of every adversarial reading, with its interval over drawn pictures."""
    rows = [
        (
            f"× {one.width:g}",
            f"{one.pictures:,}",
            f"{one.milliseconds:.1f}",
            f"{one.images:,}",
            f"{one.compute / 1e12:.2f}",
            f"{1e3 * one.y:.0f} ± {1e3 * 1.96 * one.spread:.0f}",
        )
        for one in kid
    ]
    heads = ["width", "pictures", "ms an image", "images seen", "10¹² multiply-adds"]
    return _table([*heads, "KID × 10³"], rows)


def of_paper(
    law_7: np.ndarray,
    laws_R7: np.ndarray,
    loss: Sequence[Reading],
    kid: Sequence[Reading],
    paper: Record,
) -> str:
    """What the laws say of a training of paper_64's size and length on pictures like ours."""
    size, seen = paper["parameters"], paper["images"]
    rows = []
    sizes = {"our pictures": max(one.pictures for one in loss), "any number of them": np.inf}
    for name, pictures in sizes.items():
        x_13 = np.array([[size, pictures, seen]])
        values_R = np.array([_law.predicted(law, x_13)[0] for law in laws_R7])
        said = f"{_law.predicted(law_7, x_13)[0]:.3f}"
        rows.append((f"held-out L1, {name}", said, _said(values_R, ".3f")))
    whole = [one for one in kid if one.share == 1]
    if len({one.width for one in whole}) > 2:
        rows += _kid_by_compute(whole, float(paper["multiply_adds"]) * seen)
    times = size / max(one.parameters for one in loss), seen / max(one.images for one in loss)
    about = f"That is {times[0]:,.0f} times the parameters and {times[1]:,.0f} times the images "
    return f"{_table(['', 'predicted', '95 %'], rows)}\n\n{about}of what was measured."


def _kid_by_compute(whole: Sequence[Reading], far: float) -> list[tuple[str, str, str]]:
    """KID = k C^−κ of all pictures; its interval is by KIDs drawn within their errors."""
    compute_P = np.array([one.compute for one in whole])
    y_P, spread_P = np.array([(one.y, one.spread) for one in whole]).T
    random = np.random.default_rng(0)
    drawn_RP = random.normal(y_P, spread_P, (1_000, len(whole))).clip(1e-4)
    laws_R2 = np.array([_law.power_law(compute_P, drawn_P) for drawn_P in drawn_RP])
    law_2 = np.array(_law.power_law(compute_P, y_P))

    def at(laws: np.ndarray) -> np.ndarray:
        return np.asarray(1e3 * np.exp(laws[..., 0] - laws[..., 1] * np.log(far)))

    return [
        ("κ of KID = k C^−κ", f"{law_2[1]:.3f}", _said(laws_R2[:, 1], ".3f")),
        ("KID × 10³ by that", f"{at(law_2):.0f}", _said(at(laws_R2), ".0f")),
    ]
