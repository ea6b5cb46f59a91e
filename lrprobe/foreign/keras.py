"""Keras 3: presents the variables of its optimizers under the names that the rules read.

Keras has no step hooks. So the model's ``train_function`` is replaced, for one call at a time, by
one that also reads the model's variables before and after it; a ``Tap`` captures the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import keras
import torch
from torch import Tensor

from lrprobe.foreign.standin import Parameter, StandIn
from lrprobe.foreign.tap import EagerTap, GraphTap, Tap, tensor
from lrprobe.hooks import Hooks

_STATE: dict[str, dict[str, str]] = {
    "Adadelta": {"square_avg": "_accumulated_grads", "acc_delta": "_accumulated_delta_vars"},
    "Adagrad": {"sum": "_accumulators"},
    "Adam": {
        "exp_avg": "_momentums",
        "exp_avg_sq": "_velocities",
        "max_exp_avg_sq": "_velocity_hats",
    },
    "Adamax": {"exp_avg": "_m", "exp_inf": "_u"},
    "Lion": {"exp_avg": "_momentums"},
    "Nadam": {"exp_avg": "_momentums", "exp_avg_sq": "_velocities"},
    "RMSprop": {
        "square_avg": "_velocities",
        "grad_avg": "_average_gradients",
        "velocity": "_momentums",
    },
    "SGD": {"velocity": "momentums"},
}
"""Class to {the rule's name of a state entry: the attribute that holds its variables}."""

_ONE_NUMBER = {"Nadam": {"mu_product": "_u_product"}}
"""The same for state entries that all parameters share."""

_OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Adadelta": lambda o: {"rho": o.rho, "eps": o.epsilon},
    "Adagrad": lambda o: {"lr_decay": 0.0, "eps": o.epsilon},
    "Adam": lambda o: {"betas": (o.beta_1, o.beta_2), "eps": o.epsilon, "amsgrad": o.amsgrad},
    "Adamax": lambda o: {"betas": (o.beta_1, o.beta_2), "eps": o.epsilon},
    "Lion": lambda o: {"betas": (o.beta_1, o.beta_2)},
    "Nadam": lambda o: {
        "betas": (o.beta_1, o.beta_2),
        "eps": o.epsilon,
        "momentum_decay": 1.0,
    },
    "RMSprop": lambda o: {"eps": o.epsilon, "momentum": o.momentum, "centered": o.centered},
    "SGD": lambda o: {"momentum": o.momentum, "nesterov": o.nesterov},
}
"""Class to the hyperparameters that the rule reads."""


def optimizers_in(optimizer: Any) -> list[Any]:
    """The optimizers that take steps, inside a ``LossScaleOptimizer`` or ``MultiOptimizer``."""
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return optimizers_in(inner)
    several = getattr(optimizer, "optimizers", None)
    return [optimizer] if several is None else [one for one in several if one.built]


