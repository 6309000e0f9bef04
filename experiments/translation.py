"""Translation: BLEU of a Transformer trained by each method (FNGD paper, Section V-B, Fig. 7).

The paper gives neither direction, tokenisation, number of layers, label smoothing nor kind of BLEU; here: English to
German, a byte-level BPE for each language, label smoothing 0.1, SacreBLEU on detokenised text by greedy and by beam
search (5 beams). Batches have 64 sentence pairs of similar length. `adamw` runs at a constant rate, as in the paper;
`adamw-warmup` as in Vaswani et al. (2017): linear warm-up over the first `warmup` of all steps, then the inverse
root. `fngd-warmup` has that schedule, too; all others the constant rate.

The loss is the mean over all words of a batch. For FNGD a sample is a sentence pair: its loss is ℓ_b = (B/N) Σ_t
ℓ_bt over its own words, N being those of the batch, so that the batch's loss is the mean of the ℓ_b; a sentence of
twice the words has twice the weight, as in the plain gradient. Padding has no loss and is not attended to.

There is no weight decay but AdamW's 0.01. KFAC's and SKFAC's statistics include padded positions, as is usual.

Setting "best" is one long run of one method, in a model of its own, with the best trial's options; null for none.

Small scale, process seconds of AdamW on one busy core: 0.21 a step, 26 an epoch of 8,000 pairs (2.2 million
parameters); with 8 methods, 3 seeds and 6 epochs about 65 minutes, 17 for the 32 trials, 35 for the best run.
`eva` and `skfac` are left out of it; --set 'methods=[…, "eva", "skfac"]' adds them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments import decoding, text, tuning
from experiments.bleu import bleu
from experiments.models import PADDING, Transformer
from experiments.record import Context, Experiment, Result, Settings
from experiments.runs import Plan, train
from experiments.translation_report import CLAIMS, draw, report

METHODS = ["adamw", "adamw-warmup", "sgd", "kfac", "shampoo", "fngd", "fngd-warmup", "fngd-per-layer"]
TRIAL_SEED = 1000
SMALL: Settings = {
    "corpus": "multi30k",
    "source": "en",
    "target": "de",
    "words": 4_000,
    "train_size": 8_000,
    "test_size": None,
    "model": {"width": 128, "hidden": 256, "heads": 4, "layers": 2, "dropout": 0.1},
    "batch_size": 64,
    "epochs": 6,
    "label_smoothing": 0.1,
    "warmup": 0.2,
    "inverse_every": 30,
    "beams": 5,
    "methods": METHODS,
    "trials": 4,
    "trial_size": 4_000,
    "trial_epochs": 2,
    "seeds": [0, 1, 2],
    "best": {
        "method": "adamw-warmup",
        "epochs": 10,
        "train_size": None,
        "model": {"width": 256, "hidden": 512, "heads": 4, "layers": 2, "dropout": 0.1},
    },
}
FULL: Settings = {
    **SMALL,
    "methods": [*METHODS, "eva", "skfac"],
    "words": 8_000,
    "train_size": None,
    "model": {"width": 512, "hidden": 2048, "heads": 8, "layers": 6, "dropout": 0.1},
    "epochs": 100,
    "warmup": 0.1,
    "inverse_every": 100,
    "trial_size": None,
    "trial_epochs": 5,
    "best": None,
}
SMOKE: Settings = {
    **SMALL,
    "corpus": "toy",
    "words": 300,
    "train_size": 128,
    "test_size": 20,
    "model": {"width": 32, "hidden": 64, "heads": 2, "layers": 1, "dropout": 0.1},
    "batch_size": 16,
    "epochs": 2,
    "inverse_every": 4,
    "trials": 1,
    "trial_size": 64,
    "trial_epochs": 1,
    "seeds": [0],
    "best": None,
}


def units(settings: Settings) -> list[str]:
    """All trials, the best run, then all runs, seeds outermost."""
    trials = [f"tune/{method}/{number}" for method in settings["methods"] for number in range(settings["trials"])]
    best = [f"best/{settings['best']['method']}/seed={settings['seeds'][0]}"] if settings["best"] else []
    return trials + [f"{method}/seed={seed}" for seed in settings["seeds"] for method in settings["methods"]] + best


@lru_cache(maxsize=1)
def _load(
    name: str, data_dir: Path | None, source: str, target: str, words: int
) -> tuple[text.Corpus, list[text.Vocabulary]]:
    """Read and learnt once for all units of a command."""
    corpus = text.load(name, data_dir, source, target)
    return corpus, [text.Vocabulary([pair[side] for pair in corpus.train], words) for side in (0, 1)]


def word_loss(logits: Tensor, targets: Tensor, label_smoothing: float, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy of the words that are no padding, [B, T, V] against [B, T]: their mean, or their sum.

    Label smoothing ε puts 1 − ε on the word and spreads ε over the whole vocabulary (Szegedy et al. 2016).
    """
    return F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=PADDING,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


SCHEDULES: dict[str | None, Callable[[int, int], float]] = {
    None: lambda step, warm: 1.0,
    "inverse root": lambda step, warm: min((step + 1) / warm, (warm / (step + 1)) ** 0.5),
}
"""Factor on the learning rate by step and length of the warm-up (Vaswani et al. 2017, equation 3, with peak 1)."""


