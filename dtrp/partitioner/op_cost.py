"""FLOPs and bytes moved of one aten operator.

FLOPs are torch's own count (`torch.utils.flop_counter`; for the backward of grouped convolutions ours):
matrix products, convolutions and attention, a multiply and an add counting two. Everything else has none,
and its time is that of the bytes it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten
_FREE = {"prim::device", "aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided",
         "aten::_unsafe_view", "aten::lift_fresh", "aten::_local_scalar_dense", "aten::new_empty",
         "aten::new_empty_strided", "aten::sym_size", "aten::sym_stride", "aten::sym_numel"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpCost:
    """FLOPs, bytes read and written, the dtype that decides the peak rate, and what else decides the time.

    ``kernel``: a kind of operator that a device may be slow at (`Kernels`). Of convolutions, ``width``:
    channels of a group that go in or come out, the fewer of the two; ``calls``: how many a pass makes.
    """

    flops: int
    moved_bytes: int
    dtype: torch.dtype
    kernel: str = ""
    width: int = 0
    calls: int = 1


def op_cost(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> OpCost | None:
    """The cost of one call; ``None`` for what costs nothing: views, allocations, questions about shapes."""
    if func._schema.name in _FREE or func.is_view:
        return None
    read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    written = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    if not written:
        return None
    dtype = next((t.dtype for t in read if t.is_floating_point()), written[0].dtype)
    flops = op_flops(func, args, kwargs, out)
    if func._schema.name in _GATHERS:  # reads as much of its table as it gives, not all of it
        moved = 2 * sum(map(_size, written))
    else:
        moved = sum(map(_size, read)) + sum(map(_size, written))
    packet = func._overloadpacket
    if packet is _aten.convolution or packet is _aten.convolution_backward:
        weight, groups = (args[1], args[8]) if packet is _aten.convolution else (args[2], args[9])
        calls = 1 if packet is _aten.convolution else max(1, sum(args[10][:2]))
        width = min(weight.shape[1], weight.shape[0] // groups)
        return OpCost(flops, moved, dtype, "convolution", width, calls)
    return OpCost(flops, moved, dtype, _KERNELS.get(packet, ""))


def has_flops(func: Any) -> bool:
    """Whether calls of an operator count FLOPs at all."""
    return func._overloadpacket in flop_registry or func._overloadpacket in _EXTRA


def op_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """The FLOPs of one call; only the shapes of its tensors matter."""
    packet = func._overloadpacket
    if packet is _aten.convolution_backward and args[9] > 1:
        return _grouped_backward(args)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return int(_EXTRA[packet](args, kwargs, out)) if packet in _EXTRA else 0


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of all operators that run under it, on fake tensors as on real ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += op_flops(func, args, kwargs or {}, out)
        return out


_KERNELS = {
    _aten.native_batch_norm: "norm",
    _aten._native_batch_norm_legit: "norm",
    _aten._batch_norm_with_update: "norm",
    _aten.native_batch_norm_backward: "norm_backward",
    _aten.batch_norm_backward: "norm_backward",
}
_GATHERS = {"aten::embedding", "aten::index_select", "aten::gather", "aten::index"}


def _size(tensor: torch.Tensor) -> int:
    # An expanded dimension is read from the same few bytes again and again.
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * tensor.element_size()


def _grouped_backward(args: tuple[Any, ...]) -> int:
    """Each of the two gradients costs what the forward costs; torch's counter leaves the groups out."""
    gradient, x, weight, *_ = args
    transposed, wanted = args[7], args[10]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(gradient.shape), transposed)
    return int(forward) * (bool(wanted[0]) + bool(wanted[1]))


def _cpu_attention(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    query, key, value, *_ = args
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _cpu_attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    gradient, query, key, value, *_ = args
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _rnn_layer(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """One layer of a recurrent network, one direction: each row of the input meets both weight matrices."""
    x, w_input, w_hidden, *_ = args
    rows = x.numel() // x.shape[-1]
    return int(2 * rows * (w_input.numel() + w_hidden.numel()))


def _rnn_layer_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return 2 * _rnn_layer(args, kwargs, out)  # the gradients of the input and of the weights


# Operators that some of the torch versions we support do not count themselves.
_EXTRA: dict[Any, Callable[[tuple[Any, ...], dict[str, Any], Any], int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    _aten.mkldnn_rnn_layer: _rnn_layer,
    _aten.mkldnn_rnn_layer_backward: _rnn_layer_backward,
}