class KerasOptimizer(StandIn):
    """Stands in for one built Keras optimizer; created by ``stand_in``."""

    def __init__(self, optimizer: Any) -> None:
        """Read what does not change; does not modify the optimizer."""
        self.host = optimizer
        kinds = (c.__name__ for c in type(optimizer).__mro__ if c.__module__.startswith("keras."))
        self._kind = next((kind for kind in kinds if kind in _OPTIONS), "")
        options = _OPTIONS.get(self._kind, lambda _: {})(optimizer)
        self.variables = [
            v
            for v in optimizer._trainable_variables  # noqa: SLF001 - Keras has no public name for it
            if not v.overwrite_with_gradient
        ]
        self._index = [optimizer._get_variable_index(v) for v in self.variables]  # noqa: SLF001
        parameters = [
            Parameter(v.path, value := tensor(v), {**options, **self._shared(v, value.dtype)})
            for v in self.variables
        ]
        super().__init__(parameters, self.lr())

    def _shared(self, variable: Any, dtype: torch.dtype) -> dict[str, Any]:
        decay = self.host.weight_decay
        if decay is not None:
            # Pass what Keras passes, because it caches the answer by argument.
            asked = variable.value if keras.backend.backend() == "tensorflow" else variable
            decay = decay if self.host._use_weight_decay(asked) else 0.0  # noqa: SLF001
        return {
            "weight_decay": decay or 0.0,
            "decoupled_weight_decay": True,
            "capturable": True,  # Keras computes bias corrections in the variable's dtype
            "dtype": str(dtype).removeprefix("torch."),
        }

    @property
    def iterations(self) -> int:
        """Calls so far, including those that only accumulate a gradient."""
        return int(self.host._iterations.numpy())  # noqa: SLF001 - `iterations` counts steps

    def steps(self, calls: int) -> int:
        """The number of steps in so many calls."""
        return int(calls // (self.host.gradient_accumulation_steps or 1))

    def lr(self, calls_later: int = 0) -> float:
        """The rate of the next call, or of the one that many calls later."""
        rate = self.host._learning_rate  # noqa: SLF001 - `learning_rate` is for the next call only
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            rate = rate(self.host._iterations + calls_later)  # noqa: SLF001
        elif not isinstance(rate, keras.Variable):
            rate = self.host.learning_rate
        return float(keras.ops.convert_to_numpy(rate))

    def tap(self, at: Sequence[int], calls: int, *, traced: bool) -> Tap:
        """Create a tap on the parameters at these positions, for the last of ``calls`` steps."""
        host, indices = self.host, [self._index[i] for i in at]
        overwritten = host.use_ema and host.ema_overwrite_frequency
        followed = {
            self._index[i] for i in at if overwritten or self.variables[i].constraint is not None
        }
        if not traced:
            return EagerTap(host, followed)
        return GraphTap(host, indices, followed, starts=calls > 1)

    def show_before(self, at: Sequence[int], instead: Mapping[int, Tensor] | None = None) -> None:
        """Show parameters and state at these positions before a step.

        ``instead`` has the parameters if the step is over, as the last of several in one call. The
        state before it is then unknown, and shown as NaN.
        """
        for i in at:
            if instead is None:
                self.show(i, tensor(self.variables[i]), state=self._state(i))
                continue
            value = instead.get(self._index[i])
            value = tensor(self.variables[i]) if value is None else value
            unknown = torch.full((), torch.nan, dtype=value.dtype).expand(value.shape)
            self.show(i, value, state=dict.fromkeys(self._state(i), unknown))

    def show_step(self, at: Sequence[int], tap: Tap, lr: float, step: int) -> None:
        """Show parameters, gradients and state at these positions after a step."""
        for group in self.param_groups:
            group["lr"] = lr
        numbers = _ONE_NUMBER.get(self._kind, {}).items()
        shared = {name: tensor(getattr(self.host, attribute)) for name, attribute in numbers}
        for i in at:
            index = self._index[i]
            value = tap.after.get(index)
            value = tensor(self.variables[i]) if value is None else value
            count = torch.tensor(step, dtype=value.dtype)
            self.show(i, value, tap.grads.get(index), {"step": count, **shared, **self._state(i)})

    def _state(self, at: int) -> dict[str, Tensor]:
        """The current state of a parameter, under the names of its rule."""
        return {
            name: tensor(found[self._index[at]])
            for name, attribute in _STATE.get(self._kind, {}).items()
            if (found := getattr(self.host, attribute, None))
        }


def stand_in(optimizer: Any) -> KerasOptimizer:
    """Create a stand-in for a Keras optimizer, with its class names, by which rules are found."""
    cls: Any = type(optimizer)
    return _stand_in_class(cls)(optimizer)


@cache
def _stand_in_class(cls: Any) -> type[KerasOptimizer]:
    """A class with the name of a Keras class, and with parents named like its parents."""
    bases = [base for base in cls.__bases__ if issubclass(base, keras.optimizers.Optimizer)]
    parents = [_stand_in_class(base) for base in bases]
    return type(cls.__name__, (*parents,) or (KerasOptimizer,), {"__module__": cls.__module__})


def built(model: Any) -> bool:
    """Whether the variables of the model and of its optimizer exist.

    With TensorFlow, Keras creates the optimizer's variables inside the first step, otherwise before
    it. If the model's exist, this creates the optimizer's in the same way.
    """
    if not all(layer.built for layer in model._flatten_layers()):  # noqa: SLF001 - as Keras asks
        return False
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return True


class Steps:
    """Runs the hooks around the steps of a model's training."""

    def __init__(self, model: Any) -> None:
        """Create stand-ins for the optimizers of a built model; does not modify the model.

        Raises:
            NotImplementedError: if the steps of this model cannot be recorded.
        """
        backend = keras.backend.backend()
        tensorflow = backend == "tensorflow"
        if tensorflow and model.distribute_strategy.num_replicas_in_sync > 1:
            raise NotImplementedError("the model is trained under a tf.distribute strategy")
        self._model = model
        self._calls = int(model.steps_per_execution)
        self._traced = tensorflow and not model.run_eagerly
        self._once: Callable[[Any], Any] | None = None
        self._made: Callable[[Any], Any] = model.train_function
        self._made_of: Callable[[Any], Any] | None = None
        optimizers = optimizers_in(model.optimizer)
        if self._calls > 1 and any(o.gradient_accumulation_steps for o in optimizers):
            raise NotImplementedError(
                "steps_per_execution is combined with gradient_accumulation_steps"
            )
        self._counts = (  # each call steps each optimizer once, so the count need not be read
            type(model).train_step is keras.Model.train_step
            and self._calls == 1
            and not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        )
        self.stand_ins = [stand_in(optimizer) for optimizer in optimizers]
        self.number = 0
        """The number of the current step."""
        self._tracked: list[_TrackedOptimizer] = []

    def watch(self, hooks: Sequence[Hooks]) -> None:
        """Connect hooks to the stand-ins, one for each of ``stand_ins``."""
        for one, its in zip(self.stand_ins, hooks, strict=True):
            watched = {id(w.place()) for w in its.watched}
            at = [i for i, param in enumerate(one.shown) if id(param) in watched]
            tap = one.tap(at, self._calls, traced=self._traced)
            self._tracked.append(_TrackedOptimizer(one, its, at, tap))

    def next(self) -> None:
        """Intercept the next call of the model's ``train_function``, which then restores it."""
        model = self._model
        if model.train_function is None:  # in the user's own loop
            model.make_train_function()
        plain = model.train_function
        if plain is self._once:  # it was not called
            return

        def once(data: Any) -> Any:
            model.train_function = plain
            return self._take(plain, data)

        self._once = model.train_function = once

    def _take(self, plain: Callable[[Any], Any], data: Any) -> Any:
        self._once = None
        with self._harmless():
            for tracked in self._tracked:
                self._begin(tracked)
        due = [tracked for tracked in self._tracked if tracked.due]
        with ExitStack() as stack:
            function = plain
            with self._harmless():
                function = self._tapped_function(plain) if due else plain
                for tracked in due:
                    stack.enter_context(tracked.tap.open())
            result = function(data)
        with self._harmless():
            for tracked in self._tracked:
                self._end(tracked)
        return result

    def _begin(self, tracked: _TrackedOptimizer) -> None:
        one, hooks = tracked.stand_in, tracked.hooks
        tracked.due = False
        done = one.iterations if tracked.done is None or not self._counts else tracked.done
        tracked.until = done + self._calls
        tracked.step = one.steps(tracked.until)
        if tracked.step == one.steps(tracked.until - self._calls):  # it only accumulates a gradient
            tracked.step = 0
            return
        self.number = tracked.step
        tracked.due = bool(tracked.at) and hooks.schedule.due(hooks.schedule.next())
        if tracked.due:
            one.show_before(tracked.at)
        if self._calls == 1 or not tracked.due:  # else after the call, in `_end`
            one.before()

    def _end(self, tracked: _TrackedOptimizer) -> None:
        one, tap = tracked.stand_in, tracked.tap
        tracked.done = tracked.until if self._counts and not tracked.due else one.iterations
        if not tracked.step or tracked.done != tracked.until:  # skipped: a non-finite gradient
            return
        if tracked.due:
            tap.collect()
            if self._calls > 1:
                self.number = tracked.step
                one.show_before(tracked.at, tap.before)
                one.before()
            one.show_step(tracked.at, tap, one.lr(-1), tracked.step)
        tracked.hooks.add_passes(one.host.gradient_accumulation_steps or 1)
        one.after()
        if tracked.due:
            one.forget(tracked.at)
            tap.clear()

    def _tapped_function(self, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The model's function, or a copy of it that TensorFlow traces with the taps."""
        if not self._traced:
            return plain
        if self._made_of is not plain:
            try:
                self._model.make_train_function(force=True)
                self._made, self._made_of = self._model.train_function, plain
            finally:
                self._model.train_function = plain
        return self._made

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Keep lrprobe's own errors out of the training."""
        try:
            yield
        except Warning:  # the user wants warnings to be errors
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            for tracked in self._tracked:
                tracked.hooks.failed(error)
                tracked.step, tracked.due, tracked.done = 0, False, None


@dataclass(slots=True)
class _TrackedOptimizer:
    """One recorded Keras optimizer, and what its next call will do.

    Attributes:
        stand_in, hooks: of this optimizer.
        at: positions of the recorded parameters.
        tap: captures its gradients.
        done, until: its iterations so far, and after this call.
        step: number of its step in this call; 0 if it takes none.
        due: whether that step is recorded.
    """

    stand_in: KerasOptimizer
    hooks: Hooks
    at: Sequence[int]
    tap: Tap
    done: int | None = None
    until: int = 0
    step: int = 0
    due: bool = False
