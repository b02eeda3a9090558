"""The page at `/`: files that web/play compiles to."""

from hashlib import sha256
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import Response

KINDS = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
_HEADERS = {
    "Cache-Control": "no-cache",
    # Nothing is fetched but from this server.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add(app: FastAPI) -> None:
    """The routes."""
    folder = files("polyhead.serve") / "assets"
    for name, kind in KINDS.items():
        body = (folder / name).read_bytes()
        path = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(path, _Sent(body, kind), include_in_schema=False, methods=["GET"])


class _Sent:
    """One file, which browsers ask for again only where it has changed."""

    def __init__(self, body: bytes, kind: str) -> None:
        self._body, self._kind = body, f"{kind}; charset=utf-8"
        self._headers = {**_HEADERS, "ETag": f'"{sha256(body).hexdigest()[:32]}"'}

    async def __call__(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, media_type=self._kind, headers=self._headers)
