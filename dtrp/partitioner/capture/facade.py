"""Any ``nn.Module`` becomes one graph per mode: the ways to get it are tried in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from dtrp.errors import CaptureError

from .ambient import plain_attention, quiet
from .explain import Failure, capture_error
from .graph import Captured, KeptWhole, Signature
from .leaves import has_backward_hooks, why_whole
from .methods import VALUE_DEPENDENT
from .modes import BothModes, Flags
from .operators import Walk
from .record import OtherModes, record, record_fixed
from .second_look import look
from .snapshot import untouched
from .task import Task
from .verify import verify
from .writer import CannotRecord

Way = Callable[[Task], BothModes]

# In the order in which they are tried.
WAYS: Mapping[str, Way] = {"record": record, "fixed sizes": record_fixed}


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    opened: Collection[str] = (),
    divided: Mapping[str, int] | None = None,
    ways: Sequence[str] | None = None,
    run: bool = True,
    flags: Flags = (),
    grad: bool = True,
) -> Captured:
    """Turn a model into flat fx graphs, one for each mode (or one for both where they are equal).

    The model runs on fake tensors, so it may be on the meta device and of any size. Each graph is compared
    with the model, operator by operator, before it is accepted; a small model is also really run. The model,
    its modes and all random states are left exactly as they were.

    Parameters
    ----------
    model : nn.Module
        The model; its parameters and submodules are shared with the graphs, not copied.
    args, kwargs
        An example call, ``model(*args, **kwargs)``.
    opened : collection of str
        Qualified names of modules that must not stand in the graph as one node, although they were
        (`Captured.kept_whole`) or usually are.
    divided : mapping of str to int, optional
        Qualified names of Linear layers that are computed in so many parts (`in_parts`).
    ways : sequence of str, optional
        The ways to try, by name (see `WAYS`); default all.
    run : bool
        Whether a small model may also really run for comparison.
    flags : tuple of bool, optional
        Each module's ``training`` for the train graph. Default: as they stand, or as ``model.train()`` sets
        them if the model is in eval mode.
    grad : bool
        Whether gradients are enabled around the model, which its code may ask.

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
    _refuse_unsuitable(model)
    kwargs = kwargs or {}
    signature = Signature.of(model, args, kwargs)
    tensors = signature.flatten(args, kwargs)
    task = Task(model, signature, tensors, opened, divided or {}, flags=flags, grad=grad)
    failures: list[Failure] = []
    for name in WAYS if ways is None else ways:
        try:
            with untouched(model), quiet(), plain_attention():
                try:
                    both = WAYS[name](task)
                except OtherModes as found:
                    task = replace(task, flags=found.flags, settled=True)
                    both = WAYS[name](task)
                walks = _check(task, both, run)
        except Exception as error:
            failures.append(Failure(name, error))
            if isinstance(error, (CannotRecord, *VALUE_DEPENDENT)):  # whatever the sizes are
                break
            continue
        return _accepted(task, both, name, walks)
    raise capture_error(model, failures) from failures[0].error


def _refuse_unsuitable(model: nn.Module) -> None:
    """Refuse what no way could capture."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise CaptureError(
            f"{type(model).__name__} has tensors without a shape yet, such as {lazy[0]!r} (lazy layers). "
            "Call the model once on an example, model(*args, **kwargs), then compile it."
        )
    own = [*model._modules, *model._parameters, *model._buffers]
    taken = [name for name in own if hasattr(GraphModule, name) and not hasattr(nn.Module, name)]
    if taken:
        raise CaptureError(
            f"{type(model).__name__} has a part that is called {taken[0]!r}, which torch.fx.GraphModule, of "
            "which stages are made, means something else by. Give it another name, or compile a module that "
            "holds this one (self.model = model): deeper down the name is free."
        )
    if has_backward_hooks(model):
        raise CaptureError(
            f"{type(model).__name__} has backward hooks on the model itself: its stages run apart, so "
            "nothing would call them. Register them on submodules, which are then kept whole."
        )


def _check(task: Task, both: BothModes, run: bool) -> dict[bool, Walk]:
    """Compare the graphs with the model; what their nodes did, by mode."""
    walks: dict[bool, Walk] = {}
    for training in (True, False):
        traced = both.train if training else both.eval
        traced.graph.lint()
        walks[training] = walks[True] if both.alike and walks else verify(task, traced, training)
    if run:
        look(task, both, walks[True])
    return walks


def _accepted(task: Task, both: BothModes, way: str, walks: Mapping[bool, Walk]) -> Captured:
    model = task.model
    task.runs.forget()
    train = both.train.mode_graph(model, walks[True])
    evaluate = train if both.eval is both.train else both.eval.mode_graph(model, walks[False])
    kept = {k.module: k for k in (*_closed(model, both), *both.train.kept_whole, *both.eval.kept_whole)}
    notes = tuple(dict.fromkeys(both.train.notes + both.eval.notes))
    return Captured(
        model,
        task.signature,
        train,
        evaluate,
        way,
        tuple(kept.values()),
        notes,
        tuple(task.opened),
        task.divided,
        task.flags,
        both.train.asks_grad or both.eval.asks_grad,
        tuple(task.tensors),
        task.runs,
        both.train.left,
    )


def _closed(model: nn.Module, both: BothModes) -> Iterator[KeptWhole]:
    """Modules made of others that stand in the graphs as they are, because of what was done to them."""
    for _, traced in both.each():
        for node in traced.graph.find_nodes(op="call_module"):
            reason = why_whole(traced.module(model, str(node.target)))
            if reason:
                yield KeptWhole(str(node.target), reason)
