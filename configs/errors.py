"""The errors that a user may meet, as one small tree.

    TandemError               what went wrong, why, and what to do about it; exit status 2
    ├── ConfigError           a config file or an override is wrong
    ├── DataError             conversations that cannot be read or used
    ├── ModelError            a base model that cannot be had or does not suit
    ├── ClusterError          cards, ports, disk, or a service that is not there
    │   └── FitError          a job for which no card has the memory
    ├── RegistryError         a chatbot, version or alias that is not in the registry
    ├── RunError              a training run that failed or cannot be resumed
    └── AccessError           a key that is not there, or a place that must not be open without one

Raise one of these for whatever a user can mend; let everything else be a traceback, because it is a bug.
"""

EXIT_BAD_INPUT = 2
EXIT_NOT_PROMOTED = 3
EXIT_NO_FIT = 4  # of a queued job: its card has too little memory, and another may have enough
EXIT_UNAVAILABLE = 75  # of a queued job: a service was away, which comes back by itself
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 143


class TandemError(Exception):
    """A problem that the user can mend.

    Args:
        what: One sentence that names the problem.
        why: What was seen, possibly over several lines.
        remedy: What to do now; a command where there is one.
    """

    def __init__(self, what: str, why: str = "", remedy: str = "") -> None:
        super().__init__(what, why, remedy)
        self.what, self.why, self.remedy = what, why, remedy

    def __str__(self) -> str:
        """Join the parts that are there: what, why, remedy."""
        return "\n".join(part for part in (self.what, self.why, self.remedy and f"Try: {self.remedy}") if part)


class ConfigError(TandemError):
    """A config file or an override is wrong."""


class DataError(TandemError):
    """Conversations that cannot be read or used."""


class ModelError(TandemError):
    """A base model that cannot be had or does not suit."""


class ClusterError(TandemError):
    """Cards, ports, disk, or a service that is not there."""


class FitError(ClusterError):
    """A job for which no card has the memory."""


class RegistryError(TandemError):
    """A chatbot, version or alias that is not in the registry."""


class RunError(TandemError):
    """A training run that failed or cannot be resumed."""


class AccessError(TandemError):
    """A key that is not there, or a place that must not be open without one."""


def last_lines(text: str, count: int = 12) -> str:
    """Return the last lines of a log or traceback, without the empty ones, indented for an error's `why`."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-count:])
