"""Processes that do one function of many items, in order and with few of them in memory."""

import multiprocessing as mp
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_IN_FLIGHT = 2  # items at a process: one that it works on, one that waits


def n_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[_Item, _Result]):
    """Does a function in several processes, which are forks of this one and end with it.

    Args:
        work: The function; it and what it holds are there in each process without being sent.
        n: Number of processes; with less than two, or where processes cannot be forked, this one does the work.
        weigh: Weight of an item, such as its size.
        most: Largest weight for each process of all items that are at the processes; a heavier one is there alone.
    """

    def __init__(
        self,
        work: Callable[[_Item], _Result],
        n: int,
        weigh: Callable[[_Item], int] = lambda item: 0,
        most: int = 0,
    ) -> None:
        self._work = work
        self._weigh, self._most = weigh, most
        self._n = n if sys.platform == "linux" else 1

    def map(self, items: Iterable[_Item]) -> Iterator[_Result]:
        """The function's results, in the order of the items.

        Raises:
            RuntimeError: A process has ended before its time; any error of the function is raised as it is.
        """
        if self._n < 2:
            yield from map(self._work, items)
            return
        context = mp.get_context("fork")
        ours: list[Connection] = []
        processes = []
        try:
            for _ in range(self._n):
                own, its = context.Pipe()
                ours.append(own)
                process = context.Process(target=_serve, args=(self._work, its, tuple(ours)), daemon=True)
                process.start()
                its.close()
                processes.append(process)
            yield from self._exchange(ours, items)
        finally:
            for own in ours:
                own.close()
            for process in processes:
                process.terminate()
                process.join()

    def _exchange(self, connections: list[Connection], items: Iterable[_Item]) -> Iterator[_Result]:
        waiting: deque[tuple[Connection, int]] = deque()
        most = self._most * len(connections)
        for number, item in enumerate(items):
            weight = self._weigh(item)
            while waiting and (
                len(waiting) == _IN_FLIGHT * len(connections) or weight + sum(of for _, of in waiting) > most
            ):
                yield _received(waiting.popleft()[0])
            connection = connections[number % len(connections)]
            try:
                connection.send(item)
            except OSError as error:
                raise _ended() from error
            waiting.append((connection, weight))
        while waiting:
            yield _received(waiting.popleft()[0])


def _received(connection: Connection) -> Any:
    try:
        done, result = connection.recv()
    except (EOFError, OSError) as error:
        raise _ended() from error
    if not done:
        raise result
    return result


def _ended() -> RuntimeError:
    return RuntimeError("a process that encodes text has ended before its time; the system may be out of memory")


def _serve(work: Callable[[Any], Any], connection: Connection, parents: tuple[Connection, ...]) -> None:
    """Work until the other end of the connection is closed."""
    for other in parents:  # else none of them would be closed when the parent ends
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were the parent's
    items: queue.Queue[Any] = queue.Queue()

    def receive() -> None:
        try:
            while True:
                items.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        item = items.get()
        try:
            answer: tuple[bool, Any] = True, work(item)
        except Exception as error:
            answer = False, error
        try:
            connection.send(answer)
        except OSError:
            os._exit(0)
