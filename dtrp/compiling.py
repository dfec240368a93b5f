"""``compile()``: the way in. Bad arguments are refused here, before any work starts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from . import accelerators, loop_cost
from .errors import CaptureError
from .layout import assumed, grouped
from .names import known_arguments, one_of
from .partitioner.compiler import Request, device_specs, threads_per_stage
from .partitioner.devices import LoopCost
from .partitioner.example import call_arguments
from .partitioner.links import parse_links
from .partitioner.plan import Plan
from .pipeline import Pipeline
from .runtime import launched
from .runtime.config import short
from .runtime.processes import workers_environment
from .runtime.starting import warm

log = logging.getLogger("dtrp")

RECOMPUTE = (True, False, "auto")
COSTS = ("auto", "analytic", "measured")


@known_arguments
def compile(
    model: nn.Module,
    n_gpus: int | None = None,
    *,
    example_inputs: Any = None,
    devices: Sequence[str | torch.device] | None = None,
    memory_limit: float | str | Sequence[float | str | None] | None = None,
    recompute: bool | Literal["auto"] = "auto",
    costs: Literal["auto", "analytic", "measured"] = "auto",
    bandwidth: float | str | Mapping[str, Any] | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    speed: Sequence[float] | None = None,
    split_linear: bool = False,
    replicas: int | Sequence[int] | Literal["auto"] | None = None,
) -> Pipeline:
    """Cut a model into balanced stages, ready to be trained as a decoupled pipeline.

    Parameters
    ----------
    model : nn.Module
        Any model. It keeps its parameters: the pipeline shares them.
    n_gpus : int, optional
        Number of stages, or, with ``replicas="auto"``, of devices. Default: the processes that a launcher
        started, else the CUDA devices that are there, else 2.
    example_inputs : Tensor, tuple or dict, optional
        One call's arguments: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        Without them the pipeline plans at its first batch.
    devices : sequence of str or torch.device, optional
        One per stage; a device may repeat. Default: the CUDA devices, else CPU (worker processes).
    memory_limit : int, float, str or sequence, optional
        Bytes or text such as ``"16GB"``; one for all stages or one per stage.
    recompute : bool or "auto"
        Whether stages recompute their forward pass in training; ``"auto"``: per stage, or for some of its
        nodes, as is fastest within the memory.
    costs : {"auto", "analytic", "measured"}
        Where node times come from: FLOPs and bytes through the device's roofline, or timed on it, on the CPU
        first node by node and then in the planned stages, on worker processes (both are kept in the cache).
    bandwidth : float, str or mapping, optional
        Bytes per second between stages, also text such as ``"25GB"``. Default: the devices' own. Stages in
        several nodes: ``{"node": "300GB", "net": "25GB", "per_node": 8}``, within a node and between two, and
        the most stages of a node (or ``"nodes"``, how many there are; default: 2, under a launcher as many
        stages per node as it has started processes here); which stages share a node is part of the plan.
    plan : path or Plan, optional
        A plan to reuse; refused if it does not belong to this graph and these shapes.
    speed : sequence of float, optional
        How fast each device is, relative to what dtrp takes it for: 0.5 for one that others use half of the
        time. Where devices are unequal, by this or by kind, their order is part of the plan
        (``plan.placement``), and memory limits that are given one by one go with the devices. Under a
        launcher rank k has stage k.
    split_linear : bool
        Whether a Linear layer that takes more than half of a stage's share of the time, as a vocabulary's
        head does, may be computed in parts of its rows, so that several stages share it, its weight tied
        between them; which, and in how many parts, says ``plan.divided``. Results are the model's but for
        rounding then; otherwise they are the same to the bit where torch's own operators are.
    replicas : int, sequence of int or "auto", optional
        Devices of each stage, as ``(1, 4, 2, 1)``, all of one kind: they take the parts of every batch in
        turn, and add up their gradients before the update. ``devices`` then names them all, stage by stage.
        What is trained is what stages of one device each train in as many parts, but for rounding. Inline
        each stage runs once; a launcher starts as many processes as there are devices. ``"auto"``: ``n_gpus``
        (or ``devices``) says how many there are, and the best layout of `PartitionReport.layouts` how many
        stages share them; ``report.notes`` say why. Default: as ``plan`` says, else one.

    Returns
    -------
    Pipeline

    Raises
    ------
    TypeError, ValueError
        Arguments that make no sense.
    CaptureError
        The model cannot be turned into a graph.
    InfeasiblePlanError
        No plan fits the memory limit.
    PlanMismatchError
        ``plan`` is another model's.
    """
    _check_model(model)
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to train or to place")
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a path or a dtrp.Plan, got {type(plan).__name__}")
    if n_gpus is None and devices is None and plan is not None:
        n_gpus = plan.n_stages
    if replicas is None:
        of_plan = plan is not None and n_gpus in (None, plan.n_stages)  # else the plan says what is wrong
        replicas = (plan.replicas if plan is not None and of_plan else ()) or 1
    spread = isinstance(replicas, str)
    if spread:
        _check_spread(replicas, plan, example_inputs, memory_limit)
    places, groups = _groups(n_gpus, devices, 1 if spread else replicas)
    if (groups or spread) and (speed is not None or isinstance(bandwidth, Mapping)):
        raise ValueError("replicas with speed, or with several nodes: such stages are for like devices")
    if (groups or spread) and len({place.type for group in (places, *groups) for place in group}) > 1:
        raise ValueError("replicas on devices of several kinds: the devices of all stages must be alike")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r}: expected True, False or 'auto'")
    one_of("costs", costs, COSTS)
    if not isinstance(split_linear, bool):
        raise TypeError(f"split_linear={split_linear!r}: expected True or False")
    ranked = launched.world_size() > 1
    if ranked and isinstance(bandwidth, Mapping) and not {"nodes", "per_node"} & bandwidth.keys():
        bandwidth = {**bandwidth, "per_node": min(launched.local_size(), len(places))}
    links = parse_links(bandwidth, len(places))
    speeds = _speeds(speed, len(places))
    pipeline = Pipeline(
        model,
        Request(
            places,
            memory_limit,
            recompute,
            costs,
            links,
            plan,
            loop=_loop(places, several=len(places) > 1 or bool(groups)),
            speed=speeds,
            arranged=ranked or spread or bool(groups),
            split_linear=split_linear,
            groups=groups,
            spread=spread,
            training=assumed([len(group) for group in groups]),
        ),
    )
    if costs != "measured" and not any(p.is_meta for p in model.parameters()):
        _warm(pipeline, places)
    if example_inputs is not None:
        try:
            pipeline.prepare(*call_arguments(example_inputs))
        except TypeError as e:
            one = "; a dict that is itself one argument goes into a tuple: example_inputs=(batch,)"
            told = one if isinstance(example_inputs, dict) else ""
            raise TypeError(f"example_inputs: {e}; {_EXAMPLE}{told}") from None
        except CaptureError as e:
            args, _ = call_arguments(example_inputs)
            if len(args) == 1 and isinstance(args[0], (list, dict)):
                raise CaptureError(
                    f"the {type(args[0]).__name__} in example_inputs is one argument of the model, which "
                    f"fails with it; {_EXAMPLE}\n{e}"
                ) from None
            raise
    return pipeline


def _warm(pipeline: Pipeline, places: Sequence[torch.device]) -> None:
    """While the model is captured, something else may load torch for its workers."""
    request = pipeline._planning.request
    n = sum(request.replicas) or len(places)
    if n > 1 and launched.world_size() == 1:
        try:
            device_specs(places, request.loop, n)  # if they are to be measured, then before that
        except ValueError:
            return  # a device is not here: planning says so
        warm(workers_environment(threads_per_stage(n)))


def _speeds(speed: Any, n_stages: int) -> tuple[float, ...]:
    if speed is None:
        return ()
    if isinstance(speed, (str, int, float)) or len(speed) != n_stages:
        raise ValueError(f"speed={speed!r}: expected one number > 0 for each of the {n_stages} devices")
    for value in speed:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"speed={speed!r}: expected numbers > 0, one for each device; got {value!r}")
    return tuple(map(float, speed))


def _groups(
    n_gpus: int | None, devices: Sequence[str | torch.device] | None, replicas: Any
) -> tuple[tuple[torch.device, ...], tuple[tuple[torch.device, ...], ...]]:
    """As `grouped`."""
    if replicas == 1 and isinstance(replicas, int):
        return _places(n_gpus, devices), ()
    _check_count(n_gpus)
    alike = isinstance(replicas, int)
    if alike and n_gpus is None:
        raise ValueError(f"replicas={replicas!r} without n_gpus: say how many stages there are, n_gpus=2")
    given = replicas if isinstance(replicas, Sequence) else ()
    each = [replicas] * int(n_gpus or 1) if alike else list(given)
    if not each or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in each):
        raise ValueError(f"replicas={short(replicas)}: expected an int >= 1, or one for each stage")
    if n_gpus is not None and len(each) != n_gpus:
        raise ValueError(f"replicas={replicas!r}: expected an int, or one for each of the {n_gpus} stages")
    if devices is not None and len(devices) != sum(each):
        raise ValueError(f"{len(devices)} devices for stages of {' + '.join(map(str, each))}: name each one")
    return grouped(_places(sum(each), devices), each)


def _check_spread(replicas: Any, plan: Plan | None, example_inputs: Any, memory_limit: Any) -> None:
    """Refuse to share out devices where their numbers cannot be found, or are there."""
    if replicas != "auto":
        raise ValueError(f"replicas={replicas!r}: expected an int >= 1, one for each stage, or 'auto'")
    why = ""
    if plan is not None:
        why = "with a plan, which says how many devices each stage has: leave replicas out"
    elif example_inputs is None:
        why = "without example_inputs: what stages cost says how many devices each gets"
    elif isinstance(memory_limit, (list, tuple)):
        why = "with a memory limit for each stage: give one for all devices"
    elif launched.world_size() > 1:
        why = (
            "under a launcher, where each rank would find numbers of its own: plan once without it, "
            "pipe.plan.save(path), and give plan=path"
        )
    if why:
        raise ValueError(f"replicas='auto' {why}")


def _loop(places: Sequence[torch.device], *, several: bool) -> LoopCost | None:
    """What the runtime costs, where it shares the processor with stages; one process has no pipeline."""
    return loop_cost.loop_cost() if several and any(p.type == "cpu" for p in places) else None


_EXAMPLE = (
    "give what the model is called with, without targets: a tensor, a tuple of positional arguments, or a "
    "dict of keyword arguments"
)


def _check_model(model: Any) -> None:
    """Refuse what is no model, and what already spreads or compiles one."""
    if isinstance(model, Pipeline):
        raise TypeError("model is a Pipeline, and so compiled already: give compile the nn.Module itself")
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model is the class {model.__name__}: give compile an object, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    lazy = next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(f"the parameter {lazy!r} has no shape yet: call the model once first, model(x)")
    kind = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"model is wrapped in {kind}: give compile model.module; stages have their own devices"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model was made by torch.jit, and a script cannot be cut: give compile the module that it was "
            "made from"
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "model was made by torch.compile: give dtrp.compile the module that it was made from, and "
            "pipe.trainer(compile_stages=True) to compile each stage"
        )


def _check_count(n_gpus: Any) -> None:
    """Refuse what is no number of stages."""
    if n_gpus is not None:
        if isinstance(n_gpus, (bool, torch.Tensor)) or not hasattr(n_gpus, "__index__"):
            raise TypeError(
                f"n_gpus={short(n_gpus)}: expected an int >= 1, the number of stages; example_inputs=x is an "
                f"example"
            )
        if n_gpus < 1:
            raise ValueError(f"n_gpus={n_gpus!r}: expected an int >= 1, the number of stages")


def _places(n_gpus: int | None, devices: Sequence[str | torch.device] | None) -> tuple[torch.device, ...]:
    """A device per stage."""
    _check_count(n_gpus)
    if devices is not None:
        if isinstance(devices, (str, torch.device)):
            raise TypeError(f"devices={devices!r}: expected a list with one device per stage")
        try:
            places = tuple(torch.device(d) for d in devices)
        except (RuntimeError, TypeError) as e:
            raise ValueError(
                f"devices={devices!r}: expected devices such as 'cuda:0' or 'cpu', one per stage ({e})"
            ) from None
        if not places:
            raise ValueError("devices is empty: expected one device per stage")
        if n_gpus is not None and len(places) != n_gpus:
            raise ValueError(f"n_gpus={n_gpus} but {len(places)} devices: give one device per stage")
        return places
    there = accelerators.here()
    ranks = launched.world_size()
    n_stages = int(n_gpus or (ranks if ranks > 1 else len(there) or 2))
    if ranks > 1 and there:
        return (torch.device(there[0].type),) * n_stages  # which one is each rank's own to say
    if not there:
        log.info("no CUDA device is there: %d stage(s) on CPU worker processes", n_stages)
        return (torch.device("cpu"),) * n_stages
    if n_stages > len(there):
        log.warning("n_gpus=%d but %d device(s) are there: stages share devices", n_stages, len(there))
    return tuple(there[k % len(there)] for k in range(n_stages))
