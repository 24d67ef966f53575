"""The pictures of a report, as SVG elements.

matplotlib, because it comes with every notebook, draws without a network or a script, and the same
figure gives the same bytes. Plotly's offline form would bring four megabytes of JavaScript, and ask
a page that shows untrusted text to allow it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gemma_keras_tune._support.pictures import COLOURS, draw_history, new_figure, style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In inches. A page shows pictures at about 320 pixels, so their texts are as large as its own.
WIDTH = 3.5
# Of pass rates, the same in every picture, so that several can be compared by eye.
LEFT, RIGHT, TOP, BOTTOM = 0.82, 0.88, 0.27, 0.25
ROW = 0.27


@dataclasses.dataclass(frozen=True)
class Rate:
    """A pass rate with its interval.

    Attributes:
        name: Who was asked.
        role: A role of `COLOURS`.
        passed: Cases passed.
        cases: Cases in all.
        low: Lower end of the interval.
        high: Upper end.
    """

    name: str
    role: str
    passed: int
    cases: int
    low: float
    high: float


def rates(rows: Sequence[Rate], name: str, *, target: float | None = None) -> str:
    """Pass rates, one below the other, each with its interval.

    Args:
        rows: The rates, topmost first.
        name: Of the picture; unique on its page.
        target: The rate to reach, drawn as a line.

    Returns:
        An SVG element.
    """
    height = TOP + ROW * len(rows) + BOTTOM
    figure = new_figure(WIDTH, height)
    figure.set_layout_engine("none")
    with style():
        across, up = 1 - (LEFT + RIGHT) / WIDTH, ROW * len(rows) / height
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / height, across, up))
        for place, row in enumerate(rows):
            _draw_rate(axes, -place, row)
        if target is not None:
            axes.axvline(target, color=COLOURS["ink"], linewidth=0.9, linestyle=(0, (4, 3)))
            side = "right" if target > 0.75 else "left" if target < 0.25 else "center"
            axes.text(target, 0.56, f"target {percent(target)}", ha=side, va="bottom")
        axes.set(xlim=(-0.01, 1.01), ylim=(0.5 - len(rows), 0.5))
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "25", "50", "75", "100 %"))
        axes.set_yticks(range(0, -len(rows), -1), [row.name for row in rows])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=COLOURS["line"], linewidth=0.6)
        axes.set_axisbelow(True)
    said = [
        f"{row.name}: {row.passed} of {row.cases} passed, "
        f"interval {percent(row.low)} to {percent(row.high)}"
        for row in rows
    ]
    goal = [] if target is None else [f"target {percent(target)}"]
    return to_svg(figure, name, "; ".join(goal + said))


def _draw_rate(axes: "Axes", place: int, row: Rate) -> None:
    colour = COLOURS[row.role]
    axes.plot(
        (row.low, row.high), (place, place), color=colour, alpha=0.32, linewidth=6,
        solid_capstyle="round",
    )  # fmt: skip
    if row.cases:
        axes.plot(row.passed / row.cases, place, "o", color=colour, markersize=6, clip_on=False)
    axes.text(
        1.08, place, f"{row.passed} of {row.cases}", va="center", color=COLOURS["ink"],
    )  # fmt: skip


def history(values: Mapping[str, Sequence[float]], name: str) -> str:
    """One metric by epoch, in training and, where there is one, in validation.

    Args:
        values: Of every epoch, under Keras's names.
        name: The metric.

    Returns:
        An SVG element.
    """
    figure = new_figure(WIDTH, 2.4)
    with style():
        draw_history(figure.add_subplot(), values, name)
    said = [
        f"{key.replace('val_', 'validation ')} from {values[key][0]:.3g} to {values[key][-1]:.3g}"
        for key in (name, f"val_{name}")
        if values.get(key)
    ]
    return to_svg(figure, name, f"{'; '.join(said)} over {len(values[name])} epochs")


def learning_rate(rates: Sequence[float]) -> str:
    """The learning rate of every step.

    Args:
        rates: The rates, in order.

    Returns:
        An SVG element.
    """
    figure = new_figure(WIDTH, 2.4)
    with style():
        axes = figure.add_subplot()
        # A long run has more steps than a picture has points to tell them apart.
        step = max(1, math.ceil(len(rates) / 500))
        places = sorted({*range(0, len(rates), step), len(rates) - 1})
        axes.plot([i + 1 for i in places], [rates[i] for i in places], color=COLOURS["tuned"])
        axes.set(xlabel="update", ylabel="learning rate", ylim=(0, None))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
        axes.set_axisbelow(True)
    label = f"learning rate over {len(rates)} steps, at most {max(rates):g}"
    return to_svg(figure, "learning-rate", label)


def token_lengths(lengths: Sequence[tuple[int, int]]) -> str:
    """How long the training pairs are.

    Args:
        lengths: `(tokens, pairs of that length)`.

    Returns:
        An SVG element.
    """
    import numpy as np

    tokens, counts = (np.array(column) for column in zip(*lengths, strict=True))
    span = int(tokens.max() - tokens.min()) + 1
    width = max(1, math.ceil(span / 30))  # whole tokens a bar, so that no bar holds more kinds
    edges = np.arange(tokens.min(), tokens.max() + width + 1, width)
    figure = new_figure(WIDTH, 2.4)
    with style():
        axes = figure.add_subplot()
        heights, _ = np.histogram(tokens, edges, weights=counts)
        axes.bar(edges[:-1], heights, width=0.86 * width, align="edge", color=COLOURS["tuned"])
        axes.set(xlabel="tokens in a pair", ylabel="pairs")
        axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
        axes.set_axisbelow(True)
    middle = int(np.repeat(tokens, counts)[counts.sum() // 2])
    label = (
        f"{counts.sum()} pairs of {tokens.min()} to {tokens.max()} tokens, half of them up to "
        f"{middle}"
    )
    return to_svg(figure, "token-lengths", label)


def percent(share: float) -> str:
    """A share as people read it.

    Args:
        share: 0 to 1.

    Returns:
        As in `"87 %"`; with a decimal where it is no whole percentage near the ends.
    """
    value = 100 * share
    if 0.05 < value < 1 or 99 < value < 99.95:
        return f"{value:.1f} %"
    return f"{value:.0f} %"
