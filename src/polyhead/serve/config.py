"""What a server is told: flags, environment and a TOML file say the same fields."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from polyhead.errors import ConfigError

PREFIX = "POLYHEAD_"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where to listen, whom to answer, and how much to take on.

    Each field may stand in a TOML file or, in capitals after POLYHEAD_, in the environment; flags
    win over the environment, and that over the file. Errors: ConfigError for what cannot be.
    """

    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs keys."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    keys: str | None = None
    """File of API keys, one a line, read again when it changes: where you like with a name before
    the key, and limits after it (requests=60 a minute, at_once=4). Without it nobody needs one."""
    cors: tuple[str, ...] = ()
    """Origins whose pages browsers let ask this server, such as https://a.example; * is all."""
    tls_cert: str | None = None
    """PEM file of a certificate and its chain; with tls_key the server speaks HTTPS."""
    tls_key: str | None = None
    """PEM file of its key."""
    adapters: str | None = None
    """Directory whose directories are LoRA adapters, which clients may load and drop by name."""
    upstreams: str | None = None
    """TOML file of models that other servers hold ([[upstream]] name, url, model, key_env), to
    which requests for them go on."""
    max_rows: int = 16
    """Texts that are written side by side."""
    cache_tokens: int | None = None
    """Tokens whose keys and values are held in all; None is max_rows texts of the model's length,
    or of 4096."""
    max_waiting: int = 64
    """Requests that may wait; more are answered with 429 at once."""
    timeout: float = 600.0
    """Seconds after which a request is ended as far as it came, with 408."""
    grace: float = 30.0
    """Seconds that running requests are given when the server is told to stop."""
    max_body: int = 8_000_000
    """Bytes of a request."""
    probes: bool = True
    """Refuse a model that answers otherwise than when it was saved, by the probes beside it."""
    log_text: bool = False
    """Write prompts and answers into the log."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_waiting", "max_body"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("timeout", "grace"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 seconds")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key belong together; name both, or neither")
        if self.host not in LOOPBACK and self.keys is None:
            raise ConfigError(
                f"host {self.host} can be reached from other machines; name a file of --keys, or "
                "listen at 127.0.0.1"
            )

    @classmethod
    def of(cls, *said: Mapping[str, Any]) -> Self:
        """Of what was said, the later winning; a field that there is not raises ConfigError."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for each in said:
            for name in each.keys() - known:
                raise ConfigError(
                    f"there is no setting {name!r}; there are {', '.join(sorted(known))}"
                )
            values |= each
        if isinstance(values.get("cors"), list):
            values["cors"] = tuple(values["cors"])
        return cls(**values)


def from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The fields that the environment names. Errors: ConfigError for a value that is none."""
    found: dict[str, Any] = {}
    for field in fields(ServeConfig):
        text = environment.get(PREFIX + field.name.upper())
        if text is not None:
            found[field.name] = _read(
                field.name, text, ServeConfig.__dataclass_fields__[field.name]
            )
    return found


def _read(name: str, text: str, field: Any) -> Any:
    kind = (
        type(field.default)
        if field.default is not None
        else (int if "int" in str(field.type) else str)
    )
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if kind is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        return kind(text)
    except (KeyError, ValueError):
        raise ConfigError(
            f"{PREFIX}{name.upper()} is {text!r}; it must be a {kind.__name__}"
        ) from None
