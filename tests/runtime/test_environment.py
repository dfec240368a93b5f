"""Workers are set up as the script is: switches, operators, modules, streams; threads; waits that end."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from dtrp.runtime.forms import blanks, put_together, take_apart
from dtrp.runtime.transfer import dumps, importable, loads
from dtrp.runtime.vitals import Page, Sign, Watch

from .test_faults import nothing_left as nothing_left
from .toys import batches, compiled, mlp, same, trainer

HEAD = """
import json, os, sys, logging, warnings, importlib.util
from functools import partial
import torch, torch.nn.functional as F
from torch import nn
import dtrp
SGD = partial(torch.optim.SGD, lr=0.1)
torch.manual_seed(0)
x, y = torch.randn(8, 8), torch.randint(0, 4, (8,))
def train(model, executor, loss=F.cross_entropy, n=2, y=y, steps=3):
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    pipe = dtrp.compile(model, n_gpus=n, example_inputs=x)
    with pipe.trainer(loss, SGD, executor=executor, seed=0) as t:
        for _ in range(steps):
            t.step(x, y)
    return t.losses
def equal(make, **knobs):
    inline, workers = (train(make(), ex, **knobs) for ex in ("inline", "workers"))
    print("EQUAL" if inline == workers else f"DIFFERENT {inline} {workers}", flush=True)
"""


def script(tmp_path: Path, code: str, redirect: str = "", *, head: str = HEAD) -> str:
    """What a script prints that ends well."""
    path = tmp_path / "script.py"
    path.write_text(head + textwrap.dedent(code))
    command = f'exec "{sys.executable}" "{path}" {redirect}'
    environment = {**os.environ, "PYTHONPATH": str(Path(dtrp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- switches ----------------------------------------------------------------------------------------------


def test_switches_of_the_script_hold_in_the_workers(tmp_path: Path) -> None:
    said = script(
        tmp_path,
        """
        import numpy as np
        def state():
            tiny = torch.tensor(1e-310, dtype=torch.float64)
            return [
                str(torch.get_default_dtype()), str(torch.get_default_device()),
                torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory,
                (tiny * 0.5).item() == 0.0, torch.is_autocast_cache_enabled(),
                torch.backends.mkldnn.enabled, torch.backends.mkldnn.matmul.fp32_precision,
                torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision,
                torch.backends.cuda.matmul.fp32_precision, torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.opt_einsum.enabled, torch.distributions.Distribution._validate_args,
                sys.getrecursionlimit(), np.geterr(), np.get_printoptions()["precision"],
                str(torch.tensor(1 / 3)),
                [str(f) for f in warnings.filters], logging.getLogger().level, logging.getLogger("a.b").level,
                logging.getLogger("off").disabled, logging.root.manager.disable, os.getcwd(),
                os.environ.get("MINE"), sys.flags.optimize,
            ]
        def loss(o, t):
            print("STATE", json.dumps(state()))
            return F.cross_entropy(o, t)
        def check():
            train(nn.Sequential(nn.Linear(8, 4)), "workers", loss, n=1, steps=1)
            print("HERE", json.dumps(state()))
        check()
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.set_flush_denormal(True)
        torch.backends.mkldnn.enabled = False
        x = x.double()
        check()
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.enable_flash_sdp(False)
        torch.distributions.Distribution.set_default_validate_args(False)
        sys.setrecursionlimit(4321)
        check()
        torch.set_default_dtype(torch.float32)
        x = x.float()
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        torch.set_autocast_cache_enabled(False)
        np.seterr(divide="raise", under="ignore")
        np.set_printoptions(precision=3)
        torch.set_printoptions(precision=2)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("error", message="mine", module="a.*")
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("a.b").setLevel(logging.DEBUG)
        logging.getLogger("off").disabled = True
        logging.disable(5)
        os.environ["MINE"] = "1"
        os.chdir("/")
        check()
        """,
    )
    here = [line.split("HERE ")[1] for line in said.splitlines() if "HERE" in line]
    there = [line.split("[stage 0] STATE ")[1] for line in said.splitlines() if "[stage 0] STATE" in line]
    assert len(here) == 4
    for ours, theirs in zip(map(json.loads, here), map(json.loads, there), strict=True):
        assert ours == theirs


def test_default_device_does_not_reach_what_the_runtime_makes() -> None:
    values = [torch.arange(6.0).view(2, 3), torch.empty(0, 2), torch.randn(2, 3, 4).permute(2, 0, 1), 3]
    with torch.device("meta"):
        parcel = take_apart(values)
        tensors, rows = blanks(parcel.form)
        for row, source in zip(rows, parcel.payload, strict=True):
            row.copy_(source)
        again = put_together(parcel.form, parcel.rest, tensors)
        back = loads(dumps(values))
    for a, b, c in zip(values, again, back, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(c))


# ---- operators, nodes, functions ---------------------------------------------------------------------------

NET = """
class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 16), nn.Linear(16, 4), act
    def forward(self, x):
        return self.b(torch.relu(self.act(self.a(x))))
