"""Modules that cannot run on fake tensors run on real ones, for the shapes of what they give.

On the example's own numbers where these are known, on numbers that they ran on before, or on random ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses import FakeTensor

from dtrp.partitioner.op_cost import FlopCount
from dtrp.partitioner.sketch import Sketch, fill_normal

from .leaves import trained_by
from .snapshot import Found
from .state import REGISTRIES
from .structure import flatten_output, map_tensors, mutable, tensors_in

Need = Literal["both", "first", "second"]

Known = Mapping[int, Callable[[], torch.Tensor | None]]
"""By a fake tensor's id, what gives the real one that it stands for (None if that cannot be told)."""

_ALIKE = 4  # runs on different numbers with the same sizes, after which no others are expected
_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Run:
    """One run of a module on real tensors."""

    inputs: tuple[torch.Tensor, ...]  # in order; they may come out again in the result
    result: Any
    changed: Any  # the arguments afterwards, if it put other tensors into lists and dicts among them
    held: tuple[int | None, ...]  # which inputs the arguments hold afterwards, None: another tensor
    flops: int
    left: tuple[tuple[nn.Module, str, Any], ...]  # what holds new tensors among its attributes


@dataclass(frozen=True)
class RealRun:
    """What a module did with one or two inputs of the same shapes."""

    first: Run
    second: Run | None = None


