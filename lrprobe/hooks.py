"""The hooks on one optimizer: which steps are recorded, and how a step becomes figures."""

from __future__ import annotations

import inspect
import math
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lrprobe.arguments import Every, Options, Step
from lrprobe.census import StepCount
from lrprobe.names import name_parameters, places
from lrprobe.passes import Passes
from lrprobe.rules import find_rule
from lrprobe.summary.pending import Pending, StepInfo
from lrprobe.summary.reading import keep_freed_memory
from lrprobe.summary.shards import Kept
from lrprobe.summary.snapshot import (
    Before,
    How,
    Watched,
    after,
    at_rest,
    before,
    copied,
    has_closure,
    moves,
    resting,
    tolerance,
)
from lrprobe.text import listed, warn

if TYPE_CHECKING:
    from lrprobe.distributed import Exchange, Merging


class Owner(Protocol):
    """What hooks know of the probe they belong to."""

    run: dict[str, Any]
    rank: int

    @property
    def waiting(self) -> bool:
        """Whether figures are still on their way to the host."""

    def add(self, hooks: Hooks, pending: Pending | Merging) -> None:
        """Take the figures of a step."""

    def collect(self) -> None:
        """Pass on what has arrived on the host."""

    def describe(self) -> None:
        """Read hyperparameters anew."""

    def look(self, hooks: Hooks) -> None:
        """See who steps what, and how the optimizer counts, after a step that is recorded."""


