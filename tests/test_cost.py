"""What a recorded step costs, in everything but seconds: memory, operations, host reads."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import versions
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrprobe
from lrprobe.delivery import Delivery
from lrprobe.engine import Engine
from lrprobe.engine.eager import BLOCK
from lrprobe.engine.planned import Planned
from lrprobe.hooks import Hooks

MIB = 2**20


class Watch(TorchDispatchMode):
    """Counts operations, and the bytes of storages that are made and still alive."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.names: list[str] = []
        self.peak = 0
        self._known = {StorageWeakRef(t.untyped_storage()) for t in known}
        self._alive: dict[StorageWeakRef, int] = {}
        self._most = 0  # bytes of these, with some that are gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self._known:
                    self._most += storage.nbytes() - self._alive.get(reference, 0)
                    self._alive[reference] = storage.nbytes()
        if self._most > self.peak:
            self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
            self._most = sum(self._alive.values())
            self.peak = max(self.peak, self._most)
        return result


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All that is there without the probe."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for s in optimizer.state.values() for t in s.values()]
    grads = [p.grad for p in params if p.grad is not None]
    return [t for t in (*params, *grads, *states) if isinstance(t, torch.Tensor)]


def watched(optimizer: torch.optim.Optimizer, **options: Any) -> tuple[Watch, Watch]:
    """A bare step and a recorded one, both seen from below."""
    watches = []
    with lrprobe.attach(optimizer, every=lambda step: step == 3, **options) as probe:
        optimizer.step()
        for _ in range(2):
            with Watch(*tensors(optimizer)) as watch:
                optimizer.step()
            watches.append(watch)
        assert len(probe.frame()) == sum(len(g["params"]) for g in optimizer.param_groups)
    return watches[0], watches[1]


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """With gradients."""
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


class Unknown(torch.optim.SGD):
    """An optimizer whose step no rule explains."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Half of what SGD does, and a sign."""
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(param.grad.sign_(), alpha=0.01)
        return closure


def peak(optimizer: torch.optim.Optimizer, monkeypatch: Any, **options: Any) -> float:
    """MiB that the probe's own hook holds at most, without what the step itself needs."""
    optimizer.step()
    with Watch(*tensors(optimizer)) as watch:
        hook = Hooks._after_step

        def alone(hooks: Hooks, stepped: torch.optim.Optimizer) -> None:
            watch.peak = 0
            hook(hooks, stepped)

        monkeypatch.setattr(Hooks, "_after_step", alone)
        with lrprobe.attach(optimizer, every=1, **options) as probe:
            optimizer.step()
            found = watch.peak / MIB
            assert probe.frame()["stepped"].all()
    return found


MAKERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, weight_decay=0.1, centered=True, momentum=0.9),
    "Adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "way"),
    # Eager code takes seconds, and one rule like another: the two that keep most.
    [*[(kind, "cpu") for kind in MAKERS], ("Adadelta", "eager"), ("RMSprop", "eager")],
)
def test_extra_memory_is_bounded(kind: str, dtype: torch.dtype, way: str, monkeypatch: Any) -> None:
    """Of millions of elements a recorded step holds at most 32 MiB + 64 KiB a tensor more."""
    torch.manual_seed(0)
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    rows = 4000 if way == "cpu" else 2000  # as float64 40 MB, and eager code is slow
    params = parameters((rows, 2500), (1000, 800), *[(4096,)] * 100, dtype=dtype)
    options = {"track": 10} if kind == "Adadelta" else {}
    make = MAKERS[kind]
    extra = peak(make(params), monkeypatch, **options)
    assert 1 < extra <= 32 + len(params) / 16, f"{extra:.1f} MiB"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", ["eager", "cpu"])
