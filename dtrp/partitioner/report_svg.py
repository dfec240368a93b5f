"""The drawings of the HTML report, as inline SVG: the pipeline, bars, the schedule, speed-up over stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from dtrp.partitioner.units import duration, size

if TYPE_CHECKING:
    from dtrp.partitioner.report import PartitionReport
    from dtrp.partitioner.report_parts import Scaling

TIME_COLOURS = {
    "forward": "#3b7dd8",
    "recompute": "#9cc3f2",
    "backward": "#e07b39",
    "update": "#7a6fb0",
    "prediction": "#c39bd3",
    "loop": "#d8c06a",
    "average": "#57a773",
    "transfer": "#8a8f98",
}
MEMORY_COLOURS = {
    "weights": "#3b7dd8",
    "gradients": "#e07b39",
    "optimizer": "#7a6fb0",
    "predictions": "#c39bd3",
    "stash": "#57a773",
    "activations": "#dfae2f",
}
_BOX, _GAP, _TOP = 132, 74, 16  # of the pipeline drawing
_MOST_STAGES = 16  # that a schedule is drawn for


def pipeline(report: PartitionReport) -> str:
    """Stages as boxes, filled as far as they are busy; values that cross cuts as arrows with their bytes."""
    links: dict[tuple[int, int], int] = {}
    for cut in report.cuts:
        for target in cut.targets:
            links[cut.source, target] = links.get((cut.source, target), 0) + cut.bytes
    longest = max((v - u for u, v in links), default=1)
    top = _TOP + (0 if longest <= 1 else min(22 + 14 * longest, 90))
    width = report.n_stages * (_BOX + _GAP) - _GAP + 40
    height = top + 118
    parts = []
    for (u, v), n_bytes in sorted(links.items()):
        label = f"{size(n_bytes)} from stage {u} to stage {v}"
        if v == u + 1:
            start, end, y = 20 + u * (_BOX + _GAP) + _BOX, 20 + v * (_BOX + _GAP), top + 45
            wire = f'<path class="wire" d="M{start} {y} H{end - 6}" marker-end="url(#dtrp-tip)"/>'
            name = _text((start + end) / 2 - 3, y - 7, size(n_bytes))
        else:
            x1, x2 = 20 + u * (_BOX + _GAP) + _BOX * 0.7, 20 + v * (_BOX + _GAP) + _BOX * 0.3
            peak = top - min(22 + 14 * (v - u), 90)
            wire = (
                f'<path class="wire skip" marker-end="url(#dtrp-tip)" '
                f'd="M{x1:.0f} {top} C{x1 + 20:.0f} {peak} {x2 - 20:.0f} {peak} {x2:.0f} {top - 6}"/>'
            )
            name = _text((x1 + x2) / 2, top - 0.75 * (top - peak) - 5, size(n_bytes))
        parts.append(f"<g><title>{label}</title>{wire}{name}</g>")
    for stage in report.stages:
        x = 20 + stage.index * (_BOX + _GAP)
        busy = stage.tick_time / report.tick_time if report.tick_time else 0.0
        slow = " slow" if stage.index == report.bottleneck and report.n_stages > 1 else ""
        share = stage.recompute_share
        how = "recomputes" if stage.recompute else f"recomputes {share:.0%}" if share else "keeps its graphs"
        lines = (
            _short(stage.device, 19),
            f"{duration(stage.tick_time)}, {size(stage.peak_bytes)}",
            "last: no recompute" if stage.index == report.n_stages - 1 else how,
        )
        parts.append(
            f"<g><title>{escape(', '.join(stage.holds))}</title>"
            f'<rect class="box{slow}" x="{x}" y="{top}" width="{_BOX}" height="92" rx="7"/>'
            f'<rect class="busy" x="{x + 10}" y="{top + 78}" width="{busy * (_BOX - 20):.1f}" height="6"/>'
            + _text(x + 10, top + 22, f"stage {stage.index}", kind="strong", anchor="start")
            + "".join(_text(x + 10, top + 39 + 15 * i, line, anchor="start") for i, line in enumerate(lines))
            + "</g>"
        )
    arrow = (
        '<defs><marker id="dtrp-tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>'
    )
    return _svg(width, height, arrow + "".join(parts), "The pipeline: stages and the values between them")


def bars(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    colours: Mapping[str, str],
    show: Callable[[float], str],
    *,
    marks: Sequence[float | None] = (),
    mark_label: str = "",
    apart: str = "",
    title: str,
) -> str:
    """One stacked bar per row; ``marks`` are vertical lines, ``apart`` is a part with its own thin bar."""
    left, width, step = 78, 900, 34
    totals = [sum(v for k, v in parts.items() if k != apart) for _, parts in rows]
    high = max([*totals, *(parts.get(apart, 0.0) for _, parts in rows)], default=0.0) or 1.0
    # A limit far away would squeeze the bars to nothing: it is drawn only if it is near.
    shown = [m if m is not None and m <= 2.5 * high else None for m in marks]
    high = max([high, *(m for m in shown if m is not None)])
    scale = (width - left - 96) / high
    out = []
    for i, ((name, parts), total) in enumerate(zip(rows, totals, strict=True)):
        y, x = 6 + i * step, float(left)
        out.append(_text(left - 8, y + 15, name, anchor="end"))
        for part, value in parts.items():
            if part == apart or value <= 0:
                continue
            out.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max(value * scale - 0.6, 0.4):.2f}" height="20" '
                f'fill="{colours[part]}"><title>{escape(name)}: {part} {show(value)}</title></rect>'
            )
            x += value * scale
        out.append(_text(left + high * scale + 8, y + 15, show(total), anchor="start"))
        if parts.get(apart, 0.0) > 0:
            out.append(
                f'<rect x="{left}" y="{y + 22}" width="{parts[apart] * scale:.2f}" height="4" '
                f'fill="{colours[apart]}"><title>{escape(name)}: {apart} {show(parts[apart])}</title></rect>'
            )
        mark = shown[i] if i < len(shown) else None
        if mark is not None:
            at = left + mark * scale
            out.append(
                f'<path class="limit" d="M{at:.1f} {y - 3} V{y + 25}"><title>{escape(mark_label)} '
                f"{show(mark)}</title></path>"
            )
    return _svg(width, 6 + step * len(rows), "".join(out), title)


def legend(colours: Mapping[str, str], used: Iterable[str]) -> str:
    """What the colours mean."""
    names = set(used)
    items = (
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in colours.items()
        if name in names
    )
    return f'<p class="legend">{"".join(items)}</p>'


def schedule(report: PartitionReport) -> str:
    """Who does which batch at which tick (Peng et al. 2023, Fig 1), until the first batches are through."""
    n = report.n_stages
    if n > _MOST_STAGES:
        return f"<p>The schedule is drawn for up to {_MOST_STAGES} stages.</p>"
    ticks, cell, step, left = 2 * n + 3, 44, 40, 62
    out = [_text(left + (t - 0.5) * cell, 12, str(t)) for t in range(1, ticks + 1)]
    for k in range(1, n + 1):
        stage = report.stages[k - 1]
        y = 20 + (k - 1) * step
        out.append(_text(left - 8, y + 21, f"stage {k - 1}", anchor="end"))
        for t in range(1, ticks + 1):
            forward, backward = t - k + 1, t - 2 * n + k + 1
            x = left + (t - 1) * cell
            done = "recompute and backward" if stage.recompute else "backward"
            halves = [(backward, "B", done, "backward"), (forward, "F", "forward", "forward")]
            if k == n:  # the last stage forwards first
                halves.reverse()
            for half, (batch, letter, what, colour) in enumerate(halves):
                if batch < 1:
                    continue
                corner = x + half * cell / 2
                out.append(
                    f'<rect x="{corner + 1}" y="{y}" width="{cell / 2 - 2}" height="32" rx="3" '
                    f'fill="{TIME_COLOURS[colour]}"><title>tick {t}, stage {k - 1}: {what} of batch {batch}'
                    "</title></rect>" + _text(corner + cell / 4, y + 20, f"{letter}{batch}", kind="cell")
                )
    return _svg(left + ticks * cell + 10, 24 + n * step, "".join(out), "The schedule, tick by tick")


def scaling(points: Sequence[Scaling], chosen: int) -> str:
    """Predicted speed-up over the number of stages, beside the ideal."""
    width, height, left, bottom = 520, 250, 48, 34
    most_k, most = max(p.n_stages for p in points), max(1.0, *(p.speedup for p in points))
    high = max(most * 1.15, 2.0)

    def at(k: float, s: float) -> tuple[float, float]:
        x = left + (k - 1) / max(most_k - 1, 1) * (width - left - 30)
        return x, height - bottom - s / high * (height - bottom - 16)

    out = []
    for tick in _round_steps(high):
        x, y = at(1, tick)
        out.append(f'<path class="grid" d="M{x:.0f} {y:.1f} H{width - 30}"/>')
        out.append(_text(left - 8, y + 4, f"{tick:g}", anchor="end"))
    (x1, y1), (x2, y2) = at(1, 1), at(min(high, most_k), min(high, most_k))
    out.append(f'<path class="ideal" d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}"><title>ideal</title></path>')
    path = " L".join("{:.1f} {:.1f}".format(*at(p.n_stages, p.speedup)) for p in points)
    out.append(f'<path class="line" d="M{path}"/>')
    for p in points:
        x, y = at(p.n_stages, p.speedup)
        mark = ' class="chosen"' if p.n_stages == chosen else ""
        told = f"{p.n_stages} stages: {p.speedup:.2f} times as fast, one batch per {duration(p.tick_time)}"
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if mark else 4}"{mark} fill="#3b7dd8"><title>'
            f"{told}, balance {p.balance:.3f}</title></circle>"
            + _text(x, height - bottom + 16, str(p.n_stages))
        )
    out.append(_text(width / 2, height - 2, "stages"))
    return _svg(width, height, "".join(out), "Predicted speed-up over the number of stages")


def _round_steps(high: float) -> list[float]:
    step = next(s for s in (0.5, 1, 2, 4, 8, 16, 32, 64, 128, high) if high / s <= 6)
    return [step * i for i in range(1, int(high / step) + 1)]


def _svg(width: float, height: float, content: str, title: str) -> str:
    return (
        f'<div class="scroll"><svg role="img" aria-label="{escape(title)}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">{content}</svg></div>'
    )


def _text(x: float, y: float, content: str, *, kind: str = "small", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
