"""The path /metrics, for the HTTP server and for the status socket."""

from collections.abc import Sequence

from zramd.device.life import UninitialisedError
from zramd.status.attributes import Served, everything
from zramd.status.http import Answer, Paths, Request
from zramd.status.metrics import Facts, Format, render


def metrics_paths(served: Sequence[Served]) -> Paths:
    """Return the path with the metrics of some disks: OpenMetrics for those who accept it, else the text format.

    `?classes=1` adds the size classes.
    """

    def answer(request: Request) -> Answer:
        wanted = Format.OPENMETRICS if "application/openmetrics-text" in request.accept else Format.TEXT
        with_classes = request.query.get("classes") == "1"
        facts = (_facts(one, with_classes=with_classes) for one in served)
        return Answer(render(facts, wanted).encode(), wanted.value)

    return {"/metrics": answer}


def _facts(served: Served, *, with_classes: bool) -> Facts:
    facts = everything(served)
    if with_classes:
        try:
            stats = [stat for stat in served.disk.class_stats() if stat.pages_used]
        except UninitialisedError:
            stats = []
        facts["classes"] = [(stat.size, stat.pages_used // stat.pages_per_zspage, stat.obj_used) for stat in stats]
    return facts
