"""The hooks on one optimizer: which steps are recorded, and how a step becomes figures."""

from __future__ import annotations

import inspect
import math
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrprobe import compiled
from lrprobe.arguments import Options
from lrprobe.census import StepCount
from lrprobe.distributed.parts import Parts
from lrprobe.dummy_steps import all_rates_zero, any_gradient
from lrprobe.engine import Engine, PreStep, empty_pre_step, undisturbed
from lrprobe.engine.columns import Row, StepInfo, judge_rules
from lrprobe.engine.pieces import WatchedParameter
from lrprobe.gathering import LocalGatherer, Step, unrecorded_step
from lrprobe.hyperparameters import hyperparameters
from lrprobe.passes import Passes
from lrprobe.rules import find_rule
from lrprobe.rules.base import has_closure
from lrprobe.schedule import Schedule
from lrprobe.text import listed, warn
from lrprobe.watching import Watching

if TYPE_CHECKING:
    from lrprobe.distributed import Exchange


class Owner(Protocol):
    """What hooks need from the probe they belong to."""

    run: dict[str, Any]
    rank: int
    waiting_bytes: int

    @property
    def waiting(self) -> bool:
        """Whether figures are still on their way to the host."""

    def add(self, hooks: Hooks, step: Step) -> None:
        """Take the figures of a step."""

    def collect(self, wait: bool = False) -> None:
        """Pass on what has arrived on the host; or wait for all of it."""

    def describe(self) -> None:
        """Update the description of the run."""

    def look(self, hooks: Hooks) -> None:
        """After a recorded step, check parameter membership and the optimizer's step count."""


