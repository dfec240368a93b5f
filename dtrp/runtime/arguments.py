"""A batch as the user hands it over, taken apart: inputs, named inputs, target; and what each stage gets."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from ..wiring import Wiring
from .batch import Feed, Update, WithExtra

Call = tuple[tuple[Any, ...], dict[str, Any]]
_CLASSES = (torch.int64, torch.uint8)  # dtypes that torch's losses take as classes


def refuse_autocast(known: torch.dtype | None) -> None:
    """Refuse to be called inside torch.autocast, but with the dtype that the stages use, too."""
    for kind in ("cpu", "cuda"):
        dtype = torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind) and known != dtype:
            raise RuntimeError(
                f"this is called inside torch.autocast, which ends before batches in flight do, and does "
                f"not reach worker processes: call it outside, with pipe.trainer(..., autocast={dtype})"
            )


def take_target(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, has_target: bool
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs, inputs by name and target (with what else the loss takes) of a call of `Trainer.step`.

    Raises
    ------
    TypeError
        There is no target where there should be one; ``extra`` is none, or may be meant for the model.
    """
    if not has_target:
        return args, kwargs, None
    named = dict(kwargs)
    extra = named.pop("extra", None)
    args, target = (args, named.pop("target")) if "target" in named else _last_off(args, named)
    if extra is None:
        return args, named, target
    if "extra" in inspect.signature(model.forward).parameters:
        raise TypeError(
            f"extra= gives arguments to loss_fn, but forward of {type(model).__name__} has a parameter "
            f"'extra' too: pass the model's by position, or rename it"
        )
    if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
        raise TypeError(
            f"extra={extra!r}: expected a dict of arguments of loss_fn by name, such as {{'beta': 0.5}}"
        )
    return args, named, WithExtra(target, dict(extra)) if extra else target


def _last_off(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any]:
    if not args and named:
        raise TypeError(
            f"step() got no target among {', '.join(map(repr, named))}: name it 'target', the others as the "
            f"model's forward does ((batch, target) where the model takes the dict itself); pass "
            f"loss_fn=None to trainer() if the model gives its own loss"
        )
    if not args:
        raise TypeError(
            "step() got no target: the last positional argument is the target; pass loss_fn=None to "
            "trainer() if the model gives its own loss"
        )
    return args[:-1], args[-1]


def as_call(item: Any) -> Call:
    """One item of a loader as arguments of `Trainer.step`."""
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    return (item,), {}


def check_loader(loader: Any, has_target: bool) -> None:
    """Refuse what gives no batches.

    Raises
    ------
    TypeError
    """
    kind = type(loader)
    rows = loader if isinstance(loader, (tuple, list)) else ()
    if has_target and len(rows) > 1 and all(isinstance(part, Tensor) for part in rows):
        got = "one batch"
    elif isinstance(loader, (Tensor, str)) or not (hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")):
        got = f"a {kind.__name__}"
    elif isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"got a {kind.__name__} as loader, which has samples, not batches: wrap it, "
            f"DataLoader(dataset, batch_size=32, shuffle=True); batch_size=None if its items are batches"
        )
    else:
        return
    raise TypeError(f"got {got} as loader: expected an iterable of batches (x, y), such as a DataLoader")