"""


def test_operators_and_nodes_registered_in_the_script(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "torch.library.define('theirs::half', '(Tensor x) -> Tensor')\n"
        "torch.library.impl('theirs::half', 'CompositeImplicitAutograd', lambda x: x / 2)\n"
        "LIB = torch.library.Library('more', 'DEF')\n"
        "LIB.define('thrice(Tensor x) -> Tensor')\n"
        "LIB.impl('thrice', lambda x: x * 3, 'CompositeImplicitAutograd')\n"
        "@torch.library.custom_op('theirs::same', mutates_args=())\n"
        "def same(x: torch.Tensor) -> torch.Tensor:\n    return x.clone()\n"
        "same.register_fake(torch.empty_like)\n"
        "same.register_autograd(lambda ctx, g: g)\n"
    )
    said = script(
        tmp_path,
        NET
        + """
from torch import Tensor
import theirs

@torch.library.custom_op("mine::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2
twice.register_fake(lambda x: torch.empty_like(x))
twice.register_autograd(lambda ctx, g: g * 2)

@torch.library.custom_op("mine::scale", mutates_args=(), device_types="cpu")
def scale(x: Tensor, by: float = 3.0) -> Tensor:
    return twice(x) * by
@scale.register_fake
def _(x, by=3.0):
    return torch.empty_like(x)
def setup(ctx, inputs, output):
    ctx.by = inputs[1]
scale.register_autograd(lambda ctx, g: (g * 2 * ctx.by, None), setup_context=setup)

def add_(x: Tensor) -> Tensor:
    x.add_(1)
    return x
if hasattr(torch.Tag, "inplace"):  # torch 2.11 has no such operators
    add_ = torch.library.custom_op("mine::add_", mutates_args={"x"}, tags=(torch.Tag.inplace,))(add_)

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x
    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

def loss(o, t):
    with torch.no_grad():
        assert torch.equal(add_(o.detach().clone()), o + 1)
    return F.cross_entropy(twice(o), t)

for act in (twice, torch.ops.mine.twice, torch.ops.mine.scale.default, Square.apply, lambda h: scale(h, 2.0),
            torch.ops.theirs.half, torch.ops.more.thrice.default, torch.ops.theirs.same):
    equal(lambda: Net(act), loss=loss)
from dataclasses import dataclass
from torch.utils import _pytree as pytree

class Pair:
    def __init__(self, a, b):
        self.a, self.b = a, b
pytree.register_pytree_node(Pair, lambda p: ([p.a, p.b], None), lambda v, c: Pair(*v))

@dataclass
class Labels:
    y: torch.Tensor
    weight: torch.Tensor
pytree.register_dataclass(Labels)

def loss_of_nodes(o, t):
    return F.cross_entropy(o, t.a if isinstance(t, Pair) else t.y)
equal(lambda: Net(nn.Tanh()), loss=loss_of_nodes, y=Pair(y, [torch.ones(8)]))
equal(lambda: Net(nn.Tanh()), loss=loss_of_nodes, y=Labels(y, torch.ones(8)))
""",
    )
    assert said.count("EQUAL") == 10, said


@pytest.mark.parametrize("way", ["package", pytest.param("file", marks=pytest.mark.slow)])
def test_operators_in_compiled_code(tmp_path: Path, way: str) -> None:
    """A stage's code names them by `torch.ops` alone, and nothing in it brings their library along."""
    find = importlib.util.find_spec("torchvision")
    if find is None:
        pytest.skip("no torchvision")
    (library,) = Path(find.submodule_search_locations[0]).glob("_C*.so")
    said = script(
        tmp_path,
        f"""
        if {way == "package"}:
            import torchvision
        else:
            torch.ops.load_library({str(library)!r})

        class Pick(nn.Module):
            def forward(self, x):
                boxes = torch.tensor([[0.0, i / 9, 0.0, 4.0, 4.0] for i in range(8)])
                return torch.ops.torchvision.roi_align(x, boxes, 1.0, 3, 3, 2, False)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.pick, self.b = nn.Linear(8, 16), Pick(), nn.Linear(9, 4)
            def forward(self, x):
                x = self.pick(self.a(x).view(1, 8, 4, 4))
                return self.b(x.mean(1).flatten(1))
        equal(Net)
        """,
    )
    assert "EQUAL" in said, said


LOW = {
    "library": """
        lib = torch.library.Library("low", "DEF")
        lib.define("twice(Tensor x) -> Tensor")
        lib.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
        """,
    "define": """
        torch.library.define("low::twice", "(Tensor x) -> Tensor")
        torch.library.impl("low::twice", "CompositeImplicitAutograd", lambda x: x * 2)
        """,
    "lock": """
        import threading
        lock = threading.Lock()
        @torch.library.custom_op("low::twice", mutates_args=())
        def twice(x: torch.Tensor) -> torch.Tensor:
            with lock:
                return x * 2
        twice.register_fake(torch.empty_like)
        twice.register_autograd(lambda ctx, g: g * 2)
        """,
}


@pytest.mark.parametrize("kind", [k if k == "lock" else pytest.param(k, marks=pytest.mark.slow) for k in LOW])
def test_what_cannot_travel_is_refused(tmp_path: Path, kind: str) -> None:
    use = """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
            def forward(self, x):
                return self.b(torch.ops.low.twice(self.a(x)))
        train(Net(), "inline")
        try:
            train(Net(), "workers")
        except TypeError as e:
            print("REFUSED", e)
        if sys.argv[1] != "lock":
            train(nn.Sequential(nn.Linear(8, 4)), "workers", n=1)  # does not use it
        print("END")
        """
    said = script(tmp_path, textwrap.dedent(LOW[kind]) + textwrap.dedent(use), kind)
    assert "REFUSED" in said and "END" in said  # noqa: PT018
    assert "low::twice" in said
    assert "a module of its own that the script imports, or use executor='inline'" in said


# ---- modules -----------------------------------------------------------------------------------------------

PLUGIN = """
import math
from torch import nn
import torch.nn.functional as F
SCALE = math.pi
def helper(h): return h * SCALE
class Act(nn.Module):
    def forward(self, h): return helper(super().__repr__() and h)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 16), Act(), nn.Linear(16, 4)
    def forward(self, x): return self.b(self.act(self.a(x)))
def loss(o, t): return F.cross_entropy(helper(o), t)
"""


def test_modules_that_workers_cannot_import(tmp_path: Path) -> None:
    for folder in ("plugins", "first", "package", "rel"):
        (tmp_path / folder).mkdir()
    (tmp_path / "plugins" / "plugged.py").write_text(PLUGIN)
    (tmp_path / "first" / "colorsys.py").write_text("")
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "rel" / "relative.py").write_text(PLUGIN)
    (tmp_path / "named.py").write_text(PLUGIN)
    said = script(
        tmp_path,
        """
        import pathlib, types
        def loaded(name, path):
            spec = importlib.util.spec_from_file_location(name, path)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        def executed(name):
            module = sys.modules[name] = types.ModuleType(name)
            exec(pathlib.Path("named.py").read_text(), module.__dict__)
            return module
        def local():
            scope = types.SimpleNamespace()
            class Net(named.Net):
                def forward(self, x): return super().forward(x) * 2
            scope.Net, scope.loss = Net, lambda o, t: named.loss(o, t)
            return scope
        sys.path += [pathlib.Path("plugins"), "", "rel"]  # Python ignores the Path
        import named, package, relative
        os.chdir("plugins")  # now "rel" is nowhere
        for m in (named, relative, loaded("plugged2", "plugged.py"), loaded("package.sub", "plugged.py"),
                  (os.chdir(".."), executed("executed"))[1], local()):
            equal(m.Net, loss=m.loss)
        import cloudpickle
        print("LEFT", cloudpickle.list_registry_pickle_by_value())
        """,
    )
    assert said.count("EQUAL") == 6, said
    assert "LEFT set()" in said


