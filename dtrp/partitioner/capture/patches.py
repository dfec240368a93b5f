"""What must be caught besides torch functions while a model runs: module calls, custom gradients, writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import transformer


class Observer(Protocol):
    """Who is told of what the model does; ``proceed`` does what would have happened without patches."""

    paused: bool

    def on_module(
        self, module: nn.Module, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``module(*args, **kwargs)``."""

    def on_gradient_function(
        self,
        function: type[torch.autograd.Function],
        proceed: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """``function.apply(*args, **kwargs)``."""

    def on_autocast(self) -> None:
        """A region of torch.autocast is entered."""

    def on_write(self, module: nn.Module, name: str, value: Any) -> None:
        """``module.name = value``, before it happens."""


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, calls and writes reach ``observer``; it is left alone while its ``paused`` is true."""
    call, write = nn.Module.__call__, nn.Module.__setattr__
    function: Any = torch.autograd.Function
    apply = function.__dict__["apply"]

    def patched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if observer.paused:
            return call(module, *args, **kwargs)
        return observer.on_module(module, call, args, kwargs)

    def patched_write(module: nn.Module, name: str, value: Any) -> None:
        if not observer.paused:
            observer.on_write(module, name, value)
        write(module, name, value)

    def patched_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        def proceed(*a: Any, **k: Any) -> Any:
            return apply.__get__(None, cls)(*a, **k)  # the original, as a method of this class

        if observer.paused:
            return proceed(*args, **kwargs)
        return observer.on_gradient_function(cls, proceed, args, kwargs)

    enter = torch.autocast.__enter__

    def patched_enter(region: torch.autocast) -> Any:
        # Checkpointing enters autocast just to repeat the outer state.
        if not observer.paused and not sys._getframe(1).f_code.co_filename.endswith("checkpoint.py"):
            observer.on_autocast()
        return enter(region)  # type: ignore[no-untyped-call]

    detect = transformer._detect_is_causal_mask

    def given(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        # nn.Transformer looks whether the values of a mask are those of a causal one, to choose a faster
        # kernel. A graph for all masks applies the mask as it is.
        return bool(is_causal)

    try:
        transformer._detect_is_causal_mask = given
        torch.autocast.__enter__ = patched_enter  # type: ignore[method-assign]
        nn.Module.__call__ = patched_call  # type: ignore[method-assign]
        nn.Module.__setattr__ = patched_write  # type: ignore[method-assign,assignment]
        function.apply = classmethod(patched_apply)
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__setattr__ = write  # type: ignore[method-assign]
        function.apply = apply


class ObservedFakeMode(FakeTensorMode):
    """A fake-tensor mode whose own use of torch functions is not taken for the model's."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # type: ignore[no-untyped-call]
        self.observer: Observer | None = None

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        if observer is None or observer.paused:
            return super().__torch_dispatch__(*args, **kwargs)
        observer.paused = True
        try:
            return super().__torch_dispatch__(*args, **kwargs)
        finally:
            observer.paused = False
