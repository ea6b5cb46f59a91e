"""Hands records to sinks in the background, so that no sink ever stops or slows the training.

One daemon thread makes the records and serves the sinks in memory and on disk. Any other sink may
wait for a network, or for ever, and has a thread of its own, so that it holds up none of these. A
sink is called by one thread at a time, however many probes share it. All that a thread works on
belongs to it alone; others talk to it through one queue, which is safe even from a finalizer that
interrupts whatever a thread was doing.
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
"""Bound of the records that wait for the thread (per ``Delivery``), and of those that wait for a
failing sink (per sink)."""

WAITING_BYTES = 256 * 2**20
"""The same bound in bytes; whichever comes first."""

_FLUSH_SECS = 1.0  # of a sink that does not say
_PAUSES = (1.0, 60.0)  # seconds to the first retry of a failing sink, doubling up to the second
_STALL_SECS = 1.0  # how long a hanging sink may hold up the training, once, when all is full
_EXIT_SECS = 60.0  # how long a hanging sink may hold up close(), or the end of the process
_NEAR = ("memory", "parquet", "tensorboard", "jsonl")  # modules of the sinks in memory and on disk


class Delivery:
    """Takes records from the training thread and writes them to sinks in the background.

    A sink that raises keeps its own backlog of up to ``WAITING_RECORDS`` records, is tried again
    after growing pauses, and does not touch the other sinks; past the bound the oldest are lost.
    A sink with ``flush()`` is flushed within its ``flush_secs`` (1 where it has none) after a
    write. What was put is written, too, when the interpreter ends or the object is
    garbage-collected. In a forked child nothing is written: every method returns at once.

    Args:
        sinks: where records go, in this order.
        owned: those of them that ``close`` closes; where deliveries share one, the last of them.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(self, sinks: Sequence[Sink], owned: Iterable[Sink] = ()) -> None:
        """Start the thread where it does not run."""
        self._sinks = tuple(sinks)
        owned = list(owned)
        far = [sink for sink in sinks if not _is_near(sink)]
        others = [_Line([sink], _among(owned, [sink]), _courier_of(sink)) for sink in far]
        near = [sink for sink in sinks if _is_near(sink)]
        self._line = _Line(near, _among(owned, near), _courier, others)
        for line in self._line.all:
            try:
                line.courier.open(line)
            except BaseException:
                self._line.close()
                raise
        self._finalizer = weakref.finalize(self, _abandon, self._line)
        self._finalizer.atexit = False  # at exit somebody has to wait, which _at_exit does

    def put(self, make: Callable[[], Record | None], nbytes: int = 0) -> bool:
        """Have the record that ``make`` returns written; takes microseconds.

        Where too much waits already, it lets the threads catch up first; where one makes no
        progress for a second (a sink that hangs), records are lost for it, and counted, until then.

        Args:
            make: run in the background thread; None means that there is nothing to write.
            nbytes: what ``make`` keeps in memory, for the bound on it.

        Returns:
            False where it was not taken: too much waits already (that is counted as lost), the
            delivery is closed, or this is a forked child.
        """
        line = self._line
        if line.closed or line.pid != os.getpid() or not line.take(nbytes):
            return False
        others = [other for other in line.others if other.take(nbytes)]
        line.courier.send(partial(line.courier.deliver, line, make, nbytes, others))
        return True

    def drain(self, timeout: float | None = None, *, near: bool = False) -> bool:
        """Wait until all that was put has been written, or has failed to be.

        Args:
            timeout: seconds to wait at most; None waits as long as it takes.
            near: for the sinks in memory and on disk alone.

        Returns:
            False where the time was too short.
        """

        def ask(line: _Line, done: threading.Event) -> None:
            line.courier.send(done.set)

        return self._wait(ask, timeout, near=near)

    def flush(self, timeout: float | None = None) -> bool:
        """As ``drain``; then try failing sinks again, and flush all.

        Without a timeout a sink that is not in memory or on disk is waited for a minute.
        """

        def ask(line: _Line, done: threading.Event) -> None:
            line.courier.send(partial(line.courier.flush, line, done))

        return self._wait(ask, timeout, patience=_EXIT_SECS)

    def close(self, timeout: float | None = None) -> bool:
        """As ``flush``; then close the sinks that are owned; idempotent.

        ``problems`` then says how many records were lost, if any.
        """
        self._finalizer.detach()
        if self._line.pid != os.getpid():
            return True
        self._line.close()
        return self._wait(None, timeout, patience=_EXIT_SECS)

    def problems(self) -> list[str]:
        """Messages since the last call, for the training thread to warn of."""
        return [message for line in self._line.all for message in line.said()]

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Where records go, sinks that others share among them."""
        return self._sinks

    @property
    def lost(self) -> int:
        """Records lost so far, counted once for each sink that lacks them."""
        line = self._line
        unmade = (line.overflow + line.unmade) * len(self._sinks)
        late = sum(other.overflow for other in line.others)
        return unmade + late + sum(sum(each.lost.values()) for each in line.all)

    def _wait(
        self,
        ask: Callable[[_Line, threading.Event], None] | None,
        timeout: float | None,
        *,
        near: bool = False,
        patience: float | None = None,
    ) -> bool:
        """Ask each line for something and wait for it: what the first does the others then have.

        Args:
            ask: has the event set when it is done; a line that closes is waited for to finish.
            timeout: seconds in all; None for no end.
            near: leave the others out.
            patience: seconds for each of the others; None for no end.
        """
        if self._line.pid != os.getpid():
            return True
        end = None if timeout is None else time.monotonic() + timeout
        whole = True
        for line in self._line.all[:1] if near else self._line.all:
            left = None if end is None else max(0.0, end - time.monotonic())
            if line is not self._line and patience is not None:
                left = patience if left is None else min(left, patience)
            done = line.finished
            if ask is not None and not line.closed:
                done = threading.Event()
                ask(line, done)
            since = time.monotonic()
            if not line.courier.wait(done, left):
                whole = False
                if patience is not None and time.monotonic() - since >= patience:
                    line.say(f"{_name(line.sinks[0])} did not finish within {patience:g} seconds")
        return whole


def _is_near(sink: Sink) -> bool:
    """Whether a sink is, or is made of, one of ours that writes to memory or to a disk."""
    modules = {cls.__module__ for cls in type(sink).__mro__}
    return not modules.isdisjoint(f"lrprobe.sinks.{name}" for name in _NEAR)


def _among(owned: Sequence[Sink], sinks: Sequence[Sink]) -> list[Sink]:
    return [one for one in owned if any(one is sink for sink in sinks)]


class _Line:
    """What a ``Delivery`` shares with a thread, which must not keep the ``Delivery`` alive.

    Its records go on to ``others``, each a line of one sink that has a thread of its own.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        owned: Iterable[Sink],
        courier: _Courier,
        others: Sequence[_Line] = (),
    ) -> None:
        self.sinks = tuple(sinks)
        self.owned = tuple(owned)
        self.courier = courier
        self.others = tuple(others)
        self.pid = os.getpid()
        self.closed = False  # nothing more is taken
        self.finished = threading.Event()  # all is written
        self.abandoned = False  # nobody will ask for problems
        self.lock = threading.Lock()  # for the counts up to the blank line
        self.waiting = 0
        self.waiting_bytes = 0
        self.overflow = 0
        self.stuck_at = -1  # records that waited when the thread was last seen to hang

        self.hangs = False  # it was waited for in vain at the end of the process
        self.unmade = 0
        self.making = True  # False after a failure, so that only the first of a row is told
        self.lost: Counter[str] = Counter()  # by the name of the sink
        self._messages: deque[str] = deque()

    @property
    def all(self) -> tuple[_Line, ...]:
        """This line, and those that its records go on to."""
        return (self, *self.others)

    def take(self, nbytes: int) -> bool:
        """Make room for a record, which then waits; False where there is none."""
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
            self.say(
                f"{self.waiting:,} records ({self.waiting_bytes:,} bytes) wait for {whom}, "
                "which is the bound; records are lost until the sinks keep up"
            )
        return not above

    def release(self, nbytes: int) -> None:
        """One that was taken waits no more."""
        with self.lock:
            self.waiting -= 1
            self.waiting_bytes -= nbytes

    def resize(self, nbytes: int, now: int) -> None:
        """One that was taken has another size now."""
        with self.lock:
            self.waiting_bytes += now - nbytes

    def full(self, nbytes: int) -> bool:
        """Whether as much waits as may."""
        much = self.waiting_bytes + nbytes > WAITING_BYTES
        return (self.waiting >= WAITING_RECORDS or much) and self.waiting > 0

    def wait_for_room(self, nbytes: int) -> None:
        """Let a thread that works catch up; one that hangs is waited for once, a second long."""
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
            self.courier.send(partial(self.courier.close, self))

    def finish(self, until: float, *, close: bool) -> None:
        """At the end of the process: have all that was put written by then."""
        done = self.finished if close else threading.Event()
        if close:
            self.close()
        else:
            self.courier.send(partial(self.courier.flush, self, done))
        left = 0.0 if self.hangs else max(0.0, until - time.monotonic())
        if not self.courier.wait(done, left) and not self.hangs:
            self.hangs = True
            names = ", ".join(map(_name, self.sinks))
            self.say(f"{names} did not finish within {_EXIT_SECS:g} seconds")

    def say(self, message: str) -> None:
        self._messages.append(message)

    def said(self) -> list[str]:
        messages = []
        while self._messages:
            messages.append(self._messages.popleft())
        return messages