def test_hooks_of_an_installed_package_find_its_globals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that transformers leaves on a model which was asked for hidden states: made by a function,
    they were sent with copies of what they name, among it what cannot be sent (a context variable)."""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "collecting.py").write_text(
        textwrap.dedent(
            """
            from contextvars import ContextVar
            COLLECTOR = ContextVar("collector", default=None)
            def hook_for(scale):
                def hook(module, args, output):
                    return output if COLLECTOR.get() is None else output * scale
                return hook
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    import collecting  # type: ignore[import-not-found]

    hook = collecting.hook_for(3)
    back = loads(dumps(hook))
    assert back is not hook
    assert back(None, (), 2) == 2
    token = collecting.COLLECTOR.set(1)
    assert back(None, (), 2) == 6, "what others see through the package's global it sees, too"
    collecting.COLLECTOR.reset(token)
    model = mlp(3)
    model[0].register_forward_hook(hook)
    with trainer(compiled(model, 2), "workers") as t:
        t.fit(batches(3), 1)
    assert len(t.losses) == 3


def test_importable() -> None:
    assert all(
        importable(name) for name in ("os", "os.path", "torch", "torch.nn.functional", "dtrp", __name__)
    )
    assert importable("torch.ops")
    assert importable("importlib.util")
    assert not importable(None)
    assert not importable("__main__")
    assert not importable("never_heard_of")
    fake = types.ModuleType("fake_of_this_test")
    sys.modules["fake_of_this_test"] = fake
    try:
        assert not importable("fake_of_this_test")
    finally:
        del sys.modules["fake_of_this_test"]


