"""A front before an engine of the tests' own: what they send, and what comes back."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.registry import Version
from cluster.standing import Standing
from configs.schema import ServeConfig
from data.feedback_store import FeedbackStore
from serve.adapters import Adapters, Base
from serve.completion_ids import CompletionIds
from serve.feedback import FeedbackDesk
from serve.front import Doors, Front
from serve.keys import Key, KeyFile
from serve.observed import Observer
from serve.quotas import Admission, Counter, quotas_of

NOWHERE = Path("/nowhere/keys.json")
BASE = Base("smollm2-135m", "0123456789abcdef", max_lora_rank=16)
QUESTION = {"role": "user", "content": "Wie geht's? 😀"}
ASKED = {"model": "helpdesk", "messages": [QUESTION], "stream": True, "unknown_setting": {"kept": [1, 2.5, None]}}
OPERATOR_SECRET = "sk-tandem-operator"
PROMPT = "You answer questions about Tandem."


def standings_of(versions: list[Version]) -> dict[str, Standing]:
    """How the registry says that these versions' chatbots stand."""
    return {
        version.chatbot: Standing(
            {alias: entry.number for entry in versions if entry.chatbot == version.chatbot for alias in entry.aliases},
            {entry.name: str(entry.canary_share) for entry in versions if entry.chatbot == version.chatbot},
            len(versions),
        )
        for version in versions
    }


@dataclass
class Shelf:
    """Stands where the registry stands: versions and folders of the test's own."""

    folders: dict[str, Path] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    canaries: dict[str, float] = field(default_factory=dict)

    def standings(self) -> dict[str, Standing]:
        return standings_of(self.versions())

    def versions(self, standings: dict[str, Standing] | None = None) -> list[Version]:
        found = []
        for name in self.folders:
            chatbot, _, number = name.partition(":")
            aliases = ("live",) if self.live.get(chatbot) == int(number) else ("canary",) if name in self.canaries else ()
            tags = {"base_fingerprint": BASE.fingerprint}
            found.append(Version(chatbot, int(number), "r" * 32, tags, aliases, self.canaries.get(name, 0.0)))
        return found

    def download(self, version: Version) -> Path:
        return self.folders[version.name]


@dataclass
class Engine:
    """Stands where vLLM's application stands: keeps what it was given, and answers in pieces."""

    pieces: tuple[bytes, ...] = (b"data: one\n\n", b"data: two\n\n", b"data: [DONE]\n\n")
    status: int = 200
    scopes: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    after_body: list[dict[str, Any]] = field(default_factory=list)
    passed_on: list[int] = field(default_factory=list)
    answer: "Answer | None" = None

    async def __call__(self, scope, receive, send) -> None:
        self.scopes.append(scope)
        if scope["type"] == "lifespan":
            self.after_body.append(await receive())
            await send({"type": "lifespan.startup.complete"})
            return
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", b"text/event-stream")]})
        for piece in self.pieces:
            said = piece.replace(b"chatcmpl-ID", self.completion_id.encode())
            await send({"type": "http.response.body", "body": said, "more_body": True})
            self.passed_on.append(len(self.answer.pieces))
        await send({"type": "http.response.body", "body": b""})
        self.after_body.append(await receive())

    @property
    def request(self) -> dict[str, Any]:
        return json.loads(self.bodies[-1])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.scopes[-1]["headers"])

    @property
    def completion_id(self) -> str:
        """The last chat's, as vLLM makes it."""
        return f"chatcmpl-{self.headers.get(b'x-request-id', b'').decode()}"


@dataclass
class Answer:
    """What the client got."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert self.status == 0, "an answer begins once"
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.pieces.append(message["body"])

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(b"".join(self.pieces))


class HereQuotas:
    """The real counter in this process; on a cluster it is an actor."""

    def __init__(self) -> None:
        self.counter = Counter()

    async def take(self, key: Key, num_tokens: int) -> Admission:
        return self.counter.take(key.sha256, quotas_of(key), num_tokens)

    def spend(self, key: Key, num_tokens: int) -> None:
        if key.tpm is not None:
            self.counter.spend(key.sha256, key.tpm, num_tokens)


def make_front(engine: Any, shelf: Any, keys: KeyFile, quotas: Any = None, **settings: Any) -> Front:
    """A front whose feedback lies beside its keys."""
    config = ServeConfig(**settings)
    desk = FeedbackDesk(config.feedback, FeedbackStore(f"sqlite:///{keys.file.with_name('feedback.db')}"), CompletionIds("secret"))
    return Front(engine, Adapters(shelf, BASE), Doors(keys, quotas or HereQuotas()), desk, config)


@pytest.fixture
def shelf(tmp_path, write_adapter) -> Shelf:
    """Two versions of `helpdesk`, of which the second is live and has a system prompt; `other` has one that is not live."""
    folders = {name: write_adapter(tmp_path / name.replace(":", "-")) for name in ("helpdesk:1", "helpdesk:2", "other:1")}
    (folders["helpdesk:2"] / "manifest.json").write_text(json.dumps({"system_prompt": PROMPT}))
    return Shelf(folders, {"helpdesk": 2})


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def keys(tmp_path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json", operator_secret=OPERATOR_SECRET)


@pytest.fixture
def quotas() -> HereQuotas:
    return HereQuotas()


@pytest.fixture
def observers() -> list[Observer]:
    """Who is told of the requests that `ask` sends."""
    return []


@pytest.fixture
def ask(shelf, engine, keys, quotas, observers):
    """Send one request to a front before `engine`; the body may come in several pieces."""

    def send(method: str, path: str, body: Any = b"", headers: Any = (), **settings: Any) -> Answer:
        pieces = body if isinstance(body, list) else [body if isinstance(body, bytes) else json.dumps(body).encode()]
        messages = [{"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1} for number, piece in enumerate(pieces)]
        coming = iter([*messages, {"type": "http.disconnect"}])
        answer = engine.answer = Answer()

        async def receive() -> dict[str, Any]:
            return next(coming)

        async def once() -> None:
            front = make_front(engine, shelf, keys, quotas, **{"max_body_bytes": 4096, **settings})
            front.watch.observers += observers
            await front.adapters.refresh()
            scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
            await front(scope, receive, answer.send)
            front.feedback.store.close()

        asyncio.run(once())
        return answer

    return send


def chat(ask, **changes: Any) -> Answer:
    return ask("POST", "/v1/chat/completions", {**ASKED, **changes})


def refused(answer: Answer, status: int) -> dict[str, Any]:
    """Check that an answer is an error in OpenAI's shape, and return it."""
    assert answer.status == status
    assert answer.headers[b"content-type"] == b"application/json"
    assert int(answer.headers[b"content-length"]) == len(b"".join(answer.pieces))
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error
