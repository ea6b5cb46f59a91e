"""Gradients out of a Keras optimizer's step, as it used them: unscaled, averaged and clipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import keras
import torch
from torch import Tensor


class Tap(ABC):
    """Captures the inputs of one step of one optimizer, by its variable indices.

    Attributes:
        grads: the gradients that it used.
        before: parameters before the step, if the call took more than this step.
        after: parameters right after the step, if something else followed it: a constraint, or the
            average of ``ema_overwrite_frequency``.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._error: Exception | None = None
        self.clear()

    @abstractmethod
    def open(self) -> AbstractContextManager[None]:
        """Capture while a step is taken, or traced."""

    def collect(self) -> None:
        """Read what was captured.

        Raises:
            Exception: whatever went wrong while capturing.
        """
        if self._error is not None:
            raise self._error

    def clear(self) -> None:
        """Drop all references to a step."""
        self.grads: dict[int, Tensor] = {}
        self.before: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}

    def _try(self, look: Callable[..., None], *args: Any) -> None:
        try:
            look(*args)
        except Exception as error:  # noqa: BLE001 - the training goes on
            self._error = error


class EagerTap(Tap):
    """For steps that run in Python: the gradients exist, and are not copied."""

    def __init__(self, optimizer: Any, followed: Collection[int]) -> None:
        super().__init__(optimizer)
        self._followed = followed

    @contextmanager
    def open(self) -> Iterator[None]:
        """Intercept the update itself, which receives the gradients as it uses them."""
        self._error = None
        update = self._optimizer._backend_update_step  # noqa: SLF001 - Keras has no hook there

        def looked_at(grads: Sequence[Any], variables: Sequence[Any], lr: Any) -> None:
            self._try(self._gradients, grads, variables)
            update(grads, variables, lr)
            self._try(self._parameters, variables)

        with _replaced(self._optimizer, "_backend_update_step", looked_at):
            yield

    def _gradients(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        for grad, variable in zip(grads, variables, strict=True):
            self.grads[self._optimizer._get_variable_index(variable)] = tensor(grad)  # noqa: SLF001

    def _parameters(self, variables: Sequence[Any]) -> None:
        for variable in variables:
            index = self._optimizer._get_variable_index(variable)  # noqa: SLF001
            if index in self._followed:
                self.after[index] = tensor(variable).clone()


class GraphTap(Tap):
    """Where TensorFlow traces the step once: variables of our own take what the graph has.

    They take the gradients as they come in, and what the optimizer makes of them before it uses
    them is done again outside: another use of a product inside, such as a gradient times a factor
    of clipping, would keep XLA from rounding it once together with the sum that follows.
    """

    def __init__(
        self,
        optimizer: Any,
        wanted: Collection[int],
        followed: Collection[int],
        *,
        starts: bool = False,
    ) -> None:
        """Make the variables: as large as the parameters.

        Args:
            optimizer: built.
            wanted: indices of variables whose gradients are asked for.
            followed: those whose parameters are taken right after the update.
            starts: whether parameters are taken right before it.
        """
        super().__init__(optimizer)
        variables = optimizer._trainable_variables  # noqa: SLF001 - it has no public name
        if optimizer.global_clipnorm:  # a norm over all of them
            wanted = range(len(variables))
        self._grads = {i: _room(variables[i]) for i in wanted}
        self._befores = {i: _room(variables[i]) for i in wanted} if starts else {}
        self._afters = {i: _room(variables[i]) for i in followed}
        self._present: set[int] = set()

    def clear(self) -> None:
        """Keep nothing alive but the variables."""
        super().clear()
        self._accumulated: dict[int, Any] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Look on while the step is traced; a step that has been traced needs no looking on."""
        optimizer = self._optimizer
        if optimizer.gradient_accumulation_steps:
            sums = optimizer._accumulated_gradients  # noqa: SLF001
            self._accumulated = {i: _value(sums[i]) for i in self._grads}
        apply, update = optimizer.apply, optimizer._backend_update_step  # noqa: SLF001

        def applied(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            self._try(self._given, grads, trainable_variables)
            return apply(grads, trainable_variables)

        def updated(grads: Sequence[Any], variables: Sequence[Any], lr: Any) -> None:
            update(grads, variables, lr)
            self._try(self._left, variables)

        with ExitStack() as stack:
            stack.enter_context(_replaced(optimizer, "apply", applied))
            if self._afters:
                stack.enter_context(_replaced(optimizer, "_backend_update_step", updated))
            yield

    def collect(self) -> None:
        """Read the variables, and do with the gradients what the optimizer did.

        Raises:
            Exception: what went wrong while the step was traced.
        """
        super().collect()
        optimizer, at = self._optimizer, sorted(self._present)
        grads = [_value(self._grads[i]) for i in at]
        scale, steps = optimizer.loss_scale_factor, optimizer.gradient_accumulation_steps
        if scale is not None:
            grads = [grad / scale for grad in grads]
        if steps:
            grads = [
                (grad + self._accumulated[i]) / steps for i, grad in zip(at, grads, strict=True)
            ]
        grads = optimizer._clip_gradients(grads)  # noqa: SLF001
        self.grads = {i: tensor(grad) for i, grad in zip(at, grads, strict=True)}
        self.before = {i: tensor(room) for i, room in self._befores.items()}
        self.after = {i: tensor(room) for i, room in self._afters.items()}

    def _given(self, grads: Sequence[Any], variables: Any) -> None:
        import tensorflow as tf

        optimizer = self._optimizer
        variables = optimizer._trainable_variables if variables is None else variables  # noqa: SLF001
        for grad, variable in zip(grads, variables, strict=True):
            index = optimizer._get_variable_index(variable)  # noqa: SLF001
            if grad is None or index not in self._grads:
                continue
            self._present.add(index)
            room = self._grads[index]
            room.assign(tf.cast(tf.convert_to_tensor(grad), room.dtype))
            if index in self._befores:
                self._befores[index].assign(_value(variable))

    def _left(self, variables: Sequence[Any]) -> None:
        for variable in variables:
            index = self._optimizer._get_variable_index(variable)  # noqa: SLF001
            if index in self._afters:
                self._afters[index].assign(_value(variable))


def tensor(value: Any) -> Tensor:
    """A variable or tensor of Keras's backend as one of torch's, in the same memory."""
    if isinstance(value, keras.Variable):
        value = value.value
    if isinstance(value, Tensor):
        return value.detach()
    import tensorflow as tf

    return torch.utils.dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(_value(value)))


def _value(variable: Any) -> Any:
    """A TensorFlow variable, or Keras's around it, as a tensor."""
    import tensorflow as tf

    return tf.convert_to_tensor(variable)


def _room(variable: Any) -> Any:
    """A TensorFlow variable like this one, with zeros."""
    import tensorflow as tf

    return tf.Variable(tf.zeros_like(_value(variable)), trainable=False)


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """An object has a method of ours; past its ``__setattr__``, which would track it."""
    attributes = vars(owner)
    there = name in attributes
    old = attributes.get(name)
    attributes[name] = function
    try:
        yield
    finally:
        if there:
            attributes[name] = old
        else:
            del attributes[name]
