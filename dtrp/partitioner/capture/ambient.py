"""What torch keeps for the whole process or thread, put back as it was found.

Code that fails half-way (as attempts to capture a model do) may leave such state behind: a level of
functorch or of forward-mode differentiation that nobody exits poisons every later call in the process.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_DEVICES = ("cpu", "cuda")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is logged: failed attempts are expected, and torch would print each with its stack.
    Nor are gradients looked at (``torch.autograd.set_detect_anomaly``), of which fake ones have no values.
    Where a caller is in ``torch.inference_mode``, there are gradients all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        inference = torch.is_inference_mode_enabled()  # leaving it elsewhere would switch gradients on
        left: Any = torch.inference_mode(False) if inference else nullcontext()
        with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(False), left:
            # torch asks a tensor that code has left on a module (old weight norms do) for its gradient.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        logging.disable(before)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, torch's attention layers do what they do where gradients flow: their fused path for inference
    exists as one operator alone, and asks whether the values of a mask allow it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def ambient_state() -> Iterator[None]:
    """On leaving, torch's levels, modes, switches and defaults are what they were on entering."""
    functorch = torch._C._functorch.get_dynamic_layer_stack_depth()
    dual, free = forward_ad._current_level, _no_dual_level()
    functions, operators = torch._C._len_torch_function_stack(), _get_current_dispatch_mode_stack()
    gradients = torch.is_grad_enabled()
    default_dtype = torch.get_default_dtype()
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    try:
        yield
    finally:
        _pop_modes(functions, operators)
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(functorch)
        forward_ad._current_level = dual
        if free and not _no_dual_level():
            torch._C._exit_dual_level(0)
        torch.set_grad_enabled(gradients)
        if torch.get_default_dtype() != default_dtype:
            torch.set_default_dtype(default_dtype)
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def _no_dual_level() -> bool:
    """Whether no level of forward-mode differentiation is entered: torch has one at most, uncounted."""
    try:
        torch._C._exit_dual_level(torch._C._enter_dual_level())
    except RuntimeError:
        return False
    return True


def _pop_modes(functions: int, operators: list[torch.utils._python_dispatch.TorchDispatchMode]) -> None:
    while torch._C._len_torch_function_stack() > functions:
        torch._C._pop_torch_function_stack()
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if any(mode is other for other in operators):
            continue
        key = getattr(mode, "_mode_key", None)  # torch's own modes have places of their own
        torch._C._pop_torch_dispatch_stack(key) if key is None else torch._C._unset_dispatch_mode(key)
