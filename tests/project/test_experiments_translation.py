"""Translation: decoding, the smoothed loss, vocabularies and BLEU against explicit computations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from experiments import decoding, text, translation, tuning
from experiments.models import PADDING, Transformer
from fngd.training.data import DataError


def small_transformer(words: int = 7, **options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(9, words, **{"width": 8, "hidden": 12, "heads": 2, "layers": 2, "dropout": 0.0, **options})
    for parameter in model.parameters():  # so that no two words are alike
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


SOURCE = torch.tensor([[1, 4, 5, 6, 2], [1, 7, 2, 0, 0], [1, 8, 3, 2, 0]])
TARGET = torch.tensor([[1, 3, 4, 2], [1, 5, 2, 0], [1, 6, 6, 2]])


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
