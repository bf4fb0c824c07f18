"""One page of metrics from those of several ingresses: each sample gets a label that says whose it is.

A scraper meets one ingress now and another one then; without the label its counters would jump back and forth.
"""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "ingress"


def merged(pages: Mapping[str, str]) -> tuple[bytes, str]:
    """(text, its content type). pages: what each ingress says of itself, in OpenMetrics text, by its name."""
    registry = CollectorRegistry()
    registry.register(_Merged(pages))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Merged(Collector):
    def __init__(self, pages: Mapping[str, str]):
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for name, page in sorted(self._pages.items()):
            for family in text_string_to_metric_families(page):
                into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                into.samples += [sample._replace(labels={**sample.labels, LABEL: name}) for sample in family.samples]
        return families.values()
