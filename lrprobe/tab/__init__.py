"""The tab LRPROBE. TensorBoard finds it by the entry point ``tensorboard_plugins``."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins.base_plugin import TBLoader  # type: ignore[import-untyped]

from lrprobe.sinks.tab import PLUGIN, RUN_PLUGIN

SAMPLES = 2000
"""Records of a run that TensorBoard keeps, unless ``--samples_per_plugin`` sets the number."""


class Loader(TBLoader):  # type: ignore[misc]
    """Loads the plugin."""

    def fix_flags(self, flags: Any) -> None:
        """Let TensorBoard keep enough records for a heatmap; by default it keeps 10 of a tensor."""
        kept = flags.samples_per_plugin
        if isinstance(kept, dict):
            kept.setdefault(PLUGIN, SAMPLES)
            kept.setdefault(RUN_PLUGIN, SAMPLES)

    def load(self, context: Any) -> Any:
        """Make the plugin."""
        from lrprobe.tab.plugin import Plugin

        return Plugin(context)
