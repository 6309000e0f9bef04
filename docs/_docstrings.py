"""Reads docstrings as this repository writes them: `>>>` examples wherever they stand become code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
NOTE = re.compile(r"^( *)Approximate:", re.MULTILINE)  # else griffe makes its first line a title


def fenced(text: str) -> str:
    """Returns the docstring with every example, from `>>>` to the next empty line, in a fence of its own."""
    text = NOTE.sub(r"\1**Approximate:**", text)
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class Examples(Extension):
    """Applies `fenced` to every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for each module, class, function and attribute that griffe has read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
