"""Captures the gradients that a Keras optimizer uses in a step: unscaled, averaged and clipped."""

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
        """Capture while a step runs or is traced."""

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

    def _try(self, capture: Callable[..., None], *args: Any) -> None:
        try:
            capture(*args)
        except Exception as error:  # noqa: BLE001 - the training goes on
            self._error = error


class EagerTap(Tap):
    """For steps that run in Python; it references the gradients without copying them."""

    def __init__(self, optimizer: Any, followed: Collection[int]) -> None:
        super().__init__(optimizer)
        self._followed = followed

    @contextmanager
    def open(self) -> Iterator[None]:
        """Intercept the update itself, which receives the gradients as it uses them."""
        self._error = None
        update = self._optimizer._backend_update_step  # noqa: SLF001 - Keras has no hook there

        def captured_update(grads: Sequence[Any], variables: Sequence[Any], lr: Any) -> None:
            self._try(self._gradients, grads, variables)
            update(grads, variables, lr)
            self._try(self._parameters, variables)

        with _replaced(self._optimizer, "_backend_update_step", captured_update):
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
    """For steps that TensorFlow traces: assignments in the graph store values in own variables.

    They store the incoming gradients. Unscaling, averaging and clipping are repeated outside the
    graph. A second use of such a product inside the graph would prevent XLA from fusing it with the
    following sum, and so would change the rounding of the training.
    """

    def __init__(
        self,
        optimizer: Any,
        wanted: Collection[int],
        followed: Collection[int],
        *,
        starts: bool = False,
    ) -> None:
        """Create the variables, with the shapes of the parameters.

        Args:
            optimizer: a built optimizer.
            wanted: indices of the variables whose gradients to capture.
            followed: indices of the variables to capture right after the update.
            starts: whether to capture variables right before the update too.
        """
        super().__init__(optimizer)
        variables = optimizer._trainable_variables  # noqa: SLF001 - it has no public name
        if optimizer.global_clipnorm:  # the norm needs all gradients
            wanted = range(len(variables))
        self._grads = {i: _zero_variable(variables[i]) for i in wanted}
        self._befores = {i: _zero_variable(variables[i]) for i in wanted} if starts else {}
        self._afters = {i: _zero_variable(variables[i]) for i in followed}
        self._present: set[int] = set()

    def clear(self) -> None:
        """Drop all references to a step, except the variables."""
        super().clear()
        self._accumulated: dict[int, Any] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Add the assignments while the step is traced; later calls run them without patching."""
        optimizer = self._optimizer
        if optimizer.gradient_accumulation_steps:
            sums = optimizer._accumulated_gradients  # noqa: SLF001
            self._accumulated = {i: _value(sums[i]) for i in self._grads}
        apply, update = optimizer.apply, optimizer._backend_update_step  # noqa: SLF001

        def applied(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            self._try(self._save_gradients, grads, trainable_variables)
            return apply(grads, trainable_variables)

        def updated(grads: Sequence[Any], variables: Sequence[Any], lr: Any) -> None:
            update(grads, variables, lr)
            self._try(self._save_parameters, variables)

        with ExitStack() as stack:
            stack.enter_context(_replaced(optimizer, "apply", applied))
            if self._afters:
                stack.enter_context(_replaced(optimizer, "_backend_update_step", updated))
            yield

    def collect(self) -> None:
        """Read the variables, and repeat the optimizer's processing of the gradients.

        Raises:
            Exception: whatever went wrong while the step was traced.
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

    def _save_gradients(self, grads: Sequence[Any], variables: Any) -> None:
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

    def _save_parameters(self, variables: Sequence[Any]) -> None:
        for variable in variables:
            index = self._optimizer._get_variable_index(variable)  # noqa: SLF001
            if index in self._afters:
                self._afters[index].assign(_value(variable))


def tensor(value: Any) -> Tensor:
    """View a variable or tensor of Keras's backend as a torch tensor, without a copy."""
    if isinstance(value, keras.Variable):
        value = value.value
    if isinstance(value, Tensor):
        return value.detach()
    import tensorflow as tf

    return torch.utils.dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(_value(value)))


def _value(variable: Any) -> Any:
    """Convert a TensorFlow variable, or a Keras variable around one, to a TensorFlow tensor."""
    import tensorflow as tf

    return tf.convert_to_tensor(variable)


def _zero_variable(variable: Any) -> Any:
    """Create a TensorFlow variable of zeros with the same shape and dtype."""
    import tensorflow as tf

    return tf.Variable(tf.zeros_like(_value(variable)), trainable=False)


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of an object, bypassing its ``__setattr__``, which would track it."""
    attributes = vars(owner)
    existed = name in attributes
    old = attributes.get(name)
    attributes[name] = function
    try:
        yield
    finally:
        if existed:
            attributes[name] = old
        else:
            del attributes[name]
