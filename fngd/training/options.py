"""The options of `python -m fngd`. Does without torch, so that help and mistakes are there at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fngd.training.settings import DEFAULTS, MODELS, SCHEDULES, Config, is_foreign, optimizers
from persample.testing.command_line import whole
from persample.testing.start import add_version

RESULTS, FIGURE = "results.json", "figure.png"
INSPECTED, PICTURE = "inspect.json", "inspect.png"
DEMO_RESULTS, DEMO_FIGURE = "demo.json", "demo.png"


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    top = argparse.ArgumentParser(
        prog="python -m fngd", description="Natural-gradient optimisers, compared and inspected."
    )
    add_version(top, "fngd")
    commands = top.add_subparsers(dest="command", required=True)
    _add_compare(commands)
    _add_inspect(commands)
    _add_demo(commands)
    return top


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="train with several optimisers; table, JSON and figure",
        description="Trains the same network with several optimisers on the same batches, in turns, and writes a "
        f"table, {RESULTS} and {FIGURE}. Ctrl-C stops after the current batch and keeps what there is.",
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="optimizers:\n" + "".join(f"  {name:14} {text}\n" for name, text in optimizers().items())
        + "models:\n" + "".join(f"  {name:14} {text}\n" for name, text in MODELS.items()),
    )  # fmt: skip
    add, default = compare.add_argument, Config()
    add("--data", choices=list(DEFAULTS), help=f"data set (default {default.data})")
    add(
        "--data-dir",
        metavar="DIR",
        help="folder of cifar-10-batches-py, cifar-100-python or FashionMNIST/raw; not for digits",
    )
    add("--model", choices=list(MODELS), help="network (default cnn; resnet20 for cifar10, resnet18 for cifar100)")
    add(
        "--optimizers", type=_names, metavar="A,B,…",
        help=f"names from the list below, or module:function of your own (default {','.join(default.optimizers)})",
    )  # fmt: skip
    add("--epochs", type=whole(), metavar="N", help=f"default {default.epochs}; 10 for the larger data sets")
    add("--batch-size", type=whole(), metavar="N", help=f"default {default.batch_size}; 128 for the larger data sets")
    add("--train-size", type=whole(), metavar="N", help="train on the first N images (default all)")
    add("--seeds", type=_seeds, metavar="0,1,…", help=f"default {','.join(map(str, default.seeds))}")
    add("--device", metavar="NAME", help="cpu (default), cuda, cuda:1, …")
    add("--lr", type=_rates, metavar="A=X,…", help="learning rates, as sgd=0.1,fngd=0.05 (default: see recipes.py)")
    add("--schedule", choices=SCHEDULES, help="of the learning rate (default step: × 0.1 at 50 %% and 75 %%)")
    add(
        "--weight-decay", type=_number("at least 0 and finite; 5e-4 is usual", zero=True), metavar="X",
        help=f"of all but AdamW (default {default.weight_decay})",
    )  # fmt: skip
    add(
        "--alpha", metavar="X",
        type=_number("> 0 and finite; small values (1e-3) are far from SGD, 1 is nearly SGD"),
        help=f"damping of ngd and fngd relative to ‖K‖_F (default {default.alpha})",
    )  # fmt: skip
    add("--augment", action="store_true", help="random shifts by up to 4 pixels and horizontal flips")
    add("--out", type=Path, default=Path("results/compare"), metavar="DIR", help="where to write (default %(default)s)")
    add("--resume", action="store_true", default=False, help="go on with the interrupted run in --out")
    add("--no-memory", dest="memory", action="store_false", default=True, help="do not measure peak memory")


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="correlation matrices of layers and diagnostics; picture and JSON",
        description="Trains a network for some epochs and looks at one batch of training images: correlation matrices "
        "of the first two and the last two layers, how alike layers are, and for each layer the damping λ, the "
        f"coefficients, and the step. Writes {PICTURE} and {INSPECTED}.",
    )
    add = inspect.add_argument
    add("--data", choices=list(DEFAULTS), default="digits", help="data set (default %(default)s)")
    add(
        "--data-dir",
        metavar="DIR",
        help="folder of cifar-10-batches-py, cifar-100-python or FashionMNIST/raw; not for digits",
    )
    add("--train-size", type=whole(), metavar="N", help="train on the first N images (default all)")
    add("--model", choices=list(MODELS), help="network (default cnn; resnet20 for cifar10, resnet18 for cifar100)")
    add(
        "--optimizer", type=_known, default="fngd", metavar="NAME",
        help=f"to train with: {', '.join(optimizers())}, or module:function (default %(default)s)",
    )  # fmt: skip
    add("--epochs", type=whole(0), default=3, metavar="N", help="to train before looking; 0: untrained (default 3)")
    add("--batch-size", type=whole(), default=128, metavar="N", help="also of the batch that is shown (default 128)")
    add(
        "--alpha", type=_number("> 0 and finite; 1e-2 is usual"), default=1e-2, metavar="X",
        help="damping relative to ‖K‖_F (default %(default)s)",
    )  # fmt: skip
    add("--layers", metavar="A,B,…", help="whose matrices to draw (default: the first two and the last two)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and batches (default 0)")
    add("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, …")
    add("--out", type=Path, default=Path("results/inspect"), metavar="DIR", help="where to write (default %(default)s)")


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="the first minute: who is right, what it costs, what it is good for",
        description="Gradients of five models beside those of other libraries, the time of norms, Gram matrix and "
        "clipped sum on handwritten digits, and Gauss-Newton on a Poisson equation: a table with three conclusions, "
        f"{DEMO_FIGURE} and {DEMO_RESULTS}. Takes less than a minute on two quiet cores and downloads nothing.",
    )
    demo.add_argument(
        "--seconds", type=_number("> 0 and finite; 6 is usual"), default=6.0, metavar="X",
        help="that each of three methods has for the equation (default %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--out", type=Path, default=Path("results/demo"), metavar="DIR", help="where to write (default %(default)s)"
    )


def _known(name: str) -> str:
    if name not in optimizers() and not is_foreign(name):
        raise argparse.ArgumentTypeError(
            f"{name!r} is unknown; choose from {', '.join(optimizers())}, or give module:function"
        )
    return name


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"give at least one of {', '.join(optimizers())}, or module:function")
    return tuple(map(_known, names))


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between, as 0,1,2") from None


def _rates(text: str) -> tuple[tuple[str, float], ...]:
    rates = []
    for entry in text.split(","):
        name, equals, number = entry.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text!r}: give it as sgd=0.1,fngd=0.05")
        known = _known(name.strip())
        rates.append((known, _number(f"a learning rate: at least 0 and finite, as {known}=0.1", zero=True)(number)))
    return tuple(rates)


def _number(allowed: str, *, zero: bool = False) -> Callable[[str], float]:
    """Returns a parser of finite positive numbers, or of zero too; `allowed` says so to who gives another."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not (0 < number < float("inf") or (zero and number == 0)):
            raise argparse.ArgumentTypeError(f"got {text.strip()}; it must be {allowed}")
        return number

    return parse
