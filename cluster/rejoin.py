"""`python -m cluster.rejoin HEAD COMMAND...`: holds this machine's code against the head's, and becomes the command if they are alike.

So begins each card's raylet on a machine that joined, as it joins and whenever it comes back: meanwhile the head may have been ended,
upgraded and started again. What counts is what the head was started from. One that is refused says so in its log, and the shell that
it runs under begins it again. Knows the head's gate.
There is nothing in it for users.
"""

import os
import sys
from collections.abc import Mapping

from cluster.join import ask_head
from cluster.versions import CHANGED, read_versions, require_alike
from configs.cli import print_error
from configs.errors import EXIT_BAD_INPUT, TandemError


def main() -> None:
    """Become the command, or say why not."""
    head, *command = sys.argv[1:]
    try:
        require_alike(_committed(ask_head(head)["versions"]), _committed(read_versions()))
    except TandemError as error:
        print_error(error)
        sys.exit(EXIT_BAD_INPUT)
    os.execv(command[0], command)  # noqa: S606 (a list that we made)


def _committed(versions: Mapping[str, str]) -> dict[str, str]:
    """Leave out whether files were edited: `join` looked, and an edit on the head since then keeps no lost machine out."""
    return {name: found.removesuffix(CHANGED) for name, found in versions.items()}


if __name__ == "__main__":
    main()
