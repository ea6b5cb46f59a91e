"""attach and Probe: record an optimizer, and return the records to the user.

step hook → engine: rule → figures of each piece → recorder → record → sinks
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn
from torch.optim import Optimizer

from lrprobe.about import KEY, description, joined
from lrprobe.arguments import Every, Filter, Options, Step, check_callback, check_counts
from lrprobe.delivery import Delivery
from lrprobe.diagnosis import Finding, Findings, diagnose
from lrprobe.diagnosis.live import LiveDiagnosis
from lrprobe.distributed import join, world
from lrprobe.engine import backends
from lrprobe.hooks import Hooks
from lrprobe.names import Names, find_optimizers
from lrprobe.notebook import probe_html
from lrprobe.record import Level
from lrprobe.recorder import Recorder, open_recorders
from lrprobe.runs import before_attempt
from lrprobe.schedule import Schedule
from lrprobe.sinks.memory import Memory
from lrprobe.sinks.parquet import Parquet
from lrprobe.sinks.targets import open_sinks, targets
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
    on_finding: Callable[[Finding], object] | None = None,
    process_group: Any = None,
) -> Probe:
    """Record the effective learning rate of an optimizer's steps; nothing else in the loop changes.

    Args:
        optimizer: a ``torch.optim.Optimizer``, a wrapper around one (``.optimizer``, ``.optim``,
            ``.base_optimizer``, ``.original_optimizer``), a list of them, or a dict of name to
            optimizer.
        model: provides the parameters' names. Without it, names come from the groups'
            ``param_names``, or are ``group0.param3``.
        to: where records go, in addition to memory: a path ending in ``.parquet`` (a dataset),
            another path (a TensorBoard logdir), a ``SummaryWriter``, a sink, or a list of these.
            Memory is limited to 256 MiB; pass your own ``sinks.Memory`` to change that.
        every: a period, or a function of the step that returns whether to record it. With a
            period, lrprobe records the first step after ``attach`` and every multiple of it.
        include: regular expressions (``re.search``); only parameters with a matching name are
            recorded.
        exclude: the same, for parameters that are not recorded.
        track: how many elements of each parameter to record exactly (``Probe.elements``). The same
            elements are drawn in every run.
        batch_size: samples in one backward pass. lrprobe then counts the passes of each step, for
            the columns ``samples`` and ``lr_per_sample``.
        step: where to start counting, or a function that returns the trainer's own step. By
            default the count continues from the optimizer's state, or starts at 0.
        on_finding: called once with each new ``Finding`` during the training, in a separate
            thread; :mod:`lrprobe.alerts` has ready-made callbacks.
        process_group: a ``torch.distributed`` group, if not all ranks attach. All of its ranks must
            call ``attach``; the lowest writes, and its probe has the frame. By default all ranks.

    Returns:
        The probe. It lives as long as the optimizer, even if you keep no reference to it.

    Raises:
        TypeError: if an argument has a type that is not listed above.
        ValueError: if a value is out of range, a regular expression does not compile, or a
            destination has an ending or scheme that no sink writes; on every rank, if the ranks'
            parameters or arguments cannot be merged.
        OSError: if a destination cannot be written.
        RuntimeError: if ``attach`` failed on another rank, or if parameters are sharded over ranks
            that do not attach.
    """
    ranks = world(process_group)
    try:
        names = Names(model)
        check_counts(every, track, batch_size, step)
        chosen = Filter(include, exclude)
        options = Options(names, chosen, every, step, track, batch_size, backends.engine_from_env())
        check_callback(on_finding)
        recorder = _attached(find_optimizers(optimizer), options, to, ranks.rank, on_finding)
    except Exception as error:  # so that the other ranks fail too, and do not wait
        join(ranks, [], model, error)
        raise
    try:
        join(ranks, recorder.hooks, model)
    except BaseException:
        recorder.close()
        raise
    return Probe(recorder)


def _attached(
    optimizers: Mapping[str, Optimizer],
    options: Options,
    to: Any,
    rank: int,
    on_finding: Callable[[Finding], object] | None,
) -> Recorder:
    found = targets(to)
    places = [target.place for target in found if target.place is not None]
    # A sink may be shared, but not twice by one optimizer; memory alone is a destination too.
    shared: list[Any] = [target.open() for target in found if target.place is None]
    shared += [None] * (not found)
    older = {
        each: same
        for each in list(open_recorders)
        if (same := _same_destinations(each, places, shared, optimizers))
    }
    release = partial(_close, older)
    if rank:  # only rank 0 writes
        release()
        recorder = Recorder(None, Delivery([]), places, shared, rank=rank)
    else:
        taken = {place for each in older for place in each.places}
        sinks, owned = open_sinks(found, taken, release)
        memory = next((sink for sink in sinks if isinstance(sink, Memory)), None)
        if memory is None:
            memory = Memory()
            sinks.insert(0, memory)
        attempt = max((getattr(sink, "attempt", 0) for sink in sinks), default=0)
        history = _history(sinks, attempt)
        if on_finding is not None:
            live = LiveDiagnosis(on_finding, history)
            sinks, owned = [*sinks, live], [*owned, live]
        recorder = Recorder(memory, Delivery(sinks, owned), places, shared, attempt)
        recorder.history = history
    try:
        for name, each in _unique_names(optimizers, shared, options).items():
            recorder.hooks.append(Hooks(name, each, options, recorder))
        now = options.names.now()
        if now and not any(hooks.watching.knows(now) for hooks in recorder.hooks):
            warn("the model has none of the optimizer's parameters, so it cannot name them")
        _remember_names(recorder.hooks, shared)
        recorder.describe()
    except BaseException:  # also a warning that the user turned into an error
        recorder.close()
        raise
    return recorder


def _history(sinks: Sequence[Any], attempt: int) -> Callable[[], pd.DataFrame | None] | None:
    """A function that returns what earlier attempts recorded in the dataset being continued."""
    if attempt:
        for sink in sinks:
            if isinstance(sink, Parquet):
                return partial(before_attempt, Path(sink.destination), attempt)
    return None


class Probe:
    """Records the steps of the optimizers it is attached to; created by :func:`attach`.

    It is also a context manager, which closes the probe at the end.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @property
    def step(self) -> int:
        """The last step, recorded or not; with several optimizers, the highest."""
        return self._recorder.step

    def frame(self, by: Level = "parameter") -> pd.DataFrame:
        """The recorded steps so far, one row per step and parameter.

        Args:
            by: ``"parameter"``, or ``"module"``, ``"group"``, ``"model"`` for merged rows.

        Raises:
            ValueError: for another ``by``.
            RuntimeError: if memory is turned off (``max_bytes=0``), or if this is not rank 0 of
                the probe's process group, which alone has the frame.
        """
        self._recorder.wait()
        return self._memory.frame(by)

    def elements(self) -> pd.DataFrame:
        """The tracked elements, one row per step and element (see ``attach(track=...)``)."""
        self._recorder.wait()
        return self._memory.elements()

    def histograms(self) -> pd.DataFrame:
        """A histogram of the effective rate per step and parameter: ``edges``, ``counts``."""
        self._recorder.wait()
        return self._memory.histograms()

    def findings(self) -> Findings:
        """Findings of :func:`lrprobe.diagnose` in the steps recorded so far.

        If a dataset is continued, they include what earlier attempts recorded. Until the probe is
        closed, findings that the rest of the run may refute are withheld.

        Raises:
            RuntimeError: as for ``frame``.
        """
        import pandas as pd

        frame = self.frame()
        history = self._recorder.history() if self._recorder.history is not None else None
        if history is not None:
            about = joined(description(history), description(frame))
            frame = pd.concat([history, frame[history.columns]], ignore_index=True)
            frame.attrs[KEY] = about
        return diagnose(frame, ongoing=not self._recorder.closed)

    def flush(self) -> None:
        """Write everything recorded so far, and flush sinks that buffer."""
        self._recorder.flush()

    def close(self) -> None:
        """Remove the hooks, write the remaining records, close the owned sinks; idempotent."""
        self._recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the step counts as plain values, for a checkpoint."""
        state: dict[str, Any] = {"steps": self._recorder.steps()}
        if self._recorder.live is not None:
            state["told"] = [list(key) for key in self._recorder.live.reported]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting where another probe, or this one, was when it saved the state.

        If that is before a recorded step, a new ``attempt`` begins, which supersedes the records
        from there on.

        Raises:
            ValueError: if the state belongs to other optimizers.
        """
        if "steps" not in state:
            raise ValueError(
                f"this is not a Probe.state_dict(): it has {sorted(state)} and no 'steps'"
            )
        steps = state["steps"]
        names = {hooks.name for hooks in self._recorder.hooks}
        if set(steps) != names:
            raise ValueError(
                f"this state belongs to the optimizers {sorted(steps)}; "
                f"the probe has {sorted(names)}"
            )
        self._recorder.go_on_from(steps)
        if self._recorder.live is not None:
            self._recorder.live.mark_reported(state.get("told", ()))

    def __repr__(self) -> str:
        hooks = self._recorder.hooks
        watched = sum(len(each.watched) for each in hooks)
        names = ", ".join(each.name for each in hooks)
        state = "closed" if self._recorder.closed else f"every {hooks[0].schedule}"
        return f"<lrprobe.Probe of {names}: {watched} parameters, step {self.step}, {state}>"

    def _repr_html_(self) -> str:
        return probe_html(self)

    @property
    def _memory(self) -> Memory:
        if self._recorder.memory is None:
            raise RuntimeError(
                f"this is rank {self._recorder.rank} of the probe's process group, and only rank 0 "
                "has the records: call this on rank 0 (if rank == 0: ...), or lrprobe.read() its "
                "dataset"
            )
        return self._recorder.memory


