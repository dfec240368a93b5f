"""Tells mistakes with a loss before any worker starts: it is tried on stand-ins for the model's output.

First on fake tensors, which have shapes and no values. A loss that looks at values fails there; it is tried
on random numbers, where these are few. Only what is sure is said: nothing of a loss that raises for values
it dislikes, nor of one that works as it was given.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from .loss_gradients import AsksGradients, ThroughTheModel, graph_of
from .partitioner.capture import Captured
from .partitioner.capture.example_values import batch_of
from .partitioner.capture.state import Held
from .runtime.batch import WithExtra
from .runtime.config import TrainConfig
from .runtime.loss import as_scalar, call_loss, ignored_target, own_loss, told
from .runtime.random import preserved
from .runtime.twins import private_copy
from .torch_losses import TargetMistake, Watch, described, part_of

_FEW = 2**22  # numbers in an output, up to which random ones are made
_CERTAIN = (TypeError, AttributeError, NameError, ImportError)  # that no values bring about
_OF_SIZES = (RuntimeError, IndexError, KeyError)  # where fakes, which have no values, bring it about, too


def check_loss(
    captured: Captured, config: TrainConfig, inputs: Sequence[Tensor], target: Any, *, cut: bool = True
) -> int:
    """Refuse a loss that surely cannot be trained with, as a batch like the example's shows.

    ``cut``: the model is, into several stages. The result is the class target that the loss leaves out of its
    mean, as it tells torch's losses (-100 where it names none, or several).

    Raises
    ------
    TypeError
        The loss gives no scalar, or none that depends on the output, or cannot be called so.
    ValueError
        The target is not what one of torch's losses wants.
    """
    loss_fn = config.loss_fn
    if loss_fn is not None:
        _check_call(loss_fn, target.extra if isinstance(target, WithExtra) else {})
    stand_in = _StandIn.of(captured, config, inputs, target, cut)
    ignored = ignored_target(loss_fn)
    if stand_in is None:
        return ignored
    if loss_fn is None:
        as_scalar(None, own_loss(stand_in.output()))
        return ignored
    with as_found(loss_fn):
        _judge(stand_in, loss_fn)
    return next(iter(stand_in.ignored)) if len(stand_in.ignored) == 1 else ignored


def _judge(stand_in: _StandIn, loss_fn: Callable[..., Any]) -> None:
    try:
        stand_in.judge_fakes(loss_fn)
        return
    except _Refused as e:
        raise e.error from e.__cause__
    except TargetMistake as mistake:
        if not stand_in.works_swapped(loss_fn):
            raise ValueError(stand_in.in_real_sizes(str(mistake))) from None
    except Exception as error:
        if not stand_in.works_swapped(loss_fn):
            stand_in.judge_random(loss_fn, error)
            return
    raise TypeError(
        f"{told(loss_fn)} fails as loss_fn(output, target) and works as loss_fn(target, output): swap its "
        f"arguments"
    )


@contextmanager
def as_found(loss_fn: Callable[..., Any], *, tensors: bool = False) -> Iterator[None]:
    """On leaving, what the loss changes when it runs is as before: its attributes, globals and closures;
    ``tensors``: and what is in their tensors, where it runs on real ones."""
    function: Any = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    holder = getattr(function, "__self__", function)  # of a method
    code: Any = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(code, FunctionType):
        code = inspect.unwrap(type(code).__call__)
    if isinstance(loss_fn, nn.Module) or not isinstance(code, FunctionType):  # a module is tried as a copy
        yield
        return
    own = [holder] if isinstance(holder, nn.Module) else []
    if not own and not isinstance(holder, FunctionType) and hasattr(holder, "__dict__"):
        own = [vars(holder)]
    place = code.__globals__
    named = {name: place[name] for name in code.__code__.co_names if name in place}
    cells = [(cell, cell.cell_contents) for cell in code.__closure__ or () if cell != CellType()]
    values = [*own, *named.values(), *(value for _, value in cells)]
    values += [vars(part) for value in values if isinstance(value, nn.Module) for part in value.modules()]
    held = Held(values, tensors=tensors)
    try:
        yield
    finally:
        held.put_back()
        place.update(named)
        for cell, value in cells:
            cell.cell_contents = value


class _Refused(Exception):
    """What the user is to be told."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _check_call(loss_fn: Callable[..., Any], extra: Mapping[str, Any]) -> None:
    """Refuse a loss that takes other arguments, as far as its signature says."""
    function = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, **extra)
    except TypeError as e:
        named = "".join(f", {name}=..." for name in extra)
        do = "what else it needs comes with step(x, y, extra={...}), or by functools.partial"
        if "missing" not in str(e):
            do = "let it take these"
        raise TypeError(
            f"loss_fn is called as loss_fn(output, target{named}), but {told(loss_fn)} takes {signature}: "
            f"{e}; {do}"
        ) from None


