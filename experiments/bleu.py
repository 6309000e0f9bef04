"""SacreBLEU (Post 2018) with its standard settings, on plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Returns "score" (0 … 100) and "signature" (the settings, by which figures can be compared).

    Raises ValueError unless there is one reference for each hypothesis, and at least one.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses and {len(references)} references; give as many of each, not 0")
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return {"score": score, "signature": str(metric.get_signature())}
