"""Modules that cannot run on fake tensors run on real random ones, for the shapes of what they give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from dtrp.partitioner.op_cost import FlopCount
from dtrp.partitioner.sketch import Sketch

from .snapshot import containers_in, untouched
from .state import REGISTRIES
from .structure import flatten_output, map_tensors, mutable, tensors_in

Need = Literal["both", "first", "second"]

_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Run:
    """One run of a module on real tensors."""

    inputs: tuple[torch.Tensor, ...]  # in order; they may come out again in the result
    result: Any
    changed: Any  # the arguments afterwards, if it put other tensors into lists and dicts among them
    held: tuple[int | None, ...]  # which inputs the arguments hold afterwards, None: another tensor
    flops: int
    left: tuple[tuple[nn.Module, str, Any], ...]  # what holds tensors among the attributes that it set


@dataclass(frozen=True)
class RealRun:
    """What a module did with one or two random inputs of the same shapes."""

    module: nn.Module  # held so that its id is not given to another
    first: Run
    second: Run | None = None


class RealRuns:
    """Runs modules, and remembers it: each recording of a model asks for the same runs again."""

    def __init__(self) -> None:
        self._made: dict[Hashable | None, RealRun] = {}

    def of(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        met: Mapping[int, torch.Tensor],
        need: Need = "both",
    ) -> RealRun:
        """Run ``module`` with its present parameters on tensors like those given. Nothing of it is changed.

        Parameters
        ----------
        module : nn.Module
            The module.
        args, kwargs
            Its arguments, with fake tensors.
        met : mapping
            By a fake tensor's id, the real one that a module before this one gave. The first run takes
            these, which code with expectations can do with (boxes have their corners in order); the second
            takes them, halved, only where random numbers will not do.
        need
            Which runs are asked for. ``"second"``: another than one already made, or any.

        Raises
        ------
        RuntimeError
            It changes its inputs.
        """
        args, kwargs = mutable((args, kwargs))
        key = _key(module, args, kwargs)
        run = self._made.get(key)
        again = need == "both" or run is not None or key is None
        if run is None:
            run = RealRun(module, _first(module, args, kwargs, met))
        if run.second is None and need != "first" and again:
            run = replace(run, second=_another(run, args, kwargs, met))
        if key is not None:
            self._made[key] = run
        return run


def _first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], met: Mapping[int, torch.Tensor]
) -> Run:
    """A run with what is known, and zeros for other integers; or ones, where these may be lengths."""
    try:
        return _run(module, args, kwargs, 0, lambda t: _met(t, met))
    except Exception as error:
        with contextlib.suppress(Exception):
            return _run(module, args, kwargs, 0, lambda t: _met(t, met, ones=True))
        raise error from None


def _another(
    run: RealRun, args: tuple[Any, ...], kwargs: dict[str, Any], met: Mapping[int, torch.Tensor]
) -> Run:
    """A run with other numbers, as different as the module can take without giving another form of result."""
    attempts: list[Callable[[torch.Tensor], torch.Tensor]] = [
        _varied_like,
        _random_like,
        lambda t: _random_like(t) if t.is_floating_point() else _met(t, met),
        lambda t: _random_like(t) if t.is_floating_point() else _met(t, met, ones=True),
    ]
    for make in attempts:
        with contextlib.suppress(Exception):
            second = _run(run.module, args, kwargs, 1, make)
            if flatten_output(second.result)[1] == flatten_output(run.first.result)[1]:
                return second
    return _run(run.module, args, kwargs, 1, lambda t: _met(t, met, 0.5))


def plain_values(result: Any) -> list[Any]:
    """Numbers, texts and the like in a result."""
    return [leaf for leaf in flatten_output(result)[0] if isinstance(leaf, _SIMPLE)]


def _key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """Equal for calls that give the same; None if that cannot be told."""
    leaves, spec = flatten_output((args, kwargs))
    seen: dict[int, int] = {}
    described: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            place = seen.setdefault(id(leaf), len(seen))  # the same tensor may be given twice
            described.append((place, tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad))
        elif isinstance(leaf, _SIMPLE):
            described.append((type(leaf), leaf))
        else:
            return None
    modes = tuple(m.training for m in module.modules())
    return id(module), modes, torch.is_grad_enabled(), repr(spec), tuple(described)


def _run(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
    make: Callable[[torch.Tensor], torch.Tensor],
) -> Run:
    """Run with the inputs that ``make`` makes: without heavy products, or with them if it fails without."""
    try:
        return _run_once(module, args, kwargs, seed, make, Sketch())
    except Exception:  # such as a factorization of what should be a product
        return _run_once(module, args, kwargs, seed, make, FlopCount())


def _run_once(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
    make: Callable[[torch.Tensor], torch.Tensor],
    under: FlopCount,
) -> Run:
    given: list[torch.Tensor] = []
    cut: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: a tensor, and the same without history

    def real(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            made = make(x)
            # The result of an operation: it may be written to, of which the versions tell.
            given.append(made.clone() if made.requires_grad and torch.is_grad_enabled() else made)
            return given[-1]
        return x

    def without_history(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or any(x is y for y in given):
            return x
        if id(x) not in cut:
            cut[id(x)] = x, x.detach().requires_grad_(x.requires_grad)
        return cut[id(x)][1]

    with untouched(module, tensors=True):
        found = [(m, dict(m.__dict__), containers_in(m.__dict__)) for m in module.modules()]
        torch.manual_seed(seed)
        inputs = map_tensors(real, (args, kwargs))
        before = [id(t) for _, t in tensors_in(inputs)]
        versions = [int(tensor._version) for tensor in given]
        with under:
            result = module(*inputs[0], **inputs[1])
        if [int(tensor._version) for tensor in given] != versions:
            raise RuntimeError("the module changes its inputs in place")
        result, after = map_tensors(without_history, result), map_tensors(without_history, inputs)
        left = tuple(
            (m, name, map_tensors(without_history, mutable(value)))
            for m, attributes, contents in found
            for name, value in m.__dict__.items()
            if name not in REGISTRIES and _is_new(value, name, attributes, contents)
        )
    places = {key: i for i, key in enumerate(before)}
    held = tuple(places.get(id(t)) for _, t in tensors_in(after))
    changed = held != tuple(range(len(before)))
    return Run(tuple(given), result, after if changed else None, held, under.flops, left)


def _is_new(value: Any, name: str, attributes: dict[str, Any], contents: dict[str, Any]) -> bool:
    """Whether an attribute holds tensors that it did not hold before."""
    before = contents.get(name) if value is attributes.get(name) else attributes.get(name)
    if value is attributes.get(name) and before is None:
        return False
    known = {id(t) for _, t in tensors_in(before)}
    return any(id(t) not in known for _, t in tensors_in(value))


def _met(
    fake: torch.Tensor, met: Mapping[int, torch.Tensor], scale: float = 1.0, ones: bool = False
) -> torch.Tensor:
    """The real tensor behind ``fake`` if it is known, else a random one; ``ones`` for any integers."""
    real = met.get(id(fake))
    if ones and not (fake.is_floating_point() or fake.is_complex()):
        return torch.ones_like(_random_like(fake))
    if real is None or real.shape != fake.shape:
        return _random_like(fake)
    real = real.detach().clone()
    if real.is_floating_point() or real.is_complex():
        real *= scale
    return real.requires_grad_(fake.requires_grad)


def _varied_like(fake: torch.Tensor) -> torch.Tensor:
    """As `_random_like`, with zeros and ones among integers, and some false among truths."""
    if fake.is_floating_point() or fake.is_complex():
        return _random_like(fake)
    return torch.randint(0, 2, tuple(fake.shape), device=fake.device).to(fake.dtype)


def _random_like(fake: torch.Tensor) -> torch.Tensor:
    return random_tensor(tuple(fake.shape), fake.dtype, fake.device).requires_grad_(fake.requires_grad)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A real tensor such as a model might meet: normal, or zeros where it may be an index, or all true."""
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)
