"""`python -m cluster.sample`: looks at the host and the cards of a machine that joined; on the head the arbiter does.

Knows when to look. There is nothing in it for users: `join` starts it, and `leave` ends it.
"""

import time

from cluster.logs import set_up
from cluster.sampler import sampler_of
from cluster.session import wait_for_session


def main() -> None:
    """Look from time to time, until ended."""
    set_up()
    sampler = sampler_of(wait_for_session())
    while True:
        sampler.sample()
        time.sleep(sampler.every_s)


if __name__ == "__main__":
    main()
