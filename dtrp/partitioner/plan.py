"""The immutable result of planning: which node in which stage, and which stages recompute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Which stage every node of the captured train graph belongs to, and which stages recompute."""

    n_stages: int
    stage_of: Mapping[str, int]  # node name -> stage, 0-based; placeholders and output are not listed
    recompute: tuple[bool, ...]
    fingerprint: str = ""
