"""The exported files against the model: stage by stage, in onnxruntime, through the manifest.

Each stage runs twice: on what torch's stage before it gave (*alone*: the stage's own difference), and on what
the exported stage before it gave (*chain*: what has added up so far). The first says which stage is bad, the
last stage's second says how far the whole chain is from the model.

The difference of two tensors is ``max |a - b| / max |b|``, with the model's as b: relative to the largest
magnitude, because a relative error of single elements means nothing where they cancel to almost zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...errors import ExportError
from ...onnx.chain import Chain
from ...onnx.manifest import Origin
from ...wiring import CALLER, Source
from ..capture.graph import Signature
from ..capture.structure import flatten_output
from ..split import SplitGraph
from .study import ScalarEnd, Study

TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Differences:
    """The largest differences found with some sizes: a number per stage, and the whole model's."""

    sizes: Mapping[str, int]  # of the axes
    batch: int
    alone: tuple[float, ...]
    chain: tuple[float, ...]
    output: float
    worst: tuple[str, ...]  # of each stage, the output that differs most (alone)

    @property
    def told(self) -> str:
        """The sizes, in words."""
        others = [f"{name}={size}" for name, size in self.sizes.items() if name != "batch"]
        return ", ".join([f"{self.batch} sample(s)", *others])

    def within(self, tolerance: float) -> bool:
        """Whether the chain may pass for the model."""
        return max((*self.alone, *self.chain, self.output), default=0.0) <= tolerance


def tolerance(model: nn.Module, study: Study) -> float:
    """How far the chain may be from the model: 1e-4, more where it computes with 16 bits."""
    ends = [e for row in (*study.stage_inputs, *study.stage_outputs) for e in row]
    dtypes = {p.dtype for p in model.parameters()} | {e.dtype for e in ends if not isinstance(e, ScalarEnd)}
    return max((TOLERANCES.get(d, TOLERANCE) for d in dtypes), default=TOLERANCE)


def difference(ours: Any, theirs: torch.Tensor) -> float:
    """``max |a - b| / max |b|``; infinite where shapes, or places of NaN and infinity, do not agree."""
    a, b = np.asarray(ours), to_numpy(theirs)
    if a.shape != b.shape:
        return float("inf")
    if a.size == 0:
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    a, b = a[finite], b[finite]
    gap, scale = float(np.abs(a - b).max(initial=0.0)), float(np.abs(b).max(initial=0.0))
    return 0.0 if gap == 0 else gap / max(scale, float(np.finfo(np.float32).tiny))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values."""
    result: np.ndarray = tensor.detach().cpu().numpy()
    return result


def compare(
    chain: Chain,
    graph: SplitGraph,
    model: nn.Module,
    signature: Signature,
    inputs: Sequence[torch.Tensor],
    sizes: Mapping[str, int],
    batch: int,
) -> Differences:
    """Run model, stages and files on the same inputs. The model is in eval mode, and nothing is trained."""
    made: list[list[Any]] = []
    found: list[list[Any]] = []

    def fetch(source: Source, values: list[list[Any]]) -> Any:
        return inputs[source.index] if source.stage == CALLER else values[source.stage][source.index]

    alone, together, worst = [], [], []
    for k, (module, wires) in enumerate(zip(graph.modules, graph.wiring.stages, strict=True)):
        arrived = [fetch(s, made) for s in wires.inputs]
        # A stage may write to its inputs: each run gets its own.
        ours = [to_numpy(v).copy() for v in arrived if isinstance(v, torch.Tensor)]
        chained = [
            _array(fetch(s, found)) for s, v in zip(wires.inputs, arrived, strict=True) if _is_tensor(v)
        ]
        # Not module(...), which prints what fails, also where that is only tried.
        made.append(list(module.forward(*(v.clone() if _is_tensor(v) else v for v in arrived))))
        tensors = [i for i, v in enumerate(made[k]) if _is_tensor(v)]
        single = chain.run_stage(k, ours)
        linked = single if all(map(_same, ours, chained)) else chain.run_stage(k, chained)
        found.append(list(made[k]))
        for i, value in zip(tensors, linked, strict=True):
            found[k][i] = value
        gaps = [difference(v, made[k][i]) for i, v in zip(tensors, single, strict=True)]
        alone.append(max(gaps, default=0.0))
        together.append(
            max((difference(v, made[k][i]) for i, v in zip(tensors, linked, strict=True)), default=0.0)
        )
        worst.append(wires.outputs[tensors[int(np.argmax(gaps))]] if gaps else "")
    args, kwargs = signature.unflatten([t.clone() for t in inputs])
    expected, _ = flatten_output(model(*args, **kwargs))
    ours_all = pytree.tree_leaves(chain(*map(to_numpy, inputs)))
    leaves = [i for i, leaf in enumerate(chain.manifest.outputs) if isinstance(leaf, Origin)]
    if len(expected) != len(chain.manifest.outputs):
        raise ExportError(
            f"the model's output has {len(expected)} leaves, the chain's {len(chain.manifest.outputs)}: the "
            f"model takes another course than when it was compiled. Compile again"
        )
    output = max((difference(ours_all[i], expected[i]) for i in leaves), default=0.0)
    return Differences(sizes, batch, tuple(alone), tuple(together), output, tuple(worst))


def require(found: Differences, allowed: float, submodules: Sequence[Sequence[str]]) -> None:
    """Raise `ExportError` that names the bad stage, if there is one."""
    if found.within(allowed):
        return
    bad = next((k for k, d in enumerate(found.alone) if d > allowed), None)
    if bad is not None:
        where = (
            f"stage {bad} differs from the model's own stage by {found.alone[bad]:.2g} at its output "
            f"{found.worst[bad]!r}"
        )
    else:
        adding = next((k for k, d in enumerate(found.chain) if d > allowed), None)
        if adding is None:
            raise ExportError(
                f"the stages agree with the captured graph, and the graph differs from the model by "
                f"{found.output:.2g} with {found.told}, allowed {allowed:g}: the model takes "
                f"another course with these inputs, or is random in eval mode. Compile with an example like "
                f"them"
            )
        bad = adding
        where = (
            f"differences add up to {found.chain[bad]:.2g} at stage {bad}, though each stage alone is exact"
        )
    names = list(submodules[bad])
    held = f" (it runs {', '.join(names[:3])}{' ...' if len(names) > 3 else ''})" if names else ""
    raise ExportError(
        f"the exported chain is not the model: with {found.told} {where}{held}; relative to the "
        f"largest magnitude, {allowed:g} is allowed. Nothing was written; verify=False writes it all the same"
    )


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """On CUDA, convolutions round to 10 bits of mantissa (TF32) by default: no reference for 1e-4."""
    if not any(p.device.type == "cuda" for p in model.parameters()):
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


def _array(value: Any) -> np.ndarray:
    return to_numpy(value) if isinstance(value, torch.Tensor) else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (a.shape == b.shape and np.array_equal(a, b))