@pytest.mark.parametrize("size", [640, 128])
@pytest.mark.parametrize("kind", ["AdamW", "Adadelta"])
def test_extra_memory_is_bounded_for_many_large_parameters(
    kind: str, size: int, way: str, monkeypatch: Any
) -> None:
    """What is kept of one large parameter, or of some, while the next is read is small."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    torch.manual_seed(0)
    params = parameters(*[(size, size)] * 48)
    optimizer = getattr(torch.optim, kind)(params, lr=0.1, weight_decay=0.1)
    extra = peak(optimizer, monkeypatch)
    assert 1 < extra <= 32 + len(params) / 16, f"{extra:.1f} MiB"


@pytest.mark.filterwarnings("ignore:lrprobe. Unknown has no rule")
def test_measuring_copies_no_parameter(monkeypatch: Any) -> None:
    """A rate that can only be measured is measured on a sample, not with a copy."""
    extra = peak(Unknown(parameters((4000, 2800)), lr=0.1), monkeypatch)
    assert extra <= 4, f"{extra:.1f} MiB"


def test_a_step_that_is_not_due_does_nothing() -> None:
    """Not one operation on a tensor more than without a probe, however many parameters."""
    alone = torch.optim.AdamW(parameters(*[(5,)] * 300), fused=True)
    alone.step()
    with Watch() as without:
        alone.step()
    bare, recorded = watched(torch.optim.AdamW(parameters(*[(5,)] * 300), fused=True))
    assert bare.names == without.names
    assert len(recorded.names) > len(bare.names)


READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item")


@pytest.mark.parametrize("way", ["eager", "cpu"])
@pytest.mark.parametrize("options", [{}, {"track": 3}], ids=str)
def test_the_host_reads_nothing_in_the_hook(
    options: dict[str, Any], way: str, monkeypatch: Any
) -> None:
    """No read of a device value, with few parameters or many, small or large."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    for count in (2, 60):
        optimizer = torch.optim.AdamW(parameters((90, 90), *[(5,)] * count), fused=True)
        bare, recorded = watched(optimizer, **options)
        found = [name for name in recorded.names if name in READS]
        assert found == [name for name in bare.names if name in READS]


FAULTS = """
import resource, torch, lrprobe
params = [torch.nn.Parameter(torch.randn(128, 128)) for _ in range(100)]
optimizer = torch.optim.AdamW(params)
with lrprobe.attach(optimizer, every=1) as probe:
    for _ in range(24):
        for param in params:
            param.grad = torch.randn(128, 128)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        optimizer.step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        probe.flush()
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells of glibc's allocator")
def test_memory_is_used_again_by_the_next_step() -> None:
    """A recorded step takes hardly a page from the system, also where no tensor is large."""
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    faults = [int(line) for line in result.stdout.split()]
    settled = faults[8:]  # until then the allocator still learns what is needed
    assert statistics.median(settled) < 2500, faults  # without, some 5,000


@pytest.mark.parametrize(("reader", "kind"), [(Engine, "Adafactor"), (Planned, "AdamW")])
def test_what_was_kept_is_gone_when_the_record_is_handed_over(
    reader: Any, kind: str, monkeypatch: Any
) -> None:
    """The thread that makes it would hold up the training, as freeing memory lets others go on."""
    kept: list[StorageWeakRef] = []
    gone: list[bool] = []
    before, put = reader.before, Delivery.put

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = before(*args, **kwargs)
        if result is not None:
            kept.extend(StorageWeakRef(b.untyped_storage()) for b in result.samples._buffers)
        return result

    def hand_over(self: Delivery, *args: Any) -> bool:
        gone.extend(reference.expired() for reference in kept)
        return put(self, *args)

    monkeypatch.setattr(reader, "before", keep)
    monkeypatch.setattr(Delivery, "put", hand_over)
    optimizer = getattr(torch.optim, kind)(parameters((90, 90), (5,)))
    with lrprobe.attach(optimizer):
        optimizer.step()
    assert gone
    assert all(gone)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adadelta"])
def test_operations_for_small_parameters_do_not_grow_with_their_number(
    kind: str, monkeypatch: Any
) -> None:
    """A thousand parameters of one shape are read together: at most two operations each."""
    monkeypatch.setenv("LRPROBE_ENGINE", "cpu")
    counts = {}
    for count in (10, 1000):
        optimizer = getattr(torch.optim, kind)(parameters(*[(8,)] * count), foreach=True, lr=0.1)
        bare, recorded = watched(optimizer)
        counts[count] = len(recorded.names) - len(bare.names)
    assert counts[1000] - counts[10] <= 2 * 990, counts


def test_operations_for_a_large_parameter_grow_with_its_blocks(monkeypatch: Any) -> None:
    """Eagerly, twice the elements are at most twice the operations: 250 a block, at most."""
    monkeypatch.setenv("LRPROBE_ENGINE", "eager")
    counts = {}
    for rows in (1000, 2000, 4000):
        bare, recorded = watched(torch.optim.AdamW(parameters((rows, 1000)), fused=True))
        counts[rows] = len(recorded.names) - len(bare.names)
    assert counts[4000] - counts[2000] <= 2.1 * (counts[2000] - counts[1000]), counts
    assert counts[4000] - counts[2000] < 250 * 2_000_000 / BLOCK, counts


@pytest.mark.skipif(not versions.FAR_DEVICE, reason="torch cannot have a device that is not there")
def test_nothing_waits_for_a_device() -> None:
    """A step is recorded on a device that is not there, whose values cannot be read."""
    script = Path(__file__).with_name("far_device.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 cases" in done.stdout
