"""The training experiments: losses, decoding, tuning and resuming against explicit computations; tables that say so."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import decoding, images, images_report, runs, text, translation, translation_report, tuning
from experiments.models import PADDING, Transformer
from experiments.record import Context, Record, Stopped
from fngd.data import DataError

CPU = "cpu"


def small_transformer(words: int = 7, **options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(9, words, **{"width": 8, "hidden": 12, "heads": 2, "layers": 2, "dropout": 0.0, **options})
    for parameter in model.parameters():  # so that no two words are alike
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


SOURCE = torch.tensor([[1, 4, 5, 6, 2], [1, 7, 2, 0, 0], [1, 8, 3, 2, 0]])
TARGET = torch.tensor([[1, 3, 4, 2], [1, 5, 2, 0], [1, 6, 6, 2]])


# Decoding


def test_a_stepper_gives_the_decoders_logits():
    model = small_transformer()
    with torch.no_grad():
        expected, stepper = model(SOURCE, TARGET), decoding.Stepper(model, SOURCE)
        for time in range(3):
            torch.testing.assert_close(stepper(TARGET[:, time]), expected[:, time], rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_search_and_a_beam_of_one_take_the_likeliest_word(seed):
    model = small_transformer()
    torch.manual_seed(seed)
    nn.init.normal_(model.out.weight)
    found = decoding.greedy(model, SOURCE)
    assert decoding.beam(model, SOURCE, size=1) == found
    for row, words in enumerate(found):
        alone = SOURCE[row : row + 1]
        alone = alone[alone != PADDING][None]  # padding changes nothing
        so_far = [text.BEGIN]
        for word in [*words, text.END] if len(words) < decoding.longest(SOURCE) else words:
            with torch.no_grad():
                assert model(alone, torch.tensor([so_far]))[0, -1].argmax().item() == word
            so_far.append(word)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_translations(monkeypatch, penalty):
    model, vocabulary = small_transformer(5), range(5)
    monkeypatch.setattr(decoding, "longest", lambda source: 3)
    found = decoding.beam(model, SOURCE, size=30, penalty=penalty)
    others = [word for word in vocabulary if word != text.END]
    for row in range(len(SOURCE)):
        scores = {}
        for length in range(3):
            for words in itertools.product(others, repeat=length):
                full = torch.tensor([[text.BEGIN, *words, text.END]])
                with torch.no_grad():
                    logs = model(SOURCE[row : row + 1], full[:, :-1]).log_softmax(-1)[0]
                total = logs.gather(1, full[0, 1:, None]).sum().item()
                scores[words] = total / ((5 + length + 1) / 6) ** penalty
        assert tuple(found[row]) == max(scores, key=scores.__getitem__)


def test_translations_come_in_the_order_of_their_sources_and_without_dropout():
    model = small_transformer()
    sources = [row[row != PADDING].tolist() for row in SOURCE]
    expected = [decoding.greedy(model, torch.tensor([source]))[0] for source in sources]
    assert decoding.translate(lambda m, s: decoding.greedy(m, s)[:], model, sources, rows=1) == expected
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\)"):
        decoding.translate(decoding.greedy, model.train(), sources)


# The loss of sentences


def test_the_smoothed_loss_is_the_mean_over_words_that_are_no_padding():
    logits = torch.randn(3, 4, 7, dtype=torch.float64)
    logs, each = logits.log_softmax(-1), []
    for row, column in itertools.product(range(3), range(4)):
        if TARGET[row, column] != PADDING:
            one = logs[row, column]
            each.append(-(0.9 * one[TARGET[row, column]] + 0.1 * one.mean()))
    expected = torch.stack(each)
    torch.testing.assert_close(translation.word_loss(logits, TARGET, 0.1), expected.mean())
    torch.testing.assert_close(translation.word_loss(logits, TARGET, 0.1, "sum"), expected.sum())


def test_fngd_weighs_sentences_by_their_share_of_the_loss_of_all_words():
    """`.grad` is Σ_b (B c_b) s_b, s_b being a sentence's share of the batch's gradient, found sentence by sentence."""
    model = small_transformer().train()
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    count = int((TARGET[:, 1:] != PADDING).sum())
    shares: dict[str, list[torch.Tensor]] = {path: [] for path, _ in layers}
    for source, target in zip(SOURCE, TARGET, strict=True):
        source, target = source[source != PADDING][None], target[target != PADDING][None]
        loss = translation.word_loss(model(source, target[:, :-1]), target[:, 1:], 0.1, "sum") / count
        model.zero_grad()
        loss.backward()
        for path, module in layers:
            shares[path].append(torch.cat([module.weight.grad.flatten(), module.bias.grad]))
    model.zero_grad()
    alpha = 1e-3
    optimizer = tuning.OPTIMISERS["fngd"].build(model, tuning.Training(1), {"lr": 0.1, "alpha": alpha})
    loss, words = translation.batch_loss(model, (SOURCE, TARGET), 0.1)
    loss.backward()
    assert words == count
    for path, module in layers:
        rows = torch.stack(shares[path])
        gram = rows @ rows.T
        size = len(rows)
        factors = torch.linalg.solve(
            gram / (alpha * gram.norm()) + size * torch.eye(size).double(), torch.ones(size).double()
        )
        got = torch.cat([module.weight.grad.flatten(), module.bias.grad])
        torch.testing.assert_close(got, size * factors @ rows, rtol=1e-7, atol=1e-10, msg=lambda m, p=path: f"{p}: {m}")
    optimizer.remove()


# Text


def test_a_vocabulary_gives_back_what_it_was_given():
    pytest.importorskip("tokenizers")
    sentences = ["Ein Mann, der läuft.", 'Zwei (2) Hunde & ein "Kind" – draußen!', "日本"]
    vocabulary = text.Vocabulary(sentences[:2] * 3, 300)
    assert len(vocabulary) == 300
    for sentence in sentences:
        numbers = vocabulary.encode(sentence)
        assert (numbers[0], numbers[-1], PADDING in numbers) == (text.BEGIN, text.END, False)
        assert vocabulary.decode(numbers) == sentence
    assert vocabulary.encode(sentences[0]) == text.Vocabulary(sentences[:2] * 3, 300).encode(sentences[0])
    assert vocabulary.decode([*vocabulary.encode("Mann"), 77]) == "Mann", "nothing behind the end"


def test_batches_are_of_one_size_and_hold_every_pair_at_most_once():
    pairs = [([1, n + 3, 2], [1] + [n + 3] * (n % 7) + [2]) for n in range(45)]
    seen = list(text.batches(pairs, 10, seed=1, epoch=2, pool=2))
    assert [(len(s), len(t)) for s, t in seen] == [(10, 10)] * 4
    numbers = [row[1].item() for source, _ in seen for row in source]
    assert len(set(numbers)) == 40
    again = list(text.batches(pairs, 10, seed=1, epoch=2, pool=2))
    assert all(torch.equal(a, b) for one, two in zip(seen, again, strict=True) for a, b in zip(one, two, strict=True))
    other = [row[1].item() for source, _ in text.batches(pairs, 10, seed=1, epoch=3, pool=2) for row in source]
    assert other != numbers


def test_missing_and_unequal_files_are_named(tmp_path):
    with pytest.raises(DataError, match="needs --data-dir"):
        text.load("multi30k", None, "en", "de")
    with pytest.raises(DataError, match=r"train\.en, which does not exist"):
        text.load("multi30k", tmp_path, "en", "de")
    (tmp_path / "multi30k").mkdir()
    for language, content in (("en", "a\nb\n"), ("de", "c\n")):
        (tmp_path / "multi30k" / f"train.{language}").write_text(content)
    with pytest.raises(DataError, match="train: 2 sentences in 'en', 1 in 'de'"):
        text.load("multi30k", tmp_path, "en", "de")
    with pytest.raises(ValueError, match=r"'multi31k' is unknown; choose one of \['multi30k', 'toy'\]"):
        text.load("multi31k", tmp_path, "en", "de")


def test_bleu_is_sacrebleus():
    pytest.importorskip("sacrebleu")
    from experiments.bleu import bleu

    references = ["Ein Mann läuft schnell durch den Park.", "Zwei Hunde spielen im Schnee."]
    assert bleu(references, references)["score"] == pytest.approx(100)
    worse = bleu(["Ein Mann läuft durch den Park.", "Zwei Hunde spielen im Gras."], references)
    assert 20 < worse["score"] < 90
    assert "tok:13a" in worse["signature"]
    with pytest.raises(ValueError, match="1 hypotheses and 2 references"):
        bleu(references[:1], references)


# Tuning


@pytest.mark.parametrize(("settings", "kind"), [
    *[(images.EXPERIMENT.scales[s], "images") for s in ("small", "full")],
    *[(translation.EXPERIMENT.scales[s], "translation") for s in ("small", "full")],
])  # fmt: skip
def test_every_method_has_the_same_number_of_trials(settings, kind):
    for method in settings["methods"]:
        grid = tuning.trials(method, kind, settings["trials"])
        assert len(grid) == len({tuple(each.items()) for each in grid}) == settings["trials"], method
    names = translation.units(settings) if kind == "translation" else images.units(settings)
    assert len(names) == len(set(names))


def test_the_best_trial_is_the_one_that_validation_says():
    results = {
        f"tune/sgd/{n}": {"options": {"lr": lr}, "diverged": lr == 3, "epochs": [{"loss": 9.0}, {"loss": loss}]}
        for n, (lr, loss) in enumerate([(1, 0.5), (2, 0.4), (3, 0.1)])
    }
    assert tuning.best(results, "tune/sgd/", figure="loss", smallest=True) == {"lr": 2}
    assert tuning.best(results, "tune/sgd/", figure="loss") == {"lr": 1}
    with pytest.raises(ValueError, match=r"tune/fngd/\*: no trial is finished"):
        tuning.best(results, "tune/fngd/", figure="loss")
    with pytest.raises(ValueError, match="all 1 trials diverged"):
        tuning.best({"tune/sgd/2": results["tune/sgd/2"]}, "tune/sgd/", figure="loss")
    shown = tuning.table(results, ["sgd"], "tune/", figure="loss", smallest=True)
    assert "lr 3: diverged | lr 2 |" in shown
    with pytest.raises(ValueError, match="9 trials of 'sgd'; there are 1 … 4"):
        tuning.trials("sgd", "translation", 9)
    with pytest.raises(ValueError, match="'sdg' is unknown"):
        tuning.trials("sdg", "images", 1)


def test_validation_images_are_not_trained_on_and_test_images_not_tuned_on():
    pytest.importorskip("sklearn")
    task = {**images.DIGITS, "train_size": None, "trial_size": None, "pool": 2}
    context = Context(CPU, None, Path("unused.pt"))
    trained, held = images.splits(task, context, tuning_split=True)
    final, test = images.splits(task, context, tuning_split=False)
    included, _ = images.splits({**task, "validation_included": True}, context, tuning_split=False)
    assert len(trained.labels) == len(final.labels) == len(included.labels) - len(held.labels)
    assert torch.equal(included.images[-len(held.labels) :], held.images)
    assert len(test.labels) == 360
    assert test.images.shape[1:] == (1, 4, 4)
    with pytest.raises(ValueError, match="1400 training images of digits; there are 1237"):
        images.splits({**task, "train_size": 1400}, context, tuning_split=False)


# Runs


def plan(tmp_path: Path, method: str, epochs: int = 3, lr: float = 0.05) -> runs.Plan:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    data = torch.randn(24, 4), torch.randint(3, (24,))
    options = {"lr": lr, **({"damping": 0.03} if method in ("kfac", "eva", "skfac") else {})}

    def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch)).split(8)
        return [(data[0][chosen], data[1][chosen]) for chosen in order]

    return runs.Plan(
        model,
        tuning.OPTIMISERS[method].build(model, tuning.Training(3, inverse_every=2, statistics_every=2), options),
        batches=batches,
        loss=lambda batch: (F.cross_entropy(model(batch[0]), batch[1]), 8.0),
        factor=lambda step: 0.9**step,
        test=lambda: {"accuracy": 100 * (model(data[0]).argmax(1) == data[1]).float().mean().item()},
        epochs=epochs,
        steps=3,
    )


@pytest.mark.parametrize("method", ["sgd", "adamw", "kfac", "shampoo", "eva", "skfac", "ngd", "fngd", "fngd-per-layer"])
def test_a_stopped_run_goes_on_with_the_same_numbers(tmp_path, method):
    whole = runs.train(plan(tmp_path, method), Context(CPU, None, tmp_path / "whole.pt"))
    calls = itertools.count()
    context = Context(CPU, None, tmp_path / "stopped.pt", stopping=lambda: next(calls) == 4)  # in the second epoch
    with pytest.raises(Stopped):
        runs.train(plan(tmp_path, method), context)
    resumed = runs.train(plan(tmp_path, method), context)
    for one, two in zip(whole["epochs"], resumed["epochs"], strict=True):
        assert one["train_loss"] == two["train_loss"]
        assert one["accuracy"] == two["accuracy"]


def test_a_run_that_diverges_ends_and_says_so(tmp_path):
    result = runs.train(plan(tmp_path, "sgd", lr=1e38), Context(CPU, None, tmp_path / "run.pt"))
    assert result["diverged"]
    assert len(result["epochs"]) == 1
    assert not math.isfinite(result["epochs"][0]["train_loss"])


def test_targets_are_reached_at_the_end_of_an_epoch():
    epochs = [{"accuracy": a, "process_seconds": 2.0} for a in (10.0, 60.0, 50.0)]
    assert runs.first_epoch(epochs, "accuracy", 60) == 2
    assert runs.spent(epochs, 2) == 4.0
    assert runs.first_epoch(epochs, "accuracy", 61) is None
    assert runs.spent(epochs, None) is None


# Reports


def run_units(experiment, settings, tmp_path, chosen=None) -> Record:
    record = Record(experiment.name, "smoke", CPU, settings)
    path = tmp_path / f"{experiment.name}-smoke.json"
    for unit in chosen or experiment.units(settings):
        context = Context(CPU, None, path.with_suffix(".unfinished") / f"{unit.replace('/', '--')}.pt")
        record.add(unit, experiment.run(unit, settings, context), 1.0, [None, None], path)
    return record


def test_images_from_trials_to_verdicts(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    task = {**images.DIGITS, "model": "mlp", "train_size": 256, "trial_size": 128, "targets": [20.0, 101.0]}
    settings = {**images.SMOKE, "tasks": {"digits": task}, "trials": 1, "seeds": [0, 1]}
    with pytest.raises(ValueError, match=r"tune/digits/sgd/\*: no trial is finished"):
        images.run("digits/sgd/seed=0", settings, Context(CPU, None, tmp_path / "none.unfinished" / "a.pt"))
    record = run_units(images.EXPERIMENT, settings, tmp_path)
    assert len(record.results["digits/sgd-long/seed=0"]["epochs"]) == 2 * task["epochs"]
    shown = images_report.report(record)
    assert "| sgd-long | 2 |" in shown
    assert "never" in shown
    assert all(path.stat().st_size > 10_000 for path in images_report.draw(record, tmp_path / "images"))
    verdicts = [claim.judge(record) for claim in images_report.CLAIMS]
    assert all(verdict is not None and "n = 2 seeds" in verdict.measured for verdict in verdicts)
    del record.units["digits/fngd/seed=1"]
    assert [claim.judge(record) for claim in images_report.CLAIMS] == [None] * 3


def test_translation_from_trials_to_tables(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sacrebleu")
    pytest.importorskip("matplotlib")
    best = {"method": "adamw", "epochs": 1, "train_size": 32, "model": translation.SMOKE["model"]}
    settings = {**translation.SMOKE, "methods": ["adamw", "fngd"], "test_size": 4, "epochs": 1, "best": best}
    settings |= {"train_size": 32, "trial_size": 32}
    record = run_units(translation.EXPERIMENT, settings, tmp_path)
    assert {"greedy", "beam", "signature", "examples"} <= record.results["fngd/seed=0"]["test"].keys()
    assert "test" not in record.results["tune/fngd/0"]
    shown = translation_report.report(record)
    assert "## The long run, adamw/seed=0" in shown
    assert "| fngd | 1 |" in shown
    assert all(path.stat().st_size > 10_000 for path in translation_report.draw(record, tmp_path / "translation"))
    assert [claim.judge(record) for claim in translation_report.CLAIMS] == [None] * 3


def translations(scores: dict[str, float], seconds: dict[str, float]) -> Record:
    settings = {**translation.SMALL, "seeds": [0, 1]}
    record = Record("translation", "small", CPU, settings)
    for (name, score), seed in itertools.product(scores.items(), settings["seeds"]):
        epochs = [{"process_seconds": seconds.get(name, 1.0), "train_loss": 1.0, "loss": 1.0, "bleu": score}]
        test = {"beam": score + seed, "greedy": score, "signature": "s", "examples": []}
        result = {"options": {"lr": 1.0}, "epochs": epochs, "diverged": False, "test": test}
        record.units[f"{name}/seed={seed}"] = {"result": result}
    return record


def test_verdicts_follow_the_scores():
    scores = dict.fromkeys(translation.METHODS, 10.0)
    seconds = {"kfac": 2.5, "shampoo": 5.0}

    def judged(**others: float) -> list[str]:
        record = translations({**scores, **{name.replace("_", "-"): value for name, value in others.items()}}, seconds)
        answers = [claim.judge(record) for claim in translation_report.CLAIMS]
        return [answer.judgement for answer in answers if answer is not None]

    assert judged(fngd=30.0) == ["holds", "holds", "holds"]
    assert judged(fngd=30.0, kfac=40.0) == ["holds in part", "holds", "holds"]
    assert judged(fngd=5.0, fngd_per_layer=5.0) == ["does not hold", "undecided", "holds"]
    assert judged(adamw_warmup=30.0) == ["does not hold", "does not hold", "holds"]