# ---- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "redirect",
    [
        pytest.param("<&-", id="stdin", marks=pytest.mark.slow),
        pytest.param("2>&-", id="stderr", marks=pytest.mark.slow),
        pytest.param("<&- 2>&- >&-", id="all"),
    ],
)
def test_closed_descriptors(tmp_path: Path, redirect: str) -> None:
    script(
        tmp_path,
        """
        def links():
            return [os.readlink(f"/proc/self/fd/{k}") for k in range(3)]
        def chatty(o, t):
            for k in (1, 2):
                os.write(k, b"what a library prints " * 50)
            print("printed")
            print("printed", file=sys.stderr)
            for link in links():
                assert link == "/dev/null" or "pipe" in link, link
            return F.cross_entropy(o, t)
        def plain(o, t): return F.cross_entropy(o, t)
        make = lambda: nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 4))
        a, b = train(make(), "inline", plain, steps=6), train(make(), "workers", chatty, steps=6)
        assert a == b
        assert all(link == "/dev/null" or "pipe" in link for link in links())
        open("done", "w").write("equal")
        """,
        redirect,
    )
    assert (tmp_path / "done").read_text() == "equal"


def loud(output: Tensor, target: Tensor) -> Tensor:
    print("to stdout, twice\nas two lines")
    print("to stderr", file=sys.stderr)
    if sys.stdout is not None:  # as at a caller who has closed it, and tries the loss
        sys.stdout.buffer.write(b"bytes\n")
    logging.getLogger("mine").error("logged %d", 1)
    warnings.warn("warned of it", UserWarning, stacklevel=1)
    print("unfinished", end="")
    return F.cross_entropy(output, target)


def broken(output: Tensor, target: Tensor) -> Tensor:
    print("before it broke", end="", flush=True)
    raise ArithmeticError("broken")


