"""attach and Probe: the hooks, the schedule, and the way of a step to the sinks.

step hook → rule (reconstruct) → summary → record → sinks
"""

from __future__ import annotations

import atexit
import itertools
import os
import platform
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from lrprobe.arguments import Every, Filter, Options, Step, check_counts
from lrprobe.delivery import Delivery
from lrprobe.distributed import Merging, finish, join, world
from lrprobe.hooks import Hooks
from lrprobe.names import Names, find_optimizers, name_parameters
from lrprobe.record import SCHEMA_VERSION, Level
from lrprobe.sinks.memory import Memory
from lrprobe.sinks.targets import open_sinks, targets
from lrprobe.summary.pending import Pending
from lrprobe.text import listed, warn

if TYPE_CHECKING:
    import pandas as pd


def attach(
    optimizer: Any,
    model: nn.Module | None = None,
    *,
    to: Any = None,
    every: Every = 10,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    track: int = 0,
    batch_size: int | None = None,
    step: Step = None,
    sample: int | None = None,
    compile: bool = False,  # noqa: A002 - the field's word for it
    process_group: Any = None,
) -> Probe:
    """Record the effective learning rate of an optimizer's steps; nothing else in the loop changes.

    Args:
        optimizer: a ``torch.optim.Optimizer``, a wrapper around one (``.optimizer``, ``.optim``), a
            list of them, or a dict of name to optimizer.
        model: gives the parameters their names; without it the groups' ``param_names``, else
            ``group0.param3``.
        to: where records go beside memory: a path ending in ``.parquet`` (a dataset), another path
            (a TensorBoard logdir), a ``SummaryWriter``, a sink, or a list of these. Memory is
            bounded by 256 MiB; pass a ``sinks.Memory`` of your own to change that.
        every: record step 1 and every multiple of this, or the steps for which this function of
            the step is true.
        include: regular expressions (``re.search``); only parameters with a matching name are
            recorded.
        exclude: the same, for parameters that are not recorded.
        track: how many elements of each parameter to record exactly (``Probe.elements``); drawn
            the same in every run.
        batch_size: samples in one backward pass. The passes of each step are counted, and give
            the columns ``samples`` and ``lr_per_sample``.
        step: where to start counting, or a function that gives the trainer's own step. By default
            the count goes on from the optimizer's state, else from 0.
        sample: take the figures from this many elements of each parameter instead of all:
            cheaper, and then they are estimates.
        compile: fuse rule and summary with ``torch.compile``; the first recorded step is slow.
        process_group: of ``torch.distributed``, where not all ranks attach. All of its ranks must
            call ``attach``; the lowest writes, and its probe has the frame. By default all ranks.

    Returns:
        The probe. It lives as long as the optimizer, also where it is not kept.

    Raises:
        TypeError: if an argument is of a kind that is not listed above.
        ValueError: if a value is out of range, a regular expression does not compile, or a
            destination has an ending or scheme that no sink writes; on every rank, if the ranks'
            parameters or arguments cannot be merged.
        OSError: if a destination cannot be written.
        RuntimeError: if ``attach`` failed on another rank.
    """
    ranks = world(process_group)
    rank = 0 if ranks is None else ranks.rank
    try:
        names = Names(model)
        check_counts(every, track, batch_size, step, sample)
        chosen = Filter(include, exclude)
        options = Options(names, chosen, every, step, track, batch_size, sample, compile)
        probe = _attached(find_optimizers(optimizer), options, to, rank)
    except Exception as error:  # so that the other ranks fail too, and do not wait
        join(ranks, [], model, error)
        raise
    try:
        join(ranks, probe.hooks, model)
    except BaseException:
        probe.close()
        raise
    return probe


