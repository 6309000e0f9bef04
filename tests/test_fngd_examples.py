"""The examples in fngd's docstrings, and reweight's, run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import nn

MODULES = ("coefficients", "data", "eva", "fngd", "kfac", "models", "ngd", "preconditioned", "shampoo", "skfac")


@pytest.mark.parametrize("name", [f"fngd.{module}" for module in MODULES] + ["persample.reweight"])
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "nn": nn})
    assert result.attempted > 0
    assert result.failed == 0
