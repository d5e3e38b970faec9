"""What every command line of Tandem shares: help, errors without a traceback, and a default command.

Knows typer and the error tree. Does not know any command.
"""

import gc
import os
import re
import sys
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from configs.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_NO_FIT,
    EXIT_UNAVAILABLE,
    ClusterError,
    ConfigError,
    FitError,
    RegistryError,
    TandemError,
)

JOB_VARIABLE = "TANDEM_JOB"  # tells a process which job of the queue it is

UNITS_S = {"m": 60, "h": 3600, "d": 86400}

console = Console(highlight=False, soft_wrap=True)
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings by dotted path.")]


def make_app(help_text: str, default: str | None = None) -> typer.Typer:
    """Make a command line; words that name no command, and are no slip of the pen in one, go to the command `default`."""

    class Group(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if default and args and args[0] not in ("--help", "-h") and not names_command(args[0], self.commands):
                args = [default, *args]
            return super().parse_args(ctx, args)

    return typer.Typer(
        help=help_text,
        cls=Group,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # a bug's traceback stays plain, and shows no values
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def names_command(word: str, commands: Collection[str]) -> bool:
    """Whether a word is a command, or looks more like a misspelt one than like a file."""
    is_file = any(mark in word for mark in "./=") or Path(word).exists()
    return word in commands or (not is_file and bool(get_close_matches(word, commands, cutoff=0.75)))


def run_app(app: typer.Typer, module: str) -> None:
    """Run a command line as `python -m MODULE`; a `TandemError` ends it with status 2 and no traceback.

    A job of the queue tells apart what comes back by itself, and what another card may have memory for; it is begun again then.
    """
    try:
        app(prog_name=f"python -m {module}")
    except TandemError as error:
        print_error(error)
        sys.exit(_status_in_line(error) if JOB_VARIABLE in os.environ else EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        gc.freeze()  # the interpreter else goes through all that torch and MLflow brought, as it ends: a second, and three on busy cores


def _status_in_line(error: TandemError) -> int:
    """Return the exit status by which the arbiter tells what becomes of a job of the queue."""
    if isinstance(error, FitError):
        return EXIT_NO_FIT
    return EXIT_UNAVAILABLE if isinstance(error, ClusterError | RegistryError) else EXIT_BAD_INPUT


def print_error(error: TandemError) -> None:
    """Print what, why and remedy on standard error."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    stderr.print("error: ", style="bold red", end="")
    stderr.print(str(error), markup=False)


def parse_duration_s(text: str) -> float:
    """Return the seconds that `30d`, `12h` or `5m` means.

    Raises:
        ConfigError: It means none.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    if not match:
        raise ConfigError(f"{text!r} is no time", "a time is a number and m, h or d", "30d, 12h or 5m")
    return float(match[1]) * UNITS_S[match[2]]
