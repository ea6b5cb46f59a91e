"""Passes records to sinks in the background, so that no sink ever stops or slows the training.

One daemon thread creates the records and serves the sinks in memory and on disk. Any other sink may
wait for a network, or for ever, so it has its own thread and blocks none of these. One thread at a
time calls a sink, however many probes share it. Each thread owns the data that it works on. Others
send it commands through a queue, which is safe even from a finalizer that interrupts a thread.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from lrprobe.record import Record
from lrprobe.sinks.base import Sink
from lrprobe.text import warn

WAITING_RECORDS = 1000
"""Limit of the records that wait for the thread (per ``Delivery``), and of those that wait for a
failing sink (per sink)."""

WAITING_BYTES = 256 * 2**20
"""The same limit in bytes; whichever is reached first."""

_FLUSH_SECS = 1.0  # of a sink without flush_secs
_PAUSES = (1.0, 60.0)  # seconds to the first retry of a failing sink, doubling up to the second
_STALL_SECS = 1.0  # how long a hanging sink may hold up the training, once, when all is full
_EXIT_SECS = 60.0  # how long a hanging sink may hold up close(), or the end of the process
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
        others = [_Outbox([sink], _among(owned, [sink]), _worker_of(sink)) for sink in far]
        near = [sink for sink in sinks if _is_near(sink)]
        self._outbox = _Outbox(near, _among(owned, near), _shared_worker, others)
        for outbox in self._outbox.all:
            try:
                outbox.worker.open(outbox)
            except BaseException:
                self._outbox.close()
                raise
        self._finalizer = weakref.finalize(self, _abandon, self._outbox)
        self._finalizer.atexit = False  # at exit somebody has to wait, which _at_exit does

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

    def drain(self, timeout: float | None = None, *, near: bool = False) -> bool:
        """Wait until all records have been written, or have failed to be.

        Args:
            timeout: seconds to wait at most; None waits as long as it takes.
            near: only for the sinks in memory and on disk.

        Returns:
            False if the timeout was too short.
        """

        def ask(outbox: _Outbox, done: threading.Event) -> None:
            outbox.worker.send(done.set)

        return self._wait(ask, timeout, near=near)

    def flush(self, timeout: float | None = None) -> bool:
        """Do what ``drain`` does; then retry failing sinks, and flush all.

        Without a timeout, it waits a minute for a sink that is not in memory or on disk.
        """

        def ask(outbox: _Outbox, done: threading.Event) -> None:
            outbox.worker.send(partial(outbox.worker.flush, outbox, done))

        return self._wait(ask, timeout, patience=_EXIT_SECS)

    def close(self, timeout: float | None = None) -> bool:
        """Do what ``flush`` does; then close the owned sinks; idempotent.

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
        ask: Callable[[_Outbox, threading.Event], None] | None,
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
                        f"{_name(outbox.sinks[0])} did not finish within {patience:g} seconds"
                    )
        return whole


def _is_near(sink: Sink) -> bool:
    """Whether a sink is, or is made of, one of ours that writes to memory or to a disk."""
    modules = {cls.__module__ for cls in type(sink).__mro__}
    return not modules.isdisjoint(f"lrprobe.sinks.{name}" for name in _NEAR)


def _among(owned: Sequence[Sink], sinks: Sequence[Sink]) -> list[Sink]:
    return [one for one in owned if any(one is sink for sink in sinks)]


