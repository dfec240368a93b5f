"""The placement benchmark on small problems in its format, checked by an evaluator and brute force here."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "placement.py"


@pytest.fixture(scope="module")
def placement() -> ModuleType:
    spec = importlib.util.spec_from_file_location("placement", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(seed: int, *, training: bool) -> dict[str, Any]:
    """A random problem: a forward graph and, for training, its mirror image with an orphan."""
    rng = random.Random(seed)
    n = 4 if training else 7
    nodes = [_node(i, rng, backward=False, colour=i) for i in range(n)]
    edges = [(i, j) for i, j in itertools.combinations(range(n), 2) if rng.random() < 0.5]
    links = [{"sourceId": i, "destId": j, "cost": 0.0} for i, j in edges]
    if training:
        nodes += [_node(n + i, rng, backward=True, colour=i) for i in range(n)]
        nodes.append(_node(2 * n, rng, backward=True, colour=99))
        links += [{"sourceId": n + j, "destId": n + i, "cost": 0.0} for i, j in edges]
        links += [{"sourceId": n - 1, "destId": 2 * n, "cost": 0.0}]
        links += [{"sourceId": 2 * n, "destId": 2 * n - 1, "cost": 0.0}]
    cost = {node["id"]: rng.random() * 0.3 for node in nodes}
    for link in links:
        link["cost"] = cost[link["sourceId"]]
    size = sum(node["size"] for node in nodes)
    return {"maxFPGAs": 3, "maxSizePerFPGA": size * 0.5, "nodes": nodes, "edges": links}


def _node(i: int, rng: random.Random, *, backward: bool, colour: int) -> dict[str, Any]:
    return {
        "id": i,
        "fpgaLatency": rng.random(),
        "size": rng.random(),
        "isBackwardNode": int(backward),
        "colorClass": colour,
    }


def loads(data: dict[str, Any], stage: dict[int, int]) -> list[float]:
    """Load per device: its own work, and every crossing value once per side."""
    out = []
    for device in range(data["maxFPGAs"]):
        mine = {i for i in stage if stage[i] == device}
        sends = {e["sourceId"] for e in data["edges"] if e["sourceId"] in mine and e["destId"] not in mine}
        gets = {e["sourceId"] for e in data["edges"] if e["sourceId"] not in mine and e["destId"] in mine}
        price = {e["sourceId"]: e["cost"] for e in data["edges"]}
        work = sum(node["fpgaLatency"] for node in data["nodes"] if node["id"] in mine)
        out.append(work + sum(price[u] for u in sends) + sum(price[u] for u in gets))
    return out


def valid(data: dict[str, Any], stage: dict[int, int]) -> bool:
    """Memory, colour classes and contiguity of the forward part."""
    node = {x["id"]: x for x in data["nodes"]}
    for device in range(data["maxFPGAs"]):
        if sum(node[i]["size"] for i in stage if stage[i] == device) > data["maxSizePerFPGA"] * (1 + 1e-9):
            return False
    for a, b in itertools.combinations(node, 2):
        if node[a]["colorClass"] == node[b]["colorClass"] and stage[a] != stage[b]:
            return False
    return all(
        stage[e["sourceId"]] <= stage[e["destId"]]
        for e in data["edges"]
        if not node[e["sourceId"]]["isBackwardNode"] and not node[e["destId"]]["isBackwardNode"]
    )


def brute_force(data: dict[str, Any]) -> float:
    """The best load of all assignments."""
    colours = sorted({node["colorClass"] for node in data["nodes"]})
    best = float("inf")
    for choice in itertools.product(range(data["maxFPGAs"]), repeat=len(colours)):
        device = dict(zip(colours, choice, strict=True))
        stage = {node["id"]: device[node["colorClass"]] for node in data["nodes"]}
        if valid(data, stage):
            best = min(best, max(loads(data, stage)))
    return best


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_results_are_optimal_and_as_stated(
    placement: ModuleType, tmp_path: Path, seed: int, training: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    data = problem(seed, training=training)
    source = tmp_path / "small.json"
    source.write_text(json.dumps(data))
    assert placement.main([str(source), "--out", str(tmp_path / "out"), "--time-limit", "20"]) == 0
    result = json.loads((tmp_path / "out" / "small.json").read_text())
    stage = {int(i): s for i, s in result["stage"].items()}
    assert valid(data, stage)
    assert max(loads(data, stage)) == pytest.approx(result["max_load"])
    assert result["max_load"] == pytest.approx(brute_force(data))
    assert result["lower_bound"] == pytest.approx(result["max_load"])
    assert "small" in capsys.readouterr().out
