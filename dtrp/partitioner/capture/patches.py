"""What must be caught besides torch functions while a model runs: module calls, custom gradients, writes."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import BuiltinMethodType, MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution
from torch.nn.modules import transformer
from torch.utils import checkpoint

from .location import is_ours, is_users


class Observer:
    """Is told of what the model does; ``proceed`` does what would have happened without. This one lets it."""

    paused = False  # then it is left alone

    def on_module(self, module: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``module(*args, **kwargs)``."""
        return proceed(module, *args, **kwargs)

    def on_gradient_function(self, function: Any, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``function.apply(*args, **kwargs)``."""
        return proceed(*args, **kwargs)

    def on_operator(self, operator: Any, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """An operator that no torch function called: in a legacy constructor, a scripted function."""
        return proceed(*args, **kwargs)

    def on_autocast(self, region: torch.autocast, entered: bool) -> None:
        """A region of torch.autocast was entered, or is left."""

    def on_question(self) -> None:
        """The model's own code asks whether gradients are enabled."""

    def on_mode(self, users: bool) -> None:
        """The user's code or torch's asks a module for its ``training``, perhaps while this one is paused."""

    def on_checkpoint(self) -> AbstractContextManager[Any]:
        """A region that checkpointing would run again in the backward pass runs in this context."""
        return nullcontext()

    def on_reentrant(self, region: Callable[..., Any], inputs: Any) -> Any:
        """``region(*inputs)`` as such a region, of the kind whose result alone has gradients."""
        with self.on_checkpoint():
            return region(*inputs)

    def on_write(self, module: nn.Module, name: str, value: Any) -> None:
        """``module.name = value``, before it happens."""


@contextmanager
def observed(observer: Observer, model: nn.Module) -> Iterator[None]:
    """Inside, calls and writes reach ``observer``; it is left alone while its ``paused`` is true, and by what
    other threads do."""
    here = threading.get_ident()

    def unseen() -> bool:
        return observer.paused or threading.get_ident() != here

    call, write = nn.Module.__call__, nn.Module.__setattr__
    function: Any = torch.autograd.Function
    apply = function.__dict__["apply"]

    def patched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if unseen():
            return call(module, *args, **kwargs)
        return observer.on_module(module, call, args, kwargs)

    def patched_write(module: nn.Module, name: str, value: Any) -> None:
        if not unseen():
            observer.on_write(module, name, value)
        write(module, name, value)

    def patched_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        def proceed(*a: Any, **k: Any) -> Any:
            return apply.__get__(None, cls)(*a, **k)  # the original, as a method of this class

        if unseen():
            return proceed(*args, **kwargs)
        if cls is checkpoint.CheckpointFunction:  # run its first argument, storing nothing
            region, _, *inputs = args
            # Where no input requires gradients, none reach it, whatever parameters it uses: torch warns.
            flows = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
            with torch.set_grad_enabled(flows and enabled()):
                return observer.on_reentrant(region, inputs)
        return observer.on_gradient_function(cls, proceed, args, kwargs)

    early = list(_bound_early(model))
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def patched_enter(region: torch.autocast) -> Any:
        if not unseen():
            observer.on_autocast(region, True)  # may refuse: nothing must have been entered then
        return enter(region)  # type: ignore[no-untyped-call]

    def patched_exit(region: torch.autocast, *error: Any) -> Any:
        if not unseen():
            observer.on_autocast(region, False)
        return leave(region, *error)

    def given(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        # nn.Transformer looks whether the values of a mask are those of a causal one, to choose a faster
        # kernel. A graph for all masks applies the mask as it is.
        return bool(is_causal)

    def once(frame: Any) -> Any:
        # Checkpointing without storing would run the region again in the backward pass: here it runs once.
        return nullcontext() if unseen() else observer.on_checkpoint()

    enabled = torch.is_grad_enabled

    def asked() -> bool:
        if not unseen() and is_users(sys._getframe(1).f_code.co_filename):
            observer.on_question()
        return enabled()

    def read(module: nn.Module) -> Any:
        file = sys._getframe(1).f_code.co_filename
        if not is_ours(file):
            observer.on_mode(is_users(file))
        return module.__dict__["training"]

    def flag(module: nn.Module, value: Any) -> None:
        module.__dict__["training"] = value

    base: Any = vars(torch._C.TensorBase)["data"]

    def data(tensor: torch.Tensor) -> torch.Tensor:  # the property's name, too, since Python 3.13
        found: torch.Tensor = base.__get__(tensor)
        return found

    def assign(tensor: torch.Tensor, value: torch.Tensor) -> None:
        if unseen() or (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
            base.__set__(tensor, value)
        else:  # a graph has no other way to say it; what holds the tensor sees the same
            base.__get__(tensor).copy_(base.__get__(value))

    with replaced(
        (torch, "is_grad_enabled", asked),
        NO_INFERENCE_TENSORS,
        (transformer, "_detect_is_causal_mask", given),
        (checkpoint, "_checkpoint_hook", once),
        (Distribution, "_validate_args", False),  # which looks at values only to refuse some
        (torch.autocast, "__enter__", patched_enter),
        (torch.autocast, "__exit__", patched_exit),
        (nn.Module, "__call__", patched_call),
        (nn.Module, "__setattr__", patched_write),
        (function, "apply", classmethod(patched_apply)),
    ):
        for scope, name, bound in early:
            scope[name] = functools.partial(patched_apply, bound.__self__)
        nn.Module.training = property(read, flag)  # type: ignore[assignment]
        torch.Tensor.data = property(data, assign)  # type: ignore[assignment]
        try:
            yield
        finally:
            del nn.Module.training, torch.Tensor.data
            for scope, name, bound in early:
                scope[name] = bound


def _without_gradients(region: torch.inference_mode) -> None:
    region._inference_mode_context = torch.set_grad_enabled(not region.mode)  # type: ignore[assignment]


# Inference mode is no_grad: what a stage gives goes on into layers that are trained, and is kept for that.
NO_INFERENCE_TENSORS = (torch.inference_mode, "__enter__", _without_gradients)


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, attributes (of owner, by name) have other values."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _bound_early(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where ``MyFunction.apply`` was taken before (``f = MyFunction.apply``): in modules and their files."""
    kinds = {kind for m in model.modules() for kind in type(m).__mro__}
    files = {kind.__module__ for kind in kinds} - {"builtins"}
    scopes = [
        vars(sys.modules[file]) for file in files if not file.startswith("torch.") and file in sys.modules
    ]
    for scope in (*scopes, *(vars(m) for m in model.modules())):
        for name, value in list(scope.items()):
            # Not by asking any object for a name: those of some classes answer with an error.
            if not isinstance(value, (BuiltinMethodType, MethodType)) or value.__name__ != "apply":
                continue
            owner = value.__self__
            if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
                yield scope, name, value


class ObservedFakeMode(FakeTensorMode):
    """A fake-tensor mode whose own use of torch functions is not taken for the model's."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # type: ignore[no-untyped-call]
        self.observer: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        observer, kwargs = self.observer, kwargs or {}
        if observer is None or observer.paused:
            return super().__torch_dispatch__(func, types, args, kwargs)
        run = super().__torch_dispatch__

        def proceed(*args: Any, **kwargs: Any) -> Any:
            return run(func, types, args, kwargs)

        observer.paused = True
        try:
            return observer.on_operator(func, proceed, args, kwargs)
        finally:
            observer.paused = False
