"""From an error deep inside torch's exporters to the node, the module and the line that caused it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ...errors import ExportError
from .trace import NodeFailed, describe, first_line


def explain(error: Exception, graph: fx.Graph, stage: int, tool: str) -> ExportError:
    """The error that a user meets: which node, which line, what to do."""
    chain = _causes(error)
    for cause in chain:
        if isinstance(cause, NodeFailed):
            return ExportError(f"{cause.where} cannot be exported to ONNX: {cause.why}. {_REMEDY}")
    origin = _origin(chain, graph)
    where = describe(origin, stage) if origin is not None else f"stage {stage}"
    if lacks_operator(error):
        return ExportError(f"{where} uses {_operator(chain)}, which ONNX lacks. {_REMEDY}")
    return ExportError(f"{where} cannot be exported to ONNX: {tool} says: {first_line(chain[-1])}. {_REMEDY}")


def lacks_operator(error: BaseException) -> bool:
    """Whether the exporter knows no ONNX form of an operator."""
    return "No ONNX function found" in str(root_cause(error))


def root_cause(error: BaseException) -> BaseException:
    """The first of the errors that led to this one."""
    return _causes(error)[-1]


_REMEDY = (
    "Write it with other operators, or export the model without it (a postprocessing step can run after the "
    "chain)"
)


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _operator(chain: Sequence[BaseException]) -> str:
    node = _failing(chain)
    return f"the operator {node.target}" if node is not None else "an operator"


def _failing(chain: Sequence[BaseException]) -> fx.Node | None:
    """The exported program's node at which the conversion failed.

    The exporter's errors hold it as text only; the frames that they passed hold the node itself.
    """
    for error in reversed(chain):
        traceback = error.__traceback__
        while traceback is not None:
            node = traceback.tb_frame.f_locals.get("node")
            if isinstance(node, fx.Node):
                return node
            traceback = traceback.tb_next
    return None


def _origin(chain: Sequence[BaseException], graph: fx.Graph) -> fx.Node | None:
    """The stage's node that the failing node of the exported program comes from."""
    node = _failing(chain)
    if node is None:
        return None
    known = {n.name: n for n in graph.nodes if n.op not in ("placeholder", "output")}
    sources = list(node.meta.get("from_node", ()))
    while sources:
        source = sources.pop(0)
        if "Interpreter" in source.pass_name and not source.from_node and source.name in known:
            origin: fx.Node = known[source.name]
            return origin
        sources.extend(source.from_node)
    return None