class _Outbox:
    """The records that wait for a worker, and the sinks they go to.

    It is separate from its ``Delivery`` so that the thread does not keep the ``Delivery`` alive.
    Its records also go on to ``others``, each the outbox of one sink with its own thread.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        owned: Iterable[Sink],
        worker: _Worker,
        others: Sequence[_Outbox] = (),
    ) -> None:
        self.sinks = tuple(sinks)
        self.owned = tuple(owned)
        self.worker = worker
        self.others = tuple(others)
        self.pid = os.getpid()
        self.closed = False  # accepts nothing more
        self.finished = threading.Event()  # everything is written
        self.abandoned = False  # nobody will call problems()
        self.lock = threading.Lock()  # for the counts up to the blank line
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
    def all(self) -> tuple[_Outbox, ...]:
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
            whom = _name(self.sinks[0]) if len(self.sinks) == 1 else "their sinks"
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
        much = self.waiting_bytes + nbytes > WAITING_BYTES
        return (self.waiting >= WAITING_RECORDS or much) and self.waiting > 0

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
            names = ", ".join(map(_name, self.sinks))
            self.report(f"{names} did not finish within {_EXIT_SECS:g} seconds")

    def report(self, message: str) -> None:
        self._messages.append(message)

    def take_messages(self) -> list[str]:
        messages = []
        while self._messages:
            messages.append(self._messages.popleft())
        return messages


class _BufferedSink:
    """A sink with the records that it has not written yet. Used by its worker thread only."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.name = _name(sink)
        self.flushes = callable(getattr(sink, "flush", None))
        self.has_problems = callable(getattr(sink, "problems", None))
        wait = getattr(sink, "flush_secs", _FLUSH_SECS)
        self.flush_secs = wait if isinstance(wait, (int, float)) else _FLUSH_SECS
        self.outboxes: list[_Outbox] = []
        self.owned = False
        self.backlog: deque[tuple[Record, _Outbox]] = deque()
        self.backlog_bytes = 0
        self.unflushed: Counter[_Outbox] = Counter()
        self.flush_at: float | None = None
        self.failure = ""  # the cause; empty while the sink works
        self.pause = _PAUSES[0]
        self.retry_at = 0.0
        self.dropped = 0  # since the sink began to fail
        self.reporter: _Outbox | None = None

    @property
    def due(self) -> float | None:
        """When the next flush or retry is due."""
        return self.retry_at if self.failure else self.flush_at

    def add(self, record: Record, outbox: _Outbox) -> None:
        self.backlog.append((record, outbox))
        self.backlog_bytes += record.nbytes
        self.reporter = outbox
        if not self.failure:
            self._guarded(self._write_backlog)
        while len(self.backlog) > WAITING_RECORDS or (
            self.backlog_bytes > WAITING_BYTES and len(self.backlog) > 1
        ):
            oldest, loser = self.backlog.popleft()
            self.backlog_bytes -= oldest.nbytes
            loser.lost[self.name] += 1
            self.dropped += 1

    def run_due(self, now: float) -> None:
        """Flush or retry, if it is time to."""
        if self.due is not None and self.due <= now:
            self.attempt()

    def attempt(self) -> bool:
        """Write the backlog and flush now; False if that failed."""
        done = self._guarded(self._write_backlog) and self._guarded(self._flush)
        if done and self.failure:
            lost = f", {self.dropped:,} were lost" if self.dropped else ""
            self._report(f"{self.name} works again; the waiting records have been written{lost}")
            self.failure, self.pause, self.dropped = "", _PAUSES[0], 0
        return done

    def detach(self, outbox: _Outbox) -> bool:
        """Write the records of an outbox; True if no other outbox uses the sink."""
        # A sink may report a failure once and then recover by itself: hence the second attempt.
        done = self.attempt() or self.attempt()
        self.outboxes.remove(outbox)
        self.reporter = self.outboxes[0] if self.outboxes else outbox
        waiting = sum(1 for _, owner in self.backlog if owner is outbox)
        if not done:
            self.backlog = deque(entry for entry in self.backlog if entry[1] is not outbox)
            self.backlog_bytes = sum(record.nbytes for record, _ in self.backlog)
            outbox.lost[self.name] += waiting
        unflushed = self.unflushed.pop(outbox, 0)
        cause = self.failure
        if self.owned and not self.outboxes:
            try:
                self.sink.close()
            except BaseException as error:  # noqa: BLE001 - a sink may raise what it likes
                cause = _cause(error)
                outbox.report(f"{self.name} could not be closed: {cause}")
                outbox.lost[self.name] += unflushed
        elif not done and unflushed:
            outbox.report(f"{self.name} may lack the last {unflushed:,} records: {cause}")
        if outbox.lost[self.name]:
            why = f": {cause}" if cause else ""
            outbox.report(
                f"{outbox.lost[self.name]:,} records were not written to {self.name}{why}"
            )
        return not self.outboxes

    def _write_backlog(self) -> None:
        while self.backlog:
            record, outbox = self.backlog[0]
            self.sink.write(record)
            self.backlog.popleft()
            self.backlog_bytes -= record.nbytes
            if self.flushes:
                self.unflushed[outbox] += 1
                if self.flush_at is None:  # a fifth of the time is left for doing it
                    self.flush_at = time.monotonic() + 0.8 * self.flush_secs

    def _flush(self) -> None:
        if self.flushes:
            self.sink.flush()  # type: ignore[attr-defined]
        self.flush_at = None
        self.unflushed.clear()

    def _guarded(self, work: Callable[[], None]) -> bool:
        try:
            work()
            if self.has_problems:
                for message in self.sink.problems():  # type: ignore[attr-defined]
                    self._report(str(message))
        except BaseException as error:  # noqa: BLE001 - a sink may raise what it likes
            if not self.failure:
                self._report(
                    f"{self.name} failed: {_cause(error)}; its records wait in memory (up to "
                    f"{WAITING_RECORDS:,}) and are retried; training continues"
                )
            else:
                self.pause = min(2 * self.pause, _PAUSES[1])
            self.failure = _cause(error)
            self.retry_at = time.monotonic() + self.pause
            return False
        return True

    def _report(self, message: str) -> None:
        """Report to one outbox only, so that the user is warned once."""
        if self.reporter is not None:
            self.reporter.report(message)


