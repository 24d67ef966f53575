"""Figures for notebooks, drawn with matplotlib."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour of each role.
COLOURS: Mapping[str, str] = {
    "ink": "#26231f",
    "muted": "#6f6a61",
    "line": "#d8d3c9",
    "tuned": "#1f5f8c",
    "base": "#8d867a",
    "few_shot": "#96690f",
}
STYLE: Mapping[str, Any] = {
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.5,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "xtick.major.size": 0,
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.color": COLOURS["line"],
    "ytick.major.size": 0,
    "ytick.labelcolor": COLOURS["muted"],
}


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure without a background. Draw on it within `style()`.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def style() -> Any:
    """Make a context in which figures have this library's style; the user's settings are kept.

    Returns:
        A context manager.
    """
    import matplotlib

    settings: Any = dict(STYLE)
    return matplotlib.rc_context(settings)


def history_figure(history: Mapping[str, Sequence[float]]) -> "Figure":
    """Draw loss and accuracy by epoch, in training and, if there is one, in validation.

    Args:
        history: Values of every epoch, under Keras's names.

    Returns:
        A figure with an axes for each of `loss` and `accuracy` that the history has.
    """
    names = [name for name in ("loss", "accuracy") if name in history]
    figure = new_figure(4.5 * max(len(names), 1), 3.2)
    with style():
        for number, name in enumerate(names, 1):
            draw_history(figure.add_subplot(1, len(names), number), history, name)
    return figure


def draw_history(axes: "Axes", history: Mapping[str, Sequence[float]], name: str) -> None:
    """Draw one metric by epoch.

    Args:
        axes: The axes to draw on.
        history: Values of every epoch, under Keras's names.
        name: The metric; with `val_` in front, its validation.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = [key for key in (name, f"val_{name}") if history.get(key)]
    for key in drawn:
        validation = key != name
        values = [value if math.isfinite(value) else math.nan for value in history[key]]
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=COLOURS["few_shot" if validation else "tuned"],
            linestyle="--" if validation else "-",
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            label="validation" if validation else "training",
        )
    if len(drawn) > 1:
        axes.legend(frameon=False, labelcolor=COLOURS["muted"])
    axes.set(xlabel="epoch", ylabel=f"{name} (over answer tokens)")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
