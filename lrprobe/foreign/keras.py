"""Keras 3: the variables of its optimizers, under the names that the rules read.

Keras has no hooks on a step. So the function that takes one is replaced, for one call at a time,
and looks at the model's variables around it; the gradients come from a ``Tap``.
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
"""Class to the rule's name of a state, and the attribute with its variables."""

_ONE_NUMBER = {"Nadam": {"mu_product": "_u_product"}}
"""The same, where all parameters share one."""

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
    """Those that step: what a ``LossScaleOptimizer`` or a ``MultiOptimizer`` is made of."""
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return optimizers_in(inner)
    several = getattr(optimizer, "optimizers", None)
    return [optimizer] if several is None else [one for one in several if one.built]


class KerasOptimizer(StandIn):
    """Stands in for one optimizer of Keras, which is built. Made by ``stand_in``."""

    def __init__(self, optimizer: Any) -> None:
        """Read what does not change; nothing is set on the optimizer."""
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
            # Asked as Keras asks, which remembers the answer.
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
        """Calls so far, those that only accumulate a gradient among them."""
        return int(self.host._iterations.numpy())  # noqa: SLF001 - `iterations` is of steps

    def steps(self, calls: int) -> int:
        """How many steps so many calls make."""
        return int(calls // (self.host.gradient_accumulation_steps or 1))

    def lr(self, calls_later: int = 0) -> float:
        """The rate of the next call, or of one before or after it."""
        rate = self.host._learning_rate  # noqa: SLF001 - `learning_rate` is for the next call only
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            rate = rate(self.host._iterations + calls_later)  # noqa: SLF001
        elif not isinstance(rate, keras.Variable):
            rate = self.host.learning_rate
        return float(keras.ops.convert_to_numpy(rate))

    def tap(self, at: Sequence[int], calls: int, *, traced: bool) -> Tap:
        """For steps of these positions, the last of so many that one call of a function takes."""
        host, indices = self.host, [self._index[i] for i in at]
        overwritten = host.use_ema and host.ema_overwrite_frequency
        followed = {
            self._index[i] for i in at if overwritten or self.variables[i].constraint is not None
        }
        if not traced:
            return EagerTap(host, followed)
        return GraphTap(host, indices, followed, starts=calls > 1)

    def show_before(self, at: Sequence[int], instead: Mapping[int, Tensor] | None = None) -> None:
        """Parameters and state at these positions, before a step.

        ``instead`` has the parameters where the step was taken already, and others before it in the
        same call: what the state was is not known then.
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
        """What the step at these positions left behind."""
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
        """What the optimizer holds of a parameter now, under the names of its rule."""
        return {
            name: tensor(found[self._index[at]])
            for name, attribute in _STATE.get(self._kind, {}).items()
            if (found := getattr(self.host, attribute, None))
        }


def stand_in(optimizer: Any) -> KerasOptimizer:
    """Stand in for an optimizer of Keras, under its name: rules are found as for torch's."""
    cls: Any = type(optimizer)
    return _like(cls)(optimizer)


@cache
def _like(cls: Any) -> type[KerasOptimizer]:
    """Named like a class of Keras's, with parents that are named like its parents."""
    parents = [_like(p) for p in cls.__bases__ if issubclass(p, keras.optimizers.Optimizer)]
    return type(cls.__name__, (*parents,) or (KerasOptimizer,), {"__module__": cls.__module__})


def built(model: Any) -> bool:
    """Whether the model's variables and its optimizer's are there.

    With TensorFlow Keras makes the optimizer's inside the first step, else before it. Where the
    model's are there, the optimizer's are made here, as Keras makes them.
    """
    if not all(layer.built for layer in model._flatten_layers()):  # noqa: SLF001 - as Keras asks
        return False
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return True


class Steps:
    """Takes the steps of a model's training, in the sight of hooks."""

    def __init__(self, model: Any) -> None:
        """Stand in for the optimizers of a model that is built; the model is left as it is.

        Raises:
            NotImplementedError: if a step cannot be looked at.
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
            raise NotImplementedError("steps_per_execution with gradient_accumulation_steps")
        self._counts = (  # each call is one of each optimizer: no variable need be read to know
            type(model).train_step is keras.Model.train_step
            and self._calls == 1
            and not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        )
        self.stand_ins = [stand_in(optimizer) for optimizer in optimizers]
        self.number = 0
        """Of the step that is about to be taken."""
        self._tracked: list[_TrackedOptimizer] = []

    def watch(self, hooks: Sequence[Hooks]) -> None:
        """Let them see the steps, one for each of ``stand_ins``."""
        for one, its in zip(self.stand_ins, hooks, strict=True):
            watched = {id(w.place()) for w in its.watched}
            at = [i for i, param in enumerate(one.shown) if id(param) in watched]
            tap = one.tap(at, self._calls, traced=self._traced)
            self._tracked.append(_TrackedOptimizer(one, its, at, tap))

    def next(self) -> None:
        """Look at the next call of the model's ``train_function``, which is put back by it."""
        model = self._model
        if model.train_function is None:  # in a loop of the user's own
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
        with ExitStack() as looking:
            function = plain
            with self._harmless():
                function = self._looked_at(plain) if due else plain
                for tracked in due:
                    looking.enter_context(tracked.tap.open())
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
        if tracked.step == one.steps(tracked.until - self._calls):  # a gradient is added to others
            tracked.step = 0
            return
        self.number = tracked.step
        tracked.due = bool(tracked.at) and hooks.schedule.due(hooks.schedule.next())
        if tracked.due:
            one.show_before(tracked.at)
        if self._calls == 1 or not tracked.due:  # else they are told when it is over
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

    def _looked_at(self, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The model's function, or one more like it, which is traced while we look on."""
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
        """No error of ours reaches the training."""
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