class _Channel:
    """A sink with what it has not written yet. Used by the background thread only."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.name = _name(sink)
        self.flushes = callable(getattr(sink, "flush", None))
        self.tells = callable(getattr(sink, "problems", None))
        wait = getattr(sink, "flush_secs", _FLUSH_SECS)
        self.flush_secs = wait if isinstance(wait, (int, float)) else _FLUSH_SECS
        self.lines: list[_Line] = []
        self.owned = False
        self.backlog: deque[tuple[Record, _Line]] = deque()
        self.backlog_bytes = 0
        self.unflushed: Counter[_Line] = Counter()
        self.flush_at: float | None = None
        self.failure = ""  # the cause; empty while all is well
        self.pause = _PAUSES[0]
        self.retry_at = 0.0
        self.dropped = 0  # in this episode of failure
        self.teller: _Line | None = None

    @property
    def due(self) -> float | None:
        """When something is to be done next."""
        return self.retry_at if self.failure else self.flush_at

    def offer(self, record: Record, line: _Line) -> None:
        self.backlog.append((record, line))
        self.backlog_bytes += record.nbytes
        self.teller = line
        if not self.failure:
            self._guarded(self._write_backlog)
        while len(self.backlog) > WAITING_RECORDS or (
            self.backlog_bytes > WAITING_BYTES and len(self.backlog) > 1
        ):
            oldest, loser = self.backlog.popleft()
            self.backlog_bytes -= oldest.nbytes
            loser.lost[self.name] += 1
            self.dropped += 1

    def tend(self, now: float) -> None:
        """Flush, or try again, where it is time to."""
        if self.due is not None and self.due <= now:
            self.attempt()

    def attempt(self) -> bool:
        """Write what waits and flush, now; False where that failed."""
        done = self._guarded(self._write_backlog) and self._guarded(self._flush)
        if done and self.failure:
            lost = f", {self.dropped:,} were lost" if self.dropped else ""
            self._say(f"{self.name} works again; what waited has been written{lost}")
            self.failure, self.pause, self.dropped = "", _PAUSES[0], 0
        return done

    def leave(self, line: _Line) -> bool:
        """Finish what is there of a line; True where no other line uses the sink."""
        # A sink that has failed may say so once and then help itself: hence a second time.
        done = self.attempt() or self.attempt()
        self.lines.remove(line)
        self.teller = self.lines[0] if self.lines else line
        waiting = sum(1 for _, theirs in self.backlog if theirs is line)
        if not done:
            self.backlog = deque(entry for entry in self.backlog if entry[1] is not line)
            self.backlog_bytes = sum(record.nbytes for record, _ in self.backlog)
            line.lost[self.name] += waiting
        unflushed = self.unflushed.pop(line, 0)
        cause = self.failure
        if self.owned and not self.lines:
            try:
                self.sink.close()
            except BaseException as error:  # noqa: BLE001 - a sink may raise what it likes
                cause = _cause(error)
                line.say(f"{self.name} could not be closed: {cause}")
                line.lost[self.name] += unflushed
        elif not done and unflushed:
            line.say(f"{self.name} may lack the last {unflushed:,} records: {cause}")
        if line.lost[self.name]:
            why = f": {cause}" if cause else ""
            line.say(f"{line.lost[self.name]:,} records were not written to {self.name}{why}")
        return not self.lines

    def _write_backlog(self) -> None:
        while self.backlog:
            record, line = self.backlog[0]
            self.sink.write(record)
            self.backlog.popleft()
            self.backlog_bytes -= record.nbytes
            if self.flushes:
                self.unflushed[line] += 1
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
            if self.tells:
                for message in self.sink.problems():  # type: ignore[attr-defined]
                    self._say(str(message))
        except BaseException as error:  # noqa: BLE001 - a sink may raise what it likes
            if not self.failure:
                self._say(
                    f"{self.name} failed: {_cause(error)}; its records wait in memory (up to "
                    f"{WAITING_RECORDS:,}) and are tried again; training goes on"
                )
            else:
                self.pause = min(2 * self.pause, _PAUSES[1])
            self.failure = _cause(error)
            self.retry_at = time.monotonic() + self.pause
            return False
        return True

    def _say(self, message: str) -> None:
        """Tell it to one line, so that it is told once."""
        if self.teller is not None:
            self.teller.say(message)


class _Courier:
    """The background thread and what it works on."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # for the two below
        self._thread: threading.Thread | None = None
        self._lines: set[_Line] = set()
        self._channels: dict[int, _Channel] = {}

    # What any thread may call.

    def open(self, line: _Line) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="lrprobe-delivery", daemon=True)
                thread.start()
                self._thread = thread
            self._lines.add(line)
        self.send(partial(self._attach, line))

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

    def lines(self) -> list[_Line]:
        """Those that are not finished."""
        with self._lock:
            return list(self._lines)

    # What only the thread itself calls.

    def deliver(
        self,
        line: _Line,
        make: Callable[[], Record | None],
        nbytes: int,
        others: Sequence[_Line] = (),
    ) -> None:
        try:
            record = make()
            line.making = True
        except BaseException as error:  # noqa: BLE001 - whatever it is, training goes on
            record = None
            line.unmade += 1
            if line.making:
                line.making = False
                line.say(f"a record could not be made, and is lost: {_cause(error)}")
        if record is not None:
            for sink in line.sinks:
                channel = self._channels.get(id(sink))
                if channel is not None:
                    channel.offer(record, line)
        for other in others:  # each has taken it
            if record is None:
                other.release(nbytes)
            else:
                other.resize(nbytes, record.nbytes)
                made = partial(_itself, record)
                other.courier.send(partial(other.courier.deliver, other, made, record.nbytes))
        line.release(nbytes)

    def flush(self, line: _Line, done: threading.Event) -> None:
        try:
            for channel in self._channels_of(line):
                channel.teller = line
                channel.attempt()
        finally:
            done.set()

    def close(self, line: _Line) -> None:
        try:
            for channel in self._channels_of(line):
                channel.teller = line
                if channel.leave(line):
                    del self._channels[id(channel.sink)]
            if line.overflow:
                line.say(f"{line.overflow:,} records were lost while too many waited for the sinks")
            if line.unmade:
                line.say(f"{line.unmade:,} records were lost since they could not be made")
        finally:
            for other in line.others:
                other.close()
            if line.abandoned:
                _unsaid.extend(line.said())
            with self._lock:
                self._lines.discard(line)
            line.finished.set()

    def _attach(self, line: _Line) -> None:
        for sink in line.sinks:
            channel = self._channels.setdefault(id(sink), _Channel(sink))
            if line not in channel.lines:
                channel.lines.append(line)
            channel.owned |= any(sink is one for one in line.owned)

    def _channels_of(self, line: _Line) -> list[_Channel]:
        return [channel for channel in self._channels.values() if line in channel.lines]

    def _run(self) -> None:
        while True:
            due = [channel.due for channel in self._channels.values() if channel.due is not None]
            wait = max(0.0, min(due) - time.monotonic()) if due else None
            try:
                command = self._commands.get(timeout=wait)
            except queue.Empty:
                pass
            else:
                try:
                    command()
                except BaseException as error:  # noqa: BLE001 - a bug must not end the thread
                    _unsaid.append(f"the delivery of records failed: {_cause(error)}")
                # Or the frame of a waiting thread would keep the last record alive.
                del command
            now = time.monotonic()
            for channel in self._channels.values():
                channel.tend(now)
            with self._lock:
                if not self._lines and self._commands.empty():
                    self._thread = None
                    return


