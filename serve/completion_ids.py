"""Ids of completions that say themselves which version spoke, and to whose key.

An id begins with that of its request, so that one search finds the request in the logs, the engine's answer and what was said of it. It
is random and sealed under a secret of the home folder: every replica knows its own again, also after a restart, and nothing is written
for an answer. Knows ids. Does not know HTTP or what was said.
"""

import base64
import hashlib
import hmac
import random
import re
import secrets
from dataclasses import dataclass
from urllib.parse import quote, unquote

from cluster.home import OWNER_ONLY, home_folder, write_text_once
from serve.keys import Key

ID_HEADER = b"x-request-id"  # from which vLLM makes the completion's id
SECRET_BYTES = 32
NONCE_BYTES = 9
CHANCE = random.Random()  # noqa: S311 (what it makes is no secret; the system's own makes the loop wait for Python's lock at each call)
SEAL_BYTES = 15
# What stands first is vLLM's: the kind of answer.
SHAPE = re.compile(r"(?:chatcmpl|cmpl|resp|msg)[-_](?P<nonce>[\w-]+)\.(?P<seal>[\w-]+)\.(?P<version>[!-~]+)", re.ASCII)
REQUEST_ID = re.compile(r"[\w-]{1,64}", re.ASCII)  # a client's, where it may stand in an id of ours


def request_id_of(given: bytes) -> str:
    """Return a request's id: the one that it came with, or a new one where that is none or of another shape."""
    found = given.decode("latin-1")
    return found if REQUEST_ID.fullmatch(found) else new_id()


def new_id() -> str:
    """Return letters that no other request has, here or in another process."""
    return base64.urlsafe_b64encode(CHANCE.randbytes(NONCE_BYTES)).decode()


def nonce_of(engine_id: str) -> str | None:
    """Return the part of an engine's id that no other request has; None for an id that is not ours."""
    found = SHAPE.match(engine_id)
    return found["nonce"] if found else None


@dataclass(frozen=True)
class CompletionIds:
    """Makes ids, and reads those that it made."""

    secret: str

    @classmethod
    def of_home(cls) -> "CompletionIds":
        """Return those of this home folder, whose secret is made the first time."""
        return cls(write_text_once(home_folder() / "completion_secret", secrets.token_hex(SECRET_BYTES), OWNER_ONLY))

    def make(self, version: str, key: Key | None, request_id: str) -> str:
        """Return a new id, in letters that may stand in a header and in an address; never twice the same, whatever the request's is."""
        nonce, named = f"{request_id}-{new_id()}", quote(version, safe=":")
        return f"{nonce}.{self._seal(nonce, named, key)}.{named}"

    def version_of(self, completion_id: str, key: Key | None) -> str | None:
        """Return the version that spoke; None for an id that is not ours, or was given to another key."""
        found = SHAPE.fullmatch(completion_id)
        if not found:
            return None
        is_ours = hmac.compare_digest(found["seal"], self._seal(found["nonce"], found["version"], key))
        return unquote(found["version"]) if is_ours else None

    def _seal(self, nonce: str, named: str, key: Key | None) -> str:
        sealed = "\n".join((nonce, key.sha256 if key else "", named))
        digest = hmac.digest(self.secret.encode(), sealed.encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest[:SEAL_BYTES]).decode()
