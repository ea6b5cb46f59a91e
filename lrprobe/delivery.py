"""Passes records to sinks in the background, so that no sink ever stops or slows the training.

One daemon thread creates the records and serves the sinks in memory and on disk. Any other sink may
wait for a network, perhaps forever, so it has its own thread and cannot block these. Only one
thread at a time calls a sink, even if several probes share it. Each thread owns the data that it
works on. Other threads send it commands through a queue, which is safe even from a finalizer that
interrupts a thread.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from lrprobe import worker
from lrprobe.record import Record
from lrprobe.sinks.base import Sink
from lrprobe.text import warn
from lrprobe.worker import Worker, name_of, unreported

_STALL_SECS = 1.0  # how long a hanging sink may block the training, once, when its queue is full
_EXIT_SECS = 60.0  # how long a hanging sink may block close(), or the end of the process
_NEAR = ("memory", "parquet", "tensorboard", "jsonl")  # modules of the sinks in memory and on disk


class Delivery:
    """Takes records from the training thread and writes them to sinks in the background.

    A sink that raises has its own backlog of up to ``WAITING_RECORDS`` records and is retried
    after growing pauses, without affecting the other sinks; beyond the limit the oldest are lost.
    A sink with ``flush()`` is flushed within its ``flush_secs`` (1 by default) after a write.
    Records are also written when the interpreter ends or the object is garbage-collected. In a
    forked child nothing is written: every method returns at once.

    Args:
        sinks: where records go, in this order.
        owned: the sinks that ``close`` closes; if deliveries share one, the last of them closes it.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(self, sinks: Sequence[Sink], owned: Iterable[Sink] = ()) -> None:
        """Start the threads that are not running."""
        self._sinks = tuple(sinks)
        owned = list(owned)
        far = [sink for sink in sinks if not _is_near(sink)]
        others = [Outbox([sink], _among(owned, [sink]), _worker_of(sink)) for sink in far]
        near = [sink for sink in sinks if _is_near(sink)]
        self._outbox = Outbox(near, _among(owned, near), _shared_worker, others)
        for outbox in self._outbox.all:
            try:
                outbox.worker.open(outbox)
            except BaseException:
                self._outbox.close()
                raise
        self._finalizer = weakref.finalize(self, _abandon, self._outbox)
        self._finalizer.atexit = False  # at exit, _at_exit waits for the threads

    def put(self, make: Callable[[], Record | None], nbytes: int = 0) -> bool:
        """Schedule the record that ``make`` returns for writing; takes microseconds.

        If too many records wait already, it lets the threads catch up first. If a thread makes no
        progress for a second (a sink that hangs), its records are lost, and counted, until it does.

        Args:
            make: called in the background thread; returns None if there is nothing to write.
            nbytes: memory that ``make`` holds, which counts towards the limit.

        Returns:
            False if it was not accepted: too many records wait already (it counts as lost), the
            delivery is closed, or this is a forked child.
        """
        outbox = self._outbox
        if outbox.closed or outbox.pid != os.getpid() or not outbox.reserve(nbytes):
            return False
        others = [other for other in outbox.others if other.reserve(nbytes)]
        outbox.worker.send(partial(outbox.worker.deliver, outbox, make, nbytes, others))
        return True

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Call a function in the background thread after some time, unless closed by then."""
        outbox = self._outbox
        if not outbox.closed and outbox.pid == os.getpid():
            outbox.worker.send_later(seconds, function)

    def has_room(self, nbytes: int) -> bool:
        """Whether ``put`` would not have to wait for a sink."""
        return not any(outbox.full(nbytes) for outbox in self._outbox.all)

    def report(self, message: str) -> None:
        """Keep a message of the background thread, for ``problems``."""
        self._outbox.report(message)

    def drain(self, timeout: float | None = None, *, near: bool = False) -> bool:
        """Wait until all records have been written or have failed.

        Args:
            timeout: seconds to wait at most; None waits as long as it takes.
            near: wait only for the sinks in memory and on disk.

        Returns:
            False if the timeout was too short.
        """

        def ask(outbox: Outbox, done: threading.Event) -> None:
            outbox.worker.send(done.set)

        return self._wait(ask, timeout, near=near)

    def flush(self, timeout: float | None = None) -> bool:
        """Do what ``drain`` does, then retry failing sinks and flush all.

        Without a timeout, it waits up to a minute for each sink that is not in memory or on disk.
        """

        def ask(outbox: Outbox, done: threading.Event) -> None:
            outbox.worker.send(partial(outbox.worker.flush, outbox, done))

        return self._wait(ask, timeout, patience=_EXIT_SECS)

    def close(self, timeout: float | None = None) -> bool:
        """Do what ``flush`` does, then close the owned sinks; idempotent.

        ``problems`` then reports how many records were lost, if any.
        """
        self._finalizer.detach()
        if self._outbox.pid != os.getpid():
            return True
        self._outbox.close()
        return self._wait(None, timeout, patience=_EXIT_SECS)

    def problems(self) -> list[str]:
        """Messages since the last call, which the training thread turns into warnings."""
        return [message for outbox in self._outbox.all for message in outbox.take_messages()]

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Where records go, including shared sinks."""
        return self._sinks

    @property
    def lost(self) -> int:
        """Records lost so far, counted once for each sink that lacks them."""
        outbox = self._outbox
        unmade = (outbox.overflow + outbox.unmade) * len(self._sinks)
        late = sum(other.overflow for other in outbox.others)
        return unmade + late + sum(sum(each.lost.values()) for each in outbox.all)

    def _wait(
        self,
        ask: Callable[[Outbox, threading.Event], None] | None,
        timeout: float | None,
        *,
        near: bool = False,
        patience: float | None = None,
    ) -> bool:
        """Send each outbox a request and wait for it; the first feeds the others, so it goes first.

        Args:
            ask: sends the request, which sets the event when done; None waits for the close.
            timeout: seconds in total; None waits without limit.
            near: wait only for the sinks in memory and on disk.
            patience: seconds for each of the other sinks; None waits without limit.
        """
        if self._outbox.pid != os.getpid():
            return True
        end = None if timeout is None else time.monotonic() + timeout
        whole = True
        for outbox in self._outbox.all[:1] if near else self._outbox.all:
            left = None if end is None else max(0.0, end - time.monotonic())
            if outbox is not self._outbox and patience is not None:
                left = patience if left is None else min(left, patience)
            done = outbox.finished
            if ask is not None and not outbox.closed:
                done = threading.Event()
                ask(outbox, done)
            since = time.monotonic()
            if not outbox.worker.wait(done, left):
                whole = False
                if patience is not None and time.monotonic() - since >= patience:
                    outbox.report(
                        f"{name_of(outbox.sinks[0])} did not finish within {patience:g} seconds"
                    )
        return whole


