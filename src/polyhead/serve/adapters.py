"""Adapters, loaded and dropped while the server runs, by vLLM's routes."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field

from polyhead.serve.backend import Backend
from polyhead.serve.errors import ApiError
from polyhead.serve.protocol import Body, Name

Plain = Annotated[str, Field(pattern=r"^\w[\w.:@-]{0,127}$")]


class Load(Body):
    """`/v1/load_lora_adapter`. model: which it goes on, where several write."""

    lora_name: Plain
    lora_path: Annotated[str, Field(max_length=512)] | None = None
    model: Name | None = None


class Unload(Body):
    """`/v1/unload_lora_adapter`."""

    lora_name: Name


def add(app: FastAPI, backend: Backend, root: Path | None) -> None:
    """The routes. root: the directory whose directories may be loaded; None: none may."""

    @app.post("/v1/load_lora_adapter")
    async def load(body: Load) -> dict[str, Any]:
        """Serve an adapter by a name of its own, beside the model that it goes on."""
        folder = _found(root, body.lora_path or body.lora_name)
        await backend.adapt(body.lora_name, body.model or _only(backend), str(folder))
        return {"id": body.lora_name, "object": "model", **backend.models[body.lora_name]}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: Unload) -> dict[str, Any]:
        """Serve it no longer."""
        await backend.drop(body.lora_name)
        return {"id": body.lora_name, "object": "model", "deleted": True}


def _found(root: Path | None, name: str) -> Path:
    """The directory of an adapter, below the root and nowhere else."""
    if root is None:
        raise ApiError(400, "this server was started without --adapters; none can be loaded")
    folder = (root / name).resolve()
    inside = folder.is_relative_to(root.resolve())
    if not inside or not (folder / "adapter_config.json").is_file():
        there = sorted(path.parent.name for path in root.glob("*/adapter_config.json"))
        raise ApiError(
            404, f"there is no adapter {name!r}; there is {', '.join(there) or 'none'}",
            "lora_path", "adapter_not_found",
        )  # fmt: skip
    return folder


def _only(backend: Backend) -> str:
    bases = [name for name, about in backend.models.items() if _takes(about)]
    if len(bases) != 1:
        raise ApiError(400, f"model is missing; name one of {', '.join(bases) or 'none'}", "model")
    return bases[0]


def _takes(about: Any) -> bool:
    kinds = ("decoder", "image-text", "encoder-decoder")
    return about["kind"] in kinds and "parent" not in about