def _attached(optimizers: Mapping[str, Optimizer], options: Options, to: Any, rank: int) -> Probe:
    chosen = options.chosen
    now = options.names.now()
    for each in optimizers.values():
        chosen.see(name for _, name, _ in name_parameters(each, now))
    params = {id(p) for each in optimizers.values() for g in each.param_groups for p in g["params"]}
    if now and not params & now.keys():
        warn("the model has none of the optimizer's parameters, so that it names none of them")
    found = targets(to)
    places = [target.place for target in found if target.place is not None]
    # A sink may be shared, but not twice by one optimizer; memory alone is a destination too.
    shared: list[Any] = [target.open() for target in found if target.place is None]
    shared += [None] * (not found)
    places += [
        f"{'memory' if sink is None else type(sink).__name__} for {name} ({id(sink)}, {id(each)})"
        for sink in shared
        for name, each in optimizers.items()
    ]
    older = [probe for probe in list(_open_probes) if set(places) & set(probe.places)]
    release = partial(_close, older, places)
    if rank:  # which has nothing to write
        release()
        probe = Probe(None, Delivery([]), places, rank=rank)
    else:
        taken = {place for probe in older for place in probe.places}
        sinks, owned = open_sinks(found, taken, release)
        memory = next((sink for sink in sinks if isinstance(sink, Memory)), None)
        if memory is None:
            memory = Memory()
            sinks.insert(0, memory)
        attempt = max((getattr(sink, "attempt", 0) for sink in sinks), default=0)
        probe = Probe(memory, Delivery(sinks, owned), places, attempt)
    probe.shared = shared
    for name, each in _apart(optimizers, shared).items():
        probe.hooks.append(Hooks(name, each, options, probe))
    probe.describe()
    _open_probes.add(probe)
    return probe


