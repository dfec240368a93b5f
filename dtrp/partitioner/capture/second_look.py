"""A second look at small models: the model and its graph run on real numbers, and must give the same.

They run one after the other from the same state and seed, over two calls in a row with different inputs:
outputs, their structure, updated buffers and (in training) all gradients are compared. Afterwards the model
and all random states are as they were. What counts is the comparison of operators (`verify`); this one sees
what goes on outside of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .custom import OtherSizes
from .example_values import batch_of
from .modes import BothModes
from .operators import Walk
from .patches import NO_INFERENCE_TENSORS, replaced
from .structure import flatten_output
from .task import Task
from .traced import Traced
from .verify import Unfaithful

MAX_FLOPS = 2e8
_SAMPLES = 2
_LEAST = 1e-5  # what is smaller is the noise of sums that should be zero
_TOLERANCE = 1e-3  # relative to the largest element; most graphs are equal bit for bit


def look(task: Task, both: BothModes, walk: Walk) -> None:
    """Run the model and its graphs and compare, with few samples or all, if that is cheap.

    Raises
    ------
    Unfaithful
        They differ; the message says in what.
    """
    state: list[torch.Tensor] = [*task.model.parameters(), *task.model.buffers(), *task.tensors]
    if any(t.is_meta for t in state):
        return
    size, _ = batch_of(task.tensors)
    for samples in (_SAMPLES, size) if size > _SAMPLES else (size,):
        if walk.flops * samples > MAX_FLOPS * max(size, 1):
            return
        try:
            _compare(task, both.train, True, samples)
            _compare(task, both.eval, False, samples)
        except OtherSizes:
            continue
        except Unfaithful:
            raise
        except Exception:
            if samples == size:
                raise
            continue  # the model does not take fewer samples
        return


def _compare(task: Task, traced: Traced, training: bool, samples: int) -> None:
    inputs, model = _fewer(task.tensors, samples), task.model
    module = traced.graph_module(model)

    def plain(given: list[torch.Tensor]) -> Any:
        args, kwargs = task.signature.unflatten(given)
        return model(*args, **kwargs)

    def graph(given: list[torch.Tensor]) -> Any:
        return pytree.tree_unflatten(list(module(*given)), traced.out_spec)

    calls = [inputs, [_other(t) for t in inputs]]
    try:
        expected = _behaviour(task, plain, calls, training)
    except Exception:  # it may not take other numbers: offsets begin with zero
        calls = [inputs, inputs]
        expected = _behaviour(task, plain, calls, training)
    found = _behaviour(task, graph, calls, training)
    for (name, a), (other, b) in zip(expected, found, strict=False):
        if name != other:
            raise Unfaithful(f"its graph gives {other} where the model gives {name}")
        problem = _difference(a, b)
        if problem:
            raise Unfaithful(f"its graph differs from the model in {name}: {problem}")
    if len(expected) != len(found):
        raise Unfaithful(f"its graph gives {len(found)} values, the model {len(expected)}")


def _behaviour(
    task: Task,
    function: Callable[..., Any],
    calls: list[list[torch.Tensor]],
    training: bool,
) -> list[tuple[str, Any]]:
    """All that can be seen of calls in a row."""
    model = task.model
    seen: list[tuple[str, Any]] = []
    with (
        task.run(training, tensors=True),
        torch.set_grad_enabled(task.grad),
        replaced(NO_INFERENCE_TENSORS),
    ):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        for p in model.parameters():
            p.grad = None  # put back afterwards; adding to it would change what the user holds
        buffers = dict(model.named_buffers())  # one that is None may be filled
        for call, tensors in zip(("", " of the second call"), calls, strict=True):
            given = [_leaf(t) for t in tensors]
            output = function(given)
            leaves, spec = flatten_output(output)
            seen.append((f"the output's structure{call}", spec))
            seen += [(f"output {i}{call}", _held(x)) for i, x in enumerate(leaves)]
            if training:
                _backward(leaves)
                for name, p in model.named_parameters():
                    seen.append((f"the gradient of {name}{call}", _held(p.grad)))
                    p.grad = None
                seen += [(f"the gradient of input {i}{call}", _held(t.grad)) for i, t in enumerate(given)]
            seen += [(f"buffer {n}{call}", _held(b)) for n, b in model.named_buffers() if n in buffers]
    return seen


def _backward(leaves: Sequence[Any]) -> None:
    terms = []
    for x in leaves:
        if isinstance(x, torch.Tensor) and x.requires_grad:
            # Weighted by position, so that an exchange of elements is not overlooked.
            weights = torch.linspace(0.5, 1.5, x.numel(), device=x.device).reshape(x.shape)
            terms.append((x.abs() if x.is_complex() else x).float().mul(weights).mean())
    if terms:
        torch.stack([t.to(terms[0].device) for t in terms]).sum().backward()  # type: ignore[no-untyped-call]


def _fewer(tensors: Sequence[torch.Tensor], samples: int) -> list[torch.Tensor]:
    size, batch = batch_of(tensors)
    return [t[:samples] if samples < size and i in batch else t for i, t in enumerate(tensors)]


def _other(tensor: torch.Tensor) -> torch.Tensor:
    """Other numbers, which what takes the first ones can do with."""
    other = tensor.detach()
    if tensor.dim() and tensor.layout == torch.strided:
        other = other.roll(1, 0)
    other = other * 0.5 if other.is_floating_point() or other.is_complex() else other
    return other.requires_grad_(tensor.requires_grad)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _held(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _difference(a: Any, b: Any) -> str:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        if type(a) is not type(b):
            return f"{_short(b)} instead of {_short(a)}"
        try:
            equal = bool(a == b)
        except Exception:
            equal = True  # objects without a meaning of equality
        # Objects that do not define equality are different in any two calls of the model itself.
        undefined = "__eq__" not in {k for c in type(a).__mro__[:-1] for k in vars(c)}
        return "" if equal or undefined else f"{_short(b)} instead of {_short(a)}"
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return f"{_short(b)} instead of {_short(a)}"
    if a.layout != torch.strided:  # the gradients of sparse embeddings
        a, b = a.to_dense(), b.to_dense()
    if torch.equal(a, b) or a.numel() == 0:
        return ""
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = (v.to(wide).abs() if v.is_complex() else v.to(wide) for v in (a, b))
    if not torch.equal(x.isfinite(), y.isfinite()):
        return "it is not finite in other places"
    x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
    error = float((x - y).abs().max() / x.abs().max().clamp_min(_LEAST))
    return f"relative error {error:.1e}" if error > _TOLERANCE else ""


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        layout = "" if value.layout == torch.strided else f" ({value.layout})"
        return f"{value.dtype} of shape {tuple(value.shape)}{layout}".removeprefix("torch.")
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
