"""Serve the page: local by default, and with nothing from other hosts."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

from aigiqa_reward.web.studio import Studio

MOST_UPLOADED = "32mb"
"""Largest file that the page takes."""

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""What a browser may load: nothing from other hosts, whatever the framework's page asks for."""

_HEADERS = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def is_local(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Serve the page until interrupted; models are loaded behind it.

    Args:
        studio: what the page shows.
        host: address to listen on; others than this machine's need `auth`.
        port: port, 0 for any free one.
        auth: user name and password.
        ready: called with the page's address, once it can be opened.

    Raises:
        ValueError: `auth` is missing.
        OSError: the port is taken, or the address is not this machine's.
    """
    if not is_local(host) and auth is None:
        raise ValueError(f"auth: expected a user and a password for {host}, which other machines can reach, got none")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        import uvicorn

        place = f"[{host}]" if ":" in host else host
        app = _application(studio, local=is_local(host), auth=auth)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        ready(f"http://{place}:{listening.getsockname()[1]}/")  # connections wait for the server
        threading.Thread(target=studio.warm_up).start()
        server.run(sockets=[listening])


def _application(studio: Studio, *, local: bool, auth: tuple[str, str] | None) -> Any:
    import fastapi
    import gradio
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from aigiqa_reward.web.page import appearance, build_page

    def known(user: str, password: str) -> bool:
        given, wanted = f"{user}\0{password}", "\0".join(auth or ("", ""))
        return secrets.compare_digest(given.encode(), wanted.encode())

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard)
    if local:  # another site's name that leads here is refused
        names = ["127.0.0.1", "localhost", "["]  # the last is [::1] up to its colon
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    return gradio.mount_gradio_app(
        app,
        build_page(studio),
        path="",
        auth=None if auth is None else known,
        allowed_paths=[str(folder) for folder in (*studio.folders.values(), studio.exported)],
        max_file_size=MOST_UPLOADED,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        **appearance(),
    )


class _Guard:
    """Adds headers to every answer, and fetches no file of another host for anyone, as Gradio would."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        foreign = "file=http" in scope.get("path", "").lower()
        await (PlainTextResponse("not found", 404) if foreign else self.app)(scope, receive, sending)
