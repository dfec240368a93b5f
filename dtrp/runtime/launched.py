"""What a launcher (torchrun, or what sets the same variables) says of this process."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes that run this script together; 1 where no launcher started it."""
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return 1
    return int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """This process's number among them."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Its number among those of this host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Processes of this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
