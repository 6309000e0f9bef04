"""What the tests of resuming share: a checkpoint's way through a file."""

from __future__ import annotations

import io
from typing import Any

import torch


def reloaded(value: Any) -> Any:
    """What torch.load reads of what torch.save wrote, weights only."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