def _name(sink: Sink) -> str:
    """The sink as messages call it."""
    if type(sink).__repr__ is object.__repr__:
        return type(sink).__name__
    try:
        return repr(sink)
    except Exception:  # noqa: BLE001 - it is only for a message
        return type(sink).__name__


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _abandon(line: _Line) -> None:
    """What a garbage-collected ``Delivery`` leaves: nobody waits, and no lock may be taken."""
    if line.pid == os.getpid():
        for each in line.all:
            each.abandoned = True
        line.close()


def _itself(record: Record) -> Record:
    return record


_unsaid: deque[str] = deque()
"""Problems of lines that nobody will ask, told at exit."""
_courier = _Courier()
_couriers: weakref.WeakValueDictionary[int, _Courier] = weakref.WeakValueDictionary()
"""id of a sink that has a thread of its own to that; its lines and the thread keep it alive."""


def _courier_of(sink: Sink) -> _Courier:
    found = _couriers.get(id(sink))
    if found is None:
        found = _couriers[id(sink)] = _Courier()
    return found


def _after_fork() -> None:
    """Give a forked child a courier of its own: locks and threads of the old are its parent's."""
    global _courier  # noqa: PLW0603 - one for the process is what it is
    _courier = _Courier()
    _couriers.clear()
    _unsaid.clear()


def _finish(*, close: bool) -> None:
    """Write all that was put: what is near first, then the others, a minute for each of the two."""
    near = _courier.lines()
    far = [line for each in list(_couriers.values()) for line in each.lines()]
    for lines in (near, far):
        until = time.monotonic() + _EXIT_SECS
        for line in lines:
            line.finish(until, close=close)
    if close:
        _unsaid.extend(message for line in (*near, *far) for message in line.said())


def _before_threads_end() -> None:
    # A forked multiprocessing.Process ends without atexit, but not without this.
    _finish(close=False)


def _at_exit() -> None:
    # After the non-daemon threads have ended: one of them may have been the training.
    _finish(close=True)
    while _unsaid:
        warn(_unsaid.popleft())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
# Not public, but there since 3.9 and what concurrent.futures relies on; atexit does all but the
# case above.
getattr(threading, "_register_atexit", lambda _: None)(_before_threads_end)
atexit.register(_at_exit)
