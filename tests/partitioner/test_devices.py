"""Device figures: the roofline, known GPUs, calibration and its cache, sizes as text."""

import json
import pickle
import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrp.partitioner import calibration
from dtrp.partitioner.devices import _PUBLISHED, DeviceSpec, Kernels, device_spec, parse_bytes
from dtrp.partitioner.op_cost import op_cost


def test_roofline():
    spec = DeviceSpec("d", {"float32": 10.0, "bfloat16": 100.0}, 5.0, 0.25, 1.0, 2.0, link_latency=1.0)
    assert spec.op_time(100, 10, torch.float32) == 10.25  # bound by computing
    assert spec.op_time(100, 10, torch.bfloat16) == 2.25  # bound by memory
    assert spec.op_time(100, 0, torch.int8) == 10.25, "a dtype without a figure counts as float32"
    assert spec.transfer_time(10) == 6.0
    assert spec.transfer_time(0) == 0.0
    assert spec.with_link(10.0).transfer_time(10) == 2.0
    assert spec.with_link(None) is spec
    assert spec.exchange_time(10, returns=True) == 12.0, "the gradient comes back over the same link"
    assert spec.exchange_time(10, returns=False) == 6.0


def test_kernels_take_more_than_the_roofline():
    """A convolution over few channels, its set-up for each gradient, a norm that reads its input again."""
    spec = DeviceSpec("d", {"float32": 10.0}, 5.0, 0.25, 1.0, 2.0, kernels=Kernels(3.0, 2.0, 1.0, 16.0))
    assert spec.op_time(100, 10, "float32", kernel="convolution", width=16) == 2 * 10 + 1.25
    assert spec.op_time(100, 10, "float32", kernel="convolution", width=1, calls=2) == 17 * 10 + 2.25
    assert spec.op_time(0, 10, "float32", kernel="norm") == 3 * 2 + 0.25
    assert spec.op_time(0, 10, "float32", kernel="norm_backward") == 2 * 2 + 0.25
    assert spec.with_speed(2.0).kernels == Kernels(3.0, 2.0, 0.5, 16.0)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_operators_say_how_narrow_they_are(groups):
    convolution, norm = nn.Conv2d(8, 16, 3, groups=groups), nn.BatchNorm2d(16)
    graph = nn.Sequential(convolution, norm)
    x = torch.zeros(2, 8, 6, 6, requires_grad=True)
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append(op_cost(func, args, kwargs or {}, out))
            return out

    with Look():
        graph(x).sum().backward()
    found = {(cost.kernel, cost.width, cost.calls) for cost in seen if cost is not None and cost.kernel}
    width = min(8 // groups, 16 // groups)
    assert found == {
        ("convolution", width, 1),
        ("convolution", width, 2),
        ("norm", 0, 1),
        ("norm_backward", 0, 1),
    }


def test_spec_is_plain_data():
    spec = device_spec("A100-80GB")
    assert DeviceSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("name", _PUBLISHED)
def test_known_devices_are_found_however_they_are_written(name):
    spec = device_spec(name)
    assert device_spec(name.lower().replace("-", " ")) == spec
    assert spec.flops["float16"] > spec.flops["float32"] > spec.flops["float64"]
    assert 1e11 < spec.memory_bandwidth < 1e13


def test_unknown_device():
    with pytest.raises(ValueError, match=r"unknown device 'A1000'.*'cuda:<index>'.*A100-80GB"):
        device_spec("A1000")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_here():
    with pytest.raises(ValueError, match=r"'cuda:0' is not available here.*name its kind: one of .*H100-SXM"):
        device_spec("cuda:0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops": {"bfloat16": 1.0}}, "needs a float32 rate"),
        ({"flops": {"float32": 0.0}}, r"flops\['float32'\] must be positive; got 0.0"),
        ({"memory_bandwidth": -1.0}, "memory_bandwidth must be positive"),
        ({"link_bandwidth": float("nan")}, "link_bandwidth must be positive"),
    ],
)
def test_impossible_specs(changes, message):
    with pytest.raises(ValueError, match=message):
        DeviceSpec.from_dict(device_spec("T4").to_dict() | changes)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("16GB", 16 * 10**9),
        ("16 GiB", 16 * 2**30),
        ("1.5g", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("4096", 4096),
        (4096, 4096),
        (1e9, 10**9),
        ("80000MB", 80 * 10**9),
        ("100B", 100),
    ],
)
def test_parse_bytes(text, n):
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "GB", "16XB", "-3GB", "0", 0, -1, float("inf"), True, "1e3", "16 G B"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="bytes"):
        parse_bytes(text)


@pytest.fixture(autouse=True)
def _the_machine_itself(monkeypatch, calibrate):
    """Not the figures that the other tests plan with."""
    monkeypatch.setattr(calibration, "calibrate", calibrate)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration._calibrated.cache_clear()
    yield tmp_path / "dtrp"
    calibration._calibrated.cache_clear()


def test_calibration_is_measured_once_and_quickly(cache, monkeypatch):
    start = time.perf_counter()
    spec = device_spec("cpu")
    assert time.perf_counter() - start < 5
    assert spec.kind == "cpu"
    assert spec.flops["float32"] > 1e8
    assert 1e8 < spec.memory_bandwidth < 1e13
    assert 1e-8 < spec.launch_overhead < 1e-3
    assert spec.kernels.norm >= 1
    assert 1e-7 < spec.kernels.convolution < 1e-2
    monkeypatch.setattr(calibration, "_measure", lambda *args: pytest.fail("measured twice"))
    calibration._calibrated.cache_clear()
    assert device_spec("cpu") == spec
    assert device_spec("meta") == spec
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    monkeypatch.setattr(calibration, "_CPU_LINK", (7.0, 3.0))
    calibration._calibrated.cache_clear()
    linked = device_spec("cpu")
    assert (linked.link_bandwidth, linked.link_latency) == (7.0, 3.0), "not what was stored"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 99}', '{"format": 2, "key": "other", "value": {}}']
)
def test_a_broken_cache_is_ignored(cache, content):
    spec = device_spec("cpu")
    (file,) = cache.iterdir()
    file.write_text(content)
    calibration._calibrated.cache_clear()
    assert device_spec("cpu").name == spec.name
    assert json.loads(file.read_text())["value"]["name"] == spec.name


def test_a_cached_value_of_another_form_is_measured_again(cache):
    spec = device_spec("cpu")
    (file,) = cache.iterdir()
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"value": {"speed": 3}}))
    calibration._calibrated.cache_clear()
    assert device_spec("cpu").name == spec.name


def test_no_cache_directory_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    calibration._calibrated.cache_clear()
    assert device_spec("cpu").kind == "cpu"
    calibration._calibrated.cache_clear()
