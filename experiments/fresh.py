"""What a function returns in a fresh process, which tells how far it is and can be stopped.

Where a process's memory lies, and how much of it the C library gives back between steps, stays much the same for as
long as it lives, and moves times by several percent (`benchmarks.processes`). What is timed in several processes shows
the code.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

Show = Callable[[float, float, str], None]
"""(done, total, text): see `Context.progress`."""


def in_fresh_process(function: Callable[..., Any], *arguments: Any, show: Show) -> Any:
    """Returns function(*arguments, show), run in a new process with as many threads of torch as this one has.

    Function, arguments and result must be picklable. What `show` raises here, `Stopped` say, ends the process and
    passes on, as does an exception that the function raises.

    Raises RuntimeError where the process dies.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_serve, args=(there, torch.get_num_threads(), function, arguments), daemon=True)
    child.start()
    there.close()
    try:
        while True:
            kind, *content = here.recv()
            if kind == "result":
                return content[0]
            if kind == "raised":
                raise content[0]
            show(*content)
    except EOFError:
        child.join()
        raise RuntimeError(f"the process that runs {function.__name__} has died, exit code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
        here.close()


def _serve(parent: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides
    torch.set_num_threads(threads)
    try:
        answer = "result", function(*arguments, lambda *progress: parent.send(("progress", *progress)))
    except Exception as error:
        answer = "raised", error
    parent.send(answer)
