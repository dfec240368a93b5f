"""Stages for torch.distributed.pipelining: automatic cuts for users of that engine and its schedules.

There a stage hands its outputs to the next one and to no other. So a plan fits if every value goes to the
next stage only; else what skips a stage is named. A stage's module keeps the model's names; two hooks put its
inputs and outputs in the order in which they travel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import accelerators
from .errors import PlanMismatchError
from .partitioner.compiler import Compiled
from .runtime.program import StageProgram
from .wiring import CALLER, Constant, Source, Wiring

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining import PipelineStage


def pipeline_stages(
    compiled: Compiled, programs: Sequence[StageProgram], mesh: DeviceMesh
) -> list[PipelineStage]:
    """This rank's stages; see `Pipeline.to_pipelining`."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage

    check_chain(compiled, programs)
    dimension = _stage_dimension(mesh)
    group, rank, size = mesh.get_group(dimension), mesh.get_local_rank(dimension), mesh.size(dimension)
    k = len(programs)
    if k % size:
        raise ValueError(
            f"{k} stages cannot be shared out evenly over the {size} ranks of the mesh: compile for {size} "
            f"stages, or a multiple of it"
        )
    plans: list[str] = [""] * size
    dist.all_gather_object(plans, _digest(compiled.plan.stage_of), group=group)
    if len(set(plans)) > 1:
        other = next(r for r, plan in enumerate(plans) if plan != plans[0])
        raise PlanMismatchError(
            f"ranks 0 and {other} of the mesh have cut the model differently (planning stops by the clock): "
            f"let one rank plan and save it, pipe.plan.save(path), and compile with plan=path on all of them"
        )
    device = torch.device(mesh.device_type)
    if accelerators.is_one(device):
        device = accelerators.in_use()
    stages = []
    for program in programs[rank::size]:
        module = program.module.to(device)
        _Ends(compiled, program).attach(module)
        stages.append(PipelineStage(module, program.stage, k, device, group=group))
    return stages


class _Ends:
    """Puts what one stage gets and gives in the order in which it travels."""

    def __init__(self, compiled: Compiled, program: StageProgram) -> None:
        self.stage, self.last = program.stage, program.is_last
        self.wirings = {True: program.train, False: program.evaluate}
        self.copies = program.writes_inputs
        self.signature = compiled.captured.signature
        self.given: dict[Source, Any] = {}  # what arrived last

    def attach(self, module: nn.Module) -> None:
        """Have a module called with what arrives, and give what leaves."""
        module.register_forward_pre_hook(self._arrive, with_kwargs=True)
        module.register_forward_hook(self._leave)

    def _arrive(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wiring = self.wirings[module.training]
        if self.stage == 0:
            given = {Source(CALLER, i): t for i, t in enumerate(self.signature.flatten(args, kwargs))}
        else:
            sent = wiring.sends[self.stage - 1, self.stage]
            given = {Source(self.stage - 1, n): t for n, t in zip(sent, args, strict=True)}
        self.given = given
        inputs = tuple(given[source] for source in wiring.stages[self.stage].inputs)
        if self.copies:
            inputs = tuple(x.clone() for x in inputs)
        return inputs, {}

    def _leave(self, module: nn.Module, _: Any, outputs: tuple[Any, ...]) -> Any:
        wiring = self.wirings[module.training]
        if not self.last:
            return tuple(outputs[n] for n in wiring.sends[self.stage, self.stage + 1])
        given, self.given = self.given, {}
        leaves = [leaf for leaf in wiring.result if isinstance(leaf, Source)]
        return wiring.unflatten(
            [outputs[leaf.index] if leaf.stage == self.stage else given[leaf] for leaf in leaves]
        )


# ---- what does not fit -----------------------------------------------------------------------------------


def check_chain(compiled: Compiled, programs: Sequence[StageProgram]) -> None:
    """That every value, in both modes, goes to the next stage only.

    Raises
    ------
    PlanMismatchError
        One does not; the message names it, its module, and the stages.
    """
    for wiring in (programs[0].train, programs[0].evaluate):
        names = compiled.captured.signature.tensor_names
        for j in range(1, wiring.n_stages):
            for index in wiring.caller_inputs(j):
                raise _skip(names[index], "", f"from the caller to stage {j}", 0, j)
        for (i, j), sent in wiring.sends.items():
            if j != i + 1:
                name = wiring.stages[i].outputs[sent[0]]
                module = compiled.plan.modules.get(name.partition("[")[0], "")
                raise _skip(name, module, f"from stage {i} to stage {j}", i, j)
        for i in range(wiring.n_stages - 1):
            if (i, i + 1) not in wiring.sends:
                raise PlanMismatchError(
                    f"stage {i} gives nothing to stage {i + 1}: the model is no chain of stages, as "
                    f"torch.distributed.pipelining needs; {_ELSE.format(i=i, j=i + 1)}"
                )
        _check_result(wiring)
    for i, cut in enumerate(compiled.split.train.modules[:-1]):
        for node in cut.graph.output_node().all_input_nodes:
            if not isinstance(node.meta.get("val"), Tensor):
                raise PlanMismatchError(
                    f"the value {node.name!r}, which stage {i} gives stage {i + 1}, is no tensor, and "
                    f"torch.distributed.pipelining sends nothing else: {_ELSE.format(i=i, j=i + 1)}"
                )
    for tie in programs[0].ties:
        (i, name), (j, _) = tie.holders[:2]
        raise PlanMismatchError(
            f"the parameter {name!r} is used in stages {i} and {j}, and torch.distributed.pipelining does "
            f"not add up the gradients of both: {_ELSE.format(i=i, j=j)}"
        )


_ELSE = (
    "keep both in one stage (pipe.plan.pin(module, {j}), then compile with that plan), use fewer stages, or "
    "train with pipe.trainer, which sends any value straight to where it is used"
)


def _skip(value: str, module: str, way: str, i: int, j: int) -> PlanMismatchError:
    of = f" of module {module!r}" if module else ""
    return PlanMismatchError(
        f"the value {value!r}{of} goes {way}, and torch.distributed.pipelining hands values to the next "
        f"stage only: {_ELSE.format(i=i, j=j)}"
    )


def _check_result(wiring: Wiring) -> None:
    """The engine hands the loss tensors, one or a tuple of them."""
    whole = pytree.tree_unflatten(list(range(len(wiring.result))), wiring.out_spec)
    flat = isinstance(whole, int) or (isinstance(whole, tuple) and all(isinstance(x, int) for x in whole))
    if not flat or any(isinstance(leaf, Constant) for leaf in wiring.result):
        raise PlanMismatchError(
            "the model gives something else than a tensor or a tuple of tensors, and "
            "torch.distributed.pipelining takes nothing else from its last stage: wrap the model in one that "
            "returns the tensors that the loss needs"
        )


def _stage_dimension(mesh: DeviceMesh) -> int:
    """Which dimension of the mesh the stages lie along."""
    names = mesh.mesh_dim_names or ()
    if "stage" in names:
        return names.index("stage")
    if mesh.ndim == 1:
        return 0
    raise ValueError(
        f"the mesh has the dimensions {names or mesh.ndim}: give one along which the stages lie, "
        f"mesh['stage'], or call it 'stage'"
    )


def _digest(stage_of: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps(dict(stage_of)).encode()).hexdigest()