class Hooks:
    """The hooks on one optimizer: they turn its steps into figures."""

    def __init__(self, name: str, optimizer: Optimizer, options: Options, owner: Owner) -> None:
        """Register the hooks; ``owner`` receives the figures, and holds the run's description."""
        self.name = name
        self.schedule = Schedule(options.every, options.step, optimizer)
        self.count = StepCount()
        self.watching = Watching(optimizer, options)
        self.engine = Engine(options.engine)
        self._owner = owner
        self.options = options
        self._optimizer = weakref.ref(optimizer)
        self._passes = Passes(options.batch_size) if options.batch_size is not None else None
        self.recorded = -1
        """The last step recorded in this attempt."""
        self.failures = 0
        """Steps that could not be recorded."""
        self.exchange: Exchange | None = None
        """Merges figures over ranks; None if this process holds everything."""
        self.reasons: dict[str, str] = {}
        """Name of a parameter to the error of its rule in the last recorded step."""
        self._local = LocalGatherer(self, owner)
        self._silent = False
        self._depth = 0
        self._number = self.schedule.step
        self._due = False
        self._kept: PreStep | None = None
        self._fixed: list[dict[str, Any]] = []
        self._changes: Counter[str] = Counter()
        self._cuda = torch.cuda.is_available()
        self._captured = self._warned_of_capture = False
        self._samples = math.nan
        self._refresh(optimizer)
        if self._passes is not None and self.parts is not None:
            self._passes.count_all(self.parts.leaves, self.parts.ranks)
        if find_rule(type(optimizer)) is None and owner.rank == 0:
            warn(
                f"{type(optimizer).__name__} has no rule: its effective rate is measured as "
                "|Δθ|/|g| on a sample. To reconstruct it, add a rule with lrprobe.register_rule"
            )
        # The hooks and their owner keep each other alive until the optimizer is collected.
        self._finalizer = weakref.finalize(optimizer, self._release)
        self._finalizer.atexit = False
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        # Run before the user's post-hooks, which may step a scheduler or drop the gradients.
        hooks: Any = optimizer._optimizer_step_post_hooks  # noqa: SLF001 - torch has no `prepend`
        hooks.move_to_end(self._handles[1].id, last=False)

    def join(self, data_parallel: int, flat: Sequence[Tensor], *, silent: bool) -> None:
        """Set what depends on the other ranks.

        Args:
            data_parallel: number of ranks with different samples.
            flat: parameters that autograd sees instead of the optimizer's (FSDP1).
            silent: whether rank 0 holds everything that this rank holds.
        """
        self._silent = silent
        if self._passes is not None:
            self._passes.set_ranks(data_parallel, flat)

    def add_passes(self, passes: int) -> None:
        """Count backward passes of another framework."""
        if self._passes is not None:
            self._passes.add_external(passes)

    @property
    def parts(self) -> Parts | None:
        """The optimizer's flat tensors, if it steps those one after another; else None."""
        return self.watching.parts

    @property
    def watched(self) -> list[WatchedParameter]:
        """The parameters that are watched."""
        return self.watching.watched

    @property
    def rows(self) -> list[Row]:
        """The frame's rows of the watched parameters, if this process holds them whole."""
        return self.watching.rows

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, while it lives."""
        return self._optimizer()

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        self._finalizer.detach()
        for handle in self._handles:
            handle.remove()
        if self._passes is not None:
            self._passes.remove()

    def _release(self) -> None:
        """Break the reference cycle with the owner once the optimizer is collected."""
        self.watching.forget()
        del self._owner

    def describe(self) -> dict[str, Any]:
        """Class and hyperparameters of the optimizer, as plain JSON values."""
        optimizer = self._optimizer()
        cls = type(optimizer)
        groups = [] if optimizer is None else self.watching.all_of(optimizer).param_groups
        return {
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "groups": [hyperparameters(group) for group in groups],
            "step_count": self.count.wrong,
        }

    def parameters(self) -> list[Tensor]:
        """The optimizer's current parameters."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else self.watching.all_of(optimizer).param_groups
        return [param for group in groups for param in group["params"]]

    @property
    def kind(self) -> str:
        """Name of the optimizer's class."""
        return type(self._optimizer()).__name__

    def name_of(self, param: Tensor) -> str:
        """The name of a parameter."""
        return self.watching.names.get(id(param), "")

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        compiled.call(self._before_step, optimizer, args, kwargs)

    def _after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        compiled.call(self._after_step, optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._cuda and self._in_capture():
            return
        if self._depth and not _is_nested(optimizer):
            self._depth = 0  # an earlier step raised
        self._depth += 1
        if self._depth > 1:
            return  # a subclass's step calls its parent's, and torch runs the hooks for both
        self._kept = None
        try:  # `_harmless` would cost more than all of this
            if self._owner.waiting:
                self._owner.collect()
            begins = self.parts is None or self.parts.begin(optimizer)
            if begins:
                self._begin_step()
        except Warning:
            raise
        except Exception as error:  # noqa: BLE001 - as in `_harmless`
            self.failed(error)
            return
        if not self._due or self._silent:
            return
        self._cuda = torch.cuda.is_available()  # only here, because it takes a microsecond
        if self._cuda and self._in_capture():
            return
        with self._harmless(), undisturbed():
            self._keep(optimizer, begins, args, kwargs)

    def _begin_step(self) -> None:
        """Determine the number of the step, and whether it is recorded."""
        self._due = False
        self.settle()
        if self.parts is None:
            self._local.clear()  # an interrupt may have left something of an earlier step
        else:
            self._finish()  # the previous step, if its last call never came
            self._record_skipped(self.parts)
        self._number = self.schedule.next()
        self._due = self.schedule.due(self._number)

    def _keep(self, optimizer: Optimizer, begins: bool, args: Any, kwargs: Any) -> None:
        """Keep what the upcoming step will overwrite."""
        seen = self.watching.all_of(optimizer)
        if begins:
            self._refresh(optimizer)
            self.count.before(seen, self._number, self.watching)
        # A later pre-hook or a closure may still change the gradients.
        closure = has_closure(args, kwargs) or not self._is_last(optimizer)
        gatherer = self._gatherer
        if self.exchange is not None:
            self._kept = empty_pre_step()  # after an error too, this rank joins the collectives
        if begins:
            gatherer.catch_up()
        if self.parts is not None:
            self.parts.enter()
        self._kept = gatherer.before(seen, closure=closure)

    @property
    def _gatherer(self) -> LocalGatherer | Exchange:
        """Where the figures of a step are added up."""
        return self._local if self.exchange is None else self.exchange

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._captured:
            self._depth = 0
            return
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth = 0
        kept, self._kept = self._kept, None
        ends = self.parts is None or self.parts.last
        if ends:
            self.schedule.step = self._number
            self.count.taken += 1
        if not self._is_last(optimizer):  # run after pre-hooks that clip gradients
            _pre_hooks(optimizer).move_to_end(self._handles[0].id)
        if kept is not None:
            with self._harmless(), undisturbed():
                self._gatherer.add(self.watching.all_of(optimizer), kept)
        del kept  # freeing tensors lets other threads run, so do it before the record is sent
        if self.parts is not None:
            self.parts.end()
        if ends:
            self._end_step(optimizer)

    def _end_step(self, optimizer: Optimizer) -> None:
        """Finish a step after the last of its calls."""
        try:  # as above
            passes = self._passes.take() if self._passes is not None else None
            self._samples = math.nan if passes is None else passes
            recorded = self._gatherer.under_way
            # Libraries that step flat tensors took their dummy steps before `attach`.
            if not recorded and (self.parts is not None or not all_rates_zero(optimizer)):
                return
        except Exception as error:  # noqa: BLE001 - as in `_harmless`
            self.failed(error)
            return
        with self._harmless():
            if recorded:
                self.count.after(self.watching.all_of(optimizer), self._number, self.watching)
                self._owner.look(self)
            dummy = self.exchange is not None and self._is_dummy(optimizer)
            if recorded:
                self._finish(dummy=dummy)
            elif self.exchange is None:
                with undisturbed():  # only to find out whether it was a dummy step
                    step = unrecorded_step(optimizer, self._info(recorded=False))
                self._owner.add(self, step)
            elif dummy:  # unrecorded, so no message will say so
                self.schedule.take_back()

    def _is_dummy(self, optimizer: Optimizer) -> bool:
        """Whether every rate and every gradient on this rank was 0."""
        zero_rates = self.parts is None and all_rates_zero(optimizer)
        return bool(zero_rates) and not any_gradient(optimizer)

    def _info(self, *, recorded: bool = True) -> StepInfo:
        return StepInfo(
            step=self._number,
            time=time.time(),
            optimizer=self.name,
            samples=self._samples,
            run=self._owner.run,
            recorded=recorded,
        )

    def _finish(self, *, dummy: bool = False) -> None:
        """Send the figures of the step, if it was recorded."""
        if not self._gatherer.under_way:
            return
        with undisturbed():
            step = self._gatherer.send(self._info(), dummy=dummy)
        if step is not None:  # last, because it wakes a thread that competes for the GIL
            self._owner.add(self, step)

    def _record_skipped(self, parts: Parts) -> None:
        """Record the steps that were skipped without running a hook since the last one."""
        count = parts.skips()
        if count and self._passes is not None:
            self._passes.divide_by(count + 1)
        for number in self.schedule.skipped(count):
            self.count.taken += 1
            if not self.schedule.due(number) or self._silent:
                continue
            self._number, self._samples = number, math.nan
            with undisturbed():
                self._gatherer.catch_up()
                self._gatherer.add(parts, empty_pre_step())
            self._finish()

    def end(self) -> None:
        """Record the skipped steps after the last step, before the probe closes."""
        if self.parts is None or self._silent:
            return
        with self._harmless(), undisturbed():
            since = self._number
            for number in self.schedule.skipped(self.parts.skips()):
                if self.schedule.due(number):
                    self._number, self._samples = number, math.nan
                    step = self._gatherer.skipped(self.parts, self._info(), since)
                    if step is not None:
                        self._owner.add(self, step)

    def settle(self) -> None:
        """Uncount the last recorded step if all ranks agree that it was a dummy step."""
        if self.exchange is not None and self.exchange.last_was_dummy():
            self.schedule.take_back()

    def take_back(self) -> int:
        """Uncount a dummy step; by how much to decrement the numbers of the steps after it."""
        return self.schedule.take_back() if self.exchange is None else 0  # else see `settle`

    def _is_last(self, optimizer: Optimizer) -> bool:
        """Whether no pre-hook of the optimizer runs after ours, except those of other probes."""
        hooks = _pre_hooks(optimizer)
        for number in reversed(hooks):
            if number == self._handles[0].id:
                return True
            if not isinstance(getattr(hooks[number], "__self__", None), Hooks):
                return False
        return True

    def _in_capture(self) -> bool:
        """Whether a CUDA graph is being captured, which would replay our operations too."""
        try:
            self._captured = torch.cuda.is_current_stream_capturing()
        except RuntimeError:  # this torch was built without CUDA
            self._captured = False
        if self._captured and not self._warned_of_capture:
            self._warned_of_capture = True
            warn(
                f"the step of {self.name} is being captured into a CUDA graph: lrprobe neither "
                "records nor counts it, now or when it is replayed"
            )
        return self._captured

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Keep lrprobe's own errors out of the training loop."""
        try:
            yield
        except Warning:  # the user wants warnings to be errors
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Count steps that could not be recorded; warn about the first."""
        self.failures += 1
        if self.failures == 1:
            warn(
                f"step {self._number} of {self.name} could not be recorded: "
                f"{type(error).__name__}: {error}. Training continues. Further failures are only "
                "counted, and close() reports the count"
            )

    def _refresh(self, optimizer: Optimizer) -> None:
        """Follow added groups, replaced parameters and changed hyperparameters."""
        self._refresh_hyperparameters(self.watching.all_of(optimizer))
        found = self.watching.refresh(optimizer, self.judge_waiting)
        if self._passes is not None and self.parts is None and found is not None:
            self._passes.watch(found)

    def _refresh_hyperparameters(self, optimizer: Optimizer) -> None:
        """Update the run's description if a hyperparameter changed that is not scheduled."""
        moved = {key for key, count in self._changes.items() if count > _MAX_CHANGES}
        moved.update(_SCHEDULED)
        fixed = [_fixed(group, moved) for group in optimizer.param_groups]
        if fixed == self._fixed:
            return
        before, self._fixed = self._fixed, fixed
        pairs = list(zip(before, fixed, strict=False))
        self._changes.update(
            {key for old, new in pairs for key in old.keys() & new if old[key] != new[key]}
        )
        if before:
            self._owner.describe()

    def judge_waiting(self) -> None:
        """Judge the steps that wait, before others are judged that do not."""
        if self._local.deferred.waiting:
            self._owner.collect(wait=True)

    def forked(self) -> None:
        """In a forked child, forget the steps that wait: they are the parent's."""
        self._local.deferred.forget()

    def judge(self, step: Step) -> None:
        """Turn parameters whose rule does not explain their steps to ``measured``."""
        if self.exchange is not None:
            return  # all ranks do this together, at the next recorded step
        failed = judge_rules(step.rows, step.rule_errors())
        if not failed:
            return
        names = [step.rows[at].name for at in failed]
        for watched in self.watched:
            if watched.name in names:
                watched.rule = None
        why = next(iter(failed.values()))
        self.warn_unexplained(names, self.reasons.get(names[0], why))

    def warn_unexplained(self, names: Sequence[str], reason: str) -> None:
        """Warn about parameters that are measured from now on."""
        warn(
            f"the rule does not explain the steps of {type(self._optimizer()).__name__}: "
            f"{listed(names)} ({reason}). From now on, their effective rate is measured as "
            "|Δθ|/|g| on a sample. To reconstruct it, add a rule with lrprobe.register_rule"
        )


def _pre_hooks(optimizer: Optimizer) -> Any:
    hooks: Any = optimizer._optimizer_step_pre_hooks  # noqa: SLF001 - torch has no way to order them
    return hooks


def _fixed(group: Mapping[str, Any], moved: set[str]) -> dict[str, Any]:
    """The plain hyperparameters of a group, except those that ``moved`` says are scheduled."""
    return {
        key: value
        for key, value in group.items()
        if key not in moved and isinstance(value, bool | int | float | str | None)
    }


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether an outer step of this optimizer is running, further up the stack."""
    frame = inspect.currentframe()
    found = 0
    while frame is not None:
        if (
            frame.f_code.co_name == "wrapper"
            and frame.f_globals.get("__name__") == "torch.optim.optimizer"
            and frame.f_locals.get("self") is optimizer
        ):
            found += 1
        frame = frame.f_back
    return found > 1  # one of them is the current step


_SCHEDULED = ("lr", "initial_lr", "momentum", "betas")
_MAX_CHANGES = 3
"""A hyperparameter that changes more often counts as scheduled, to avoid many dataset parts."""
