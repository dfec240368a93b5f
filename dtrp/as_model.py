"""What a pipeline has in common with its model: it is called like it, and has its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from .partitioner.capture.modes import set_flags
from .planning import Planning
from .runtime import looks


class AsModel:
    """A compiled model, called like the model. In training, too, it has the present weights."""

    def __init__(self, planning: Planning) -> None:
        self.model = planning.model
        self._planning = planning

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as ``model(*args, **kwargs)``; plans first if that has not been done.

        Raises
        ------
        TypeError, ValueError
            The arguments have another structure, or a shape that the graph is not for (with what to do).
        """
        looks.show(self.model)
        self.prepare(args, kwargs)
        tensors = self.bind(args, kwargs)
        made, training = self._planning.made, self._planning.training
        if training:  # where the model's own code switches modes
            set_flags(self.model, made.captured.flags)
        return made.split.graph(training)(*tensors)

    @property
    def training(self) -> bool:
        """Whether the model is in train mode."""
        return self.model.training

    def train(self, mode: bool = True) -> Self:
        """As on the model."""
        self.model.train(mode)
        return self

    def eval(self) -> Self:
        """As on the model."""
        return self.train(False)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's parameters."""
        looks.show(self.model)
        return self.model.parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters by their original names."""
        looks.show(self.model)
        return self.model.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's own state, original names."""
        looks.show(self.model)
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """As on the model."""
        return self.model.load_state_dict(state_dict, strict=strict)

    def prepare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Plan for a call with these arguments, unless planned already; again if the model was changed.

        Raises
        ------
        CaptureError, PlanMismatchError
            The model was changed since, and could not be captured again or does not fit its plan any more.
        """
        self._planning.prepare(args, kwargs)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of one call, in the order of the stages' model inputs.

        Raises
        ------
        TypeError, ValueError
            They do not fit the example that was compiled for.
        """
        return self._planning.bind(args, kwargs)
