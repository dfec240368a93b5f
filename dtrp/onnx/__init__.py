"""Running exported stages where they are deployed: onnxruntime and numpy, no torch.

>>> from dtrp.onnx import load_chain
>>> chain = load_chain("stages")            # doctest: +SKIP
>>> logits = chain(images)                  # numpy in, numpy out  # doctest: +SKIP
"""

from .chain import Chain, load_chain
from .manifest import Manifest, read_manifest
from .merge import merge_chain

__all__ = ["Chain", "Manifest", "load_chain", "merge_chain", "read_manifest"]
