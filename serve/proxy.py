"""What Ray Serve's own proxy says to a client whose engine has died, where the proxy itself would say nothing.

Pure ASGI, around the proxy; Serve asks for it by the name that `cluster.parts` gives it. Knows HTTP and the shapes of errors. Does not
know the engine. Behind HAProxy streams are ended by `serve.last_words`.
"""

from starlette.middleware import Middleware

from serve.protocols import PROTOCOLS, error_body
from serve.refusal import App, Message, Receive, Scope, Send, engine_lost, send_json


def middlewares() -> list[Middleware]:
    """Return what is to stand around Serve's own proxy."""
    return [Middleware(LastWords)]


class LastWords:
    """Wraps an application that may give up an answer before it began, or in the middle."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on; to a request for the engine, say what became of it where the application ends without a word."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path not in PROTOCOLS:
            await self.app(scope, receive, send)
            return
        begun = streams = over = False

        async def send_watched(message: Message) -> None:
            nonlocal begun, streams, over
            if message["type"] == "http.response.start":
                begun, streams = True, message["status"] == 200 and _is_stream(message)
            else:
                over = not message.get("more_body", False)
            await send(message)

        await self.app(scope, receive, send_watched)
        if not begun:
            lost = engine_lost()
            await send_json(send, lost.status, error_body(path, lost), lost.headers)
        elif streams and not over:
            await send({"type": "http.response.body", "body": PROTOCOLS[path].error_event(engine_lost())})


def _is_stream(message: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"])
