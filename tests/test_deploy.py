"""The files of deploy/ say what there is: flags, settings, metrics and routes."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("fastapi")

from polyhead.cli.serve import Args, defaults  # noqa: E402
from polyhead.serve.app import create  # noqa: E402
from polyhead.serve.backend import Backend  # noqa: E402
from polyhead.serve.config import ServeConfig, from_environment  # noqa: E402
from polyhead.serve.messages import Plan  # noqa: E402
from polyhead.serve.metrics import Metrics  # noqa: E402

HERE = Path(__file__).parents[1] / "deploy"


def test_every_yaml_is_yaml() -> None:
    for path in HERE.rglob("*.y*ml"):
        assert list(yaml.safe_load_all(path.read_text())), path


def test_the_container_is_told_settings_that_there_are() -> None:
    text = (HERE / "Containerfile").read_text()
    names = dict(re.findall(r"(POLYHEAD_[A-Z_]+)=(\S+)", text))
    names.pop("POLYHEAD_HOME")
    config = ServeConfig.of(from_environment(names))
    assert (config.host, config.port, config.keys) == ("0.0.0.0", 8000, "/keys.txt")
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "/health" in text
    for name in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE):
        assert all((HERE.parent / each).exists() for each in name.split())


def test_kubernetes_asks_routes_that_there_are() -> None:
    deployment, service = yaml.safe_load_all((HERE / "kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    app = create(ServeConfig(), Backend(Plan({}), 1)).app
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
    flags = [word for word in container["args"] if word.startswith("--")]
    known = {f"--{name.replace('_', '-')}" for name in ServeConfig.__dataclass_fields__}
    assert set(flags) <= known
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    spec = deployment["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] > ServeConfig().grace


def test_the_board_shows_metrics_that_there_are() -> None:
    board: dict[str, Any] = json.loads((HERE / "grafana/board.json").read_text())
    said = set(re.findall(r"# TYPE (\S+) ", Metrics().text().decode()))
    shown = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    named = {name for expr in shown for name in re.findall(r"(?:vllm|polyhead):\w+", expr)}
    assert len(named) >= 10
    for name in named:
        assert name.removesuffix("_bucket") in said, name


def test_the_unit_starts_what_there_is() -> None:
    unit = (HERE / "polyhead.service").read_text()
    command = re.search(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    assert command is not None
    words = command[1].split()
    assert words[1] == "serve"
    assert {"config"} == {word[2:] for word in words if word.startswith("--")}
    assert "config" in Args.__dataclass_fields__
    assert defaults([]).settings == ServeConfig()
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there to hold the unit to systemd's words")
    asked = ["systemd-analyze", "verify", str(HERE / "polyhead.service")]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stderr
    complaints = [line for line in told.splitlines() if "polyhead.service" in line]
    assert [line for line in complaints if "is not executable" not in line] == []