class SpeaksWhenRead:
    """`loud`, and something that is printed while the worker starts."""

    def __init__(self) -> None:
        self.name = "loud"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return loud(output, target)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        print("read")


def test_what_workers_say_arrives_in_order(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with trainer(compiled(), "workers", SpeaksWhenRead()) as t:
            t.step(*batches(1)[0])
    out, err = capsys.readouterr()
    last = [line for line in re.findall(r"\[stage 1\] (.*)", out) if line != "read"]
    assert last == ["to stdout, twice", "as two lines", "bytes", "unfinished"]
    assert "] read\n" in out
    assert "[stage 1] to stderr\n" in err
    assert "UserWarning: warned of it" in err
    record = next(r for r in caplog.records if r.name == "mine" and "stage" in r.getMessage())
    assert record.getMessage() == "[stage 1] logged 1"
    assert record.levelno == logging.ERROR
    assert record.funcName == "loud"
    assert record.pathname == __file__


def test_what_was_printed_before_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(dtrp.WorkerError, match="broken"):
        run_all(trainer(compiled(), "workers", broken), batches(1))
    assert "[stage 1] before it broke\n" in capsys.readouterr().out


def test_no_streams_at_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with trainer(compiled(), "workers", loud) as t:
            t.step(*batches(1)[0])
    assert len(t.losses) == 1


# ---- threads -----------------------------------------------------------------------------------------------


def trained(executor: str, seed: int, model: nn.Module) -> dict[str, Tensor]:
    with trainer(compiled(model), executor, seed=seed) as t:
        for x, y in batches(12):
            t.step(x, y)
    return dict(model.state_dict())


@pytest.mark.parametrize(
    "executors", [("inline", "inline"), ("workers", "workers"), ("inline", "workers")], ids="-".join
)
def test_trainers_in_threads(executors: tuple[str, str], nothing_left: None) -> None:
    alone = [trained("inline", k, mlp(3, dropout=0.5, seed=k)) for k in range(2)]
    models = [mlp(3, dropout=0.5, seed=k) for k in range(2)]  # drawn from the process's one generator
    got: list[Any] = [None, None]

    def work(k: int) -> None:
        try:
            got[k] = trained(executors[k], k, models[k])
        except BaseException as e:
            got[k] = e

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for state, expected in zip(got, alone, strict=True):
        assert isinstance(state, dict), state
        assert same(state, expected)


@pytest.mark.slow
def test_in_the_processes_of_a_pool(tmp_path: Path) -> None:
    said = script(
        tmp_path,
        """
        import multiprocessing
        def work(k):
            return train(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), "workers")
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                print("SAME", len({tuple(losses) for losses in pool.map(work, range(2))}))
        """,
    )
    assert "SAME 1" in said


# ---- waits that end ----------------------------------------------------------------------------------------


def watched(signs: list[list[Sign]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str] | None]:
    """What a watch with a limit of 10 s says to signs that come second by second."""
    descriptor = os.memfd_create("test")
    page = Page(descriptor, len(signs[0]))
    os.close(descriptor)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch, said = Watch(page.read, [f"stage {k}" for k in range(len(signs[0]))], 10.0), []
    for row in signs:
        now[0] += 1.0
        for k, sign in enumerate(row):
            page.write(k, sign)
        said.append(watch.look())
    return said


def test_who_computes_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    long = [
        [Sign(i, 3, 0.0, True, "waiting for stage 1 (gradient)"), Sign(i, 5, 0.5 * i, False, "forward")]
        for i in range(60)
    ]
    assert not any(watched(long, monkeypatch))
    nothing_to_do = [[Sign(i, 3, 0.0, False, "idle")] * 2 for i in range(60)]
    assert not any(watched(nothing_to_do, monkeypatch))
    slow = [
        [Sign(i, i // 8, 0.0, False, "forward"), Sign(i, 0, 0.0, True, "waiting for stage 0 (value)")]
        for i in range(60)
    ]
    assert not any(watched(slow, monkeypatch))


def test_who_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [
        [Sign(i, 3, 0.0, True, "waiting for stage 1 (gradient)"), Sign(i, 5, 9.0, False, "idle")]
        for i in range(60)
    ]
    said = next(filter(None, watched(waits, monkeypatch)))
    assert said[0] == 0
    assert "have waited for each other for 11 s (watchdog=10 s): stage 0: waiting for" in said[1]
    locked = [
        [Sign(i, 3, 0.0, True, "waiting for stage 1 (gradient)"), Sign(i, 5, 9.0, False, "forward")]
        for i in range(120)
    ]
    assert not any(watched(locked[:100], monkeypatch))  # it may wait for a service, or a device
    said = next(filter(None, watched(locked, monkeypatch)))
    assert said[0] == 1
    assert "stage 1 has not computed for 101 s" in said[1]
    assert "a lock or a connection" in said[1]
    silent = [
        [Sign(i, i, 0.0, False, "forward"), Sign(min(i, 4), 5, 9.0, False, "forward")] for i in range(60)
    ]
    said = next(filter(None, watched(silent, monkeypatch)))
    assert said[0] == 1
    assert "has shown no sign of life" in said[1]


class Locked(nn.Module):
    """Waits for ever for a lock, in one batch in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and float(x.detach().abs().max()) > 1e3:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        return x


def locked(output: Tensor, target: Tensor) -> Tensor:
    if len(target) == 3:
        __import__("threading").Event().wait()
    return F.cross_entropy(output, target)


def busy(output: Tensor, target: Tensor) -> Tensor:
    until = time.monotonic() + 5.0
    while time.monotonic() < until and len(target) == 3:
        pass
    return F.cross_entropy(output, target)


def unsent(output: Tensor, target: Tensor) -> Tensor:
    """From the batch of three on, this process's messages to other stages do not leave it."""
    from dtrp.runtime.shared import SharedLinks

    if len(target) == 3:
        SharedLinks.send = lambda *args: None  # type: ignore[method-assign]
    return F.cross_entropy(output, target)


def run_all(t: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    with t:
        for x, y in data:
            t.step(x, y)
        t.flush()


def stalls(t: Any, match: str) -> float:
    """Seconds until it is told."""
    x, y = batches(1, size=3)[0]
    for small in batches(3):
        t.step(*small)
    t.flush()
    start = time.monotonic()
    with pytest.raises(dtrp.WorkerError, match=match):
        run_all(t, [(x * 1e6, y), *batches(20)])
    return time.monotonic() - start


def test_a_loss_that_waits_for_ever(nothing_left: None) -> None:
    took = stalls(trainer(compiled(mlp(3)), "workers", locked, watchdog=0.3), "stage 1 has not computed")
    assert took < 20


def test_a_module_that_waits_for_ever(nothing_left: None) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Locked(), nn.Linear(8, 8), nn.Linear(8, 3))
    took = stalls(trainer(compiled(model), "workers", watchdog=0.3), r"stage \d has not computed")
    assert took < 20


def test_stages_that_wait_for_each_other(nothing_left: None) -> None:
    took = stalls(trainer(compiled(mlp(3)), "workers", unsent, watchdog=2.0), "have waited for each other")
    assert took < 20


@pytest.mark.slow
def test_a_stage_that_computes_for_long_is_left_alone() -> None:
    with trainer(compiled(mlp(3)), "workers", busy, watchdog=1.5) as t:
        for x, y in [*batches(2), *batches(1, size=3), *batches(2)]:
            t.step(x, y)
    assert len(t.losses) == 5


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        (1, signal.SIGKILL),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_each_worker_killed_or_stopped(stage: int, number: signal.Signals, nothing_left: None) -> None:
    t = trainer(compiled(mlp(3), 3), "workers", watchdog=3.0)
    what = "killed by SIGKILL" if number == signal.SIGKILL else "shown no sign of life"
    for x, y in batches(4):
        t.step(x, y)
    t.flush()
    os.kill(t._run.executor.crew.processes[stage].pid, number)
    start = time.monotonic()
    with pytest.raises(dtrp.WorkerError, match=what) as caught:
        run_all(t, batches(400))
    assert time.monotonic() - start < 15
    assert caught.value.stage == stage