class Hooks:
    """The hooks on one optimizer: from its step to the figures of it."""

    def __init__(self, name: str, optimizer: Optimizer, options: Options, owner: Owner) -> None:
        """Start listening; ``owner`` gets the figures, and holds what describes the run."""
        self.name = name
        self.schedule = Schedule(options.every, options.step, optimizer)
        self.count = StepCount()
        self.watched: list[Watched] = []
        self._owner = owner
        self.options = options
        self._optimizer = weakref.ref(optimizer)
        self._passes = Passes(options.batch_size) if options.batch_size is not None else None
        self.recorded = -1
        """The last step recorded in this attempt."""
        self.failures = 0
        """Steps that could not be recorded."""
        self.exchange: Exchange | None = None
        """Where the parameters are spread over ranks."""
        self._silent = False
        self._depth = 0
        self._number = self.schedule.step
        self._kept: Before | Kept | None = None
        self._seen: list[list[tuple[int, int]]] = []
        """By group, id and elements of its parameters."""
        self._given: dict[int, str] = {}
        """id of each parameter to its name, which stays."""
        self._fixed: list[dict[str, Any]] = []
        self._changes: Counter[str] = Counter()
        self._cuda = torch.cuda.is_available()
        self._captured = self._told_of_capture = False
        keep_freed_memory()
        self._refresh(optimizer)
        if find_rule(type(optimizer)) is None and owner.rank == 0:
            warn(
                f"{type(optimizer).__name__} has no rule: its effective rate is measured as "
                "|Δθ|/|g| on a sample. lrprobe.register_rule teaches lrprobe an optimizer"
            )
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        # Before the user's own post-hooks, which may step a scheduler or drop the gradients, and
        # after the pre-hooks, also those to come, which may clip them.
        hooks: Any = optimizer._optimizer_step_post_hooks  # noqa: SLF001 - torch has no `prepend`
        hooks.move_to_end(self._handles[1].id, last=False)
        _LAST.add(optimizer, self._handles[0].id)

    def join(self, data_parallel: int, flat: Sequence[Tensor], *, silent: bool) -> None:
        """Take part among other ranks.

        Args:
            data_parallel: ranks, each with samples of its own.
            flat: parameters that autograd sees instead of the optimizer's (FSDP1).
            silent: whether rank 0 has all that is here.
        """
        self._silent = silent
        if self._passes is not None:
            self._passes.spread(data_parallel, flat)

    def passed(self, passes: int) -> None:
        """Tell of backward passes that are not torch's."""
        if self._passes is not None:
            self._passes.tell(passes)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        _LAST.remove(self._handles[0].id)
        for handle in self._handles:
            handle.remove()
        if self._passes is not None:
            self._passes.remove()

    def describe(self) -> dict[str, Any]:
        """Class and hyperparameters of the optimizer, as plain JSON values."""
        optimizer = self._optimizer()
        cls = type(optimizer)
        groups = [] if optimizer is None else optimizer.param_groups
        return {
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "groups": [
                {key: _plain(value) for key, value in group.items() if key not in _NOT_PLAIN}
                | {"dtypes": _dtypes(group["params"])}
                for group in groups
            ],
            "step_count": self.count.wrong,
        }

    def parameters(self) -> list[Tensor]:
        """Those that the optimizer has now."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return [param for group in groups for param in group["params"]]

    @property
    def kind(self) -> str:
        """Name of the optimizer's class."""
        return type(self._optimizer()).__name__

    def name_of(self, param: Tensor) -> str:
        """What a parameter is called."""
        return self._given.get(id(param), "")

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            _outside_graph(self._before_step, optimizer, args, kwargs)
        else:
            self._before_step(optimizer, args, kwargs)

    def _after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            _outside_graph(self._after_step, optimizer)
        else:
            self._after_step(optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._cuda and self._in_capture():
            return
        if self._depth and not _is_nested(optimizer):
            self._depth = 0  # an earlier step raised
        self._depth += 1
        if self._depth > 1:
            return  # a child's step calls its parent's, and both have hooks
        self._kept = None
        try:  # not `_harmless`, which costs more than all of this
            if self._owner.waiting:
                self._owner.collect()
            self.settle()
            self._number = self.schedule.next()
            due = self.schedule.due(self._number)
        except Warning:
            raise
        except Exception as error:  # noqa: BLE001 - as in `_harmless`
            self.failed(error)
            return
        if not due or self._silent:
            return
        self._cuda = torch.cuda.is_available()  # asked seldom, since it costs a microsecond
        if self._cuda and self._in_capture():
            return
        with self._harmless(), _undisturbed():
            self._refresh(optimizer)
            self.count.before(optimizer, self._number, self._given)
            closure = has_closure(args, kwargs)
            if self.exchange is None:
                self._kept = before(self.watched, optimizer, closure=closure)
            else:
                self._kept = Kept()  # the other ranks must not wait, whatever happens here
                self._kept = self.exchange.before(self.watched, optimizer, closure=closure)

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._captured:
            self._depth = 0
            return
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth = 0
        kept, self._kept = self._kept, None
        self.schedule.step = self._number
        self.count.taken += 1
        try:  # as above
            passes = self._passes.take() if self._passes is not None else None
            if kept is None and not at_rest(optimizer):
                return
        except Exception as error:  # noqa: BLE001 - as in `_harmless`
            self.failed(error)
            return
        with self._harmless():
            if kept is not None:
                self.count.after(optimizer, self._number, self._given)
                self._owner.look(self)
            info = StepInfo(
                step=self._number,
                time=time.time(),
                optimizer=self.name,
                samples=math.nan if passes is None else passes,
                run=self._owner.run,
                recorded=kept is not None,
            )
            with _undisturbed():
                pending = self._figures(optimizer, kept, info)
            del kept  # torch lets other threads go on while it frees memory
            if pending is not None:  # last: a thread begins that holds up this one
                self._owner.add(self, pending)

    def _figures(
        self, optimizer: Optimizer, kept: Before | Kept | None, info: StepInfo
    ) -> Pending | Merging | None:
        """Those of the step that was just taken."""
        if self.exchange is not None:
            return self._exchanged(optimizer, kept, info, self.exchange)
        if isinstance(kept, Before):
            how = How(self.options.sample, self.options.compile)
            raw = after(self.watched, optimizer, kept, how)
            return Pending(raw, self.watched, info)
        # Nothing is to be known of it but whether it was a step.
        return Pending(resting(optimizer), (), info)

    def _exchanged(
        self, optimizer: Optimizer, kept: Any, info: StepInfo, exchange: Exchange
    ) -> Merging | None:
        still = bool(at_rest(optimizer)) and not moves(optimizer)
        if kept is not None:
            return exchange.after(optimizer, kept, info, still=still)
        if still:  # no message will tell of it
            self.schedule.take_back()
        return None

    def settle(self) -> None:
        """Over ranks, take a recorded step back that was none: all do, before the next one."""
        if self.exchange is not None and self.exchange.none_taken():
            self.schedule.take_back()

    def take_back(self) -> int:
        """A record tells that its step was none; how much less those after it are numbered."""
        return self.schedule.take_back() if self.exchange is None else 0  # else see `settle`

    def _in_capture(self) -> bool:
        """Whether a CUDA graph is being captured, which would replay what is done now."""
        try:
            self._captured = torch.cuda.is_current_stream_capturing()
        except RuntimeError:  # this torch was built without CUDA
            self._captured = False
        if self._captured and not self._told_of_capture:
            self._told_of_capture = True
            warn(
                f"the step of {self.name} is being captured into a CUDA graph: nothing is recorded "
                "or counted in it, nor when it is replayed"
            )
        return self._captured

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """No error of ours reaches the training loop."""
        try:
            yield
        except Warning:  # the user wants warnings to be errors
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Tell of the first step that could not be recorded, and count them."""
        self.failures += 1
        if self.failures == 1:
            warn(
                f"step {self._number} of {self.name} could not be recorded: "
                f"{type(error).__name__}: {error}. Training goes on; more such steps are counted, "
                "and close() says how many"
            )

    def _refresh(self, optimizer: Optimizer) -> None:
        """Follow added groups and exchanged parameters."""
        groups = [group["params"] for group in optimizer.param_groups]
        seen = [[(id(param), _numel(param)) for param in params] for params in groups]
        self._refresh_hyperparameters(optimizer)
        if seen == self._seen:
            return
        self._seen = seen
        gone = self._given.keys() - {at for params in seen for at, _ in params}
        self.options.names.forget(gone)
        given = {at: name for at, name in self._given.items() if at not in gone}
        named = list(name_parameters(optimizer, self.options.names.now(given)))
        self._given = {id(param): name for _, name, param in named}
        known = {(w.name, w.ref.id, w.numel): w for w in self.watched}
        rule = find_rule(type(optimizer))
        self.watched = []
        found = places(optimizer)
        for (group, name, param), place in zip(named, found, strict=True):
            numel = _numel(param)
            if numel < 0 or not self.options.chosen.takes(name):
                continue
            watched = known.get((name, id(param), numel))
            if watched is None:
                watched = Watched(
                    name=name,
                    group=group,
                    ref=place,
                    rule=rule,
                    tracked=draw(name, numel, self.options.track),
                    numel=numel,
                    initial_lr=_initial_lr(optimizer.param_groups[group]),
                )
            watched.group, watched.ref = group, place
            self.watched.append(watched)
        if self._passes is not None:
            self._passes.watch(found)

    def _refresh_hyperparameters(self, optimizer: Optimizer) -> None:
        """Describe the run anew where one has changed that nothing moves from step to step."""
        moved = {key for key, count in self._changes.items() if count > _MOST_CHANGES}
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

    def judge(self, pending: Pending | Merging) -> None:
        """Parameters whose rule does not explain their steps become measured."""
        if not isinstance(pending, Pending):
            return  # all ranks do so together, at the next recorded step
        failed = {pending.watched[i]: why for i, why in pending.errors.items()}
        if not pending.skipped:
            errors = pending.reconstruction_errors()
            for watched, error in zip(pending.watched, errors, strict=True):
                param = watched.ref()
                if watched.rule is None or param is None or math.isnan(error):
                    continue
                wrong = error > tolerance(param.dtype, watched.rule)
                watched.bad_steps = watched.bad_steps + 1 if wrong else 0
                if watched.bad_steps >= 2:
                    failed[watched] = f"error {error:.2g} of the step really taken"
        for watched in failed:
            watched.rule = None
        if failed:
            self.tell_unexplained([w.name for w in failed], next(iter(failed.values())))

    def tell_unexplained(self, names: Sequence[str], reason: str) -> None:
        """Warn of parameters that are measured from now on."""
        warn(
            f"the rule does not explain the steps of {type(self._optimizer()).__name__}: "
            f"{listed(names)} ({reason}). From now on the effective rate there is measured "
            "as |Δθ|/|g| on a sample; lrprobe.register_rule teaches lrprobe an optimizer"
        )


class _Last:
    """Keeps pre-hooks the last of their optimizers, however late others are registered.

    By a hook of all optimizers, which runs before those of one, and is there while it is needed.
    """

    def __init__(self) -> None:
        self._optimizers: dict[int, tuple[int, weakref.finalize[..., Optimizer]]] = {}
        """Pre-hook to the id of its optimizer, and what forgets it with that."""
        self._hooks: dict[int, list[int]] = {}
        """id of an optimizer to its pre-hooks."""
        self._handle: Any = None

    def add(self, optimizer: Optimizer, hook: int) -> None:
        forget = weakref.finalize(optimizer, self.discard, hook)
        forget.atexit = False
        self._optimizers[hook] = id(optimizer), forget
        self._hooks.setdefault(id(optimizer), []).append(hook)
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._run)

    def discard(self, hook: int) -> None:
        if hook not in self._optimizers:
            return
        optimizer, forget = self._optimizers.pop(hook)
        forget.detach()
        self._hooks[optimizer].remove(hook)
        if not self._hooks[optimizer]:
            del self._hooks[optimizer]

    def remove(self, hook: int) -> None:
        """As ``discard``; not for a finalizer, which may run while the hooks are gone through."""
        self.discard(hook)
        if not self._optimizers and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _run(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for hook in self._hooks.get(id(optimizer), ()):
            hooks: Any = optimizer._optimizer_step_pre_hooks  # noqa: SLF001 - as above
            if hook in hooks:  # or it is of another optimizer, which had the same id
                hooks.move_to_end(hook)


_LAST = _Last()


class Schedule:
    """Counts the steps of one optimizer, and says which are recorded."""

    def __init__(self, every: Every, step: Step, optimizer: Optimizer) -> None:
        self._every = every
        self._source = step if callable(step) else None
        self.step = _steps_taken(optimizer) if step is None or callable(step) else int(step)
        self._begins = True

    def next(self) -> int:
        """The number of the step that is about to be taken."""
        return int(self._source()) if self._source is not None else self.step + 1

    def take_back(self) -> int:
        """The last step was none; how much less those after it are numbered."""
        if self._source is not None:
            return 0
        self.step -= 1
        return 1

    def due(self, step: int) -> bool:
        """Whether that step is recorded."""
        if callable(self._every):
            return bool(self._every(step))
        begins, self._begins = self._begins, False  # also that of a resumed run
        return begins or step == 1 or step % self._every == 0

    def __repr__(self) -> str:
        return "step chosen" if callable(self._every) else f"{self._every} steps"


def _fixed(group: Mapping[str, Any], moved: set[str]) -> dict[str, Any]:
    """The hyperparameters but for those that move, as far as they can be compared at once."""
    return {
        key: value
        for key, value in group.items()
        if key not in moved and isinstance(value, bool | int | float | str | None)
    }


def _steps_taken(optimizer: Optimizer) -> int:
    states = (state for state in optimizer.state.values() if isinstance(state, Mapping))
    steps = [state["step"] for state in states if "step" in state]
    return max(map(_as_count, steps), default=0)


def _as_count(step: Any) -> int:
    try:
        return int(step)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return 0  # no count that can be gone on from


def _numel(param: Tensor) -> int:
    """Real elements (a complex one counts twice); −1 of a lazy parameter that has none yet."""
    if is_lazy(param):
        return -1
    return param.numel() * (2 if param.is_complex() else 1)


def _initial_lr(group: Mapping[str, Any]) -> Any:
    rate = group.get("initial_lr", group.get("lr"))
    rate = math.nan if rate is None else rate  # Transformers' Adafactor finds its own
    return copied(rate)


def draw(name: str, numel: int, count: int) -> Tensor | None:
    """Flat positions of the elements to track, the same in every run: (count,) or fewer."""
    if not count or not numel:
        return None
    generator = torch.Generator("cpu").manual_seed(
        zlib.crc32(name.encode("utf-8", "backslashreplace"))
    )
    if numel <= 1 << 16:
        drawn = torch.randperm(numel, generator=generator, device="cpu")[:count]
    else:
        drawn = torch.randint(numel, (2 * count,), generator=generator, device="cpu")
        drawn = torch.unique(drawn)
        drawn = drawn[torch.randperm(len(drawn), generator=generator, device="cpu")[:count]]
    return torch.sort(drawn)[0]


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer is under way further up the stack."""
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
    return found > 1  # the first is the one that has just begun


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The user's autograd and autocast settings do not reach the figures."""
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@_disable_dynamo
def _outside_graph(function: Callable[..., None], *args: Any) -> None:
    function(*args)


_SCHEDULED = ("lr", "initial_lr", "momentum", "betas")
_MOST_CHANGES = 3
"""A hyperparameter that changes more often is scheduled too, or a count of the optimizer's own.
Each description of the run begins a new part of a dataset."""
_NOT_PLAIN = ("params", "param_names")


def _dtypes(params: Sequence[Tensor]) -> list[str]:
    """Those of some parameters, by name."""
    return sorted({str(param.dtype).removeprefix("torch.") for param in params})


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON holds it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)
