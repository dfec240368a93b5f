"""Files of the format's version 1 (dtrp 0.1), which kept optimizers and schedulers stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .checkpoint import digest
from .training_state import SECTIONS, flat_options, flat_state


def upgraded(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A run as version 1 of the format (dtrp 0.1) had it, stage by stage, as it is written today.

    Raises
    ------
    CheckpointError
        Its schedulers cannot be put together without their stages.
    """
    sets = content["sets"]
    made: dict[str, Any] = {key: {} for key in SECTIONS}
    for one in sets:
        for group in one["groups"]:
            for name in group["names"]:
                made["optimizer"].update(flat_options(name, group["options"]))
                made["waiting"][name] = one["waiting"]
        for name, state in one["state"].items():
            made["optimizer"].update(flat_state(name, state))
        made["gradients"].update(one["gradients"])
        made["previous"].update(one["previous"])
    first = sets[0]
    if any(digest(one["scheduler"]) != digest(first["scheduler"]) for one in sets):
        raise CheckpointError(
            f"{origin} was written by dtrp 0.1 with a learning-rate scheduler that had other groups of "
            f"parameters in each stage, which this dtrp does not read. Go on from it with dtrp 0.1, or take "
            f"its weights alone: dtrp.load_weights(model, {origin!r})"
        )
    training = {
        "optimizer": first["optimizer"],
        "groups": len(first["groups"]),
        "scheduler": first["scheduler"],
    }
    kept = {k: v for k, v in content.items() if k != "sets"}
    return {"loss": None, "attributes": {}, **kept, **made, "training": training}
