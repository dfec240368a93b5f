"""Which modules stand in the graph as one node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .structure import tensors_in

# Modules of torch.nn that are made of others. Kept as one node they would be most of a model; opened, they
# show the layers inside. TransformerEncoderLayer and MultiheadAttention stay closed: in evaluation they
# choose fused kernels by looking at their arguments, which a traced copy of their code would not do.
_OPENED = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)

# Where the hooks are made by which transformers' models gather hidden states: they hand what a layer gives to
# the call that asked for it, and do nothing else, so they are recorded as the model's own code is.
_GATHERS = "transformers.utils.output_capturing"


def is_leaf(
    module: nn.Module, name: str, *, closed: Collection[str] = (), opened: Collection[str] = ()
) -> bool:
    """Whether ``module`` (at the qualified ``name``) is one node of the graph.

    Parameters
    ----------
    module : nn.Module
        The module that is called.
    name : str
        Its qualified name; the root, ``""``, is never a leaf.
    closed : collection of str
        Names that are leaves whatever they are.
    opened : collection of str
        Names that must not be leaves.
    """
    if name == "":
        return False
    if name in opened:
        return has_backward_hooks(module)  # which only autograd's own call would run
    if name in closed or has_hooks(module) or is_compiled(module):
        return True
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(
        module, _OPENED
    )


def is_lent(module: nn.Module, own: Mapping[nn.Module, list[int]]) -> bool:
    """Whether a module has tensors for parameters that are not its ``own``, by their ids
    (`torch.func.functional_call`), or shares what it makes of them with other calls
    (`torch.nn.utils.parametrize.cached`)."""
    return any(
        [*map(id, m._parameters.values())] != own.get(m)
        or (parametrize._cache_enabled and parametrize.is_parametrized(m))
        for m in module.modules()
    )


def borrowed(model: nn.Module, module: nn.Module, result: Any, given: Any, since: int) -> str:
    """The name of a parameter of the model's other modules that a call of this one used, ``""`` if none.

    Its hooks may do so, or code that reaches around: standing as one node it would have a copy of its own.
    ``result`` and ``given`` are the call's, ``since`` as in `trained_by`.
    """
    own = {id(p) for p in module.parameters()} | {id(t) for _, t in tensors_in(given)}
    used = {id(p) for p in trained_by(result, since)} - own
    return next((name for name, p in model.named_parameters() if id(p) in used), "") if used else ""


def trained_by(result: Any, since: int) -> Iterator[torch.Tensor]:
    """Leaves that gradients of ``result`` come to by what was called since then (a number of autograd's)."""
    waiting: list[Any] = [t.grad_fn for _, t in tensors_in(result)]
    seen = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        elif node._sequence_nr() >= since:
            waiting += [before for before, _ in node.next_functions]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs hooks, which only a real call of it would run."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if hooks:
        hooks = tuple(hook for hook in hooks if getattr(hook, "__module__", None) != _GATHERS)
    return bool(hooks) or has_backward_hooks(module)


def entry(model: nn.Module) -> Callable[..., Any]:
    """What a call of the model is: with its hooks and ``__call__``, where it has such, else ``forward``."""
    own = any(
        "__call__" in vars(kind) for kind in type(model).__mro__ if kind.__module__ != nn.Module.__module__
    )
    return model if own or has_hooks(model) else model.forward


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether gradients that pass ``module`` run hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def why_whole(module: nn.Module) -> str:
    """Why a module made of others is a leaf by itself, ``""`` if it is a layer of torch.nn."""
    if next(module.children(), None) is None:
        return ""
    if is_compiled(module):
        return "it is compiled (torch.compile or TorchScript), and runs as such"
    return "it has hooks, which run when it is called as a whole" if has_hooks(module) else ""


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` is (or its call was replaced by) torch.compile's or TorchScript's."""
    kind = type(module)
    return (
        module._compiled_call_impl is not None
        or (kind.__module__, kind.__name__) == ("torch._dynamo.eval_frame", "OptimizedModule")
        or kind.__module__.startswith("torch.jit.")
    )