class RealRuns:
    """Runs modules, and remembers it: each recording of a model asks for the same runs again."""

    def __init__(self) -> None:
        self._made: dict[Hashable | None, RealRun] = {}
        # Inputs that did, by the id of the module, which is held so that no other gets it.
        self._served: dict[int, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {}

    def of(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        met: Known,
        need: Need = "both",
        others: Sequence[Known] = (),
    ) -> RealRun:
        """Run ``module`` with its present parameters on tensors like those given. Nothing of it is changed.

        Parameters
        ----------
        module : nn.Module
            The module.
        args, kwargs
            Its arguments, with fake tensors.
        met : mapping
            The tensors of the example. The first run takes these, which code with expectations can do with
            (boxes have their corners in order, lengths are none of them zero); the second takes random ones
            or ``others``, or these, halved, only where nothing else will do.
        need
            Which runs are asked for. ``"second"``: another than one already made, or any.
        others : sequence of mappings
            As ``met``, for calls with other samples.

        Raises
        ------
        RuntimeError
            It changes its inputs.
        """
        args, kwargs = mutable((args, kwargs))
        key = _key(module, args, kwargs)
        run = self._made.get(key)
        again = need == "both" or run is not None or key is None
        known = met, self._before(module, args, kwargs)
        go = partial(_run, Found(module), module, args, kwargs)
        if run is None:
            run = RealRun(_first(go, known))
            inputs = tuple(t.detach() for t in run.first.inputs)
            self._served.setdefault(id(module), (module, inputs))  # the example's own come first
        if run.second is None and need != "first" and again:
            counts = any(_counts(t) for _, t in tensors_in((args, kwargs)))
            run = replace(run, second=_another(go, counts, run.first, known, others))
        if key is not None:
            self._made[key] = run
        return run

    def inputs(self, module: nn.Module) -> tuple[torch.Tensor, ...]:
        """The tensors that it first ran on, ``()`` if it never did."""
        return self._served[id(module)][1] if id(module) in self._served else ()

    def forget(self) -> None:
        """The model is captured: what its modules gave may be large, and can be had again."""
        self._made.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Known:
        """Numbers like those that the module ran on before."""
        fakes: list[torch.Tensor] = []
        map_tensors(fakes.append, (args, kwargs))
        before = self.inputs(module)
        pairs = zip(fakes, before, strict=True) if len(before) == len(fakes) else ()
        return {id(fake): partial(_rows_like, old, fake) for fake, old in pairs}


def _rows_like(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor | None:
    """``real`` with its samples repeated or left out to have the shape of ``fake``; None if it cannot."""
    if real.dtype != fake.dtype or real.dim() != fake.dim() or real.shape[1:] != fake.shape[1:]:
        return None
    if real.shape == fake.shape:
        return real
    return real[torch.arange(fake.shape[0], device=real.device) % len(real)] if len(real) else None


Make = Callable[[torch.Tensor], torch.Tensor]
"""A real tensor in place of a fake one."""


Go = Callable[[int, Make], Run]
"""A run with a seed, on what is made."""


def _first(go: Go, known: Sequence[Known]) -> Run:
    """A run with what is known, and zeros for other integers; or ones, where these may be lengths."""
    try:
        return go(0, lambda t: _met(t, *known))
    except Exception as error:
        with contextlib.suppress(Exception):
            return go(0, lambda t: _ones_like(t) if _counts(t) else _met(t, *known))
        raise error from None


def _another(go: Go, counts: bool, first: Run, known: Sequence[Known], others: Sequence[Known]) -> Run:
    """A run with other numbers, as different as the module can take without giving another form of result."""
    form = flatten_output(first.result)[1]

    def news(second: Run) -> int:
        """In how many sizes it differs from the first."""
        a, b = ([n for _, t in tensors_in(run.result) for n in t.shape] for run in (first, second))
        return sum(x != y for x, y in zip(a, b, strict=False))

    # Sizes may be equal in two runs by chance: what shows that they depend on values is looked for. Other
    # samples of the example are dear to compute; they matter where numbers count or choose something.
    given: list[Make] = [partial(_given, met) for met in others if met]
    makers: list[Make] = [_varied_like, *(given if counts else ()), _random_like, *(() if counts else given)]
    if counts:
        makers.append(lambda t: _met(t, *known) if _counts(t) else _random_like(t))
        makers.append(lambda t: _ones_like(t) if _counts(t) else _random_like(t))
    best: Run | None = None
    sized, alike = any(t.dim() for _, t in tensors_in(first.result)), 0
    for seed, make in enumerate(makers, 1):
        if alike == _ALIKE or (best and (not sized or news(best) or (make in given and not counts))):
            break
        with contextlib.suppress(Exception):
            second = go(seed, make)
            if flatten_output(second.result)[1] == form:
                alike += 1
                best = second if best is None or news(second) else best
    best = best or go(1, lambda t: _met(t, *known, scale=0.5))
    return replace(best, inputs=())  # nobody asks for these, and they may be large


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
            described.append((leaf.__class__, copy.copy(leaf)))  # of a size the number, not its recording
        else:
            return None
    modes = tuple(m.training for m in module.modules())
    return id(module), modes, torch.is_grad_enabled(), repr(spec), tuple(described)


def _run(found: Found, module: nn.Module, args: Any, kwargs: Any, seed: int, make: Make) -> Run:
    """Run with the inputs that ``make`` makes: without heavy products, or with them if it fails without."""
    try:
        return _run_once(found, module, args, kwargs, seed, make, Sketch())
    except Exception:  # such as a factorization of what should be a product
        return _run_once(found, module, args, kwargs, seed, make, FlopCount())


def _run_once(
    found: Found, module: nn.Module, args: Any, kwargs: Any, seed: int, make: Make, under: FlopCount
) -> Run:
    given: list[torch.Tensor] = []
    cut: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: a tensor, and the same without history

    def real(fake: torch.Tensor) -> torch.Tensor:
        made = make(fake)
        # The result of an operation: it may be written to, of which the versions tell.
        given.append(made.clone() if made.requires_grad and torch.is_grad_enabled() else made)
        return given[-1]

    def without_history(x: torch.Tensor) -> torch.Tensor:
        if any(x is y for y in given):
            return x
        if id(x) not in cut:
            cut[id(x)] = x, x.detach().requires_grad_(x.requires_grad)
        return cut[id(x)][1]

    def attributes() -> dict[tuple[nn.Module, str], Any]:
        pairs = ((m, name) for m in module.modules() for name in m.__dict__ if name not in REGISTRIES)
        return {(m, name): value for m, name in pairs if list(tensors_in(value := m.__dict__[name]))}

    with found.again(tensors=True):
        known = {key: [t for _, t in tensors_in(value)] for key, value in attributes().items()}
        torch.manual_seed(seed)
        inputs = map_tensors(real, (args, kwargs))
        before = [id(t) for _, t in tensors_in(inputs)]
        versions = [int(tensor._version) for tensor in given]
        since = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        with under:
            result = module(*inputs[0], **inputs[1])
        if any(isinstance(p, FakeTensor) for p in trained_by(result, since)):
            raise RuntimeError("the module uses parameters that are not its own")
        if [int(tensor._version) for tensor in given] != versions:
            raise RuntimeError("the module changes its inputs in place")
        result, after = map_tensors(without_history, result), map_tensors(without_history, inputs)
        left = tuple(
            (m, name, map_tensors(without_history, mutable(value)))
            for (m, name), value in attributes().items()
            if {id(t) for _, t in tensors_in(value)} - set(map(id, known.get((m, name), ())))
        )
    places = {key: i for i, key in enumerate(before)}
    held = tuple(places.get(id(t)) for _, t in tensors_in(after))
    changed = held != tuple(range(len(before)))
    return Run(tuple(given), result, after if changed else None, held, under.flops, left)


def _counts(fake: torch.Tensor) -> bool:
    """Whether a tensor may hold lengths, indices or flags."""
    return not (fake.is_floating_point() or fake.is_complex())


def _met(fake: torch.Tensor, *known: Known, scale: float = 1.0, any_shape: bool = False) -> torch.Tensor:
    """The real tensor behind ``fake`` if it is known, else a random one."""
    found = (values[id(fake)]() for values in known if id(fake) in values)
    real = next((t for t in found if t is not None and (any_shape or t.shape == fake.shape)), None)
    if real is None:
        return _random_like(fake)
    real = real.detach()
    scaled = real.clone() if _counts(real) or scale == 1 else real * scale
    return scaled.requires_grad_(fake.requires_grad)


def _given(met: Known, fake: torch.Tensor) -> torch.Tensor:
    """As in another call, which may have other sizes."""
    return _met(fake, met, any_shape=True)


def _varied_like(fake: torch.Tensor) -> torch.Tensor:
    """As `_random_like`, with zeros and ones among integers, and some false among truths: the same each time,
    as code may pick from several tensors by one mask."""
    if not _counts(fake):
        return _random_like(fake)
    generator = torch.Generator().manual_seed(fake.numel())
    return torch.randint(0, 2, tuple(fake.shape), generator=generator).to(fake.device, fake.dtype)


def _ones_like(fake: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(_random_like(fake))


def _random_like(fake: torch.Tensor) -> torch.Tensor:
    return random_tensor(tuple(fake.shape), fake.dtype, fake.device).requires_grad_(fake.requires_grad)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A real tensor such as a model might meet: normal, or zeros where it may be an index, or all true."""
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=dtype, device=device)
    made = torch.empty(shape, dtype=dtype, device=device)
    fill_normal(made.view(-1))
    return made