def _is_near(sink: Sink) -> bool:
    """Whether a sink is one of lrprobe's sinks in memory or on disk, or a subclass of one."""
    modules = {cls.__module__ for cls in type(sink).__mro__}
    return not modules.isdisjoint(f"lrprobe.sinks.{name}" for name in _NEAR)


def _among(owned: Sequence[Sink], sinks: Sequence[Sink]) -> list[Sink]:
    return [one for one in owned if any(one is sink for sink in sinks)]


class Outbox:
    """The records that wait for a worker, and the sinks they go to.

    It is separate from its ``Delivery`` so that the thread does not keep the ``Delivery`` alive.
    Its records also go on to ``others``, each the outbox of one sink with its own thread.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        owned: Iterable[Sink],
        worker: Worker,
        others: Sequence[Outbox] = (),
    ) -> None:
        self.sinks = tuple(sinks)
        self.owned = tuple(owned)
        self.worker = worker
        self.others = tuple(others)
        self.pid = os.getpid()
        self.closed = False  # accepts nothing more
        self.finished = threading.Event()  # everything is written
        self.abandoned = False  # nobody will call problems()
        self.lock = threading.Lock()  # guards the counts up to the blank line
        self.waiting = 0
        self.waiting_bytes = 0
        self.overflow = 0
        self.stuck_at = -1  # records that waited when the thread was last seen to hang

        self.hangs = False  # it timed out at the end of the process
        self.unmade = 0
        self.last_was_made = True  # False after a failure: only the first in a row is reported
        self.lost: Counter[str] = Counter()  # by the sink's name
        self._messages: deque[str] = deque()

    @property
    def all(self) -> tuple[Outbox, ...]:
        """This outbox, and the ones that it feeds."""
        return (self, *self.others)

    def reserve(self, nbytes: int) -> bool:
        """Reserve room for a record; False if there is none."""
        if self.full(nbytes):
            self.wait_for_room(nbytes)
        with self.lock:
            above = self.full(nbytes)
            if above:
                self.overflow += 1
            else:
                self.waiting += 1
                self.waiting_bytes += nbytes
        if above and self.overflow == 1:
            whom = name_of(self.sinks[0]) if len(self.sinks) == 1 else "their sinks"
            self.report(
                f"{self.waiting:,} records ({self.waiting_bytes:,} bytes) wait for {whom}, "
                "which is the limit; records are lost until the sinks catch up"
            )
        return not above

    def release(self, nbytes: int) -> None:
        """Free the room of a record that no longer waits."""
        with self.lock:
            self.waiting -= 1
            self.waiting_bytes -= nbytes

    def resize(self, nbytes: int, now: int) -> None:
        """Change the size of a waiting record."""
        with self.lock:
            self.waiting_bytes += now - nbytes

    def full(self, nbytes: int) -> bool:
        """Whether the limit is reached."""
        much = self.waiting_bytes + nbytes > worker.WAITING_BYTES
        return (self.waiting >= worker.WAITING_RECORDS or much) and self.waiting > 0

    def wait_for_room(self, nbytes: int) -> None:
        """Let a working thread catch up; wait for a hanging one only once, for a second."""
        seen, since = self.waiting, time.monotonic()
        if seen == self.stuck_at:
            return
        while self.full(nbytes) and time.monotonic() < since + _STALL_SECS:
            time.sleep(0.002)
            if self.waiting < seen:
                seen, since = self.waiting, time.monotonic()
        self.stuck_at = self.waiting if self.full(nbytes) else -1

    def close(self) -> None:
        """Take nothing more; what waits is still written."""
        if not self.closed:
            self.closed = True
            self.worker.send(partial(self.worker.close, self))

    def finish(self, until: float, *, close: bool) -> None:
        """At the end of the process: wait until everything is written, or the time is up."""
        done = self.finished if close else threading.Event()
        if close:
            self.close()
        else:
            self.worker.send(partial(self.worker.flush, self, done))
        left = 0.0 if self.hangs else max(0.0, until - time.monotonic())
        if not self.worker.wait(done, left) and not self.hangs:
            self.hangs = True
            names = ", ".join(map(name_of, self.sinks))
            self.report(f"{names} did not finish within {_EXIT_SECS:g} seconds")

    def report(self, message: str) -> None:
        """Keep a message for the training thread."""
        self._messages.append(message)

    def take_messages(self) -> list[str]:
        """The messages since the last call."""
        messages = []
        while self._messages:
            messages.append(self._messages.popleft())
        return messages


def _abandon(outbox: Outbox) -> None:
    """Finish for a garbage-collected ``Delivery``: nobody waits, and taking a lock is not safe."""
    if outbox.pid == os.getpid():
        for each in outbox.all:
            each.abandoned = True
        outbox.close()


_shared_worker = Worker()
_own_workers: weakref.WeakValueDictionary[int, Worker] = weakref.WeakValueDictionary()
"""id of a sink with its own thread to its worker; its outboxes and the thread keep that alive."""


def _worker_of(sink: Sink) -> Worker:
    found = _own_workers.get(id(sink))
    if found is None:
        found = _own_workers[id(sink)] = Worker()
    return found


def _after_fork() -> None:
    """Give a forked child its own worker: locks and threads of the old one are the parent's."""
    global _shared_worker  # noqa: PLW0603 - one for the process is what it is
    _shared_worker = Worker()
    _own_workers.clear()
    unreported.clear()


def _finish(*, close: bool) -> None:
    """Write everything: sinks in memory and on disk first, then the others; a minute for each."""
    near = _shared_worker.outboxes()
    far = [outbox for each in list(_own_workers.values()) for outbox in each.outboxes()]
    for outboxes in (near, far):
        until = time.monotonic() + _EXIT_SECS
        for outbox in outboxes:
            outbox.finish(until, close=close)
    if close:
        unreported.extend(message for outbox in (*near, *far) for message in outbox.take_messages())


def _before_threads_end() -> None:
    # A forked multiprocessing.Process does not run atexit at its end, but runs this.
    _finish(close=False)


def _at_exit() -> None:
    # The non-daemon threads have ended by now: one of them may have been the training.
    _finish(close=True)
    while unreported:
        warn(unreported.popleft())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
# It is private, but has existed since 3.9, and concurrent.futures relies on it. atexit covers every
# case except the one above.
getattr(threading, "_register_atexit", lambda _: None)(_before_threads_end)
atexit.register(_at_exit)
