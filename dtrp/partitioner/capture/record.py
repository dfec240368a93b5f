"""Second way: the model's own code runs on fake tensors, and what it calls is recorded.

Sizes are plain numbers while the model runs. To keep the batch size out of the graph, the model runs with
another batch size too, and numbers that changed are computed from tensors in the graph (`sizes`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

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
        def run(batch: tuple[int, ...] = (), size: int = 0) -> Traced:
            for _ in range(_ATTEMPTS):
                traced, failures = _record_once(model, signature, tensors, closed, opened, batch, size)
                if not failures:
                    break
                # Some modules were given up half-way and replaced by single nodes. Record again with these
                # closed from the start: their half-run code may have left something behind.
                closed.update(failures)
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
) -> tuple[Traced, dict[str, str]]:
    mode = ObservedFakeMode()
    world = FakeWorld(mode)
    with untouched(model), world.inhabited_by(model), torch.enable_grad():
        recorder = Recorder(model, world, closed, opened)
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
    kept = tuple(KeptWhole(name, why) for name, why in closed.items())
    traced = Traced(recorder.graph, out_spec, kept, constants=recorder.constants, keepers=recorder.keepers)
    return traced, recorder.failures