@dataclass
class _StandIn:
    """What stands for output and target of a batch like the example's."""

    model: nn.Module
    config: TrainConfig
    mode: FakeTensorMode
    leaves: list[Any]  # of the output, as captured
    nodes: Sequence[Any] | None  # that give them, where the model is cut
    spec: pytree.TreeSpec
    left: Mapping[str, Tensor]  # by forward, in attributes
    target: Any
    batch: int  # samples of the batch
    example: int  # and of the example
    ignored: set[int] = field(default_factory=set)  # class targets that it tells torch's losses to leave out

    @classmethod
    def of(
        cls, captured: Captured, config: TrainConfig, inputs: Sequence[Tensor], target: Any, cut: bool
    ) -> _StandIn | None:
        """None where the graph does not say what the output will be."""
        graph = captured.train.module.graph
        examples = [n.meta.get("val") for n in graph.find_nodes(op="placeholder")]
        if not all(isinstance(e, FakeTensor) for e in examples):
            return None
        size, batched = batch_of(examples)
        now = inputs[batched[0]].shape[0] if batched and inputs[batched[0]].dim() else size
        for i, (example, tensor) in enumerate(zip(examples, inputs, strict=True)):
            wanted = (now, *example.shape[1:]) if i in batched else tuple(example.shape)
            if tuple(tensor.shape) != wanted or now == 0:
                return None
        (output_node,) = graph.find_nodes(op="output")
        leaves = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in output_node.args[0]]
        mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)
        if mode is None:
            return None
        spec, left = captured.train.out_spec, captured.left
        nodes = output_node.args[0] if cut else None
        return cls(captured.model, config, mode, leaves, nodes, spec, left, target, now, size)

    def output(self) -> Any:
        """The output, of fakes."""
        return pytree.tree_unflatten(self.leaves, self.spec)

    def in_real_sizes(self, text: str) -> str:
        """Shapes in a message as they are in the batch."""
        text = text.replace(f"({self.example},", f"({self.batch},")
        return text.replace(f"a list of {self.example}", f"a list of {self.batch}")

    def judge_fakes(self, loss_fn: Callable[..., Any], *, swapped: bool = False) -> None:
        """Try it on fake tensors. Raises `_Refused` where it runs and is wrong, or whatever it raises."""
        if isinstance(loss_fn, nn.Module):  # the user's own must not keep fakes, nor count this call
            loss_fn = private_copy(loss_fn, [(p, p) for p in loss_fn.parameters()])
        with _faking(self.mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training will warn
            place = next(leaf.device for leaf in self.leaves if isinstance(leaf, FakeTensor))
            pairs: list[tuple[Tensor, Tensor]] = []

            def fake(real: Tensor) -> Tensor:
                made = self.mode.from_tensor(real.detach()).to(place)
                if self._follows_batch(real):
                    made = made.new_empty((self.example, *real.shape[1:]))
                pairs.append((made, real))
                return made

            target = pytree.tree_map_only(Tensor, fake, self._cut(self.target))
            self._judge(loss_fn, Tensor.detach, target, pairs, swapped)

    def judge_random(self, loss_fn: Callable[..., Any], on_fakes: Exception) -> None:
        """It fails on fakes: refuse it where it does the same wrong with whatever numbers."""
        if sum(leaf.numel() for leaf in self.leaves if isinstance(leaf, Tensor)) > _FEW:
            return
        found: list[Exception] = []
        for source in (torch.zeros, torch.rand, torch.randn):
            try:
                own = deepcopy(loss_fn)
            except Exception:
                return
            try:
                with preserved(()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._judge_random(own, source)
                return
            except _Refused as e:
                found.append(e.error)
            except Exception as e:
                if not isinstance(e, _CERTAIN) and not (type(e) is type(on_fakes) and type(e) in _OF_SIZES):
                    return
                found.append(self._failure(loss_fn, e))
        if len({str(e) for e in found}) == 1:
            raise found[0]

    def works_swapped(self, loss_fn: Callable[..., Any]) -> bool:
        """Whether output and target in each other's place give a loss that can be trained with."""
        try:
            self.judge_fakes(loss_fn, swapped=True)
        except Exception:
            return False
        return True

    def _judge_random(self, loss_fn: Callable[..., Any], source: Callable[..., Tensor]) -> None:
        def made(leaf: Tensor) -> Tensor:
            return (source if leaf.is_floating_point() else torch.zeros)(leaf.shape, dtype=leaf.dtype)

        def sized(real: Tensor) -> Tensor:
            return real[torch.arange(self.example) % self.batch] if self._follows_batch(real) else real

        self._judge(loss_fn, made, pytree.tree_map_only(Tensor, sized, self._cut(self.target)), [], False)

    def _judge(
        self,
        loss_fn: Callable[..., Any],
        stand_in: Callable[[Tensor], Tensor],
        target: Any,
        pairs: list[tuple[Tensor, Tensor]],
        swapped: bool,
    ) -> None:
        leaves = [stand_in(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        roots = [x.requires_grad_() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
        with torch.enable_grad():
            leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]  # may be changed in place
        output = pytree.tree_unflatten(leaves, self.spec)

        def turned(output: Any, target: Any, **extra: Any) -> Any:
            return loss_fn(target, output, **extra)

        formats: Any = nullcontext()
        if self.config.autocast is not None and roots:
            formats = torch.autocast(roots[0].device.type, dtype=self.config.autocast)
        asks: Any = nullcontext()
        if self.nodes is not None:
            asking = [made for made, real in pairs if real.requires_grad]
            given_by = list(zip(leaves, self.nodes, strict=True))
            asks = AsksGradients(given_by, dict(self.model.named_parameters()), asking)
        try:
            watch = Watch(pairs, self.ignored)
            with self._left_behind(stand_in) as left, torch.enable_grad(), watch, asks, formats:
                given = call_loss(turned if swapped else loss_fn, output, target)
        except ThroughTheModel as e:
            raise _Refused(
                ValueError(
                    f"{told(loss_fn)} takes gradients (torch.autograd.grad) with respect to {e}: what lies "
                    f"between runs in stages elsewhere, through which they do not flow; take them in the "
                    f"model's forward, and let it return them beside its output (layers that they go "
                    f"through then stay in one stage)"
                )
            ) from None
        try:
            loss = as_scalar(loss_fn, given)
        except TypeError as e:
            raise _Refused(e) from None
        if any(root.grad is not None for root in roots):
            raise _Refused(
                TypeError(f"{told(loss_fn)} calls backward(); only return the loss: the stages go backward")
            )
        graph = graph_of(loss)
        used = {id(node.variable) for node in graph if hasattr(node, "variable")}
        for name in (name for key, (name, _) in left.items() if key in used):
            raise _Refused(
                ValueError(
                    f"{told(loss_fn)} reads {name!r}, where the model's forward leaves a tensor: stages run "
                    f"apart from the loss, and would find another batch's there; let forward return it "
                    f"beside its output"
                )
            )
        for name, p in self.model.named_parameters():
            if id(p) in used:
                raise _Refused(
                    ValueError(
                        f"{told(loss_fn)} uses the model's own parameter {name!r}, which trains in a stage "
                        f"elsewhere: decay weights by the optimizer (weight_decay=, param_groups=), or let "
                        f"the model's forward return the penalty beside its output"
                    )
                )
        if not roots or (loss.requires_grad and loss.is_leaf):  # made so on purpose
            return
        if not loss.requires_grad or graph.isdisjoint(map(_node, roots)):
            raise _Refused(
                TypeError(
                    f"{told(loss_fn)} gave a tensor without a gradient back to the model's output: it does "
                    f"not depend on it, or leaves torch on the way (.item(), .detach(), .numpy(), "
                    f"torch.tensor, no_grad); compute it from the output with torch operations"
                )
            )

    @contextmanager
    def _left_behind(self, stand_in: Callable[[Tensor], Tensor]) -> Iterator[dict[int, tuple[str, Tensor]]]:
        """Inside, attributes in which forward leaves tensors hold others: a loss that reads them shows it."""
        made = {name: stand_in(tensor) for name, tensor in self.left.items()}
        owners = {name: vars(self.model.get_submodule(name.rpartition(".")[0])) for name in made}
        before = [(owners[name], name.rpartition(".")[2]) for name in made]
        found = [owner.get(name, self) for owner, name in before]
        try:
            for (owner, name), tensor in zip(before, made.values(), strict=True):
                owner[name] = tensor.requires_grad_() if tensor.is_floating_point() else tensor
            yield {id(tensor): (name, tensor) for name, tensor in made.items()}
        finally:
            for (owner, name), value in zip(before, found, strict=True):
                owner[name] = value
                if value is self:
                    del owner[name]

    def _failure(self, loss_fn: Callable[..., Any], error: Exception) -> TypeError:
        output, use = self.output(), ""
        if isinstance(output, Tensor) and isinstance(self.target, Tensor):
            sizes = f"; the output is {described(output)}, the target {described(self.target)}"
            use = self.in_real_sizes(sizes)
        elif not isinstance(output, Tensor):
            use = f"; the model gives {described(output)}: the loss may be meant for {part_of(output)}"
        refusal = TypeError(f"{told(loss_fn)} fails on the first batch: {type(error).__name__}: {error}{use}")
        refusal.__cause__ = error
        return refusal

    def _cut(self, target: Any) -> Any:
        """Lists as long as the batch, as long as the example's; tensors are seen to where they are met."""
        if type(target) is list and len(target) == self.batch != self.example:
            target = [target[i % self.batch] for i in range(self.example)]
        if type(target) in (list, tuple):
            return type(target)(map(self._cut, target))
        if isinstance(target, WithExtra):
            return WithExtra(*map(self._cut, target))
        return {k: self._cut(v) for k, v in target.items()} if type(target) is dict else target

    def _follows_batch(self, tensor: Tensor) -> bool:
        return self.batch != self.example and tensor.dim() > 0 and tensor.shape[0] == self.batch


def _node(root: Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(root).node


@contextmanager
def _faking(mode: FakeTensorMode) -> Iterator[None]:
    """Fake tensors and others may meet; what torch logs of operators that refuse fakes is of no use here."""
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True
    try:
        with mode:
            yield
    finally:
        mode.allow_non_fake_inputs, log.disabled = allowed, silent
