"""What a manifest says of an export: origins, output leaves, the output's structure, versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch.utils import _pytree as pytree

from ...errors import ExportError
from ...onnx.manifest import Constant, Origin
from ...version import __version__
from ...wiring import CALLER, Source, Wiring
from ...wiring import Constant as ConstantLeaf
from ..capture.structure import parts_of
from .names import Names
from .stage import NotDynamic
from .study import ScalarEnd, Study, TensorEnd


def origin_of(source: Source, names: Names) -> Origin:
    """Where a value comes from, as the manifest writes it."""
    return Origin(None if source.stage == CALLER else source.stage, names[source])


def output_leaf(leaf: Source | ConstantLeaf, found: Study, names: Names) -> Origin | Constant:
    """A leaf of the model's output."""
    value: Any
    if isinstance(leaf, ConstantLeaf):
        value = leaf.value
    else:
        end = (
            found.inputs[leaf.index] if leaf.stage == CALLER else found.stage_outputs[leaf.stage][leaf.index]
        )
        if not isinstance(end, ScalarEnd):
            return origin_of(leaf, names)
        if end.varies:
            raise NotDynamic("the model's output has a number that follows its inputs' sizes")
        value = end.value
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ExportError(
            f"the model's output has a leaf of type {type(value).__name__}, {value!r:.80}: a chain can give "
            f"tensors, numbers, strings and None. Leave it out of the output (transformers' caches: "
            f"model.config.use_cache = False)"
        )
    return Constant(value)


def output_structure(wiring: Wiring) -> Any:
    """The output's structure as JSON: see `dtrp.onnx.manifest.build`."""
    tree = wiring.unflatten([_Leaf(i) for i in range(len(wiring.result))])

    def describe(node: Any) -> Any:
        if isinstance(node, _Leaf):
            return {"leaf": node.index}
        if isinstance(node, Mapping):
            return {"dict": [[_key(k), describe(v)] for k, v in node.items()]}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return {"dict": [[k, describe(v)] for k, v in zip(node._fields, node, strict=True)]}
        if isinstance(node, (tuple, list)):
            return {"list" if isinstance(node, list) else "tuple": [describe(v) for v in node]}
        if pytree.tree_is_leaf(node):  # an object that was opened along its attributes
            return {"dict": [[_key(name), describe(part)] for (_, name), part in parts_of(node)]}
        # Of a class that pytree knows: its leaves, in order.
        return {"tuple": [describe(leaf) for leaf in pytree.tree_leaves(node)]}

    return describe(tree)


class _Leaf:
    """Stands in the output's structure where leaf ``index`` goes."""

    def __init__(self, index: int) -> None:
        self.index = index


def _key(key: Any) -> Any:
    if not isinstance(key, (str, int)):
        raise ExportError(
            f"the model's output has a dict with the key {key!r}: a chain's output can have strings and "
            f"integers as keys"
        )
    return key


def dtype_name(end: TensorEnd) -> str:
    """numpy's name of a dtype."""
    return str(end.dtype).removeprefix("torch.")


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of dtrp and of ``packages``, as far as they are installed."""
    found = {"dtrp": __version__}
    for package in packages:
        try:
            found.setdefault(package, version(package))
        except PackageNotFoundError:  # run from its sources
            continue
    return found
