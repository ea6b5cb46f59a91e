"""Keras 3: a callback that records the optimizer of ``Model.fit``, on torch and on TensorFlow."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import lrprobe
from lrprobe import Probe
from lrprobe.optional import extra
from lrprobe.text import warn

with extra("keras"):
    import keras

    from lrprobe.foreign.keras import Steps, built


class LRProbeCallback(keras.callbacks.Callback):
    """Records the optimizer of a training: ``model.fit(..., callbacks=[LRProbeCallback()])``.

    Steps are counted like ``optimizer.iterations``, and parameters have Keras's names
    (``variable.path``). ``callback.probe.frame()`` returns the frame, also after the training.

    Args:
        to: as for ``lrprobe.attach``.
        options: further arguments of ``lrprobe.attach``: ``every``, ``on_finding`` and others.

    Raises:
        NotImplementedError: Keras runs on a backend other than torch or TensorFlow.
    """

    probe: Probe | None = None
    """The probe of the current training, or of the last one."""

    def __init__(self, to: Any = None, **options: Any) -> None:
        super().__init__()
        backend = keras.backend.backend()
        if backend not in ("tensorflow", "torch"):
            raise NotImplementedError(
                f"Keras runs on {backend!r}; supported are 'tensorflow' and 'torch'"
            )
        every = options.get("every")
        if callable(every):  # cached, because it is asked twice per step
            options["every"] = lru_cache(maxsize=1)(every)
        self._to = to
        self._options = options
        self._steps: Steps | None = None
        self._waits = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Attach; a checkpoint's state is restored by now."""
        self.on_train_end()  # of a training that was interrupted
        self._waits = True
        self._attach()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Prepare for the next step; attach now if Keras built the model in its first step."""
        self._attach()
        if self._steps is not None:
            self._steps.next()

    def on_train_end(self, logs: Any = None) -> None:
        """Detach."""
        self._steps, self._waits = None, False
        if self.probe is not None:
            self.probe.close()

    def _attach(self) -> None:
        if not self._waits:
            return
        try:
            if not built(self.model):
                return
            steps = Steps(self.model)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._waits = False
            warn(f"this training is not recorded: {type(error).__name__}: {error}")
            return
        self._waits = False
        options = {"step": lambda: steps.number, **self._options}
        self.probe = lrprobe.attach(steps.stand_ins, to=self._to, **options)
        steps.watch(self.probe._recorder.hooks)  # noqa: SLF001 - nobody else needs them
        self._steps = steps
