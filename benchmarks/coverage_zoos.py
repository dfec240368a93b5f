"""Where `coverage.py` gets its models: name -> a model with random weights and an example call."""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor

_LARGE = 256  # pixels


@dataclass
class Sample:
    """One model of a zoo with an example call; `build` makes the weights (on the current device)."""

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]  # batch size -> args, kwargs
    options: dict[str, Any] = field(default_factory=dict)
    steps: bool = False  # whether it is also trained for one step through a two-stage pipeline


def torchvision_names() -> list[str]:
    """All models that torchvision registers."""
    import torchvision

    return list(torchvision.models.list_models())


def torchvision_sample(name: str) -> Sample:
    """A torchvision model at the smallest sensible resolution."""
    import torchvision
    from torchvision.models import get_model_builder

    options: dict[str, Any] = {}
    kind = get_model_builder(name).__module__.removeprefix("torchvision.models.").split(".")[0]
    if "weights_backbone" in inspect.signature(get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    plain = name.removeprefix("quantized_")
    if plain in ("inception_v3", "googlenet"):
        options["init_weights"] = False  # the initialisation takes longer than everything else
    size = {"inception_v3": 299, "alexnet": 96, "squeezenet1_0": 96, "squeezenet1_1": 96}.get(plain, 64)
    if name.startswith("vit_"):
        options["image_size"] = size = 4 * int(name.split("_")[2])
    if name.startswith("maxvit"):
        size = 224

    def images(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(batch, 3, size, size),), {}

    def video(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if name.startswith(("mvit", "s3d")):  # built for no other size
            return (torch.randn(batch, 3, 16, 224, 224),), {}
        return (torch.randn(batch, 3, 8, 64, 64),), {}

    def flow(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first, second = (torch.rand(batch, 3, 128, 128) for _ in range(2))
        return (first, second), {"num_flow_updates": 3}

    def detection(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        pictures = [torch.rand(3, 96, 96) for _ in range(batch)]
        targets = []
        for _ in range(batch):
            target = {
                "boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0], [20.0, 30.0, 80.0, 90.0]]),
                "labels": torch.tensor([1, 1]),
            }
            if name.startswith("maskrcnn"):
                target["masks"] = torch.ones(2, 96, 96, dtype=torch.uint8)
            if name.startswith("keypointrcnn"):
                target["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 17] * 2)
            targets.append(target)
        return (pictures, targets), {}

    call = {"video": video, "optical_flow": flow, "detection": detection}.get(kind, images)
    if kind == "detection" and not name.startswith("ssd"):
        options |= {"min_size": 96, "max_size": 192}  # else it enlarges every image to 800 pixels
    return Sample(name, lambda: torchvision.models.get_model(name, weights=None, **options), call, options)


def timm_names(sample: int | None, seed: int) -> list[str]:
    """All of timm's architectures, or a sample drawn with a seed."""
    import timm

    names = sorted(timm.list_models())
    return names if sample is None else sorted(random.Random(seed).sample(names, min(sample, len(names))))


def timm_sample(name: str) -> Sample:
    """A timm model at the resolution that it is registered with, or at 256 pixels if it takes less."""
    import timm

    config = timm.get_pretrained_cfg(name)
    size: tuple[int, ...] = (3, 224, 224)
    if config is not None:
        size = tuple(config.min_input_size or config.input_size)
        if config.fixed_input_size or max(config.input_size[1:]) <= 128:
            size = tuple(config.input_size)

    def build(**options: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = timm.create_model(name, pretrained=False, **options)
        return model

    options: dict[str, Any] = {}
    if max(size[1:]) > _LARGE:
        for candidate in ({}, {"img_size": _LARGE}):
            smaller = (size[0], _LARGE, _LARGE)
            with contextlib.suppress(Exception), torch.device("meta"):
                build(**candidate)(torch.empty(2, *smaller))
                size, options = smaller, candidate
                break

    def images(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(batch, *size),), {}

    return Sample(name, lambda: build(**options), images, {"size": size, **options})
