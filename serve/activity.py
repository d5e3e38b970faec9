"""Notes that the engine has requests, and since when it has none: what chat's card may be lent by.

Pure ASGI, around the front. Knows HTTP's methods. Does not know what is asked.
"""

from cluster.activity import ActivityFile
from serve.refusal import App, Receive, Scope, Send


class Noted:
    """Wraps an application; a look at a page, the list of models or the health is no request that keeps an engine awake."""

    def __init__(self, app: App, file: ActivityFile) -> None:
        self.app, self.file = app, file
        file.open()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, and note what asks the engine for something."""
        if scope.get("method") != "POST":
            await self.app(scope, receive, send)
            return
        self.file.begin()
        try:
            await self.app(scope, receive, send)
        finally:
            self.file.end()