_named: weakref.WeakKeyDictionary[Any, dict[str, tuple[weakref.ref[Optimizer], Schedule]]] = (
    weakref.WeakKeyDictionary()
)
"""A user's sink to the optimizers that have recorded to it, by their names in that sink."""


def _unique_names(
    optimizers: Mapping[str, Optimizer], shared: Sequence[Any], options: Options
) -> dict[str, Optimizer]:
    """Give each optimizer a name that no other optimizer has in a shared sink.

    An optimizer whose count starts where a closed one ended takes over its name: a resumed run.
    """
    sinks = [_named.setdefault(sink, {}) for sink in shared if _may_be_key(sink)]
    recording = [hooks.optimizer for each in list(open_recorders) for hooks in each.hooks]
    result: dict[str, Optimizer] = {}
    for name, optimizer in optimizers.items():
        start = Schedule(options.every, options.step, optimizer).step
        for unique in itertools.chain([name], (f"{name}#{n}" for n in itertools.count(1))):
            free = all(
                other() is optimizer
                or (schedule.step <= start and all(other() is not each for each in recording))
                for other, schedule in (named[unique] for named in sinks if unique in named)
            )
            if free and unique not in result:
                break
        result[unique] = optimizer
    return result


def _remember_names(hooks: Sequence[Hooks], shared: Sequence[Any]) -> None:
    for sink in shared:
        for each in hooks if _may_be_key(sink) else ():
            if each.optimizer is not None:
                known = weakref.ref(each.optimizer), each.schedule
                _named.setdefault(sink, {})[each.name] = known


def _may_be_key(sink: Any) -> bool:
    try:
        weakref.ref(sink)
        hash(sink)
    except TypeError:
        return False
    return sink is not None


def _same_destinations(
    recorder: Recorder,
    places: Sequence[str],
    shared: Sequence[Any],
    optimizers: Mapping[str, Optimizer],
) -> list[str]:
    """Destinations that another probe also records to: paths, and sinks of the same optimizer.

    A sink of None stands for memory.
    """
    same = sorted(set(places) & set(recorder.places))
    sinks = [sink for sink in shared if any(sink is other for other in recorder.shared)]
    for name, each in optimizers.items():
        # Compare objects, because ids may be reused.
        if any(hooks.optimizer is each for hooks in recorder.hooks):
            same += [f"{'memory' if s is None else type(s).__name__} for {name}" for s in sinks]
    return same


def _close(older: Mapping[Recorder, Sequence[str]]) -> None:
    for each, same in older.items():
        warn(
            f"another probe was recording to {listed(same)}: it is closed, and this "
            "one replaces it. (For several optimizers, call attach once, with a list.)"
        )
        each.close()
