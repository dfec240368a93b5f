"""Any ``nn.Module`` becomes one graph per mode: the ways to get it are tried in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from dtrp.errors import CaptureError

from .fakes import FakeWorld, fake_inputs
from .graph import Captured, ModeGraph, Signature
from .location import raised_at
from .propagate import fold_constants, propagate
from .record import record
from .snapshot import untouched
from .symbolic import trace_symbolically
from .traced import Traced, same_graph

Way = Callable[..., Traced]
WAYS: dict[str, Way] = {"fx": trace_symbolically, "record": record}


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    opened: Collection[str] = (),
    ways: Sequence[str] | None = None,
) -> Captured:
    """Turn a model into flat fx graphs, one for each mode (or one for both where they are equal).

    Nothing is computed: the model runs on fake tensors, so it may be on the meta device. The model, its
    modes and all random states are left exactly as they were.

    Parameters
    ----------
    model : nn.Module
        The model; its parameters and submodules are shared with the graphs, not copied.
    args, kwargs
        An example call, ``model(*args, **kwargs)``.
    opened : collection of str
        Qualified names of modules that must not stand as one node.

    Raises
    ------
    CaptureError
        No way gave a faithful graph; the message names the module, the line of the user's code, the
        construct and what to do about it.
    TypeError
        ``model`` is not an ``nn.Module``, or the arguments do not fit its ``forward``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}: {model!r:.80}")
    signature = Signature.of(model, args, kwargs or {})
    tensors = signature.flatten(args, kwargs or {})
    failures = []
    for name in WAYS if ways is None else ways:
        try:
            traces = {
                training: _trace(model, signature, tensors, WAYS[name], training, opened)
                for training in (True, False)
            }
        except Exception as error:
            failures.append((name, error))
            continue
        train = ModeGraph(traces[True].graph_module(model), traces[True].out_spec)
        evaluate = train
        if not same_graph(traces[True], traces[False]):
            evaluate = ModeGraph(traces[False].graph_module(model), traces[False].out_spec)
        kept = tuple(dict.fromkeys(traces[True].kept_whole + traces[False].kept_whole))
        notes = tuple(dict.fromkeys(traces[True].notes + traces[False].notes))
        return Captured(model, signature, train, evaluate, name, kept, notes)
    raise _error(model, failures) from failures[0][1]


def _trace(
    model: nn.Module,
    signature: Signature,
    tensors: Sequence[torch.Tensor],
    way: Way,
    training: bool,
    opened: Collection[str],
) -> Traced:
    with untouched(model):
        model.train(training)
        traced = way(model, signature, tensors, opened)
    with untouched(model):
        model.train(training)
        world = FakeWorld()
        propagate(model, traced.graph, world, fake_inputs(world, tensors))
    fold_constants(traced.graph)
    traced.graph.lint()
    return traced


def _error(model: nn.Module, failures: list[tuple[str, Exception]]) -> CaptureError:
    lines = [f"{type(model).__name__} could not be turned into a graph."]
    for name, error in failures:
        module = getattr(error, "dtrp_module", "")
        where = f"in module {module!r}" if module else "in the model's own forward"
        place = raised_at(error)
        lines.append(f"  {name}: {where}{', ' + place if place else ''}: {type(error).__name__}: {error}")
    return CaptureError("\n".join(lines))