def length(loader: Iterable[Any]) -> int | None:
    """How many batches, where the loader knows."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set has the method, but no answer
        return None


def feeds(
    wiring: Wiring, batch: int, tensors: Sequence[Tensor], target: Any, update: Update | None = None
) -> list[Feed]:
    """What each stage gets of a batch: the model inputs that it uses; the last stage also the target."""
    last = wiring.n_stages - 1
    update = update or Update()
    return [
        Feed(batch, [tensors[i] for i in wiring.caller_inputs(k)], target if k == last else None, update)
        for k in range(wiring.n_stages)
    ]


def split_batch(
    tensors: Sequence[Tensor],
    target: Any,
    parts: int,
    *,
    least: int = 1,
    ignored: int = -100,
    along: Sequence[bool] | None = None,
) -> Iterator[tuple[Sequence[Tensor], Any, float]]:
    """A mini-batch as ``parts`` micro-batches of equal size (but for the last), with their shares.

    Tensors are cut along their first dimension if it is as long as the batch (of ``tensors`` only those that
    ``along`` says); others go with every part. A share is a part's in the mean over all samples; where class
    targets are ``ignored``, in the mean over those that are not, which is what torch's losses give.

    Parameters
    ----------
    least : int
        Samples that a part has; there are fewer parts where the batch has too few. The last may have fewer,
        but no less than two where ``least`` is: a single sample has no statistics, and joins the part before.
    """
    samples = n_samples(tensors)
    size = max(-(-samples // parts), least)
    starts = range(0, max(1, samples - (least > 1)), size)
    cuts = [slice(start, start + size) for start in starts[:-1]] + [slice(starts[-1], samples)]
    counts = _counting(target, samples, cuts, ignored) if len(cuts) > 1 else None
    if len(cuts) == 1 or (counts is not None and 0 in counts):  # a mean over nothing is not a number
        yield tensors, target, 1.0
        return

    def has_rows(x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == samples

    def of_samples(x: Any) -> bool:
        """A list with something for each sample, such as boxes; not one of tensors for the whole batch."""
        return type(x) is list and len(x) == samples and not all(map(has_rows, x))

    leaves, spec = pytree.tree_flatten(target, is_leaf=of_samples)
    along = list(map(has_rows, tensors)) if along is None else along
    for i, part in enumerate(cuts):
        inputs = [x[part] if follows else x for x, follows in zip(tensors, along, strict=True)]
        wanted = [x[part] if has_rows(x) or of_samples(x) else x for x in leaves]
        share = (part.stop - part.start) / samples if counts is None else counts[i] / sum(counts)
        yield inputs, pytree.tree_unflatten(wanted, spec), share


def _counting(target: Any, samples: int, cuts: Sequence[slice], ignored: int) -> list[int] | None:
    """How many class targets of each part count; ``None``: all do."""
    if isinstance(target, WithExtra):
        target = target.target
    is_classes = isinstance(target, Tensor) and target.dtype in _CLASSES and target.dim() > 0
    if not is_classes or len(target) != samples:
        return None
    counts = target != ignored
    return None if bool(counts.all()) else [int(counts[cut].sum()) for cut in cuts]


def follow_batch(tensors: Sequence[Tensor]) -> list[bool]:
    """Which of a batch's inputs have a row for each sample."""
    samples = n_samples(tensors)
    return [t.dim() > 0 and t.shape[0] == samples for t in tensors]


def n_samples(tensors: Sequence[Tensor]) -> int:
    """Samples in a batch, as far as its first tensor with a dimension says."""
    return next((t.shape[0] for t in tensors if t.dim() > 0), 1)


def n_counted(tensors: Sequence[Tensor], target: Any, ignored: int = -100) -> int:
    """What a mean over a batch is taken over: class targets that are not ``ignored``, or else samples."""
    target = target.target if isinstance(target, WithExtra) else target
    if isinstance(target, Tensor) and target.dtype in _CLASSES and target.dim() > 0:
        return int((target != ignored).sum())
    return n_samples(tensors)


def what_step_takes(args: tuple[Any, ...], has_target: bool, targets: bool) -> str:
    """What to do about arguments of `Trainer.step`, or without ``targets`` `predict`, that do not fit."""
    if any(type(value).__module__ == "numpy" for value in args):
        return "give tensors, as by torch.as_tensor"
    if not targets:
        return "predict takes the model's arguments alone: predict(x for x, y in loader)"
    if len(args) == 1 and isinstance(args[0], Mapping):
        return (
            "step takes a batch's parts by name: step(**batch); a dict that the model itself takes comes "
            "before the target: step(batch, y)"
        )
    if not has_target:
        return "with loss_fn=None, step takes the model's arguments alone, no target and no extra"
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        return "step takes a batch's parts one by one: step(*batch)"
    if args and isinstance(args[0], (tuple, list)) and any(isinstance(x, Tensor) for x in args[0]):
        return "step takes the model's arguments one by one, then the target: step(*inputs, y)"
    return "step takes the model's arguments, then the target: step(x, y), or step(x, None) without one"
