"""From a plan to a server that listens, and to its end."""

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Generator

import uvicorn

from polyhead.errors import ConfigError, FileError
from polyhead.serve.app import create
from polyhead.serve.backend import Backend
from polyhead.serve.config import ServeConfig
from polyhead.serve.messages import Plan


def serve(config: ServeConfig, plan: Plan, told: Callable[[str], None]) -> None:
    """Listen until a signal says to end; requests at work are finished first.

    told: hears the address, and when the models are loaded. Errors: ConfigError for a model that
    cannot be served, and for an address that is taken.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    with asyncio.Runner(loop_factory=_loop()) as runner:
        runner.run(_served(config, plan, told))


async def _served(config: ServeConfig, plan: Plan, told: Callable[[str], None]) -> None:
    _check_tls(config)
    backend = Backend(plan, config.max_rows + config.max_waiting, config.timeout)
    listening = _listening(config)
    server = _Server(
        uvicorn.Config(
            create(config, backend), log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=round(config.grace), ws="none",
            ssl_certfile=config.tls_cert, ssl_keyfile=config.tls_key,
        )
    )  # fmt: skip
    host, port = listening.getsockname()[:2]
    scheme, shown = "https" if config.tls_cert else "http", f"[{host}]" if ":" in host else host
    told(f"listening at {scheme}://{shown}:{port}; loading")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.end)
    running = asyncio.ensure_future(server.serve(sockets=[listening]))
    try:
        await backend.start()
        told(f"ready: {', '.join(backend.models)}")
    except ConfigError:
        server.should_exit = True
        await running
        raise
    await running


def _loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The faster one, where it is there."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


class _Server(uvicorn.Server):
    """Ends as it is told to, and leaves the process to end with 0."""

    def end(self) -> None:
        """Once: after what is at work; again: at once."""
        self.force_exit, self.should_exit = self.should_exit, True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are taken by the event loop, and are not raised again at the end."""
        yield


def _check_tls(config: ServeConfig) -> None:
    """Errors: FileError for a certificate or a key that cannot be read, or do not fit."""
    if config.tls_cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        files = f"{config.tls_cert} and {config.tls_key}"
        raise FileError(f"{files} are no certificate with its key: {error.args[-1]}") from None


def _listening(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host, config.port))
    except OSError as error:
        found.close()
        raise ConfigError(
            f"cannot listen at {config.host}:{config.port}: {error.strerror}; name another --port"
        ) from None
    return found
