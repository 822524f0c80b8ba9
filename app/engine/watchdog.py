"""When the window goes, its engines go, whatever they are doing.

A thread of the engine cannot be relied on for that: while native code holds the interpreter's lock, or the
engine is stopped, no thread runs. Linux's PR_SET_PDEATHSIG fires when the *thread* that started the child
ends, and exists nowhere else. So on POSIX a small forked process in the engine's own group sleeps in poll()
on the command pipe, without reading it: the kernel reports a hang-up as soon as the last writer is gone, and
the group is killed. It is forked before anything heavy is imported, so it shares all its memory.
On Windows the parent holds a job object that does the same (see process_tree).
"""

from __future__ import annotations

import os
import signal
import sys
import time


def start(command_pipe: int) -> None:
    """Fork the watchdog. Call it while this process still has one thread. Does nothing on Windows."""
    if sys.platform == "win32":
        return
    engine = os.getpid()
    if os.fork():
        return
    # From here on: the watchdog, which must never return into the engine's code.
    try:
        _watch(command_pipe, engine)
    finally:
        os._exit(0)


def end_group() -> None:
    """Kill this process and its whole group, now."""
    if sys.platform != "win32":
        _kill_group(os.getpid())
    os._exit(1)


def _watch(command_pipe: int, engine: int) -> None:
    import select

    assert sys.platform != "win32"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Hold nothing open but the pipe that is watched: the parent waits for the ends of the others.
    quiet = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(quiet, fd)
    os.closerange(3, command_pipe)
    os.closerange(command_pipe + 1, 4096)
    poller = select.poll()
    poller.register(command_pipe, select.POLLHUP)  # not POLLIN: the commands are for the engine
    while True:
        events = poller.poll(60_000)
        gone = any(flags & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, flags in events)
        if gone and os.getpgrp() == engine:
            _kill_group(engine)
        if os.getppid() != engine:
            return  # the engine died; its parent, waiting for it, kills what is left of the group
        if gone:
            _kill_group(engine)
        if events:
            time.sleep(0.25)  # a system that reports unread commands too must not make this a busy loop


def _kill_group(engine: int) -> None:
    assert sys.platform != "win32"
    # Only a group of our own: an engine started by hand shares the group of somebody's shell. While we are in
    # the group, its number belongs to nobody else, even when the engine is dead.
    if os.getpgrp() == engine:
        os.killpg(engine, signal.SIGKILL)
    os.kill(engine, signal.SIGKILL)
