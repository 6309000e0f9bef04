"""What the command lines share: numbers, a device, what is printed, and an end that loses nothing."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def whole(least: int = 1) -> Callable[[str], int]:
    """Returns a parser of whole numbers from `least` on, for `type=` of an argument.

    >>> whole(0)("7")
    7
    """

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return parse


def check_device(device: str) -> None:
    """Raises ValueError where --device names none that can be used."""
    import torch  # here, so that options can be read without it

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def console(**options: Any) -> Any:
    """Returns a rich console that prints texts as they are: shapes such as [B, T] are no markup, and :x: no picture.

    Colours are given as `rich.text.Text`. Columns of a progress bar read markup of their own: `TextColumn(…,
    markup=False)`.
    """
    from rich.console import Console

    return Console(**{"markup": False, "emoji": False, "highlight": False, **options})


@contextmanager
def stop_flag(until: str) -> Iterator[list[bool]]:
    """A list that becomes non-empty at the first Ctrl-C or SIGTERM; the second one interrupts as usual.

    Arguments:
        until: what is still finished, in words: "after this batch".
    """
    flag: list[bool] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)
        print(f"\nstopping {until} (again: at once)", file=sys.stderr)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
