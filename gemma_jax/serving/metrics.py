"""Numbers for Prometheus, under our names or those that dashboards for vLLM read."""

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from gemma_jax.serving.generation import Usage

OURS = "gemma_jax_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """Counts what a server does.

    Args:
      model: Its name, the label `model_name`.
      prefix: Of all names: `gemma_jax_`, or `vllm:`.
      stats: Asked for the engine's numbers whenever they are read.
    """

    def __init__(self, model: str, prefix: str = OURS, stats: Callable[[], Mapping] = dict):
        self.registry, self._model = CollectorRegistry(), model
        self._prefix, self._stats, self._labels = prefix, stats, ("model_name", "engine")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._new = self._counter("generation_tokens", "Tokens written.")
        self._cached = self._counter("prompt_tokens_cached", "Tokens of prompts not read again.")
        self._ended = self._counter(
            "request_success", "Answers by how they ended.", "finished_reason"
        )
        self._http = self._counter(
            "http_requests", "Requests by route and status.", "route", "status"
        )
        self._usage = self._counter("usage_tokens", "Tokens by whose key it was.", "owner", "kind")
        self._first = self._histogram(
            "time_to_first_token_seconds", "Until the first token.", _SECONDS
        )
        self._gap = self._histogram("inter_token_latency_seconds", "Between tokens.", _GAPS)
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "Until the last token.", _SECONDS
        )
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of answers.", _TOKENS)
        for metric in (self._prompt, self._new, self._cached, self._first, self._gap, self._whole):
            self._of(metric)  # is there from the beginning, as zero
        self.registry.register(self)

    def answered(self, usage: Usage, owner: str) -> None:
        """Counts what one request took."""
        self._of(self._prompt).inc(usage.prompt)
        self._of(self._new).inc(usage.new)
        self._of(self._cached).inc(usage.cached)
        for kind, tokens in (("prompt", usage.prompt), ("generation", usage.new)):
            self._of(self._usage, owner, kind).inc(tokens)
        for reason in usage.reasons:
            self._of(self._ended, reason).inc()
        self._of(self._prompts).observe(usage.prompt)
        self._of(self._answers).observe(usage.new)
        self._of(self._whole).observe(time.monotonic() - usage.begun)
        if usage.first:
            self._of(self._first).observe(usage.first - usage.begun)
        for gap in usage.gaps:
            self._of(self._gap).observe(gap)

    def served(self, route: str, status: int) -> None:
        """Counts one HTTP request."""
        self._of(self._http, route, str(status)).inc()

    def text(self) -> tuple[bytes, str]:
        """All of it, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """What the engine says of itself; called by the registry."""
        names = {
            "num_requests_running": ("running", GaugeMetricFamily, "Requests being answered."),
            "num_requests_waiting": ("waiting", GaugeMetricFamily, "Requests that wait."),
            "kv_cache_usage_perc": ("usage", GaugeMetricFamily, "Share of slots in use."),
            "prefix_cache_queries": ("prompt_tokens", CounterMetricFamily, "Tokens looked for."),
            "prefix_cache_hits": ("cached_tokens", CounterMetricFamily, "Tokens found."),
            "spec_decode_num_draft_tokens": ("drafted_tokens", CounterMetricFamily, "Drafts."),
            "spec_decode_num_accepted_tokens": ("kept_tokens", CounterMetricFamily, "Drafts kept."),
        }
        stats = dict(self._stats())
        if "slots" in stats and "running" in stats:
            stats["usage"] = stats["running"] / stats["slots"]
        for name, (key, family, text) in names.items():
            if key in stats:
                metric = family(self._prefix + name, text, labels=self._labels)
                metric.add_metric([self._model, "0"], float(stats[key]))
                yield metric

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        names = (*self._labels, *labels)
        return Counter(self._prefix + name, text, names, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple) -> Histogram:
        return Histogram(
            self._prefix + name, text, self._labels, buckets=buckets, registry=self.registry
        )

    def _of(self, metric, *labels: str):
        return metric.labels(self._model, "0", *labels)