class _Worker:
    """A background thread and the data that it works on."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # for the two below
        self._thread: threading.Thread | None = None
        self._outboxes: set[_Outbox] = set()
        self._buffered: dict[int, _BufferedSink] = {}

    # Any thread may call these.

    def open(self, outbox: _Outbox) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="lrprobe-delivery", daemon=True)
                thread.start()
                self._thread = thread
            self._outboxes.add(outbox)
        self.send(partial(self._attach, outbox))

    def send(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def wait(self, done: threading.Event, timeout: float | None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            thread = self._thread
            if thread is threading.current_thread():
                return False  # a sink that asks for its own end would wait forever
            left = 1.0 if end is None else min(1.0, end - time.monotonic())
            if done.wait(max(left, 0.0)):
                return True
            if left <= 0 or thread is None or not thread.is_alive():
                return done.is_set()

    def outboxes(self) -> list[_Outbox]:
        """Unfinished outboxes."""
        with self._lock:
            return list(self._outboxes)

    # Only the thread itself calls these.

    def deliver(
        self,
        outbox: _Outbox,
        make: Callable[[], Record | None],
        nbytes: int,
        others: Sequence[_Outbox] = (),
    ) -> None:
        try:
            record = make()
            outbox.last_was_made = True
        except BaseException as error:  # noqa: BLE001 - whatever it is, training goes on
            record = None
            outbox.unmade += 1
            if outbox.last_was_made:
                outbox.last_was_made = False
                outbox.report(f"a record could not be created, and is lost: {_cause(error)}")
        if record is not None:
            for sink in outbox.sinks:
                buffered = self._buffered.get(id(sink))
                if buffered is not None:
                    buffered.add(record, outbox)
        for other in others:  # each has reserved room for it
            if record is None:
                other.release(nbytes)
            else:
                other.resize(nbytes, record.nbytes)
                made = partial(_return_it, record)
                other.worker.send(partial(other.worker.deliver, other, made, record.nbytes))
        outbox.release(nbytes)

    def flush(self, outbox: _Outbox, done: threading.Event) -> None:
        try:
            for buffered in self._sinks_of(outbox):
                buffered.reporter = outbox
                buffered.attempt()
        finally:
            done.set()

    def close(self, outbox: _Outbox) -> None:
        try:
            for buffered in self._sinks_of(outbox):
                buffered.reporter = outbox
                if buffered.detach(outbox):
                    del self._buffered[id(buffered.sink)]
            if outbox.overflow:
                outbox.report(
                    f"{outbox.overflow:,} records were lost while too many waited for the sinks"
                )
            if outbox.unmade:
                outbox.report(
                    f"{outbox.unmade:,} records were lost because they could not be created"
                )
        finally:
            for other in outbox.others:
                other.close()
            if outbox.abandoned:
                _unreported.extend(outbox.take_messages())
            with self._lock:
                self._outboxes.discard(outbox)
            outbox.finished.set()

    def _attach(self, outbox: _Outbox) -> None:
        for sink in outbox.sinks:
            buffered = self._buffered.setdefault(id(sink), _BufferedSink(sink))
            if outbox not in buffered.outboxes:
                buffered.outboxes.append(outbox)
            buffered.owned |= any(sink is one for one in outbox.owned)

    def _sinks_of(self, outbox: _Outbox) -> list[_BufferedSink]:
        return [buffered for buffered in self._buffered.values() if outbox in buffered.outboxes]

    def _run(self) -> None:
        while True:
            due = [buffered.due for buffered in self._buffered.values() if buffered.due is not None]
            wait = max(0.0, min(due) - time.monotonic()) if due else None
            try:
                command = self._commands.get(timeout=wait)
            except queue.Empty:
                pass
            else:
                try:
                    command()
                except BaseException as error:  # noqa: BLE001 - a bug must not end the thread
                    _unreported.append(f"the delivery of records failed: {_cause(error)}")
                # Or the frame of a waiting thread would keep the last record alive.
                del command
            now = time.monotonic()
            for buffered in self._buffered.values():
                buffered.run_due(now)
            with self._lock:
                if not self._outboxes and self._commands.empty():
                    self._thread = None
                    return


def _name(sink: Sink) -> str:
    """The sink's name in messages."""
    if type(sink).__repr__ is object.__repr__:
        return type(sink).__name__
    try:
        return repr(sink)
    except Exception:  # noqa: BLE001 - it is only for a message
        return type(sink).__name__


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _abandon(outbox: _Outbox) -> None:
    """Finish for a garbage-collected ``Delivery``: nobody waits, and taking a lock is not safe."""
    if outbox.pid == os.getpid():
        for each in outbox.all:
            each.abandoned = True
        outbox.close()


