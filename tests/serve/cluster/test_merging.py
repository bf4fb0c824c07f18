"""The metrics of several ingresses on one page."""

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from clipdit_serve.batching import InProcessEngine
from clipdit_serve.cluster.merging import merged
from clipdit_serve.engine import BatchReport
from clipdit_serve.metrics import Metrics
from clipdit_serve.settings import ServeSettings
from clipdit_serve.variants import Variants


def page(requests: int) -> str:
    metrics = Metrics(Variants.of(InProcessEngine(lambda: pytest.fail("nobody asks"), ServeSettings())))
    for _ in range(requests):
        metrics.request("/v1/translate", 200, None, 0.01)
    metrics.batch("", BatchReport(images=requests, seconds=0.1, waits_s=(0.0,) * requests))
    return metrics.exposition()[0].decode()


def test_every_sample_is_there_once_with_the_name_of_its_ingress():
    text, content_type = merged({"a": page(2), "b": page(5)})
    assert content_type.startswith("application/openmetrics-text")
    samples = [sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples]
    counts = {(s.name, s.labels["ingress"]): s.value for s in samples}
    assert counts["clipdit_requests_total", "a"] == 2 and counts["clipdit_requests_total", "b"] == 5
    assert counts["clipdit_batch_size_sum", "a"] == 2 and counts["clipdit_batch_size_sum", "b"] == 5
    alone = [sample for family in text_string_to_metric_families(page(2)) for sample in family.samples]
    assert len(samples) == 2 * len(alone)
