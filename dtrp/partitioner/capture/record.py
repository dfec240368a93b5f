"""Second way: the model's own code runs on fake tensors, and what it calls is recorded.

Sizes are plain numbers while the model runs. To keep the batch size out of the graph, the model runs with
another batch size too, and numbers that changed are computed from tensors in the graph (`sizes`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from .decisions import Decisions
from .fakes import FakeWorld, fake_inputs
from .graph import KeptWhole, Signature
from .modes import BothModes, in_mode
from .patches import ObservedFakeMode, observed
from .recorder import Recorder
from .sizes import Run, free_the_batch
from .snapshot import untouched
from .structure import flatten_output
from .traced import Traced

_ATTEMPTS = 8  # each closes at least one module more; nested failures need one each


def record(
    model: nn.Module,
    signature: Signature,
    tensors: Sequence[torch.Tensor],
    opened: Collection[str] = (),
    closed: Mapping[str, str] = MappingProxyType({}),
) -> BothModes:
    """Record ``model`` in both modes."""

    def recorder(closed: dict[str, str]) -> Run:
        made: list[Decisions] = []  # by the first recording; later ones, of other batches, repeat them
        deciding = False

        def run(batch: tuple[int, ...] = (), size: int = 0) -> Traced:
            nonlocal deciding
            for _ in range(_ATTEMPTS):
                decisions = [*made, None][0] if deciding else None
                try:
                    traced, failures, found = _record_once(
                        model, signature, tensors, closed, opened, batch, size, deciding, decisions
                    )
                except DataDependentOutputException:
                    if deciding:
                        raise
                    deciding = True  # the root itself decides by values
                    continue
                if not failures:
                    break
                # Some modules were given up half-way and replaced by single nodes. Record again with these
                # closed from the start: their half-run code may have left something behind.
                closed.update(failures)
            if found is not None and not made:
                made.append(found)
            return traced

        return run

    # What is kept whole in one mode need not be in the other.
    runs = {training: recorder(dict(closed)) for training in (True, False)}
    modes = iter((True, False))
    both = BothModes.of(model, lambda: runs[next(modes)]())
    freed = {}
    for training, traced in both.each():
        with in_mode(model, training):
            freed[training] = free_the_batch(traced, runs[training], model, tensors)
    return BothModes(freed[True], freed.get(False, freed[True]))


def _record_once(
    model: nn.Module,
    signature: Signature,
    tensors: Sequence[torch.Tensor],
    closed: dict[str, str],
    opened: Collection[str],
    batch: tuple[int, ...],
    size: int,
    deciding: bool,
    earlier: Decisions | None,
) -> tuple[Traced, dict[str, str], Decisions | None]:
    mode = ObservedFakeMode()
    world = FakeWorld(mode)
    with untouched(model), world.inhabited_by(model), torch.enable_grad():
        decisions = Decisions(model, world, tensors, earlier) if deciding else None
        recorder = Recorder(model, world, closed, opened, decisions)
        inputs = fake_inputs(world, tensors, batch, size)
        for i, tensor in enumerate(inputs):
            recorder.placeholder(f"input_{i}", tensor)
        args, kwargs = signature.unflatten(inputs)
        mode.observer = recorder
        with torch.compiler.set_stance("force_eager"), observed(recorder), recorder:
            output = model.forward(*args, **kwargs)
        mode.observer = None
        leaves, out_spec = flatten_output(output)
        recorder.finish(leaves)
    kept = tuple(KeptWhole(name, why) for name, why in closed.items() if not _inside(name, closed))
    notes: tuple[str, ...] = ()
    if decisions is not None:
        notes = tuple(
            f"the model's check at {place} became a guard in the graph"
            for place in dict.fromkeys(decisions.places)
        )
    traced = Traced(
        recorder.graph, out_spec, kept, notes, constants=recorder.constants, keepers=recorder.keepers
    )
    return traced, recorder.failures, decisions


def _inside(name: str, closed: Collection[str]) -> bool:
    """Whether a module is part of another one that is closed."""
    return any(name.startswith(other + ".") for other in closed)
