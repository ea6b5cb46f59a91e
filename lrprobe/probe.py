"""attach and Probe: what is recorded of an optimizer, and what a user has of it.

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
from lrprobe.diagnosis.live import Live
from lrprobe.distributed import join, world
from lrprobe.engine import ways
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
        on_finding: called with each new ``Finding`` while the training runs, once, in a thread of
            its own; :mod:`lrprobe.alerts` has some ready-made.
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
        RuntimeError: if ``attach`` failed on another rank, or if parameters are sharded over ranks
            that do not attach.
    """
    ranks = world(process_group)
    try:
        names = Names(model)
        check_counts(every, track, batch_size, step)
        chosen = Filter(include, exclude)
        options = Options(names, chosen, every, step, track, batch_size, ways.chosen())
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
    if rank:  # which has nothing to write
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
            live = Live(on_finding, history)
            sinks, owned = [*sinks, live], [*owned, live]
        recorder = Recorder(memory, Delivery(sinks, owned), places, shared, attempt)
        recorder.history = history
    for name, each in _apart(optimizers, shared, options).items():
        recorder.hooks.append(Hooks(name, each, options, recorder))
    now = options.names.now()
    if now and not any(hooks.watching.knows(now) for hooks in recorder.hooks):
        warn("the model has none of the optimizer's parameters, so that it names none of them")
    _remember_names(recorder.hooks, shared)
    recorder.describe()
    return recorder


def _history(sinks: Sequence[Any], attempt: int) -> Callable[[], pd.DataFrame | None] | None:
    """Gives what the dataset that is continued has of earlier attempts."""
    if attempt:
        for sink in sinks:
            if isinstance(sink, Parquet):
                return partial(before_attempt, Path(sink.destination), attempt)
    return None


class Probe:
    """Records the steps of the optimizers it is attached to; made by :func:`attach`.

    A context manager: leaving it closes it.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @property
    def step(self) -> int:
        """The last step taken, recorded or not; of several optimizers, the furthest."""
        return self._recorder.step

    def frame(self, by: Level = "parameter") -> pd.DataFrame:
        """The recorded steps so far, one row per step and parameter.

        Args:
            by: ``"parameter"``, or ``"module"``, ``"group"``, ``"model"`` for merged rows.

        Raises:
            ValueError: for another ``by``.
            RuntimeError: if memory was turned off (``max_bytes=0``), or if this is not rank 0 of
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
        """What the recorded steps so far point to, as :func:`lrprobe.diagnose` says it.

        Of a dataset that is continued, what earlier attempts recorded counts, too. Until the probe
        is closed, nothing is said that the rest of the run may change.

        Raises:
            RuntimeError: as ``frame`` does.
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
        """Write all that was recorded so far, and make sinks that buffer do the same."""
        self._recorder.flush()

    def close(self) -> None:
        """Remove the hooks, write what is left, and close the sinks opened here; idempotent."""
        self._recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the counts stand, as plain values, to go into a checkpoint."""
        state: dict[str, Any] = {"steps": self._recorder.steps()}
        if self._recorder.live is not None:
            state["told"] = [list(key) for key in self._recorder.live.told]
        return state

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
        names = {hooks.name for hooks in self._recorder.hooks}
        if set(steps) != names:
            raise ValueError(
                f"this state is of the optimizers {sorted(steps)}; the probe has {sorted(names)}"
            )
        self._recorder.go_on_from(steps)
        if self._recorder.live is not None:
            self._recorder.live.forget_none(state.get("told", ()))

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
                f"this is rank {self._recorder.rank} of the probe's process group, and rank 0 has "
                "what was recorded: ask there (if rank == 0: ...), or lrprobe.read() what it writes"
            )
        return self._recorder.memory


_named: weakref.WeakKeyDictionary[Any, dict[str, tuple[weakref.ref[Optimizer], Schedule]]] = (
    weakref.WeakKeyDictionary()
)
"""Sink of a user's to the optimizers that have recorded to it, by the names they have there."""


def _apart(
    optimizers: Mapping[str, Optimizer], shared: Sequence[Any], options: Options
) -> dict[str, Optimizer]:
    """Names that no other optimizer has in a sink that both write to.

    One that begins where another has ended goes on under its name: a resumed training.
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
    """What another probe records to as well: a path, or a sink (None: memory) of an optimizer."""
    same = sorted(set(places) & set(recorder.places))
    sinks = [sink for sink in shared if any(sink is other for other in recorder.shared)]
    for name, each in optimizers.items():
        # By living objects: an id may be used again.
        if any(hooks.optimizer is each for hooks in recorder.hooks):
            same += [f"{'memory' if s is None else type(s).__name__} for {name}" for s in sinks]
    return same


def _close(older: Mapping[Recorder, Sequence[str]]) -> None:
    for each, same in older.items():
        warn(
            f"another probe was recording to {listed(same)}: it is closed, and this "
            "one takes its place. (For several optimizers attach once, with a list.)"
        )
        each.close()
