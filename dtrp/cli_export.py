"""``dtrp export``: a model by name, trained weights from a file, one ONNX file per stage."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``dtrp export`` takes beside the model and its inputs."""
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="directory for stage_0.onnx, ..., manifest.json"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="trained weights: a file of trainer.save, or of a state_dict"
    )
    parser.add_argument("--plan", metavar="FILE", help="a plan to reuse")
    parser.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators")
    parser.add_argument(
        "--fixed-batch", action="store_true", help="for the batch size of --input only (default: for any)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with the model")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run(
    args: argparse.Namespace, model: nn.Module, positional: Sequence[Tensor], named: Mapping[str, Tensor]
) -> int:
    """Export; prints the files' paths, and on stderr what verifying found."""
    import dtrp
    from dtrp.onnx import read_manifest

    if args.checkpoint is not None:
        dtrp.load_weights(model, args.checkpoint)
    example: Any = tuple(positional)
    if named:
        parameters = inspect.signature(model.forward).parameters
        example = dict(zip(parameters, positional, strict=False)) | dict(named)
    pipe = dtrp.compile(model, args.n_gpus, example_inputs=example, plan=args.plan)
    paths = pipe.export_onnx(
        args.out,
        opset=args.opset,
        dynamic_batch=not args.fixed_batch,
        verify=not args.no_verify,
        overwrite=args.overwrite,
        inputs=_drawn(example),
    )
    for path in paths:
        print(path)
    manifest = read_manifest(args.out)
    batch = "any batch size" if manifest.batch.dynamic else f"batches of {manifest.batch.size} only"
    print(f"dtrp: {len(manifest.stages)} stages for {batch}, opset {manifest.opset}", file=sys.stderr)
    if manifest.verification is not None:
        gaps = manifest.verification["largest_difference_per_stage"]
        for k, gap in enumerate(gaps):
            print(f"dtrp: stage {k} differs from the model by {gap:.1e} (relative)", file=sys.stderr)
        whole = manifest.verification["largest_difference_of_output"]
        print(f"dtrp: the chain differs from the model by {whole:.1e} (relative)", file=sys.stderr)
    return 0


def _drawn(example: Any) -> Any:
    """Inputs to verify with: zeros, which the command line plans with, would hide differences."""
    import torch
    from torch.utils import _pytree as pytree

    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        if like.is_floating_point():
            return torch.randn(like.shape, generator=generator).to(like)
        return torch.randint(0, 2, like.shape, generator=generator).to(like)

    return pytree.tree_map(draw, example)
