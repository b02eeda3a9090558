"""What a server does when things go wrong around it."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serve.conftest import Server, Start, until

from polyhead.cli.main import main
from polyhead.errors import ConfigError
from polyhead.serve.app import create
from polyhead.serve.backend import Backend
from polyhead.serve.config import ServeConfig
from polyhead.serve.errors import ApiError
from polyhead.serve.messages import Plan

LONG: dict[str, Any] = {"model": "tiny", "prompt": "once", "max_tokens": 1500, "temperature": 0}
HUGE: dict[str, Any] = {**LONG, "max_tokens": 30_000, "ignore_eos": True, "stream": True}
"""Goes on for seconds."""
SHORT: dict[str, Any] = {**LONG, "max_tokens": 4}


def post(server: Server, body: Any, path: str = "/v1/completions", **named: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60, **named)


def routes() -> list[tuple[str, str]]:
    """Every route of the application, read from it."""
    guard = create(ServeConfig(), Backend(Plan({}), 1))
    found = [
        (method, route.path.replace("{name:path}", "tiny"))
        for route in guard.app.routes
        for method in sorted(route.methods)
    ]
    assert len(found) >= 8
    return found


@pytest.fixture(scope="module")
def locked(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Path]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# ours\nann secret-one\nsecret-two\n")
    return start("--keys", str(keys)), keys


@pytest.mark.parametrize(("method", "path"), routes())
def test_every_route_but_two_wants_a_key(
    locked: tuple[Server, Path], method: str, path: str
) -> None:
    server, _ = locked
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-one"}):
        answer = httpx.request(method, f"{server.url}{path}", headers=headers)
        if path in ("/health", "/ready"):
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401
            assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"


def asked(url: str, key: str) -> httpx.Response:
    return httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})


def test_what_a_key_may_ask(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("ann few= requests=3\nbob wide=1 at_once=1\n")
    server = start("--keys", str(keys))
    told = [asked(server.url, "few=") for _ in range(5)]
    assert [each.status_code for each in told] == [200, 200, 200, 429, 429]
    assert told[3].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(told[3].headers["retry-after"]) <= 20
    bearer = {"Authorization": "Bearer wide=1"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=HUGE, headers=bearer) as answer:
        lines = answer.iter_lines()  # that is dropped, it hangs up
        next(lines)
        assert asked(server.url, "wide=1").status_code == 429
    until(lambda: asked(server.url, "wide=1").status_code == 200)
    keys.write_text("ann few= requests=none\n")
    assert asked(server.url, "wide=1").status_code == 200  # those of before hold


def test_pages_of_other_origins(start: Start, locked: tuple[Server, Path]) -> None:
    origin = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    plain = httpx.options(f"{locked[0].url}/v1/models", headers=origin)
    assert "access-control-allow-origin" not in plain.headers
    server = start("--cors", "https://a.example", "--keys", str(locked[1]))
    allowed = httpx.options(f"{server.url}/v1/models", headers=origin)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.options(f"{server.url}/v1/models", headers=origin | {"Origin": "https://b.c"})
    assert "access-control-allow-origin" not in other.headers
    refused = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"


def test_https(start: Start, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
            "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert),
            "-keyout", str(key)]  # fmt: skip
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl, which is not there")
    subprocess.run(made, check=True, capture_output=True)
    server = start("--tls-cert", str(cert), "--tls-key", str(key))
    assert server.url.startswith("https://127.0.0.1:")
    trusts = ssl.create_default_context(cafile=str(cert))
    assert httpx.get(f"{server.url}/health", verify=trusts).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_a_dry_run_says_what_is_taken(server: Server, folder: Path) -> None:
    words = [sys.executable, "-m", "polyhead.cli.main", "serve", f"tiny={folder}", "--dry-run"]
    told = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True)
    (plan,) = json.loads(told.stdout)["models"]
    (held,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert plan["parameters"] == held["parameters"]
    assert plan["weight_bytes"] == pytest.approx(held["weight_bytes"], rel=0.02)
    assert plan["cache_bytes"] == pytest.approx(held["cache_bytes"], rel=0.02)
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "for 65,536 tokens" in shown
    too_much = [*words, "--cache-tokens", str(10**10)]
    refused = subprocess.run(too_much, capture_output=True, text=True, check=False)
    assert (refused.returncode, "it does not fit" in refused.stdout) == (1, True)


def test_keys_are_rotated_by_writing_the_file(locked: tuple[Server, Path]) -> None:
    server, keys = locked

    def status(key: str) -> int:
        return post(server, SHORT, headers={"Authorization": f"Bearer {key}"}).status_code

    assert [status(key) for key in ("secret-one", "secret-two", "third")] == [200, 200, 401]
    keys.write_text("third\n")
    assert [status(key) for key in ("secret-one", "third")] == [401, 200]
    assert "secret" not in server.log.read_text()


def test_requests_have_ids_and_the_log_no_text(server: Server) -> None:
    body = SHORT | {"prompt": "confidential words"}
    answer = post(server, body, headers={"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    odd = post(server, SHORT, headers={"X-Request-Id": "a b\\n{"})
    assert odd.headers["x-request-id"] != "a b\\n{"
    until(lambda: "abc-1" in server.log.read_text())
    assert "confidential" not in server.log.read_text()


def test_tokens_there_and_back(server: Server) -> None:
    ids = post(server, {"model": "tiny", "prompt": "once é"}, "/tokenize").json()["tokens"]
    told = post(server, {"model": "tiny", "tokens": ids}, "/detokenize").json()
    assert told == {"prompt": "once é"}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    assert post(server, chat, "/tokenize").json()["count"] > len("hi")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"model": 3}', b""])
def test_what_is_no_request(server: Server, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_route_that_is_not_there(server: Server) -> None:
    for answer in (httpx.get(f"{server.url}/v1/none"), httpx.get(f"{server.url}/v1/completions")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_too_large_a_request(start: Start) -> None:
    server = start("--max-body", "2000")
    assert post(server, SHORT).status_code == 200
    answer = post(server, SHORT | {"prompt": "x" * 3000})
    assert answer.status_code == 413
    pieces = (b"x" * 500 for _ in range(6))  # says no length
    answer = httpx.post(f"{server.url}/v1/completions", content=pieces)
    assert answer.status_code == 413


def test_one_that_goes_away_makes_room(start: Start) -> None:
    server = start("--max-rows", "1", "--max-waiting", "1")
    for stream in (True, False):
        body = HUGE | {"stream": stream}
        if stream:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.05)
    assert until(lambda: post(server, SHORT).status_code == 200)


def test_more_than_there_is_room_for(start: Start) -> None:
    server = start("--max-rows", "1", "--max-waiting", "1")
    found: list[int] = []
    retry: list[str] = []

    def ask() -> None:
        answer = post(server, LONG | {"ignore_eos": True})
        found.append(answer.status_code)
        if answer.status_code == 429:
            retry.append(answer.headers["retry-after"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {200, 429}
    assert found.count(200) >= 2
    assert len(retry) == found.count(429)


def test_a_worker_that_is_lost_comes_back(start: Start) -> None:
    server = start()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=HUGE, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert "worker_lost" in rest[-1]
    assert httpx.get(f"{server.url}/health").status_code == 200
    while_away = post(server, SHORT)
    assert while_away.status_code in (200, 503)
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
    assert post(server, SHORT).status_code == 200
    assert server.workers() != [worker]


def test_what_is_at_work_is_finished_before_the_end(start: Start) -> None:
    server = start()
    body = LONG | {"stream": True, "ignore_eos": True, "max_tokens": 400}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason": "length"' in rest[-2]
    assert server.process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serve"], "name a model to serve"),
        (["serve", "nowhere"], "nowhere: no such file"),
        (["serve", "a=x", "a=y"], "two models are called a"),
        (["serve", "x", "--host", "0.0.0.0"], "name a file of --keys"),
        (["serve", "x", "--keys", "none.txt"], "cannot read the keys"),
        (["serve", "x", "--tls-cert", "a.pem"], "belong together"),
        (["serve", "x", "--tls-cert", "a.pem", "--tls-key", "b"], "are no certificate"),
        (["serve", "x", "--config", "none.toml"], "cannot read"),
        (["serve", "x", "--max-rows", "0"], "max_rows is 0"),
    ],
)
def test_bad_words(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--port", "0"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("polyhead")]
    assert told in line


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyhead.cli.serve import defaults

    file = tmp_path / "serve.toml"
    file.write_text("port = 81\nmax_rows = 3\ntimeout = 5\n")
    monkeypatch.setenv("POLYHEAD_PORT", "82")
    found = defaults(["x", "--config", str(file)]).settings
    assert (found.port, found.max_rows, found.timeout) == (82, 3, 5)
    file.write_text("colour = 1\n")
    with pytest.raises(ConfigError, match="no setting 'colour'"):
        defaults([f"--config={file}"])
    monkeypatch.setenv("POLYHEAD_PORT", "many")
    with pytest.raises(ConfigError, match="POLYHEAD_PORT is 'many'"):
        defaults([])


@pytest.mark.parametrize(
    "message",
    ["no file /home/ann/model/x.safetensors here", "at 0x7f32aa00bb11", r"C:\models\x is missing"],
)
def test_no_path_or_address_leaves(message: str) -> None:
    told = ApiError(400, message).message
    assert "[...]" in told
    assert not any(part in told for part in ("home", "7f32", "models"))


def test_the_front_goes_without_torch() -> None:
    words = "import sys; import polyhead.serve.run; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


def test_what_prometheus_is_told(start: Start) -> None:
    server = start()

    def told() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics").text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def named(name: str, **labels: str) -> str:
        inside = ",".join(f'{k}="{v}"' for k, v in sorted({**labels, "model_name": "tiny"}.items()))
        return f"vllm:{name}{{{inside}}}"

    body = SHORT | {"ignore_eos": True, "prompt": ["once", "upon"], "n": 2}
    assert post(server, body).status_code == 200
    assert post(server, SHORT | {"ignore_eos": True, "stream": True}).status_code == 200
    assert post(server, SHORT | {"logit_bias": {"9999": 1}}).status_code == 400
    found = told()
    assert found[named("prompt_tokens_total")] == 4 + 4 + 4
    assert found[named("generation_tokens_total")] == 4 * 4 + 4
    assert found[named("request_success_total", finished_reason="length")] == 5
    assert found[named("request_failure_total", status="400")] == 1
    assert found[named("e2e_request_latency_seconds_count")] == 2
    assert found[named("time_to_first_token_seconds_count")] == 1
    assert found[named("num_requests_running")] == 0
    assert found[named("kv_cache_usage_perc")] == 0
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json=HUGE | {"n": 8},
    ) as answer:
        lines = answer.iter_lines()  # that is dropped, it hangs up
        next(lines)
        until(lambda: told()[named("num_requests_running")] == 8)
        assert told()[named("kv_cache_usage_perc")] > 0
    until(lambda: told()[named("num_requests_running")] == 0)
    os.kill(*server.workers(), signal.SIGKILL)
    until(lambda: told()["polyhead:worker_restarts_total"] == 1)


def test_what_is_larger_than_a_pipe_arrives_whole(start: Start) -> None:
    server = start("--max-body", str(2**24))
    tokens = [5] * 800_000
    told = httpx.post(f"{server.url}/detokenize", json={"model": "tiny", "tokens": tokens})
    assert told.status_code == 200
    text = told.json()["prompt"]
    body = {"model": "tiny", "prompt": text}
    assert httpx.post(f"{server.url}/tokenize", json=body).json()["count"] > 100_000
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert "polyhead:worker_restarts_total 0.0" in httpx.get(f"{server.url}/metrics").text
