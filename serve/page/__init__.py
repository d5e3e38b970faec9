"""The chat page: three static files that the replica serves itself, so that the page works wherever the endpoint does.

Knows its own files. Does not know the endpoint; `page.js` does.
"""

from functools import cache
from pathlib import Path

from serve.refusal import Headers, Send, send_whole

FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
# The page asks this address and no other, whatever gets into an answer.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
)


@cache
def _read(name: str) -> bytes:
    return (Path(__file__).parent / name).read_bytes()


async def send_page(path: str, send: Send) -> None:
    """Send one of the page's files."""
    name, kind = FILES[path]
    headers: Headers = [
        (b"content-type", f"{kind}; charset=utf-8".encode()),
        (b"content-security-policy", POLICY.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]
    await send_whole(send, 200, _read(name), headers)
