"""What can be tried of devices where there is none: who is asked what, and in which order."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrp import accelerators
from dtrp.partitioner import calibration, compiler, measured
from dtrp.partitioner.devices import device_spec
from dtrp.runtime import group_links, mesh, peers, predictors, world
from dtrp.runtime.group_links import GroupLinks
from dtrp.runtime.links import Channel, Message
from dtrp.runtime.ranks import Ranks
from dtrp.runtime.updates import Updates

from .toys import batches, compiled, mlp, same, trainer

CUDA = torch.device("cuda")


class Work:
    def wait(self) -> None: ...

    def is_completed(self) -> bool:
        return True


class Group:
    """Notes what it is asked for; nothing ever comes."""

    def __init__(self, name: str, said: list[tuple[str, str, int]]) -> None:
        self.name, self.said = name, said

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        self.said.append((self.name, "send", peer))
        return Work()

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        self.said.append((self.name, "recv", peer))
        return Work()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, list[tuple[str, str, int]]]]:
    """The middle one of three stages, of which only neighbours send tensors."""

    def make(*, on_device: bool) -> tuple[Any, list[tuple[str, str, int]]]:
        said: list[tuple[str, str, int]] = []

        def beside(device: torch.device) -> Any:
            said.append(("", "stream", 0))
            return nullcontext()

        monkeypatch.setattr(group_links.accelerators, "beside", beside)
        names = ("down", "up", "device down", "device up")
        down, up, *payload = (Group(name, said) for name in names)
        everybody = [(i, j) for i in range(3) for j in range(3) if i != j]
        links: Any = GroupLinks(
            1,
            everybody,
            down,  # type: ignore[arg-type]
            up,  # type: ignore[arg-type]
            payload=tuple(payload) if on_device else None,  # type: ignore[arg-type]
            carrying={(0, 1), (1, 2), (2, 1)},
        )
        return links, said

    return make


def test_only_stages_that_send_tensors_connect_their_devices(ends: Any) -> None:
    """In one order on all of them. A connection takes memory of the device, and one of 32 streams: two in one
    could wait for each other."""
    _, said = ends(on_device=True)
    assert [s for s in said if s[0].startswith("device")] == [
        ("device down", "recv", 0),
        ("device down", "send", 2),
        ("device up", "recv", 2),
    ]
    assert said.count(("", "stream", 0)) == 1


@pytest.mark.parametrize("on_device", [True, False])
def test_a_note_announces_what_is_on_its_way(ends: Any, on_device: bool) -> None:
    """A host that is held up between the two (CUDA may wait for all that runs on the device) would hold up
    whoever has read the note, and perhaps wait for that one. On the host the note goes first: it is short."""
    links, said = ends(on_device=on_device)
    said.clear()
    links.send(Channel("forward", 1, 2), Message(0, [torch.ones(1000)]))
    way = [("device down", "send", 2), ("down", "send", 2)] if on_device else [("down", "send", 2)] * 2
    assert said == way


def test_who_waits_for_others_is_woken_before_devices_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort may hang, and ends receives without an error, in the middle of their data."""
    said: list[str] = []

    class Waiting:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 0

        def recv(self, *_: Any) -> Any:
            said.append("host")
            return SimpleNamespace(wait=lambda limit: None)

    ranks = object.__new__(mesh.Mesh)
    ranks.on_devices = (SimpleNamespace(abort=lambda: said.append("device")),)  # type: ignore[assignment]
    monkeypatch.setattr(ranks, "_groups", lambda: iter([Waiting()]))
    ranks.poison()
    assert said == ["host", "device"]


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", True),
        ("NCCL communicator was aborted on rank 0.", True),
        ("ncclInvalidUsage: This usually reflects invalid usage of NCCL library.", False),
        ("CUDA out of memory.", False),
    ],
)
def test_a_lost_rank_is_told_from_what_is_wrong_here(text: str, others: bool) -> None:
    """Else a rank that loses another one in a sum over replicas says that it failed itself."""
    assert peers._is_of_links(RuntimeError(text)) is others


def test_large_gradients_of_float16_are_finite() -> None:
    """Their norm is more than float16 holds. If this fails, good batches are given up, and the loss's scale
    goes down without need."""
    updates = object.__new__(Updates)
    updates.weights = SimpleNamespace(trainable={})  # type: ignore[assignment]
    gradient = torch.full((10**6,), 100.0, dtype=torch.float16)
    assert updates.finite([gradient, None])
    gradient[7] = float("inf")
    assert not updates.finite([torch.ones(3), gradient])


def test_a_device_without_a_number_is_the_one_in_use() -> None:
    """``devices=["cuda"] * 2``: torch wants a number here."""
    accelerators.use(torch.device("cuda"))


