"""`python -m benchmarks`: time and memory of everything we offer beside plain training and other libraries.

python -m benchmarks [--models …] [--what …] [--no-peers] [--out FILE.json]    measure; goes on where it stopped,
                                                                               memory may follow later
python -m benchmarks report FILE.json        Markdown and figure, beside the file
python -m benchmarks check FILE.json         targets met and missed, peers that are faster
python -m benchmarks growth [--out FILE.json]    growth with batch, width, positions, depth
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.options import COMMANDS, parser
from persample.testing.start import check_installed, complete


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 where a target is missed, 130 when interrupted. Exits with 2 on a mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given.pop(0) if given and given[0] in COMMANDS else "measure"
    top = parser(name, __doc__ or "")
    options = top.parse_args(given)
    try:
        check_installed("rich", "matplotlib")
        complete()
        from benchmarks import commands

        return commands.RUN[name](options)
    except ValueError as error:
        top.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last model that was finished", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
