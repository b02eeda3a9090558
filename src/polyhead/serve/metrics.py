"""What Prometheus is told, by the names that vLLM gives it."""

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from polyhead.serve.messages import Stats

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server. Labels are names of models, never what users send."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = self._gauge("num_requests_running", "Requests whose texts are written")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for their turn")
        self.cache = self._gauge("kv_cache_usage_perc", "Share of keys and values held, 0 to 1")
        self.read = self._counter("prompt_tokens", "Tokens of prompts that were read")
        self.written = self._counter("generation_tokens", "Tokens that were written")
        self.done = self._counter("request_success", "Choices that ended", "finished_reason")
        self.failed = self._counter("request_failure", "Requests that ended in an error", "status")
        self.first = self._histogram("time_to_first_token_seconds", "Until the first piece")
        self.between = self._histogram("inter_token_latency_seconds", "Between pieces")
        self.whole = self._histogram("e2e_request_latency_seconds", "Until the end")
        self.restarts = Counter(
            "polyhead:worker_restarts", "Workers that ended and were started again",
            registry=self.registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self.registry)

    def watch(self, model: str) -> "Watch":
        """One that is told how a request goes."""
        return Watch(self, model)

    def stand(self, stats: Stats) -> None:
        """How an engine stands."""
        self.running.labels(stats.model).set(stats.running)
        self.waiting.labels(stats.model).set(stats.waiting)
        self.cache.labels(stats.model).set(stats.cache)

    def lost(self) -> None:
        """A worker ended; what it held is gone."""
        self.restarts.inc()
        for gauge in (self.running, self.waiting, self.cache):
            gauge.clear()

    def _gauge(self, name: str, told: str) -> Gauge:
        return Gauge(f"vllm:{name}", told, ("model_name",), registry=self.registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", told, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, told: str) -> Histogram:
        return Histogram(
            f"vllm:{name}", told, ("model_name",), registry=self.registry, buckets=_SECONDS
        )


class Watch:
    """One request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model, self._began = metrics, model, time.perf_counter()
        self._last: dict[int, float] = {}

    def piece(self, choice: int) -> None:
        """More of a choice came."""
        now, metrics = time.perf_counter(), self._metrics
        if choice in self._last:
            metrics.between.labels(self._model).observe(now - self._last[choice])
        else:
            metrics.first.labels(self._model).observe(now - self._began)
        self._last[choice] = now

    def done(self, result: Mapping[str, Any]) -> None:
        """It came to its end."""
        metrics, name = self._metrics, self._model
        metrics.whole.labels(name).observe(time.perf_counter() - self._began)
        if "choices" not in result:
            count = result.get("tokens", 0)
            metrics.read.labels(name).inc(count if isinstance(count, int) else 0)
            metrics.done.labels(name, "stop").inc()
            return
        choices, prompts = result["choices"], result["prompt_tokens"]
        metrics.read.labels(name).inc(sum(prompts[:: len(choices) // result["num_prompts"]]))
        metrics.written.labels(name).inc(sum(choice["tokens"] for choice in choices))
        for choice in choices:
            metrics.done.labels(name, choice["finish_reason"]).inc()

    def failed(self, status: int) -> None:
        """It ended in an error."""
        self._metrics.failed.labels(self._model, str(status)).inc()
