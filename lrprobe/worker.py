"""The background threads: each writes the records of its outboxes, and retries failing sinks."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lrprobe.record import Record
from lrprobe.sinks.base import Sink

if TYPE_CHECKING:
    from lrprobe.delivery import Outbox

WAITING_RECORDS = 1000
"""Limit of the records that wait for the thread (per ``Delivery``), and of those that wait for a
failing sink (per sink)."""

WAITING_BYTES = 256 * 2**20
"""The same limit in bytes; whichever is reached first applies."""

_FLUSH_SECS = 1.0  # of a sink without flush_secs
_PAUSES = (1.0, 60.0)  # seconds before the first retry of a failing sink; doubles up to a maximum

unreported: deque[str] = deque()
"""Problems of abandoned outboxes, reported at exit."""


class BufferedSink:
    """A sink with the records that it has not written yet. Used by its worker thread only."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.name = name_of(sink)
        self.flushes = callable(getattr(sink, "flush", None))
        self.has_problems = callable(getattr(sink, "problems", None))
        wait = getattr(sink, "flush_secs", _FLUSH_SECS)
        self.flush_secs = wait if isinstance(wait, (int, float)) else _FLUSH_SECS
        self.outboxes: list[Outbox] = []
        self.owned = False
        self.backlog: deque[tuple[Record, Outbox]] = deque()
        self.backlog_bytes = 0
        self.unflushed: Counter[Outbox] = Counter()
        self.flush_at: float | None = None
        self.failure = ""  # the cause; empty while the sink works
        self.pause = _PAUSES[0]
        self.retry_at = 0.0
        self.dropped = 0  # records lost since the sink began to fail
        self.reporter: Outbox | None = None

    @property
    def due(self) -> float | None:
        """When the next flush or retry is due."""
        return self.retry_at if self.failure else self.flush_at

    def add(self, record: Record, outbox: Outbox) -> None:
        """Write a record after the backlog; beyond the limit, drop the oldest."""
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

    def detach(self, outbox: Outbox) -> bool:
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
                if self.flush_at is None:  # leaves a fifth of the time for the flush itself
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


class Worker:
    """A background thread and the data that it works on."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the next two
        self._thread: threading.Thread | None = None
        self._outboxes: set[Outbox] = set()
        self._buffered: dict[int, BufferedSink] = {}
        self._later: list[tuple[float, Callable[[], None]]] = []

    # Any thread may call these.

    def open(self, outbox: Outbox) -> None:
        """Serve an outbox; start the thread if it is not running."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="lrprobe-delivery", daemon=True)
                thread.start()
                self._thread = thread
            self._outboxes.add(outbox)
        self.send(partial(self._attach, outbox))

    def send(self, command: Callable[[], None]) -> None:
        """Queue a command for the thread."""
        self._commands.put(command)

    def send_later(self, seconds: float, command: Callable[[], None]) -> None:
        """Queue a command for the thread, to be run after some time."""
        self.send(partial(self._later.append, (time.monotonic() + seconds, command)))

    def wait(self, done: threading.Event, timeout: float | None) -> bool:
        """Wait for an event that the thread sets; return whether it is set."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            thread = self._thread
            if thread is threading.current_thread():
                return False  # a sink that waits for its own thread would deadlock
            left = 1.0 if end is None else min(1.0, end - time.monotonic())
            if done.wait(max(left, 0.0)):
                return True
            if left <= 0 or thread is None or not thread.is_alive():
                return done.is_set()

    def outboxes(self) -> list[Outbox]:
        """The outboxes that are not finished."""
        with self._lock:
            return list(self._outboxes)

    # Only the thread itself calls these.

    def deliver(
        self,
        outbox: Outbox,
        make: Callable[[], Record | None],
        nbytes: int,
        others: Sequence[Outbox] = (),
    ) -> None:
        """Create a record, and pass it to the outbox's sinks and to the others."""
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

    def flush(self, outbox: Outbox, done: threading.Event) -> None:
        """Write and flush the backlog of the outbox's sinks, then set the event."""
        try:
            for buffered in self._sinks_of(outbox):
                buffered.reporter = outbox
                buffered.attempt()
        finally:
            done.set()

    def close(self, outbox: Outbox) -> None:
        """Write the backlog, and close owned sinks that no other outbox uses."""
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
                unreported.extend(outbox.take_messages())
            with self._lock:
                self._outboxes.discard(outbox)
            outbox.finished.set()

    def _attach(self, outbox: Outbox) -> None:
        for sink in outbox.sinks:
            buffered = self._buffered.setdefault(id(sink), BufferedSink(sink))
            if outbox not in buffered.outboxes:
                buffered.outboxes.append(outbox)
            buffered.owned |= any(sink is one for one in outbox.owned)

    def _sinks_of(self, outbox: Outbox) -> list[BufferedSink]:
        return [buffered for buffered in self._buffered.values() if outbox in buffered.outboxes]

    def _run(self) -> None:
        while True:
            due = [buffered.due for buffered in self._buffered.values() if buffered.due is not None]
            due += [at for at, _ in self._later]
            wait = max(0.0, min(due) - time.monotonic()) if due else None
            try:
                command = self._commands.get(timeout=wait)
            except queue.Empty:
                pass
            else:
                self._execute(command)
                # Otherwise the frame of the waiting thread would keep the last record alive.
                del command
            now = time.monotonic()
            late = [command for at, command in self._later if at <= now]
            self._later[:] = [(at, command) for at, command in self._later if at > now]
            while late:
                self._execute(late.pop(0))
            for buffered in self._buffered.values():
                buffered.run_due(now)
            with self._lock:
                if not self._outboxes and self._commands.empty():
                    self._thread = None
                    return

    def _execute(self, command: Callable[[], None]) -> None:
        try:
            command()
        except BaseException as error:  # noqa: BLE001 - a bug must not end the thread
            unreported.append(f"the delivery of records failed: {_cause(error)}")


def name_of(sink: Sink) -> str:
    """The sink's name in messages."""
    if type(sink).__repr__ is object.__repr__:
        return type(sink).__name__
    try:
        return repr(sink)
    except Exception:  # noqa: BLE001 - it is only for a message
        return type(sink).__name__


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _return_it(record: Record) -> Record:
    return record