def _return_it(record: Record) -> Record:
    return record


_unreported: deque[str] = deque()
"""Problems of abandoned outboxes, reported at exit."""
_shared_worker = _Worker()
_own_workers: weakref.WeakValueDictionary[int, _Worker] = weakref.WeakValueDictionary()
"""id of a sink with its own thread to its worker; its outboxes and the thread keep that alive."""


def _worker_of(sink: Sink) -> _Worker:
    found = _own_workers.get(id(sink))
    if found is None:
        found = _own_workers[id(sink)] = _Worker()
    return found


def _after_fork() -> None:
    """Give a forked child its own worker: locks and threads of the old one are the parent's."""
    global _shared_worker  # noqa: PLW0603 - one for the process is what it is
    _shared_worker = _Worker()
    _own_workers.clear()
    _unreported.clear()


def _finish(*, close: bool) -> None:
    """Write everything: sinks in memory and on disk first, then the others; a minute for each."""
    near = _shared_worker.outboxes()
    far = [outbox for each in list(_own_workers.values()) for outbox in each.outboxes()]
    for outboxes in (near, far):
        until = time.monotonic() + _EXIT_SECS
        for outbox in outboxes:
            outbox.finish(until, close=close)
    if close:
        _unreported.extend(
            message for outbox in (*near, *far) for message in outbox.take_messages()
        )


def _before_threads_end() -> None:
    # A forked multiprocessing.Process ends without running atexit, but runs this.
    _finish(close=False)


def _at_exit() -> None:
    # The non-daemon threads have ended by now: one of them may have been the training.
    _finish(close=True)
    while _unreported:
        warn(_unreported.popleft())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
# Not public, but available since 3.9, and concurrent.futures relies on it. atexit covers everything
# but the case above.
getattr(threading, "_register_atexit", lambda _: None)(_before_threads_end)
atexit.register(_at_exit)