def run(unit: str, settings: Settings, context: Context) -> Result:
    """Trains. Returns "options", "parameters", "epochs" (figures by epoch, see `experiments.runs`), "diverged", and of
    a run that is no trial "test": SacreBLEU on the test sentences by greedy and beam search, and its signature."""
    kind, _, rest = unit.partition("/") if unit.startswith(("tune/", "best/")) else ("", "", unit)
    method, number = rest.split("/")
    optimiser = tuning.optimiser(method)
    if kind == "tune":
        seed, options = TRIAL_SEED, tuning.trials(method, "translation", settings["trials"])[int(number)]
        settings = {**settings, "train_size": settings["trial_size"], "epochs": settings["trial_epochs"]}
    else:
        seed = int(number.removeprefix("seed="))
        options = tuning.best(tuning.finished(context), f"tune/{method}/", figure="loss", smallest=True)
        settings = {**settings, **(settings["best"] if kind == "best" else {})}
    corpus, vocabularies = _load(
        settings["corpus"], context.data_dir, settings["source"], settings["target"], settings["words"]
    )
    pairs = text.encode(corpus.train[: settings["train_size"]], *vocabularies)
    held = text.encode(corpus.validation, *vocabularies)
    steps, size = len(pairs) // settings["batch_size"], settings["batch_size"]
    if not steps:
        raise ValueError(f"{len(pairs)} sentence pairs do not fill a batch of {size}")
    torch.manual_seed(seed)
    model = Transformer(*map(len, vocabularies), **settings["model"]).to(context.device)
    warm = max(1, round(settings["warmup"] * settings["epochs"] * steps))
    factor = SCHEDULES[optimiser.schedule]
    need = tuning.Training(
        steps, inverse_every=settings["inverse_every"], plain=("source", "target", "out"), weight_decay=0.0
    )

    def test() -> dict[str, float]:
        figures = {"loss": held_loss(model, held)}
        if kind != "tune":
            references = [pair[1] for pair in corpus.validation]
            figures["bleu"] = _bleu(decoding.greedy, model, held, vocabularies[1], references)["score"]
        return figures

    plan = Plan(
        model,
        optimiser.build(model, need, options),
        batches=lambda epoch: text.batches(pairs, size, seed=seed, epoch=epoch),
        loss=lambda batch: batch_loss(model, batch, settings["label_smoothing"]),
        factor=lambda step: factor(step, warm),
        test=test,
        epochs=settings["epochs"],
        steps=steps,
        seed=seed,
    )
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"options": options, "parameters": parameters, "pairs": len(pairs), "steps": steps}
    result: Result = {**facts, **train(plan, context)}
    if kind != "tune" and not result["diverged"]:
        model.eval()
        tested = corpus.test[: settings["test_size"]]
        numbers, references = text.encode(tested, *vocabularies), [pair[1] for pair in tested]
        greedy = _bleu(decoding.greedy, model, numbers, vocabularies[1], references)
        search = lambda net, source: decoding.beam(net, source, size=settings["beams"])  # noqa: E731
        beam = _bleu(search, model, numbers, vocabularies[1], references)
        result["test"] = {
            "greedy": greedy["score"],
            "beam": beam["score"],
            "signature": beam["signature"],
            "examples": [[*pair, hypothesis] for pair, hypothesis in zip(tested[:5], beam["texts"][:5], strict=False)],
        }
    return result


def batch_loss(model: Transformer, batch: text.Batch, label_smoothing: float) -> tuple[Tensor, float]:
    """Returns (mean loss by word, how many words): position t is to predict word t + 1."""
    device = model.out.weight.device
    source, target = (side.to(device, non_blocking=True) for side in batch)
    loss = word_loss(model(source, target[:, :-1]), target[:, 1:], label_smoothing)
    return loss, int((batch[1][:, 1:] != PADDING).sum())


def held_loss(model: Transformer, pairs: text.Numbers, rows: int = 100) -> float:
    """Returns the mean cross-entropy by word, in nats, without label smoothing."""
    order = sorted(pairs, key=lambda pair: len(pair[1]))
    total, count = 0.0, 0
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        source, target = (text.padded([pair[side] for pair in chosen]).to(model.out.weight.device) for side in (0, 1))
        total += word_loss(model(source, target[:, :-1]), target[:, 1:], 0.0, "sum").item()
        count += int((target[:, 1:] != PADDING).sum())
    return total / count


def _bleu(
    search: Callable[[Transformer, Tensor], list[decoding.Words]],
    model: Transformer,
    pairs: text.Numbers,
    vocabulary: text.Vocabulary,
    references: list[str],
) -> dict[str, Any]:
    texts = [vocabulary.decode(words) for words in decoding.translate(search, model, decoding.sources(pairs))]
    return {**bleu(texts, references), "texts": texts}


EXPERIMENT = Experiment(
    name="translation",
    help="BLEU of a Transformer on Multi30K, tuned alike",
    source="FNGD paper, Section V-B and Fig. 7",
    scales={"small": SMALL, "full": FULL, "smoke": SMOKE},
    units=units,
    run=run,
    report=report,
    draw=draw,
    claims=CLAIMS,
    needs=("tokenizers", "sacrebleu"),
    growing=("seeds", "methods", "best"),
)
