"""Merges the recorded steps of an optimizer whose parameters are spread over ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrprobe.distributed.layouts import Layouts
from lrprobe.distributed.ranks import (
    MergedRows,
    Spec,
    World,
    holdings_of,
    merge_rows,
    rename_by_rank,
)
from lrprobe.engine import PreStep, empty_pre_step
from lrprobe.engine.buffers import SUMS, Buffers, blank, fill
from lrprobe.engine.columns import Row, StepInfo, judge_rules, slots_of
from lrprobe.engine.flight import CHANGED, MOVED, PATIENCE, StepInFlight
from lrprobe.engine.pieces import WatchedParameter

if TYPE_CHECKING:
    from lrprobe.hooks import Hooks


class Exchange:
    """Gathers the steps of an optimizer whose parameters are spread over ranks, by all-reduce.

    ``LocalGatherer`` is its counterpart for a single process.
    """

    def __init__(
        self, hooks: Hooks, layouts: Layouts, world: World, merged: MergedRows, device: torch.device
    ) -> None:
        self._hooks = hooks
        self._layouts = layouts
        self._world = world
        self._group = world.new_group()
        self._device = device
        self._previous: StepInFlight | None = None
        self._maybe_dummy = False
        self._error = ""
        self._buffers: Buffers | None = None
        self._failure: Exception | None = None
        self._take(merged)

    def _take(self, merged: MergedRows) -> None:
        self._union = merged
        self._described = tuple(h for h, *_ in holdings_of(self._hooks.watched, self._layouts))
        self._changed = False
        self._watched: list[WatchedParameter] = []
        self._held: list[WatchedParameter] = []
        self._row_of: list[int] = []
        self._slots: dict[int, Tensor] = {}

    def _follow(self, watched: list[WatchedParameter]) -> None:
        """Determine which pieces this rank contributes, if its parameters have changed."""
        if watched is self._watched:
            return
        self._watched = watched
        here = holdings_of(watched, self._layouts)
        self._changed = tuple(holding for holding, *_ in here) != self._described
        rows = self._union.rows
        index = {row.name: at for at, row in enumerate(rows)}
        slots, _ = slots_of(rows)
        self._held, self._row_of, self._slots = [], [], {}
        for holding, w, layout in here:
            at = index.get(holding.name)
            if at is None:  # it is new: the next recorded step includes it
                continue
            if rows[at].rule == "measured":
                w.rule = None
            owner, first = self._union.owners[at]
            if holding.sharded:
                mine = holding.key == owner.key and layout.contributes
            else:
                mine = not owner.sharded and self._world.rank == first
            if not mine or holding.shape != owner.shape:
                continue
            wanted = rows[at].tracked
            if wanted is not None:
                found, w.tracked = layout.region.find(wanted)
                self._slots[len(self._held)] = slots[at][:, found]
            self._held.append(w)
            self._row_of.append(at)

    @property
    def under_way(self) -> bool:
        """Whether a step has begun and has not been sent."""
        return self._buffers is not None

    def before(self, optimizer: Any, *, closure: bool = False) -> PreStep:
        """Keep what the step will overwrite; called in the pre-hook of a recorded step."""
        if self._error:
            raise RuntimeError(self._error)
        return self._hooks.engine.before(self._held, optimizer, closure=closure)

    def catch_up(self) -> None:
        """Before a recorded step, apply the result of the last one, and follow new parameters.

        Raises:
            Exception: if the result does not arrive; recording over ranks then ends.
        """
        if self._error:
            raise RuntimeError(self._error)
        watched = self._hooks.watched
        try:
            self._settle(watched)
        except Exception as error:
            self._error = f"recording over ranks has ended: {error}"
            raise
        self._follow(watched)

    def add(self, optimizer: Any, kept: PreStep) -> None:
        """Add the figures of one call of ``step``; this rank may hold no pieces at all."""
        if self._error:
            return
        if self._buffers is None:
            self._buffers, self._failure = self._blank(), None
        try:
            figures = self._hooks.engine.after(self._held, optimizer, kept, self._partial())
            fill(self._buffers, figures, self._row_of, self._slots, folds=True)
        except Exception as error:  # noqa: BLE001 - still join the collectives, without figures
            self._buffers, self._failure = self._blank(), error

    def send(self, info: StepInfo, *, dummy: bool = False) -> StepInFlight | None:
        """Finish the step: start the collectives.

        ``dummy`` is whether every rate and gradient on this rank was 0.
        """
        buffers, self._buffers = self._buffers, None
        if self._error or buffers is None:
            return None
        rows = self._union.rows
        buffers.maxima[-1, CHANGED] = float(self._changed)
        buffers.maxima[-1, MOVED] = float(not dummy)
        works = [
            self._reduce(buffers.maxima, torch.distributed.ReduceOp.MAX),
            self._reduce(buffers.added, torch.distributed.ReduceOp.SUM),
        ]
        counted = counted_rows(rows)
        if counted:
            folded = buffers.fold_rows(counted)
            works.append(self._reduce(folded, torch.distributed.ReduceOp.SUM))
        step = StepInFlight(rows, buffers, info, works, reads_rates=self.leads)
        self._previous, self._maybe_dummy = step, dummy
        if self._failure is not None:
            raise self._failure
        return step if self.leads else None

    def skipped(self, optimizer: Any, info: StepInfo, since: int) -> StepInFlight | None:
        """Gather a step that was skipped after the last one, without collectives, at the close.

        The parameters are as the last step, number ``since``, left them; their norms are known if
        that step was recorded.
        """
        if not self.leads or self._error:
            return None
        self._follow(self._hooks.watched)
        buffers, last = self._blank(), self._previous
        figures = self._hooks.engine.after(self._held, optimizer, empty_pre_step(), {})
        fill(buffers, figures, self._row_of, {}, folds=True)
        buffers.set_flag(MOVED, 1.0)
        square = SUMS.index("param_square")
        buffers.sums[:, square] = torch.nan
        if last is not None and last.info.step == since and last.wait():
            buffers.sums[:, square] = torch.from_numpy(last.arrived().sums[:, square])
        return StepInFlight(self._union.rows, buffers, info)

    def _blank(self) -> Buffers:
        rows = self._union.rows
        _, tracked = slots_of(rows)
        return blank(len(rows), tracked, self._device)

    def last_was_dummy(self) -> bool:
        """Whether the last recorded step was a dummy step on all ranks; true only once per step.

        If it was a dummy step on this rank, this waits for the other ranks.
        """
        if self._previous is None or not self._maybe_dummy:
            return False
        self._maybe_dummy = False
        try:
            return self._previous.is_dummy
        except Exception as error:  # noqa: BLE001 - the upcoming step is still counted
            self._error = f"recording over ranks has ended: {error}"
            return False

    def finish(self, until: float) -> None:
        """Wait for the pending collectives, so that the other ranks do not fail when this ends."""
        if self._previous is not None:
            self._previous.until = until
            self._previous.wait()

    @property
    def leads(self) -> bool:
        """Whether this rank writes the records."""
        return self._world.rank == 0

    def _reduce(self, tensor: Tensor, op: Any) -> Any:
        return torch.distributed.all_reduce(tensor, op, group=self._group, async_op=True)

    def _partial(self) -> dict[int, Tensor | None]:
        """Reduce the partial gradients that tensor parallelism left; parameter id to gradient.

        The optimizer does the same reduction in its step, over the same ranks. Only one mesh is
        supported; a partial gradient on another mesh is None, for unknown. Replicas take part in
        the collective too, although another rank contributes their figures.
        """
        module = sys.modules.get("torch.distributed.tensor")
        if module is None:
            return {}
        found: list[tuple[Any, Any]] = []
        for w in self._watched:
            param = w.place()
            grad: Any = None if param is None else param.grad
            if grad is not None and isinstance(grad, module.DTensor):
                parts = [dim for dim, how in enumerate(grad.placements) if how.is_partial()]
                if parts:
                    found.append((param, (id(grad.device_mesh), parts)))
        if not found:
            return {}
        chosen = next((over for _, over in found if len(over[1]) == 1), None)
        result: dict[int, Tensor | None] = {id(p): None for p, over in found if over != chosen}
        mine = [param for param, over in found if over == chosen]
        if chosen is None or not mine:
            return result
        grads = [param.grad.to_local() for param in mine]
        flat = torch.cat([grad.reshape(-1).to(grads[0].dtype) for grad in grads])
        (dim,) = chosen[1]
        mesh, how = mine[0].grad.device_mesh, mine[0].grad.placements[dim]
        torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        if how.reduce_op == "avg":
            flat /= mesh.size(dim)
        pieces = torch.split(flat, [grad.numel() for grad in grads])
        for param, grad, piece in zip(mine, grads, pieces, strict=True):
            result[id(param)] = piece.view(grad.shape).to(grad.dtype)
        return result

    def _settle(self, watched: list[WatchedParameter]) -> None:
        """Judge the rules by the last recorded step, and join again if parameters changed.

        All ranks do this at the same recorded step, and come to the same result.
        """
        previous, self._previous = self._previous, None
        if previous is None:
            return
        rows = self._union.rows
        failed = judge_rules(rows, previous.rule_errors())
        if failed:
            names = {rows[at].name for at in failed}
            for w in watched:
                if w.name in names:
                    w.rule = None
            if self.leads:
                self._hooks.warn_unexplained(sorted(names), next(iter(failed.values())))
        if previous.changed:
            self._join_again()

    def _join_again(self) -> None:
        name = self._hooks.name
        holdings = tuple(h for h, *_ in holdings_of(self._hooks.watched, self._layouts))
        kinds = self._world.kinds(Spec(((name, holdings),)), self._device)
        kinds = rename_by_rank(self._hooks, kinds, self._world)
        known = {row.name: row for row in self._union.rows}
        merged = merge_rows(name, kinds, self._world.ranks, self._hooks.options.track)
        for row in merged.rows:
            if row.name in known and known[row.name].rule == "measured":
                row.rule = "measured"
        self._take(merged)


def counted_rows(rows: Sequence[Row]) -> list[int]:
    """Rows whose rates may differ by element, and whose distributions are therefore reduced."""
    return [at for at, row in enumerate(rows) if row.rule == "measured" or not row.shared_rate]


def finish(exchanges: Sequence[Exchange]) -> None:
    """Wait for the pending collectives of all exchanges, for a minute in total."""
    until = time.monotonic() + PATIENCE
    for exchange in exchanges:
        exchange.finish(until)
