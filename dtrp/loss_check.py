"""Refuses a loss function that gives no scalar before any worker starts: it is tried on fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .partitioner.capture import Captured
from .runtime.loss import as_scalar, own_loss, scalar_loss


def check_scalar_loss(
    captured: Captured, loss_fn: Callable[[Any, Any], Any] | None, inputs: Sequence[Tensor], target: Any
) -> None:
    """Raise ``TypeError`` if the loss of a batch like the example's is surely no scalar tensor.

    Nothing is said of batches of other shapes, nor where the loss cannot be had without computing (it
    looks at values, say): then a stage will say.
    """
    graph = captured.train.module.graph
    examples = [n.meta.get("val") for n in graph.find_nodes(op="placeholder")]
    if any(
        not isinstance(e, FakeTensor) or e.shape != x.shape for e, x in zip(examples, inputs, strict=True)
    ):
        return
    (output_node,) = graph.find_nodes(op="output")
    leaves = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in output_node.args[0]]
    mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)
    if mode is None:
        return
    output = pytree.tree_unflatten(leaves, captured.train.out_spec)
    if loss_fn is None:
        scalar_loss(None, own_loss(output), None)
        return
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        tried = (
            copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        )  # it may count its calls
        with mode:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, target)
            loss = tried(output, fakes)
    except Exception:
        return
    finally:
        mode.allow_non_fake_inputs = allowed
    as_scalar(loss_fn, loss)
