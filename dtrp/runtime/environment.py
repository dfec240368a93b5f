"""What the script has set in its process, for the workers to have the same.

Described in the caller when workers start, applied in each before it reads its stage; only what differs from
a fresh interpreter is set there. Variables of the environment, working directory and limits are inherited.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

# (how it is asked for, how it is set, leading arguments of both)
CALLS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("sys.getrecursionlimit", "sys.setrecursionlimit", ()),
    ("torch.get_default_dtype", "torch.set_default_dtype", ()),
    ("torch.get_deterministic_debug_mode", "torch.set_deterministic_debug_mode", ()),
    ("torch.get_float32_matmul_precision", "torch.set_float32_matmul_precision", ()),
    ("torch.is_anomaly_enabled", "torch.autograd.set_detect_anomaly", ()),
    ("torch.is_warn_always_enabled", "torch.set_warn_always", ()),
    ("torch.is_autocast_cache_enabled", "torch.set_autocast_cache_enabled", ()),
    *(("torch.get_autocast_dtype", "torch.set_autocast_dtype", (d,)) for d in ("cpu", "cuda")),
    *(("torch.is_autocast_enabled", "torch.set_autocast_enabled", (d,)) for d in ("cpu", "cuda")),
    ("torch.backends.mha.get_fastpath_enabled", "torch.backends.mha.set_fastpath_enabled", ()),
    *(
        (f"torch.backends.cuda.{kind}_sdp_enabled", f"torch.backends.cuda.enable_{kind}_sdp", ())
        for kind in ("flash", "mem_efficient", "math", "cudnn")
    ),
)
ATTRIBUTES = (
    "torch.utils.deterministic.fill_uninitialized_memory",
    "torch.distributions.Distribution._validate_args",
    *(
        f"torch.backends.{name}"
        for name in (
            "cuda.matmul.allow_tf32",
            "cuda.matmul.allow_fp16_reduced_precision_reduction",
            "cuda.matmul.allow_bf16_reduced_precision_reduction",
            "cuda.matmul.allow_fp16_accumulation",
            "cudnn.enabled",
            "cudnn.benchmark",
            "cudnn.benchmark_limit",
            "cudnn.deterministic",
            "cudnn.allow_tf32",
            "mkldnn.enabled",
            "mkldnn.deterministic",
            "mkldnn.allow_tf32",
            "opt_einsum.enabled",
            "opt_einsum.strategy",
            "quantized.engine",
            # What these say includes what was set by the older names above: they come last.
            "fp32_precision",
            *(f"{backend}.fp32_precision" for backend in ("cudnn", "mkldnn")),
            *(f"{backend}.{op}.fp32_precision" for backend in ("cudnn", "mkldnn") for op in ("conv", "rnn")),
            "cuda.matmul.fp32_precision",
            "mkldnn.matmul.fp32_precision",
        )
    ),
)


@dataclass(frozen=True)
class Environment:
    """What workers are to set."""

    calls: Mapping[tuple[str, str, tuple[Any, ...]], Any]
    attributes: Mapping[str, Any]
    device: torch.device  # by default
    flush_denormal: bool
    print_options: tuple[Any, Mapping[str, Any]]  # torch's, numpy's
    numpy_errors: Mapping[str, Any]
    warn_filters: tuple[Any, ...]
    capture_warnings: bool
    log_levels: Mapping[str, tuple[int, bool]]  # by name: the level, and whether it is disabled
    log_disable: int

    @classmethod
    def capture(cls) -> Environment:
        """This process's."""
        numpy = sys.modules.get("numpy")
        loggers = logging.root.manager.loggerDict.items()
        levels = {
            n: (g.level, g.disabled)
            for n, g in loggers
            if isinstance(g, logging.Logger) and (g.level or g.disabled)
        }
        return cls(
            calls={c: _get(c[0])(*c[2]) for c in CALLS if _known(c)},
            attributes={name: _get(name) for name in ATTRIBUTES if _known((name,))},
            device=torch.get_default_device(),
            flush_denormal=_flushes_denormal(),
            print_options=(torch._tensor_str.PRINT_OPTS, numpy.get_printoptions() if numpy else {}),
            numpy_errors=numpy.geterr() if numpy else {},
            warn_filters=tuple(warnings.filters),
            capture_warnings=getattr(logging, "_warnings_showwarning", None) is not None,
            log_levels={"": (logging.root.level, False), **levels},
            log_disable=logging.root.manager.disable,
        )

    def apply(self, device: torch.device) -> None:
        """In a worker whose stage is on ``device``. Logs and warnings last (`apply_filters`)."""
        for (ask, change, arguments), value in self.calls.items():
            if not _known((ask, change, arguments)) or _get(ask)(*arguments) != value:
                _get(change)(*arguments, value)
        for name, value in self.attributes.items():
            if not _known((name,)) or _get(name) != value:
                owner, _, last = name.rpartition(".")
                setattr(_get(owner), last, value)
        if self.device.type != "cpu":  # setting the CPU costs a look at every call
            torch.set_default_device(device if device.type == self.device.type else self.device)
        if self.flush_denormal:
            torch.set_flush_denormal(True)
        torch._tensor_str.PRINT_OPTS = self.print_options[0]
        if self.numpy_errors:
            import numpy

            numpy.seterr(**self.numpy_errors)
            numpy.set_printoptions(**self.print_options[1])

    def apply_filters(self) -> None:
        """When all has been imported: what imports say has been dealt with in the caller."""
        for name, (level, disabled) in self.log_levels.items():
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.disabled = disabled
        logging.disable(self.log_disable)
        logging.captureWarnings(self.capture_warnings)
        warnings.filters[:] = self.warn_filters  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]


def _get(name: str) -> Any:
    root, *path = name.split(".")
    return reduce(getattr, path, importlib.import_module(root))


def _known(what: tuple[Any, ...]) -> bool:
    """Whether this torch has it and can say: some refuse to where older and newer names were used."""
    try:
        value = _get(what[0])
        if len(what) > 1:
            value(*what[2])
    except (AttributeError, RuntimeError):
        return False
    return True


def _flushes_denormal() -> bool:
    """Nothing says, but a sum does."""
    return sys.float_info.min * torch.tensor(0.5, dtype=torch.float64, device="cpu").item() == 0.0
