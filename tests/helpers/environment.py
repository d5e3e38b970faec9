"""The environment of a user's shell for tests: without what Tandem or Ray would read of the developer's own."""

import os

from configs.schema import Environment

OWN = tuple(name.upper() for name in Environment.model_fields)


def users_environment() -> dict[str, str]:
    """Return this process's environment without the variables that Tandem and Ray read."""
    return {key: value for key, value in os.environ.items() if key not in OWN and not key.startswith("RAY_")}
