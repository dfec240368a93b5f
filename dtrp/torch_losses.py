"""What torch's own losses want of a target, said before they are computed, with what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode

_CLASSES = {F.cross_entropy, F.nll_loss}
_LIKE_OUTPUT = {F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.huber_loss}
_OTHERS = {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.kl_div}
_VALUES_STAY = {Tensor.view, Tensor.reshape, Tensor.flatten, torch.flatten, torch.reshape, Tensor.long}
_VALUES_STAY |= {Tensor.squeeze, torch.squeeze, Tensor.contiguous, Tensor.to, Tensor.clone, Tensor.detach}


class TargetMistake(ValueError):
    """A loss of torch's surely can't work with this target."""


class Watch(TorchFunctionMode):
    """Looks at all calls of torch's own losses, however deep in a loss of the user's they are.

    Parameters
    ----------
    real : sequence of (fake, real) tensors
        The values of targets, where the loss is called with tensors that have none.
    ignored : set of int
        Gets the class targets that these losses are told to leave out, where they take the mean.
    """

    def __init__(self, real: list[tuple[Tensor, Tensor]], ignored: set[int]) -> None:
        super().__init__()
        self._ignored = ignored
        self._fakes = [fake for fake, _ in real]  # kept, as are their ids
        self._real = {id(fake): values for fake, values in real}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CLASSES or func in _LIKE_OUTPUT or func in _OTHERS:
            self._check(func, signature(func).bind(*args, **kwargs).arguments)
        result = func(*args, **kwargs)
        if func in _VALUES_STAY and args and id(args[0]) in self._real and isinstance(result, Tensor):
            self._fakes.append(result)
            self._real[id(result)] = self._real[id(args[0])]
        return result

    def _check(self, func: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        name, given, target = f"F.{func.__name__}", arguments["input"], arguments["target"]
        if not isinstance(given, Tensor):
            raise TargetMistake(
                f"the model gives {described(given)}, and {name} takes a tensor; use "
                f"loss_fn=lambda out, y: {name}({part_of(given)}, y)"
            )
        if not given.is_floating_point():
            raise TargetMistake(f"{name} takes the model's output first, got {described(given)}")
        if not isinstance(target, Tensor):
            raise TargetMistake(
                f"{name} takes a tensor as target, got {described(target)}; make it one, as with "
                f"torch.as_tensor(y)"
            )
        if func in _CLASSES:
            _check_classes(name, given, target, func is F.cross_entropy)
            ignored, values = arguments.get("ignore_index", -100), self._real.get(id(target))
            if not target.is_floating_point() and arguments.get("reduction", "mean") == "mean":
                self._ignored.add(ignored)
            if values is not None and not target.is_floating_point():
                with unset_fake_temporarily():
                    _check_range(name, given.shape[min(1, given.dim() - 1)], values, ignored)
        elif func in _LIKE_OUTPUT:
            _check_like_output(name, given, target, same_shape=func is not F.huber_loss)


def _check_classes(name: str, given: Tensor, target: Tensor, soft: bool) -> None:
    axis = min(1, given.dim() - 1)
    of_indices = given.shape[:axis] + given.shape[axis + 1 :]
    is_soft = soft and target.shape == given.shape and target.shape != of_indices
    if is_soft and target.is_floating_point():
        return
    do = ""
    if is_soft:
        do = "give one-hot targets as floats, y.float(), or as indices, y.argmax(1)"
    elif target.shape == of_indices:
        if target.dtype in (torch.int64, torch.uint8):
            return
        do = "use y.long()"
    elif target.numel() == of_indices.numel() and target.dim() > len(of_indices):
        do = f"use y.reshape{tuple(of_indices)}" if len(of_indices) != 1 else "use y.flatten()"
        do += ".long()" if target.is_floating_point() else ""
    elif given.dim() == 3 and target.shape == given.shape[:2]:
        do = "classes lie along dimension 1: use out.flatten(0, 1) and y.flatten(), or out.transpose(1, 2)"
    elif target.dim() == given.dim() and target.shape[:1] == given.shape[:1] and len(of_indices) == 1:
        do = f"the model gives {given.shape[1]} scores, the targets have {target.shape[1]} classes"
    else:
        do = "check how outputs and targets are batched"
    wanted = f"class indices (int64) of shape {tuple(of_indices)}"
    if soft:
        wanted += f" or probabilities of shape {tuple(given.shape)}"
    raise TargetMistake(
        f"{name} wants {wanted} for an output of shape {tuple(given.shape)}, got targets that are "
        f"{described(target)}; {do}"
    )


def _check_range(name: str, classes: int, values: Tensor, ignored: int) -> None:
    bad = values[(values != ignored) & ((values < 0) | (values >= classes))]
    if bad.numel() == 0:
        return
    low, high = int(bad.min()), int(bad.max())
    one_off = high == classes and not bool((values == 0).any()) and low >= 0
    if one_off:
        do = "count classes from 0: use y - 1"
    elif low < 0:
        do = "give what is to be left out as ignore_index"
    else:
        do = f"let the model give {high + 1} scores, or mend the labels"
    raise TargetMistake(
        f"{name} wants classes from 0 to {classes - 1}, as the model gives {classes} scores; the first batch "
        f"has {low if low < 0 else high}; {do}"
    )


def _check_like_output(name: str, given: Tensor, target: Tensor, *, same_shape: bool) -> None:
    do = []
    if same_shape and target.shape != given.shape:
        do.append(
            f"y.reshape{tuple(target.shape[:1]) + tuple(given.shape[1:])}"
            if target.numel() == given.numel()
            else "y"
        )
    if not target.is_floating_point() or (target.dtype == torch.float64 != given.dtype and not same_shape):
        do = [f"{do[0] if do else 'y'}.float()"]
    if do:
        use = f"; use {do[0]}" if do != ["y"] else ""
        raise TargetMistake(
            f"{name} wants targets like the output, {described(given)}, got {described(target)}{use}"
        )


def described(value: Any) -> str:
    """What a value is, in few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if value is None:
        return "None"
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiou" else "a"
    if isinstance(value, Mapping):
        return f"{article} {kind} with {', '.join(map(repr, list(value)[:4]))}"
    return f"{article} {kind} of {len(value)}" if isinstance(value, (tuple, list)) else f"{article} {kind}"


def part_of(output: Any) -> str:
    """How to get at the tensor that a loss is likely meant for."""
    for name in ("logits", "prediction", "output", "out"):
        if isinstance(getattr(output, name, None), Tensor):
            return f"out.{name}"
    if isinstance(output, Mapping):
        return f"out[{next((k for k in ('logits', 'out') if k in output), next(iter(output), 'logits'))!r}]"
    return "out[0]" if isinstance(output, (tuple, list)) else "out.logits"
