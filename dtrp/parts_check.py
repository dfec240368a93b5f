"""Whether a batch that travels in parts trains as the whole does: tried on a few samples of the first batch.

It does where the model treats samples one by one (BatchNorm aside, which has a rule of its own) and the loss
is the mean over them, or over the targets that count. A loss over all pairs of a batch is not, nor is a sum.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .loss_check import as_found
from .partitioner.capture.modes import in_mode
from .partitioner.compiler import Compiled
from .runtime.arguments import n_samples, split_batch
from .runtime.batch import WithExtra
from .runtime.config import TrainConfig
from .runtime.loss import scalar_loss
from .runtime.twins import Snapshot, private_copy

log = logging.getLogger("dtrp")

_TRIED = 4  # samples
_FEW = 2**22  # numbers in an output, up to which the whole batch's targets are tried
_CLOSE = 1e-3


def differs_in_parts(compiled: Compiled, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> str:
    """Why it does not, or cannot be tried; ``""``: it does."""
    loss_fn, model = config.loss_fn, compiled.captured.model
    if loss_fn is None:
        return "the model gives its own loss, which need not be the mean over its samples"
    if any(t.is_meta for t in (*model.parameters(), *inputs)):
        return "the model has no values to try it with"
    if isinstance(loss_fn, nn.Module):  # it may count its calls
        config = replace(config, loss_fn=private_copy(loss_fn, [(p, p) for p in loss_fn.parameters()]))
    samples = n_samples(inputs)
    state = Snapshot(model)
    try:
        with (
            in_mode(model, None),
            as_found(loss_fn, tensors=True),
            torch.no_grad(),
        ):  # also puts the generators back
            some, aim = _repeated((list(inputs), target), samples, min(_TRIED, samples))
            whole = _run(compiled, some)
            cut = [_run(compiled, part) for part, _, _ in split_batch(some, aim, 2)]
            if not _same_rows(whole, cut):
                return "the model does not treat samples one by one"
            for output, wanted in _trials(whole, aim, target, samples, config.ignored):
                if not _is_mean(config, output, wanted):
                    return "the loss is not the mean over the samples"
            if not _is_mean_without_a_row(config, whole, aim):
                return "the loss is a mean over what targets let count"
    except Exception as error:  # whatever the user's code dislikes about a few samples
        return f"a few samples cannot be tried: {type(error).__name__}: {error}"
    finally:
        state.restore()
    return ""


def check_parts(compiled: Compiled, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> None:
    """Refuse parts that the model cannot take, as the first one of this batch shows.

    Raises
    ------
    ValueError
        It fails with a part.
    """
    model = compiled.captured.model
    if any(t.is_meta for t in (*model.parameters(), *inputs)):
        return
    state = Snapshot(model)
    try:
        with in_mode(model, None), torch.no_grad():
            _run(compiled, next(split_batch(list(inputs), target, config.parts, least=config.least_part))[0])
    except Exception as error:
        sizes = ", ".join(str(t.shape[0]) if t.dim() else "none" for t in inputs)
        raise ValueError(
            f"micro_batches={config.parts} cuts inputs along their first dimension, and the model fails with "
            f"the first part: {type(error).__name__}: {error}; they are {sizes} long there (what is not as "
            f"long as the first goes with every part); use micro_batches=1"
        ) from None
    finally:
        state.restore()


def _run(compiled: Compiled, inputs: Sequence[Tensor]) -> Any:
    return compiled.split.graph(False)(*[t.detach().clone() for t in inputs])


def _repeated(tree: Any, samples: int, n: int) -> Any:
    """``n`` samples from what has ``samples``: the first ones, again and again if there are fewer."""
    rows = torch.arange(n) % samples

    def take(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples
        return value[rows.to(value.device)] if is_batch else value

    return pytree.tree_map(take, tree)


def _same_rows(whole: Any, cut: Sequence[Any]) -> bool:
    """Whether the outputs of the parts, one below the other, are that of the whole."""
    leaves = [pytree.tree_leaves(output) for output in cut]
    for all_rows, *rows in zip(pytree.tree_leaves(whole), *leaves, strict=True):
        if not isinstance(all_rows, Tensor):
            continue
        if all_rows.dim() == 0 or sum(r.shape[0] for r in rows) != all_rows.shape[0]:
            return False
        if not _close(all_rows, torch.cat(rows)):
            return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((a - b).norm() <= _CLOSE * a.norm() + 1e-6)


def _trials(whole: Any, aim: Any, target: Any, samples: int, ignored: int) -> Iterator[tuple[Any, Any]]:
    """Outputs and targets: of the few; with targets that do not count; with those of the whole batch."""
    yield whole, aim
    plain = aim.target if isinstance(aim, WithExtra) else aim
    if isinstance(plain, Tensor) and plain.dtype == torch.int64 and plain.dim() > 1 and len(plain) > 1:
        padded = plain.clone()
        padded[0].view(-1)[plain[0].numel() // 2 :] = ignored
        yield whole, WithExtra(padded, aim.extra) if isinstance(aim, WithExtra) else padded
    if isinstance(whole, Tensor) and whole.numel() // len(whole) * samples <= _FEW:
        yield _repeated(whole, len(whole), samples), target


def _is_mean_without_a_row(config: TrainConfig, output: Any, aim: Any) -> bool:
    """With targets of zero, or -1, for one sample: a mask (or weights) that is all ones in the first batch
    would hide that it is divided by its sum. What the user's code makes of these may be no answer."""
    samples = len(pytree.tree_leaves(output)[0])

    def other(value: Any, sign: int) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != samples:
            return value
        # As a class, -1 is an error, and on an accelerator one that ends the process.
        fill = -1 if sign and value.dtype is torch.int64 and value.device.type == "cpu" else 0
        return torch.cat([torch.full_like(value[:1], fill), value[1:]])

    for sign in (0, 1):
        wanted = pytree.tree_map(partial(other, sign=sign), aim)
        try:
            known = bool(scalar_loss(config.loss_fn, output, wanted).isfinite())
            if known and not _is_mean(config, output, wanted):
                return False
        except Exception:
            log.debug("the loss takes no targets of %d", -sign, exc_info=True)
    return True


def _is_mean(config: TrainConfig, output: Any, target: Any) -> bool:
    """Whether the loss of the whole is the mean of the parts' by their shares: by its value, and by its
    gradients, which differ also where all samples happen to have about the same loss."""
    leaves, spec = pytree.tree_flatten(output)
    roots = [x.detach().requires_grad_() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]

    def copies() -> list[Any]:  # which a loss may change in place
        fresh = iter(roots)
        return [next(fresh).clone() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]

    with torch.enable_grad():
        whole = scalar_loss(config.loss_fn, pytree.tree_unflatten(copies(), spec), target)
        in_parts = torch.zeros_like(whole)
        for part, wanted, share in split_batch(copies(), target, 2, ignored=config.ignored):
            in_parts = in_parts + share * scalar_loss(
                config.loss_fn, pytree.tree_unflatten(part, spec), wanted
            )
        pairs = zip(
            *(torch.autograd.grad(x, roots, allow_unused=True) for x in (whole, in_parts)), strict=True
        )
    return _close(whole, in_parts) and all(a is None or b is None or _close(a, b) for a, b in pairs)