def test_memory_of_measuring_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages' processes want it, on the same device."""
    said: list[str] = []
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: said.append("empty"))
    spec = calibration.calibrate(torch.device("cpu"))
    monkeypatch.setattr(calibration, "read_cache", lambda kind, key: None)
    monkeypatch.setattr(calibration, "write_cache", lambda kind, key, value: None)
    monkeypatch.setattr(accelerators, "memory", lambda device: 0)
    monkeypatch.setattr(calibration, "_measure", lambda *_: said.append("measured") or spec)
    calibration._calibrated.__wrapped__(torch.device("cpu"), 1, "")
    calibration._calibrated.__wrapped__(CUDA, 0, "")
    assert said == ["measured", "measured", "empty"]

    said.clear()
    clock = SimpleNamespace(run=lambda budget: {"sweep": 0.0})
    captured = SimpleNamespace(model=nn.Identity())
    monkeypatch.setattr(measured, "_place", lambda spec: CUDA)
    for name, answer in (("_Clock", clock), ("fingerprint", ""), ("identity", ""), ("read_cache", None)):
        monkeypatch.setattr(measured, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(measured, "write_cache", lambda *_: None)
    measured.measure_nodes(captured, measured.nx.DiGraph(), spec)  # type: ignore[arg-type]
    assert said == ["empty"]


@pytest.mark.parametrize("many", [2, 20])
def test_numbers_on_a_device_are_read_at_once(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a fused Adam, which are there: predicting would wait for the device once per parameter."""
    monkeypatch.setattr(accelerators, "is_one", lambda device: True)
    looks: list[int] = []
    single = Tensor.__float__
    monkeypatch.setattr(Tensor, "__float__", lambda t: (looks.append(1), single(t))[1])
    weights = [torch.ones(3) for _ in range(many)]
    states = [
        {"step": torch.tensor(2.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)} for _ in weights
    ]
    targets = [torch.zeros(3) for _ in weights]
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    predictors.Adam().write(targets, weights, group, states, 1.0)
    assert not looks
    expected = 1.0 - 0.1 * (1 / (1 - 0.9**2)) / ((1 / (1 - 0.99**2)) ** 0.5 + 1e-8)
    torch.testing.assert_close(torch.stack(targets), torch.full((many, 3), expected))


def test_devices_predict_with_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that fit a core's cache would be thousands of calls there, each with its look at the steps."""
    weights = [torch.empty(predictors.CACHED, device="meta") for _ in range(4)]
    assert len(list(predictors._cached(range(4), weights))) == 4
    monkeypatch.setattr(accelerators, "is_one", lambda device: True)
    assert list(predictors._cached(range(4), weights)) == [[0, 1, 2, 3]]


def test_parts_of_one_device_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL looks at the slot that a device is in, and refuses two ranks there: they talk through the host."""
    known: dict[int, Any] = {
        0: SimpleNamespace(uuid="MIG-1", pci_domain_id=0, pci_bus_id=65, pci_device_id=0),
        1: SimpleNamespace(uuid="MIG-2", pci_domain_id=0, pci_bus_id=65, pci_device_id=0),
        2: SimpleNamespace(uuid="GPU-3", pci_domain_id=0, pci_bus_id=66, pci_device_id=0),
        3: SimpleNamespace(uuid="other"),
        4: SimpleNamespace(),
    }
    module = SimpleNamespace(get_device_properties=lambda device: known[device.index])
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    a, b, c, d, e = (accelerators.identity(torch.device("cuda", i)) for i in known)
    assert a == b != c
    assert (d, e) == ("other", "cuda:4")


def test_modules_that_cannot_say_whether_they_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.mps: capturing a model asks for all generators."""
    state = torch.arange(3)
    module = SimpleNamespace(is_available=lambda: True, get_rng_state=lambda device: state)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(accelerators, "here", lambda: [torch.device("mps", 0)])
    assert accelerators.random_states() == [state]


def test_the_norm_of_gradients_is_there_when_it_is_asked_for() -> None:
    """Nobody waits for a device to see it in every batch; `Trainer.grad_norm` was 0 there."""
    found = []
    for on_host in (True, False):
        with trainer(compiled(mlp())) as t:
            t.step(*batches(1)[0])
            t.flush()
            for stage in t._run.executor.stages:
                stage.updates.on_host = on_host
            for x, y in batches(3):
                t.step(x, y)
            t.flush()
            found.append(t.grad_norm)
    assert found[0] == found[1] > 0


def test_ranks_ask_their_own_device_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all ranks of a host that measure anything, or place a tensor, take memory of its first device."""
    said: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(accelerators, "here", lambda: [torch.device("cuda", i) for i in range(2)])
    monkeypatch.setattr(accelerators, "use", said.append)
    ranks = object.__new__(world.Together)
    monkeypatch.setattr(ranks, "first", lambda what, plan: plan())
    compiled: Any = SimpleNamespace(
        request=SimpleNamespace(devices=(CUDA, CUDA)),
        prepare=lambda *_: said.append("planning"),
        planned=lambda: "",
        adopt=lambda text: None,
    )
    ranks.prepare(compiled, (), {})
    assert said == [torch.device("cuda", 1), "planning", "planning"]


def unforked(output: Tensor, target: Tensor) -> Tensor:
    """Fails where CUDA could not be begun."""
    assert not torch.cuda._is_in_bad_fork()
    return nn.functional.cross_entropy(output, target)


def test_workers_can_begin_to_use_devices() -> None:
    """They are forked off a process that has never asked for any: after that CUDA refuses."""
    with trainer(compiled(), "workers", unforked) as t:
        t.step(*batches(1)[0])


class Mapped(accelerators.Lent):
    """Stands for a device's memory: of the host, known to others by a file's name."""

    @classmethod
    def make(cls, device: torch.device, size: int) -> Mapped:
        with tempfile.NamedTemporaryFile(prefix="lent-", dir=os.environ["LENT"], delete=False) as file:
            file.truncate(size)
        lent = cls(*_opened(file.name, size))
        lent.filled.file = file.name
        return lent

    def handle(self) -> bytes:
        return pickle.dumps(_Opened(self.filled.file, self.memory.numel()))


class _Opened:
    def __init__(self, *file: Any) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return _opened, self.file


def _mapped(file: str, size: int) -> Tensor:
    return torch.from_file(file, shared=True, size=size, dtype=torch.uint8)


def _opened(file: str, size: int) -> tuple[Any, ...]:
    return _mapped(file, size), SimpleNamespace(wait=int, record=int), SimpleNamespace(wait=int, record=int)


class Lending:
    """A loss that brings the stand-in to workers."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def __reduce__(self) -> Any:
        return _lending, ()


def _lending() -> Lending:
    accelerators.Lent = Mapped  # type: ignore[misc]
    return Lending()


def test_stages_on_one_device_share_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing travels through the host's, of a skip and of gradients neither, and all bits are the same."""
    monkeypatch.setenv("LENT", str(tmp_path))
    found = []
    for executor in ("inline", "workers"):
        monkeypatch.setattr(accelerators, "lends", lambda device: True)
        model = mlp()
        with trainer(compiled(model, 3), executor, Lending()) as t:
            for x, y in batches(12):
                t.step(x, y)
        found.append((model.state_dict(), t.losses))
        assert bool(list(tmp_path.iterdir())) == (executor == "workers")
    assert found[0][1] == found[1][1]
    assert same(found[0][0], found[1][0])


@pytest.mark.parametrize("told", ["", "expandable_segments:True", "backend:cudaMallocAsync"])
def test_memory_of_other_allocators_is_not_shared(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They refuse it, at the first message; the host's memory works."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", f"garbage_collection_threshold:0.8, {told}")
    assert accelerators.lends(CUDA) == (not told)
    assert not accelerators.lends(torch.device("cpu"))


@pytest.mark.parametrize("n_stages", [1, 2])
def test_a_model_stays_where_it_is(n_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages on devices train copies, whose values the model has when nothing is in flight, and hear of what
    the script writes. If this fails, parameters are left on the devices and buffers are not: the model can no
    longer be called."""
    data, found = batches(6), []
    for there in (True, False):
        monkeypatch.setattr(accelerators, "has", lambda device, tensor, there=there: there)
        model = mlp(dropout=0.0)
        with trainer(compiled(model, n_stages), "inline") as t:
            own = {id(p) for p in model.parameters()}
            for k, (x, y) in enumerate(data):
                t.step(x, y)
                if k == 2:
                    t.flush()
                    with torch.no_grad():
                        model.get_parameter(next(n for n, _ in model.named_parameters())).mul_(0.5)
            shared = [id(p) in own for s in t._run.executor.stages for p in s.module.parameters()]
            assert all(shared) if there else not any(shared)
        found.append(({n: v.clone() for n, v in model.state_dict().items()}, t.losses))
    assert found[0][1] == found[1][1]
    assert same(found[0][0], found[1][0])


def test_a_model_that_was_made_real_stage_by_stage_hears_of_its_own() -> None:
    """On a device its buffers are not the stage's: a saved run would have those of the start."""
    ranks: Any = object.__new__(Ranks)
    ranks.partial = True
    ranks.stage = SimpleNamespace(answers=SimpleNamespace(state=lambda: {"tensors": {"running_mean": 1}}))
    assert list(ranks.states()) == [{"tensors": {"running_mean": 1}}]


def test_stages_on_one_device_have_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each is planned with all of its memory, and the report promises the speed of several."""
    monkeypatch.setattr(compiler, "device_spec", lambda *_, **__: device_spec("A100-80GB"))
    whole = device_spec("A100-80GB").memory_bytes
    places = [torch.device("cuda", i) for i in (0, 0, 0, 0, 1, 1, 1, 1)]
    shared = compiler.device_specs(places)
    assert {spec.memory_bytes for spec in shared} == {whole / 4}
    assert shared[0].shared(8) == 2
    for places in (
        [torch.device("cuda", i) for i in range(2)],
        [CUDA] * 2,
    ):  # of ranks, CUDA is each one's own
        assert {spec.memory_bytes for spec in compiler.device_specs(places)} == {whole}
        assert compiler.device_specs(places)[0].shared(2) == 0
