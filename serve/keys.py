"""API keys: who may ask, for which chatbots, and until when.

Knows one file of hashes in the home folder, and looks at it again and again. Does not know HTTP or the engine. A key is 256 random
bits, so a plain SHA-256 of it is as good as a slow hash, and cheap enough for each request.
"""

import hashlib
import math
import secrets
import time
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, PositiveInt, StringConstraints, TypeAdapter, ValidationError

from cluster.home import OWNER_ONLY, home_folder, locked, write_text
from configs.errors import AccessError
from configs.schema import is_loopback

KEY_BYTES = 32
PREFIX = "sk-tandem-"
LOOK_EVERY_S = 0.25  # a revoked key is out after that on this machine, and few requests wait for a disk
OPERATOR = "tandem"  # whose key is made from the cluster's token, and may use everything
ModelName = Annotated[str, StringConstraints(pattern=r"^[^\s,]{1,200}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class Key(BaseModel):
    """One key; the secret itself is kept nowhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    sha256: str
    models: tuple[ModelName, ...] | None = None
    """Chatbots, versions or bases that it may use; all, if empty."""
    rpm: PositiveInt | None = None
    """Requests that it may ask in a minute."""
    tpm: PositiveInt | None = None
    """Tokens, of prompts and answers, that it may use in a minute."""
    created_s: float
    expires_s: float | None = None
    revoked: bool = False
    revoked_s: float | None = None
    """Since when; empty also for a key that was revoked before this was kept."""

    def is_valid(self) -> bool:
        """Whether it opens anything now."""
        return not self.revoked and (self.expires_s is None or time.time() < self.expires_s)

    def may_use(self, name: str) -> bool:
        """Whether it opens a base, a chatbot or a version; a chatbot's name opens all of its versions."""
        return self.models is None or name in self.models or name.partition(":")[0] in self.models


MEANT = {
    "name": "a key's name has letters, digits, dots, dashes, underscores and @, at most 64 of them",
    "models": "a model's name has no spaces",
    "rpm": "requests a minute are a whole number from 1 on",
    "tpm": "tokens a minute are a whole number from 1 on",
}
STORED = TypeAdapter(list[Key])


class KeyFile:
    """The keys of one home folder. Revoked ones stay, so that an endpoint that once had keys never opens by itself."""

    def __init__(self, file: Path | None = None, host: str = "127.0.0.1", operator_secret: str | None = None) -> None:
        self.file = file or home_folder() / "keys.json"
        self.host = host
        self._operator = Key(name=OPERATOR, sha256=_digest(operator_secret), created_s=0) if operator_secret else None
        self._keys: dict[str, Key] = {}
        self._stamp: tuple[int, int] | None = None
        self._looked_s = -math.inf

    def read(self) -> list[Key]:
        """Return all keys as the file has them now, the oldest first.

        Raises:
            AccessError: The file is there, and cannot be read.
        """
        try:
            found = self.file.stat()
            if (found.st_mtime_ns, found.st_ino) != self._stamp:
                self._keys = {key.sha256: key for key in STORED.validate_json(self.file.read_bytes())}
                self._stamp = (found.st_mtime_ns, found.st_ino)
        except FileNotFoundError:
            if self._stamp:
                raise AccessError("the keys are gone", f"{self.file} is no longer there", "put it back, or restart serving") from None
        except (OSError, ValidationError) as error:
            raise AccessError("the keys cannot be read", f"{self.file}: {error}", "restore the file from a copy") from None
        self._looked_s = time.monotonic()
        return list(self._keys.values())

    def are_asked_for(self) -> bool:
        """Whether a request must show a key: where one was ever made, up to `LOOK_EVERY_S` ago, and always where others reach the address.

        Raises:
            AccessError: The file is there, and cannot be read.
        """
        self._look()
        return bool(self._keys) or not is_loopback(self.host)

    def find(self, secret: str) -> Key | None:
        """Return the key that a client shows, if it is one, valid or not; the operator's is built in, and in no file.

        Raises:
            AccessError: The file is there, and cannot be read.
        """
        digest = _digest(secret)
        if self._operator and self._operator.sha256 == digest:
            return self._operator
        self._look()
        if secret and digest not in self._keys:
            self.read()  # it may have been made this moment
        return self._keys.get(digest)

    def create(
        self, name: str, models: list[str] | None = None, lifetime_s: float | None = None, rpm: int | None = None, tpm: int | None = None
    ) -> str:
        """Add a key and return its secret, which nobody can read again.

        Raises:
            AccessError: The name is taken, or a value is none that a key can have.
        """
        secret, now_s = PREFIX + secrets.token_urlsafe(KEY_BYTES), time.time()
        with self._locked():
            keys = self.read()
            if name == OPERATOR:
                raise AccessError(f"{OPERATOR} is the operator's own key", "it is made from the cluster's token", "choose another name")
            if any(key.name == name and key.is_valid() for key in keys):
                raise AccessError(f"there is a key named {name} already", "", f"another name, or python -m serve keys revoke {name} first")
            try:
                key = Key(
                    name=name,
                    sha256=_digest(secret),
                    models=None if models is None else tuple(models),
                    rpm=rpm,
                    tpm=tpm,
                    created_s=now_s,
                    expires_s=now_s + lifetime_s if lifetime_s else None,
                )
            except ValidationError as error:
                reasons = [f"{mistake['input']!r}: {MEANT[str(mistake['loc'][0])]}" for mistake in error.errors()]
                raise AccessError("no key was made", "\n".join(reasons), "python -m serve keys create alice --models helpdesk") from None
            self._write([*keys, key])
        return secret

    def revoke(self, name: str) -> None:
        """Close a key for good.

        Raises:
            AccessError: No key has this name, or it was revoked before.
        """
        with self._locked():
            keys = self.read()
            named = [key for key in keys if key.name == name]
            if not named:
                raise _no_key(name, [key.name for key in keys if not key.revoked])
            if all(key.revoked for key in named):
                since = f" on {day(named[-1].revoked_s)}" if named[-1].revoked_s else ""
                raise AccessError(f"the key {name} was revoked{since} already", "it opens nothing any more", "python -m serve keys list")
            closed = {"revoked": True, "revoked_s": time.time()}
            self._write([key.model_copy(update=closed) if key.name == name and not key.revoked else key for key in keys])

    def _look(self) -> None:
        if time.monotonic() - self._looked_s >= LOOK_EVERY_S:
            self.read()

    def _write(self, keys: list[Key]) -> None:
        self._looked_s = -math.inf
        write_text(self.file, STORED.dump_json(keys, indent=1).decode() + "\n", OWNER_ONLY)

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.file.with_suffix(".lock"))


def is_operator(key: Key | None) -> bool:
    """Whether a key is the operator's own, which the cluster's own jobs show: what they ask is nobody's conversation."""
    return key is not None and key.name == OPERATOR


def day(moment_s: float | None) -> str:
    """Write a moment with its day, for people; nothing for none."""
    return "" if moment_s is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment_s))


def _no_key(name: str, known: list[str]) -> AccessError:
    near = get_close_matches(name, known, n=1)
    why = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}"
    return AccessError(f"no key is named {name}", why, "python -m serve keys list")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
