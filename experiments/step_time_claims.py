"""What the papers say of the time of a step, and what `experiments.step_time` has measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from experiments.evidence import FEWEST
from experiments.record import Claim, Record, Verdict
from experiments.statistics import mean
from experiments.step_time_ratios import by_round, parts, ratio, results
from experiments.step_time_report import PAPER
from persample.testing.measure import Ratio

SECOND_ORDER = ("kfac", "shampoo", "eva", "skfac", "ngd", "fngd")


def _ratios(record: Record, models: Iterable[str]) -> dict[str, dict[str, Ratio]] | None:
    """By model and method; None unless all models are there."""
    measured, found = results(record), {}
    for model in models:
        if model not in measured:
            return None
        pairs = {m: ratio(measured[model], m, record.settings["epochs"]) for m in record.settings["methods"]}
        found[model] = {method: value for method, value in pairs.items() if value is not None}
    return found


def judge_lowest(record: Record) -> Verdict | None:
    """FNGD has the lowest time of all second-order methods."""
    found = _ratios(record, PAPER)
    if found is None:
        return None
    measured, epochs = results(record), record.settings["epochs"]
    won, words = [], []
    for model, each in found.items():
        rivals = [method for method in SECOND_ORDER if method in each and method != "fngd"]
        rival = min(rivals, key=lambda method: each[method].median)
        own, other = (by_round(measured[model], method, epochs) for method in ("fngd", rival))
        won.append(each["fngd"].median < each[rival].median)
        words.append(
            f"{model} {each['fngd']}, next {rival} {each[rival]}, FNGD faster in "
            f"{sum(own[number] < other[number] for number in own)} of {len(own)} rounds"
        )
    verdict = "holds" if all(won) else "holds in part" if any(won) else "does not hold"
    return Verdict(f"time of FNGD's step over SGD's, median (quartiles), of six methods: {'; '.join(words)}.", verdict)


def judge_ratio(record: Record) -> Verdict | None:
    """FNGD over SGD."""
    found = _ratios(record, PAPER)
    if found is None:
        return None
    words = "; ".join(f"{model} {each['fngd']}" for model, each in found.items())
    average = mean([each["fngd"].median for each in found.values()])
    lower = all(each["fngd"].median <= PAPER[model]["fngd"] for model, each in found.items())
    verdict = "holds" if lower else "holds in part" if average <= 1.37 else "does not hold"
    return Verdict(f"on average {average:.2f}: {words} (n = {_n(found)} rounds). Holds: no more than stated.", verdict)


def judge_rivals(record: Record) -> Verdict | None:
    """How much faster than KFAC, Shampoo and Eva."""
    found = _ratios(record, PAPER)
    if found is None:
        return None
    gains = {
        rival: [each[rival].median / each["fngd"].median for each in found.values()]
        for rival in ("kfac", "shampoo", "eva")
    }
    faster = [min(values) > 1 for values in gains.values()]
    verdict = "holds" if all(faster) else "holds in part" if any(faster) else "does not hold"
    words = "; ".join(f"{rival} {min(values):.2f}–{max(values):.2f} ×" for rival, values in gains.items())
    return Verdict(
        f"time of the rival over FNGD's, range over the four models: {words}. Holds: always faster.", verdict
    )


def judge_ngd(record: Record) -> Verdict | None:
    """NGD over FNGD on ResNet-32."""
    found = _ratios(record, ["resnet32"])
    if found is None or "ngd" not in found["resnet32"]:
        return None
    each = found["resnet32"]
    gain = each["ngd"].median / each["fngd"].median
    verdict = "holds" if gain >= 1.9 else "holds in part" if gain > 1.05 else "does not hold"
    return Verdict(f"ResNet-32: NGD {each['ngd']}, FNGD {each['fngd']} of SGD's time: {gain:.2f} × as fast.", verdict)


def judge_transformer(record: Record) -> Verdict | None:
    """FNGD, AdamW and KFAC on the Transformer."""
    found = _ratios(record, ["transformer"])
    if found is None:
        return None
    each = found["transformer"]
    close, gain = each["fngd"].median / each["adamw"].median, each["kfac"].median / each["fngd"].median
    verdict = "holds" if close <= 1.1 and gain > 1 else "holds in part" if close <= 1.1 or gain > 1 else "does not hold"
    words = "; ".join(f"{name} {value}" for name, value in each.items() if name != "sgd")
    s = record.settings["transformer"]
    return Verdict(
        f"FNGD takes {close:.2f} × AdamW's time, KFAC {gain:.2f} × FNGD's ({s['layers']} + {s['layers']} layers, batch "
        f"{results(record)['transformer']['batch']} × {s['time']} words; over SGD: {words}).",
        verdict,
    )


def judge_backward(record: Record) -> Verdict | None:
    """FNGD's backward pass against SGD's."""
    found, measured = [], results(record)
    for model in ("resnet32", "transformer"):
        if model not in measured:
            return None
        own, plain = (parts(measured[model], m, record.settings["epochs"]) for m in ("fngd", "sgd"))
        if not own or not plain:
            return None
        found.append(
            (model, own["backward"] / plain["backward"], (own["statistics"] + own["solve"]) / sum(own.values()))
        )
    less = [value < 1 for _, value, _ in found]
    verdict = "holds" if all(less) else "holds in part" if any(less) else "does not hold"
    words = "; ".join(f"{m}: {value:.2f} of SGD's, Gram and solve {100 * g:.1f} % of the step" for m, value, g in found)
    return Verdict(
        f"backward pass of an average FNGD step, weighted sum included: {words}. (Here the weights scale what the "
        "backward pass computes anyway; nothing is extracted.)",
        verdict,
    )


def _n(found: dict[str, dict[str, Ratio]]) -> int:
    return min(each["fngd"].rounds for each in found.values())


def enough(judge: Callable[[Record], Verdict | None]) -> Callable[[Record], Verdict | None]:
    """Returns a judge that says no more than figures where a model was timed in fewer than three rounds."""

    def judged(record: Record) -> Verdict | None:
        verdict = judge(record)
        rounds = min((len(each["times"]["sgd/step"]["round"]) for each in results(record).values()), default=0)
        if verdict is None or rounds >= FEWEST:
            return verdict
        return Verdict(f"{verdict.measured} No verdict: n = {rounds} rounds, and {FEWEST} are needed.", "undecided")

    return judged


JUDGES = {
    "FNGD, Table III: the shortest epochs of all second-order methods, on all four ResNets": judge_lowest,
    "FNGD, Table III: epochs take 1.23, 1.58, 1.36, 1.42 × SGD's (ResNet-32, -110, -18, -34), on average 1.37 ×":
        judge_ratio,
    "FNGD, V-A: up to 2.05 × faster than KFAC, 1.22 × than Shampoo, 1.49 × than Eva": judge_rivals,
    "FNGD, IV-B and Fig. 4: twice as fast as NGD (ResNet-32)": judge_ngd,
    "FNGD, V-B: on the Transformer about the time of AdamW, and 2.4 × faster than KFAC": judge_transformer,
    "FNGD, V-C and Fig. 8: the backward pass takes less than SGD's": judge_backward,
}  # fmt: skip
CLAIMS = tuple(Claim(paper, enough(judge)) for paper, judge in JUDGES.items())
