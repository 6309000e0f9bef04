"""`python -m fngd demo` is the first minute; `compare` trains several optimisers on the same data, and `inspect` shows
what they see in one batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fngd.training.options import parser
from persample.testing.start import check_installed, complete


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 130 when interrupted. Exits with 2 on a mistake in the options."""
    top = parser()
    options = top.parse_args(arguments)
    try:
        check_installed("rich", "matplotlib", *(["sklearn"] if options.command == "demo" else []))
        given = vars(options)
        if given.get("data_dir") and given.get("data", "digits") == "digits" and not given.get("resume"):
            raise ValueError(
                "--data-dir is given, but the digits come with scikit-learn; name the data set too: --data cifar10"
            )
        complete()
        from fngd.demo import command as demo_command
        from fngd.training import compare_command, inspect_command

        commands = {"demo": demo_command.run, "compare": compare_command.run, "inspect": inspect_command.run}
        command = commands[options.command]
        return command(options)
    except ValueError as error:
        top.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
