"""Any ``nn.Module`` to one fx graph per mode; the ways to get it are tried in order."""

from .facade import capture
from .graph import Captured, KeptWhole, ModeGraph, Signature
from .in_parts import divisible

__all__ = ["Captured", "KeptWhole", "ModeGraph", "Signature", "capture", "divisible"]
