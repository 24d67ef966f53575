"""The charts of a report: coordinates of ticks, lines and bars, which `chart.svg.jinja` draws."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from gemma_keras_tune.evaluation.reporting import texts

# In units of the viewBox. A page shows charts at about as many pixels.
WIDTH, HEIGHT = 320, 200
ROW = 26
MAX_POINTS = 500
MAX_BARS = 30

Point = tuple[float, float]
Ticks = list[tuple[float, str]]


@dataclasses.dataclass(frozen=True)
class Rate:
    """A pass rate with its interval; `role` is a colour of the page, such as `"tuned"`."""

    name: str
    role: str
    passed: int
    cases: int
    low: float
    high: float


class _Frame:
    """The plot's rectangle, and the position of values in it."""

    def __init__(
        self, x_range: Point, y_range: Point, height: int, *,
        left: int = 52, right: int = 10, top: int = 24, bottom: int = 40,
    ) -> None:  # fmt: skip
        self.height = height
        self.left, self.right, self.top, self.bottom = left, WIDTH - right, top, height - bottom
        self._x_range, self._y_range = x_range, y_range

    def x(self, value: float) -> float:
        return _scaled(value, self._x_range, self.left, self.right)

    def y(self, value: float) -> float:
        return _scaled(value, self._y_range, self.bottom, self.top)

    def x_ticks(self) -> Ticks:
        return [(self.x(v), f"{v:g}") for v in _ticks(*self._x_range, whole=True)]

    def y_ticks(self, *, whole: bool = False) -> Ticks:
        return [(self.y(v), f"{v:g}") for v in _ticks(*self._y_range, whole=whole)]


def _scaled(value: float, span: Point, start: float, end: float) -> float:
    low, high = span
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + share * (end - start), 1)


def _ticks(low: float, high: float, *, most: int = 5, whole: bool = False) -> list[float]:
    """Choose round numbers between two values, at most one more than `most`."""
    least = (high - low or abs(high) or 1.0) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [number * step for number in numbers]


def _draw(frame: _Frame, label: str, **parts: Any) -> Markup:
    empty = dict.fromkeys(("x_ticks", "y_ticks", "lines", "bars", "legend", "rates"), ())
    parts = {**empty, "titles": ("", ""), "goal": None, **parts}
    template = texts.template("chart.svg.jinja")
    return Markup(template.render(frame=frame, width=WIDTH, label=label, **parts))


def rates(rows: Sequence[Rate], *, target: float | None = None) -> Markup:
    """Draw pass rates as SVG, each with its interval, and the target as a line."""
    height = 24 + ROW * len(rows) + 24
    frame = _Frame((0, 1), (0, 1), height, left=74, right=88, top=24, bottom=24)
    drawn = [
        {
            "it": row,
            "y": frame.top + ROW * (place + 0.5),
            "x": frame.x(row.passed / row.cases) if row.cases else None,
            "interval": (frame.x(row.low), frame.x(row.high)),
        }
        for place, row in enumerate(rows)
    ]
    said = [
        f"{row.name}: {row.passed} of {row.cases} passed, "
        f"interval {texts.percent(row.low)} to {texts.percent(row.high)}"
        for row in rows
    ]
    goal = None
    if target is not None:
        anchor = "end" if target > 0.75 else "start" if target < 0.25 else "middle"
        goal = {"x": frame.x(target), "anchor": anchor, "text": f"target {texts.percent(target)}"}
        said.insert(0, f"target {texts.percent(target)}")
    shares = [(frame.x(n / 4), f"{25 * n}{' %' * (n == 4)}") for n in range(5)]
    return _draw(frame, "; ".join(said), x_ticks=shares, rates=drawn, goal=goal)


def history(values: Mapping[str, Sequence[float]], name: str) -> Markup:
    """Draw one metric by epoch as SVG, in training and, if there is one, in validation."""
    drawn = {key: values[key] for key in (name, f"val_{name}") if values.get(key)}
    finite = [value for key in drawn for value in drawn[key] if math.isfinite(value)] or [0.0]
    epochs = max(map(len, drawn.values()))
    room = 0.06 * (max(finite) - min(finite)) or 0.5
    frame = _Frame((1, epochs), (min(finite) - room, max(finite) + room), HEIGHT)
    lines = [
        {
            "role": "tuned" if key == name else "few-shot",
            "dashed": key != name,
            "name": "training" if key == name else "validation",
            "parts": _parts(frame, enumerate(series, 1)),
            "dots": True,
        }
        for key, series in drawn.items()
    ]
    said = [
        f"{key.replace('val_', 'validation ')} from {series[0]:.3g} to {series[-1]:.3g}"
        for key, series in drawn.items()
    ]
    return _draw(
        frame,
        f"{'; '.join(said)} over {epochs} epochs",
        x_ticks=frame.x_ticks(),
        y_ticks=frame.y_ticks(),
        titles=("epoch", f"{name} (over answer tokens)"),
        lines=lines,
        legend=lines if len(lines) > 1 else [],
    )


def _parts(frame: _Frame, points: Iterable[Point]) -> list[list[Point]]:
    """Split a line at values that are no numbers, such as the loss of a lost run."""
    parts: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            parts[-1].append((frame.x(x), frame.y(y)))
        else:
            parts.append([])
    return [part for part in parts if part]


def learning_rate(rates: Sequence[float]) -> Markup:
    """Draw the learning rate of every update as SVG."""
    frame = _Frame((1, len(rates)), (0, max(rates) * 1.05 or 1.0), HEIGHT)
    step = max(1, math.ceil(len(rates) / MAX_POINTS))
    places = sorted({*range(0, len(rates), step), len(rates) - 1})
    parts = _parts(frame, [(place + 1, rates[place]) for place in places])
    return _draw(
        frame,
        f"learning rate over {len(rates)} updates, at most {max(rates):g}",
        x_ticks=frame.x_ticks(),
        y_ticks=frame.y_ticks(),
        titles=("update", "learning rate"),
        lines=[{"role": "tuned", "dashed": False, "parts": parts, "dots": len(rates) == 1}],
    )


def token_lengths(lengths: Sequence[tuple[int, int]]) -> Markup:
    """Draw a histogram of the training pairs as SVG, out of `(tokens, pairs of that length)`."""
    import numpy as np

    tokens, counts = (np.array(column) for column in zip(*lengths, strict=True))
    first, last = int(tokens.min()), int(tokens.max())
    width = max(1, math.ceil((last - first + 1) / MAX_BARS))  # whole tokens
    edges = np.arange(first, last + width + 1, width)
    heights, _ = np.histogram(tokens, edges, weights=counts)
    frame = _Frame((first, int(edges[-1])), (0, float(heights.max()) * 1.05), HEIGHT)
    bars = [
        {"x": frame.x(left), "y": frame.y(height), "width": frame.x(left + 0.86 * width)}
        for left, height in zip(edges.tolist(), heights.tolist(), strict=False)
    ]
    middle = int(np.repeat(tokens, counts)[counts.sum() // 2])
    return _draw(
        frame,
        f"{counts.sum()} pairs of {first} to {last} tokens, half of them up to {middle}",
        x_ticks=frame.x_ticks(),
        y_ticks=frame.y_ticks(whole=True),
        titles=("tokens in a pair", "pairs"),
        bars=bars,
    )
