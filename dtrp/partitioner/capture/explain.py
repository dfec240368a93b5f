"""Says readably why a model could not be captured: where, what construct, and what to do about it."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from dtrp.errors import CaptureError

from .location import raised_at
from .verify import Unfaithful


@dataclass(frozen=True)
class Failure:
    """One way that did not work."""

    way: str
    error: Exception

    @property
    def text(self) -> str:
        """What went wrong, in one line."""
        error = self.error
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
        return line if isinstance(error, Unfaithful) else f"{type(error).__name__}: {line}"

    @property
    def packs(self) -> bool:
        """Whether a function that the error passed through makes or has a packed sequence."""
        frames = [frame for frame, _ in traceback.walk_tb(self.error.__traceback__)]
        held = (value for frame in frames for value in frame.f_locals.values())
        makes = {"pack_padded_sequence", "pack_sequence", "pad_packed_sequence"}
        return not makes.isdisjoint(f.f_code.co_name for f in frames) or any(
            type(value) is PackedSequence for value in held
        )

    @property
    def place(self) -> str:
        """The user's line, ``""`` if unknown."""
        return getattr(self.error, "place", "") or raised_at(self.error)

    @property
    def whole(self) -> str:
        """Why `module` could not be kept whole instead, ``""`` if that was not tried."""
        return str(getattr(self.error, "dtrp_whole", ""))

    @property
    def module(self) -> str | None:
        """Qualified name of the module that was running, if known."""
        found = getattr(self.error, "dtrp_module", None)
        return None if found is None else str(found)


# What in an error's text tells the construct, the construct in words, and what its author can do.
_KNOWN = (
    (
        (
            "DataDependentOutput",
            "_local_scalar_dense",
            "is_nonzero",
        ),
        "Python code decides something by the values in a tensor (if, while, int(), .item(), bool())",
        "Compute both sides and choose with torch.where, or {whole}.",
    ),
    (
        ("DynamicOutputShape", "nonzero", "masked_select", "unique", "takes another course"),
        "the shape of a tensor depends on the values in another (nonzero, boolean indexing, unique), and "
        "code decides by it",
        "Use torch.where or a mask of fixed shape, or {whole}.",
    ),
    (
        ("differs from the model", "its graph gives", "where its graph runs"),
        "the graph does not do what the model does",
        "Look in the part named above for what forward keeps from call to call outside of its module (in a "
        "global, an iterator, a generator of its own), and keep it in a buffer or a plain attribute of the "
        "module, which is then kept whole; draw random numbers by torch.",
    ),
    (
        ("calls backward() inside forward",),
        "forward computes gradients itself, through layers that stages would cut apart",
        "Do it in a submodule of its own, under torch.enable_grad() and from a detached input: it is then "
        "kept whole, as one node; or use torch.autograd.grad.",
    ),
    (
        ("checkpoint(use_reentrant=True)",),
        "this kind of torch.utils.checkpoint gives gradients to what a region returns alone, and code "
        "outside uses more of it",
        "Use use_reentrant=False, or switch checkpointing off (stages recompute by themselves: "
        "dtrp.compile(..., recompute=True)), or {whole}.",
    ),
    (
        ("under torch.utils.checkpoint",),
        "a buffer is changed under torch.utils.checkpoint, whose code runs once more in the backward pass",
        "Switch checkpointing off (stages recompute by themselves: dtrp.compile(..., recompute=True)), or "
        "{whole}.",
    ),
    (
        ("must have the same dtype", "should be the same", "expected scalar type"),
        "values of different dtypes meet",
        "Where the inputs' dtype is not the parameters': x.float() (numpy gives float64), model.float(), or "
        "inputs of the model's dtype. Mixed precision is pipe.trainer(autocast=torch.bfloat16).",
    ),
    (
        ("scalar types: Long, Int",),
        "an embedding is given numbers that are not whole",
        "Give it int64: x.long(), or on the command line --input 2x128:int64.",
    ),
    (
        ("makes the layer",),
        "forward makes a layer of the model when it first runs",
        "Call the model once on an example, model(*args, **kwargs), then compile it.",
    ),
    (
        ("Python's or numpy's generator",),
        "the model's own forward draws random numbers that are not torch's",
        "Draw them by torch (torch.rand(()) < p, and torch.where to choose), give them to forward as an "
        "input, or {whole}.",
    ),
    (
        ("BatchedTensorImpl", "TensorWrapper"),
        "torch.func (vmap, grad, jacrev) runs code on tensors that cannot be followed",
        "Write it for the whole batch, or {whole}.",
    ),
    (
        ("data is not allocated yet",),
        "a function of torch's reads the numbers in a tensor where it cannot be followed "
        "(pad_packed_sequence, tensor_split by a tensor)",
        "Give it plain numbers, or {whole} (together with what makes and uses such values).",
    ),
    (
        ("CannotRecord",),
        "the model does something that a graph cannot hold",
        "Rewrite this line without it, or {whole}.",
    ),
)


_PACKED = (
    "how long a packed sequence is depends on the values of the lengths, which no graph knows",
    "Pack, run the layer and unpack in a submodule of its own that takes padded values and lengths: it is "
    "then kept whole, as one node (examples/lstm_packed.py).",
)


def capture_error(model: nn.Module, failures: Sequence[Failure]) -> CaptureError:
    """The error for a model for which all ways failed."""
    # What ran the model's own code says most: it stops at the user's line that matters.
    chief = next((f for f in failures if f.way == "record"), failures[0])
    place = chief.place or next((f.place for f in failures if f.place), "")
    module = next((f.module for f in (chief, *failures) if f.module), "")
    where = f"module {module!r}" if module else f"{type(model).__name__}.forward"
    construct, remedy = _construct(failures, chief)
    whole = "move this code into a submodule of its own: it is then kept whole, as one node"
    if chief.whole:
        whole = f"see to it that module {chief.module!r} can be kept whole: now it cannot ({chief.whole})"
    lines = [
        f"{type(model).__name__} could not be turned into a graph.",
        f"  where: {where}{', ' + place if place else ''}",
        f"  what:  {construct}",
        f"  to do: {remedy.replace('{whole}', whole)}",
    ]
    tried: dict[str, list[str]] = {}
    for f in failures:
        tried.setdefault(f"{f.text}{' (' + f.place + ')' if f.place else ''}", []).append(f.way)
    if len(tried) > 1 or chief.text not in construct:
        lines += ["  tried:", *(f"    {', '.join(ways)}: {text}" for text, ways in tried.items())]
    return CaptureError("\n".join(lines))


def _construct(failures: Sequence[Failure], chief: Failure) -> tuple[str, str]:
    if chief.packs:
        return _PACKED
    for failure in (chief, *failures):
        for marks, construct, remedy in _KNOWN:
            if any(mark in failure.text for mark in marks):
                return construct, remedy
    return (
        f"running it on tensors of the example's shapes failed: {chief.text}",
        "Call model(*args, **kwargs) on the example inputs, in train and in eval mode. Where it fails in "
        "the same way, mend this line or the inputs; where it runs, {whole}.",
    )
