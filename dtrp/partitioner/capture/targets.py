"""How a torch function that was called is written as an fx node."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

# Tensor's operator methods, as the functions of the operator module. A method that is the reflected one
# (``__rsub__``) has its two arguments exchanged.
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_OTHER = ("neg", "invert", "abs", "pos", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "setitem")
_OPERATORS: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in (*_BINARY, *_BITWISE, *_OTHER, *(f"i{name}" for name in (*_BINARY, *_BITWISE)))
    if name != "imatmul"  # tensors have none
}
_REFLECTED = {f"__r{name}__": _OPERATORS[f"__{name}__"] for name in (*_BINARY, *_BITWISE)}
_WRAPPED = {"pow": operator.pow, "pow_": operator.ipow}
_OPERATORS["__div__"] = operator.truediv
_REFLECTED["__rdiv__"] = operator.truediv
_OPERATORS["__idiv__"] = operator.itruediv
# A method may call itself by another name (``Tensor.__pow__`` is a wrapped ``pow``): its place in the class
# tells what it is. The plain name of a method counts more than an operator's, ``x.neg()`` is no ``-x``.
_NAMES: dict[Any, str] = {}
for _name in (*_OPERATORS, *_REFLECTED):
    _method: Any = getattr(torch.Tensor, _name, None)
    if _method is not None and getattr(torch.Tensor, _method.__name__, None) != _method:
        _NAMES[_method] = _name


def node_form(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """``(op, target, args, kwargs)`` of the node for ``function(*args, **kwargs)``."""
    name = str(_NAMES.get(function) or getattr(function, "__name__", ""))
    if is_property(function):
        attribute = property_name(function)
        if attribute == "data":
            return "call_method", "detach", args[:1], {}
        return "call_function", getattr, (args[0], attribute), {}
    if not _is_tensor_method(function, name):
        # torch's own wrappers of methods (``x ** 2``) have the method's name without underscores.
        if getattr(function, "__module__", "") == "torch._tensor" and name in _WRAPPED:
            return "call_function", _WRAPPED[name], args, kwargs
        return "call_function", function, args, kwargs
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args, kwargs
    if name in _REFLECTED and len(args) == 2:
        return "call_function", _REFLECTED[name], (args[1], args[0]), kwargs
    return "call_method", name, args, kwargs


def is_property(function: Callable[..., Any]) -> bool:
    """Whether ``function`` reads an attribute of a tensor."""
    return getattr(function, "__name__", "") == "__get__"


def property_name(function: Callable[..., Any]) -> str:
    """The attribute that a property's ``__get__`` or ``__set__`` is about."""
    owner = getattr(function, "__self__", None)
    name = getattr(owner, "__name__", None)
    if name is None:  # a Python property of torch.Tensor
        name = next((k for k, v in vars(torch.Tensor).items() if v is owner), "")
    return str(name)


def _is_tensor_method(function: Callable[..., Any], name: str) -> bool:
    method = getattr(torch.Tensor, name, None)
    return method is not None and (method is function or method == function)
