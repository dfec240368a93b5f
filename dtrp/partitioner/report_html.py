"""The partition report as one HTML page that stands on its own: no network, no scripts, names escaped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dtrp.partitioner import report_svg as svg
from dtrp.partitioner.report_parts import recomputes
from dtrp.partitioner.report_text import explained, gap, shares_cores
from dtrp.partitioner.units import count, duration, size
from dtrp.version import __version__

if TYPE_CHECKING:
    from dtrp.partitioner.report import PartitionReport
    from dtrp.partitioner.report_parts import Scaling, StageReport

PAYS = 0.05
"""A larger number of stages pays if the tick gets shorter by at least this share."""

_STYLE = """
.dtrp{--ink:#1d2430;--soft:#5b6472;--line:#d9dee6;--panel:#f6f8fa;--page:#fff;--accent:#3b7dd8;--alarm:#c0392b;
 color:var(--ink);background:var(--page);font:14px/1.5 system-ui,sans-serif;max-width:1120px;margin:0 auto;
 padding:24px}
@media (prefers-color-scheme:dark){.dtrp{--ink:#e6eaf0;--soft:#a3adbb;--line:#3a424e;--panel:#1e242c;
 --page:#15191f;--accent:#6aa3ee;--alarm:#ff8a75}body{background:#15191f}}
.dtrp h1{font-size:24px;margin:0 0 4px}.dtrp h2{font-size:17px;margin:32px 0 8px}
.dtrp p{margin:6px 0;max-width:80ch}.dtrp .sub{color:var(--soft)}
.dtrp .facts{display:flex;flex-wrap:wrap;gap:10px;margin:18px 0}
.dtrp .fact{background:var(--panel);border:1px solid var(--line);border-radius:8px;
 padding:8px 14px;min-width:104px}
.dtrp .fact b{display:block;font-size:19px}.dtrp .fact span{color:var(--soft);font-size:12px}
.dtrp .scroll{overflow-x:auto}.dtrp svg{display:block;font:13px system-ui,sans-serif}
.dtrp svg text{fill:var(--ink)}.dtrp svg .small{font-size:12px;fill:var(--soft)}
.dtrp svg .strong{font-weight:600}.dtrp svg .cell{fill:#fff;font-size:10px}
.dtrp svg .box{fill:var(--panel);stroke:var(--line);stroke-width:1.5}
.dtrp svg .box.slow{stroke:var(--alarm);stroke-width:2.5}.dtrp svg .busy{fill:var(--accent)}
.dtrp svg .wire{fill:none;stroke:var(--soft);stroke-width:1.6}.dtrp svg .skip{stroke-dasharray:5 3}
.dtrp svg .tip{fill:var(--soft)}.dtrp svg .limit{stroke:var(--alarm);stroke-width:2}
.dtrp svg .grid{stroke:var(--line)}.dtrp svg .ideal{stroke:var(--soft);stroke-dasharray:4 4;fill:none}
.dtrp svg .line{stroke:var(--accent);stroke-width:2;fill:none}
.dtrp svg .chosen{stroke:var(--ink);stroke-width:2}
.dtrp .legend span{margin-right:16px;white-space:nowrap}
.dtrp .legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
.dtrp table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.dtrp th,.dtrp td{padding:4px 12px 4px 0;text-align:right;vertical-align:top;
 border-bottom:1px solid var(--line)}
.dtrp th{color:var(--soft);font-weight:600}.dtrp .left{text-align:left}
.dtrp code{font:12px ui-monospace,monospace;overflow-wrap:anywhere}
.dtrp details{border:1px solid var(--line);border-radius:8px;padding:6px 12px;margin:6px 0}
.dtrp summary{cursor:pointer}.dtrp ul{columns:3 240px;margin:8px 0;padding-left:20px}
.dtrp .alarm{color:var(--alarm)}
"""


def page(report: PartitionReport) -> str:
    """A whole document, with the speed-up over other numbers of stages (planned for now: a few seconds)."""
    title = f"{escape(report.model)} in {_stages(report.n_stages)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"</head><body>{fragment(report, _scaling(report))}</body></html>\n"
    )


def fragment(report: PartitionReport, scaling: str = "") -> str:
    """What a notebook shows: the page without its frame and, by default, without other numbers of stages."""
    sections = [
        _head(report),
        "<h2>Pipeline</h2>",
        svg.pipeline(report),
        "<h2>Time per tick</h2>",
        _time(report),
        "<h2>Memory</h2>",
        _memory(report),
        scaling,
        "<h2>Stages</h2>",
        _table(report),
        *map(_modules, report.stages),
        "<h2>Values that cross cuts</h2>",
        _cuts(report),
        "<h2>Schedule</h2>",
        "<p>F: forward, B: backward (with recomputation where the stage recomputes), of the batch with this "
        "number. Values made in one tick arrive in the next.</p>",
        svg.schedule(report),
        "<h2>How it was made</h2>",
        _notes(report),
    ]
    return f'<style>{_STYLE}</style><div class="dtrp">{"".join(sections)}</div>'


def _head(report: PartitionReport) -> str:
    facts = {
        "one batch per": duration(report.tick_time),
        "over one device": f"{report.speedup:.2f} times",
        "balance": f"{report.balance:.3f}",
        "lower bound": duration(report.lower_bound),
        "gap": gap(report),
        "over cuts, per batch": size(report.cut_bytes),
        "parameters": count(sum(stage.params for stage in report.stages)),
    }
    shown = "".join(
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in facts.items()
    )
    reason = f"<p>{escape(explained(report))}</p>" if report.n_stages > 1 else ""
    return (
        f"<h1>{escape(report.model)} in {_stages(report.n_stages)}</h1>"
        f'<p class="sub">Predicted from {escape(report.costs)} costs; {size(report.bandwidth)} per second '
        f'between stages.</p><div class="facts">{shown}</div>{reason}'
    )


def _time(report: PartitionReport) -> str:
    rows = [(f"stage {s.index}", s.time) for s in report.stages]
    used = {part for _, parts in rows for part, value in parts.items() if value > 0}
    shares = shares_cores(report)
    drawn = svg.bars(
        rows,
        svg.TIME_COLOURS,
        duration,
        marks=[] if shares else [report.lower_bound] * len(rows),
        mark_label="lower bound",
        apart="transfer" if report.overlaps else "",
        title="Time per tick and stage",
    )
    how = (
        "A stage computes while it communicates."
        if report.overlaps
        else "Sending and receiving take CPU time from computing."
    )
    bound = (
        f"The stages share the cores: a batch takes {duration(report.tick_time)}, at least "
        f"{duration(report.lower_bound)}."
        if shares
        else "The line is the lower bound for the slowest stage."
    )
    text = f"<p>{how} {bound}</p>"
    return text + drawn + svg.legend(svg.TIME_COLOURS, used)


def _memory(report: PartitionReport) -> str:
    rows = [(f"stage {s.index}", s.memory) for s in report.stages]
    used = {part for _, parts in rows for part, value in parts.items() if value > 0}
    limits = [s.memory_limit for s in report.stages]
    drawn = svg.bars(
        rows,
        svg.MEMORY_COLOURS,
        size,
        marks=limits,
        mark_label="limit",
        title="Memory per stage",
    )
    known = sorted({limit for limit in limits if limit is not None})
    text = f"<p>Limit per stage: {' or '.join(size(limit) for limit in known)}.</p>" if known else ""
    return text + drawn + svg.legend(svg.MEMORY_COLOURS, used)


def _scaling(report: PartitionReport) -> str:
    k = report.n_stages
    wanted = {1, 2, 3, 4, 6, 8, k, 2 * k} if k <= 8 else {1, k // 4, k // 2, k, 2 * k}
    points = report.compare(sorted(wanted), time_limit=0.5)
    if len(points) < 2:
        return ""
    return (
        f"<h2>More or fewer stages</h2>{svg.scaling(points, k)}<p>{escape(stop_paying(points))} Predicted, "
        f"on devices like the first and without a memory limit; the dashed line is the ideal.</p>"
    )


def stop_paying(points: Sequence[Scaling]) -> str:
    """Where further stages stop paying, in a sentence."""
    for here, after in itertools.pairwise(points):
        if after.tick_time > here.tick_time * (1 - PAYS):
            gain = 1 - after.tick_time / here.tick_time
            less = f"shorten the tick by {100 * gain:.1f} %" if gain >= 5e-4 else "not shorten the tick"
            return f"More than {here.n_stages} stages stop paying: {after.n_stages} would {less}."
    return f"Each step up to {points[-1].n_stages} stages still pays."


def _table(report: PartitionReport) -> str:
    heads = ("params", "GFLOP", "in", "out", "forward", "backward", "tick", "peak memory", "limit")
    rows = []
    for s in report.stages:
        over = s.memory_limit is not None and s.peak_bytes > s.memory_limit
        cells = (
            count(s.params),
            f"{s.flops / 1e9:.2f}",
            size(s.input_bytes),
            size(s.output_bytes),
            duration(s.forward_time),
            duration(s.backward_time),
            duration(s.tick_time),
            f'<span class="alarm">{size(s.peak_bytes)}</span>' if over else size(s.peak_bytes),
            "-" if s.memory_limit is None else size(s.memory_limit),
        )
        rows.append(
            f'<tr><td class="left">{s.index}</td><td class="left">{escape(s.device)}</td>'
            f'<td class="left">{recomputes(s)}</td>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    return (
        '<div class="scroll"><table><thead><tr><th class="left">stage</th><th class="left">device</th>'
        f'<th class="left">recompute</th>{"".join(f"<th>{h}</th>" for h in heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _modules(stage: StageReport) -> str:
    names = stage.holds if len(stage.holds) <= 4 else (*stage.holds[:2], "…", *stage.holds[-2:])
    items = "".join(f"<li><code>{escape(name)}</code></li>" for name in stage.submodules)
    return (
        f"<details><summary>Stage {stage.index}: {stage.nodes} nodes, {len(stage.submodules)} modules: "
        f"<code>{escape(', '.join(names))}</code></summary><ul>{items}</ul></details>"
    )


def _cuts(report: PartitionReport) -> str:
    if not report.cuts:
        return "<p>None.</p>"
    rows = []
    for cut in report.cuts:
        left = [f"<code>{escape(cut.name)}</code>", f"<code>{escape(cut.module)}</code>"]
        left += [escape("; ".join(cut.shapes))]
        right = [f"{cut.source}", ", ".join(map(str, cut.targets)), size(cut.bytes)]
        right += ["yes" if cut.gradient else "no"]
        rows.append(
            "".join(f'<td class="left">{cell}</td>' for cell in left)
            + "".join(f"<td>{cell}</td>" for cell in right)
        )
    heads = [f'<th class="left">{name}</th>' for name in ("value", "module", "shape")]
    heads += [f"<th>{name}</th>" for name in ("from", "to", "bytes", "gradient comes back")]
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>"
    )


def _notes(report: PartitionReport) -> str:
    lines = [f"<p>Captured by {escape(report.method)}; planned by {escape(report.engine or '-')}.</p>"]
    lines += [
        f"<p>Kept whole: <code>{escape(module)}</code>: {escape(reason)}</p>"
        for module, reason in report.kept_whole
    ]
    lines += [f"<p>{escape(note)}</p>" for note in report.notes]
    return "".join(lines) + f'<p class="sub">dtrp {escape(__version__)}</p>'


def _stages(n: int) -> str:
    return f"{n} stage{'s' if n != 1 else ''}"
