"""Ready-made callbacks for ``attach(..., on_finding=...)``: a warning, a log line, a W&B alert.

If many layers have the same fault, only the first finding per code and optimizer is reported.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from lrprobe.diagnosis import Finding


class _Alert:
    """Reports the first finding per code and optimizer, and notes if ``notes`` is set."""

    def __init__(self, *, notes: bool) -> None:
        self._notes = notes
        self._reported: set[tuple[str, str]] = set()

    def __call__(self, finding: Finding) -> None:
        """Report a finding."""
        what = finding.code, finding.optimizer
        if what in self._reported or (finding.severity == "note" and not self._notes):
            return
        self._reported.add(what)
        self._send(finding)

    def _send(self, finding: Finding) -> None:
        raise NotImplementedError


class Warn(_Alert):
    """Warns with a ``UserWarning``: ``attach(..., on_finding=alerts.Warn())``.

    Args:
        notes: whether to report notes too.
    """

    def __init__(self, *, notes: bool = False) -> None:
        super().__init__(notes=notes)

    def _send(self, finding: Finding) -> None:
        warnings.warn(f"lrprobe: {_sentence(finding)}", stacklevel=4)


class Log(_Alert):
    """Writes a line to a logger: a warning for a finding, an info for a note.

    Args:
        logger: by default the logger ``lrprobe``.
        notes: whether to report notes too.
    """

    def __init__(self, logger: logging.Logger | None = None, *, notes: bool = True) -> None:
        super().__init__(notes=notes)
        self._logger = logger or logging.getLogger("lrprobe")

    def _send(self, finding: Finding) -> None:
        level = logging.WARNING if finding.severity == "finding" else logging.INFO
        self._logger.log(level, "%s", _sentence(finding))


class WandB(_Alert):
    """Sends a Weights & Biases alert, by e-mail or Slack as configured there.

    Args:
        run: what ``wandb.init`` returned; None uses the active run.
        notes: whether to report notes too.

    Raises:
        ModuleNotFoundError: the package is not installed (``pip install 'lrprobe[wandb]'``).
        RuntimeError: no run is active.
    """

    def __init__(self, run: Any = None, *, notes: bool = False) -> None:
        super().__init__(notes=notes)
        import wandb

        self._wandb = wandb
        self._run: Any = wandb.run if run is None else run
        if self._run is None:
            raise RuntimeError("no Weights & Biases run is active; call wandb.init() first")

    def _send(self, finding: Finding) -> None:
        levels = self._wandb.AlertLevel
        self._run.alert(
            title=f"lrprobe: {finding.title}",
            text=_sentence(finding),
            level=levels.WARN if finding.severity == "finding" else levels.INFO,
        )


def _sentence(finding: Finding) -> str:
    return f"{finding} [{finding.code}]. Usually: {finding.meaning} Try: {finding.advice}"