class Probe:
    """Records the steps of the optimizers it is attached to; made by :func:`attach`.

    A context manager: leaving it closes it.
    """

    def __init__(
        self,
        memory: Memory | None,
        delivery: Delivery,
        places: Sequence[str],
        attempt: int = 0,
        rank: int = 0,
    ) -> None:
        self._in_memory = memory
        self.rank = rank
        self._delivery = delivery
        self.places = places
        self.shared: Sequence[Any] = ()
        """Sinks of the user's, also on ranks that do not write to them."""
        self.attempt = attempt
        self.hooks: list[Hooks] = []
        self._waiting: deque[tuple[Hooks, Pending | Merging]] = deque()
        self._lock = threading.RLock()  # a frame may be asked for beside the training
        self._closed = False
        self.run: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """The last step taken, recorded or not; of several optimizers, the furthest."""
        return max((hooks.schedule.step for hooks in self.hooks), default=0)

    def frame(self, by: Level = "parameter") -> pd.DataFrame:
        """The recorded steps so far, one row per step and parameter.

        Args:
            by: ``"parameter"``, or ``"module"``, ``"group"``, ``"model"`` for merged rows.

        Raises:
            ValueError: for another ``by``.
            RuntimeError: if memory was turned off (``max_bytes=0``), or if this is not rank 0 of
                the probe's process group, which alone has the frame.
        """
        self._wait()
        return self._memory.frame(by)

    def elements(self) -> pd.DataFrame:
        """The tracked elements, one row per step and element (see ``attach(track=...)``)."""
        self._wait()
        return self._memory.elements()

    def histograms(self) -> pd.DataFrame:
        """A histogram of the effective rate per step and parameter: ``edges``, ``counts``."""
        self._wait()
        return self._memory.histograms()

    def flush(self) -> None:
        """Write all that was recorded so far, and make sinks that buffer do the same."""
        self.collect(wait=True)
        self._delivery.flush()
        self._tell()

    def close(self) -> None:
        """Remove the hooks, write what is left, and close the sinks opened here; idempotent."""
        if self._closed:
            return
        self._closed = True
        for hooks in self.hooks:
            hooks.remove()
        try:
            finish([hooks.exchange for hooks in self.hooks if hooks.exchange is not None])
            self.collect(wait=True, last=True)
        finally:
            _open_probes.discard(self)
            self._delivery.close()
        for hooks in self.hooks:
            if hooks.failures > 1:  # of the first it was told when it happened
                warn(f"{hooks.failures:,} steps of {hooks.name} could not be recorded")
        self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the counts stand, as plain values, to go into a checkpoint."""
        self.collect(wait=True)
        return {"steps": {hooks.name: hooks.schedule.step for hooks in self.hooks}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where another probe stood, or this one earlier.

        Where that is before a step that was recorded, a new ``attempt`` begins, which supersedes
        what was recorded from there on.

        Raises:
            ValueError: if it was of other optimizers.
        """
        if "steps" not in state:
            raise ValueError(f"this is no Probe.state_dict(): it has {sorted(state)}, not 'steps'")
        steps = state["steps"]
        names = {hooks.name for hooks in self.hooks}
        if set(steps) != names:
            raise ValueError(
                f"this state is of the optimizers {sorted(steps)}; the probe has {sorted(names)}"
            )
        self.collect(wait=True)
        for hooks in self.hooks:
            hooks.schedule.step = int(steps[hooks.name])
        if any(hooks.schedule.step < hooks.recorded for hooks in self.hooks):
            self._begin_attempt()

    def __repr__(self) -> str:
        watched = sum(len(hooks.watched) for hooks in self.hooks)
        names = ", ".join(hooks.name for hooks in self.hooks)
        state = "closed" if self._closed else f"every {self.hooks[0].schedule}"
        return f"<lrprobe.Probe of {names}: {watched} parameters, step {self.step}, {state}>"

    @property
    def _memory(self) -> Memory:
        if self._in_memory is None:
            raise RuntimeError(
                f"this is rank {self.rank} of the probe's process group, and rank 0 has what was "
                "recorded: ask there (if rank == 0: ...), or lrprobe.read() what it writes"
            )
        return self._in_memory

    @property
    def waiting(self) -> bool:
        """Whether figures are still on their way to the host."""
        return bool(self._waiting)

    def describe(self) -> None:
        """Hyperparameters and versions, which travel with every record."""
        self.run = {
            "schema_version": SCHEMA_VERSION,
            "lrprobe": _version("lrprobe"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "optimizers": {hooks.name: hooks.describe() for hooks in self.hooks},
        }

    def add(self, hooks: Hooks, pending: Pending | Merging) -> None:
        """Take the figures of a step, still on the device."""
        with self._lock:
            self._waiting.append((hooks, pending))
        self.collect()

    def collect(self, wait: bool = False, last: bool = False) -> None:
        """Pass on what has arrived on the host; the rest is asked again at a later hook.

        Args:
            wait: for what is on its way. Other ranks are not waited for without end.
            last: what has not arrived then never will.
        """
        with self._lock:
            while self._waiting:
                hooks, pending = self._waiting[0]
                try:
                    if not (pending.ready() or (wait and (pending.wait() or last))):
                        break
                except Exception as error:  # noqa: BLE001 - it never arrives, and training goes on
                    self._waiting.popleft()
                    hooks.failed(error)
                    continue
                self._waiting.popleft()
                try:
                    self._pass_on(hooks, pending)
                except Warning:  # the user wants warnings to be errors
                    raise
                except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                    hooks.failed(error)
            if wait:
                for hooks in self.hooks:
                    hooks.settle()
        self._tell()

    def _pass_on(self, hooks: Hooks, pending: Pending | Merging) -> None:
        if pending.none_taken:
            less = hooks.take_back()
            for others, later in self._waiting:
                if others is hooks:
                    later.info.step -= less
        elif pending.info.recorded:
            if pending.info.step < hooks.recorded:  # the trainer's own count went back
                self._begin_attempt()
            hooks.recorded = pending.info.step
            pending.info.attempt = self.attempt
            try:
                hooks.judge(pending)
            finally:  # last, since the thread that makes the record holds up this one
                self._delivery.put(pending.record, pending.nbytes)

    def _begin_attempt(self) -> None:
        self.attempt += 1
        for hooks in self.hooks:
            hooks.recorded = -1

    def forked(self) -> None:
        """In a child process: what waits is the parent's."""
        self._lock = threading.RLock()
        self._waiting.clear()

    def _wait(self) -> None:
        if not self._closed:
            self.collect(wait=True)
            self._delivery.drain(near=True)
            self._tell()

    def _tell(self) -> None:
        for message in self._delivery.problems():
            warn(message)


_version = cache(version)  # which else searches all that is installed, at each attach

_open_probes: weakref.WeakSet[Probe] = weakref.WeakSet()


def _in_child() -> None:
    """A lock that another thread held when the process was forked is never released."""
    for probe in list(_open_probes):
        probe.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@atexit.register
def _at_exit() -> None:
    """Pass on what is still on its way from a device, before the delivery ends."""
    for probe in list(_open_probes):
        probe.collect(wait=True, last=True)


def _apart(optimizers: Mapping[str, Optimizer], shared: Sequence[Any]) -> dict[str, Optimizer]:
    """Names that no other probe's optimizer has in a sink that both write to."""
    sinks = {id(sink) for sink in shared if sink is not None}
    others = [probe for probe in list(_open_probes) if sinks & set(map(id, probe.shared))]
    taken = {hooks.name for probe in others for hooks in probe.hooks}
    result: dict[str, Optimizer] = {}
    for name, optimizer in optimizers.items():
        unique = next(
            each
            for each in itertools.chain([name], (f"{name}#{n}" for n in itertools.count(1)))
            if each not in taken and each not in result
        )
        result[unique] = optimizer
    return result


def _close(older: Sequence[Probe], places: Sequence[str]) -> None:
    for probe in older:
        same = set(places) & set(probe.places)
        warn(
            f"another probe was recording to {listed(sorted(same))}: it is closed, and this "
            "one takes its place. (For several optimizers attach once, with a list.)"
        )
        probe.close()
