"""Metrics, read by the parsers of Prometheus' own client, over each way to get them."""

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.nbd_bytes import receive_rest
from tests.property.test_device import make_data, write
from zramd.cli.stat import stat
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.listeners import listen_tcp, listen_unix
from zramd.status.attributes import Served
from zramd.status.client import ask
from zramd.status.http import HttpServer
from zramd.status.metrics import FAMILIES, Format, render
from zramd.status.scraping import metrics_paths
from zramd.status.server import StatusServer

ROOT = Path(__file__).parents[2]
ACCEPT_OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PARSERS: dict[Format, Any] = {Format.OPENMETRICS: parse_openmetrics, Format.TEXT: parse_text}


@dataclass
class Site:
    """Two disks, of which the first is in use: the status socket of that, and the port of both."""

    disk: Disk
    status: Path
    port: int

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


@pytest.fixture
def site(tmp_path: Path, opened: OpenDevice) -> Iterator[Site]:
    disk, empty = Disk('a"\\\nb', None), Disk("zram1", None)
    disk.opened = opened
    write(opened.device, 0, bytearray(make_data("text", 1, 8 * 4096)))
    write(opened.device, 1 << 20, bytearray(make_data("random", 1, 4 * 4096)))
    served = [Served(one, (), tmp_path / "admin") for one in (disk, empty)]
    status, server = StatusServer(served[0]), HttpServer(metrics_paths(served))
    status.accept_on(listen_unix(tmp_path / "status"))
    (listener,) = listen_tcp("127.0.0.1", 0)
    server.accept_on(listener)
    yield Site(disk, tmp_path / "status", listener.getsockname()[1])
    assert status.stop(10)
    assert server.stop(10)


def samples(text: str, form: Format) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the value of each sample, by its name and labels; no two are the same."""
    found = [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in PARSERS[form](text)
        for sample in family.samples
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_both_formats_are_what_their_parsers_read_and_say_the_same(site: Site) -> None:
    status, headers, text = site.get("/metrics?classes=1")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    status, headers, openmetrics = site.get("/metrics?classes=1", Accept=ACCEPT_OPENMETRICS)
    assert (status, headers["Content-Type"]) == (200, "application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert openmetrics.endswith("\n# EOF\n")
    found = samples(text, Format.TEXT)
    assert found == samples(openmetrics, Format.OPENMETRICS)
    device = ("device", 'a"\\\nb')
    assert found["zramd_disksize_bytes", (device,)] == 64 << 20
    assert found["zramd_disksize_bytes", (("device", "zram1"),)] == 0
    assert found["zramd_orig_data_bytes", (device,)] == 12 * 4096
    assert found["zramd_huge_pages", (device,)] == found["zramd_objects", (("class", "4096"), device)] == 4
    assert found["zramd_pages", (("algorithm", "lz4"), device)] == 8
    assert {name for name, _ in found} >= {family.full_name for family in FAMILIES if family.kind != "histogram"}
    kinds = {(family.name, family.type) for family in PARSERS[Format.OPENMETRICS](openmetrics)}
    assert kinds == {(family.name, family.kind) for family in FAMILIES}


def test_a_histogram_has_octaves_of_all_that_was_counted(site: Site) -> None:
    with site.disk.requests.counting() as counters:
        counters.add(0, 4096)
        counters.add(0, 4096)
        counters.note_answers(0)
    text = site.get("/metrics", Accept=ACCEPT_OPENMETRICS)[2]
    family = next(one for one in PARSERS[Format.OPENMETRICS](text) if one.name == "zramd_request_duration_seconds")
    reads = [one for one in family.samples if one.labels["op"] == "read" and one.labels["device"] != "zram1"]
    buckets = [one for one in reads if one.name.endswith("_bucket")]
    assert [float(one.labels["le"]) for one in buckets] == [2**power / 1e9 for power in range(10, 35)] + [float("inf")]
    assert [one.value for one in buckets] == [0] * 25 + [2]
    assert [one.value for one in reads if one.name.endswith("_count")] == [2]


def test_the_status_socket_speaks_http_to_those_who_do(site: Site) -> None:
    def converse(*parts: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(site.status))
            for part in parts:
                sock.sendall(part)
            return receive_rest(sock)

    answer = converse(b"GET /met", b"rics HTTP/1.1\r\nHost: d\r\n", b"\r\n")
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert f"Content-Length: {len(body)}\r\n" in head
    devices = {dict(labels)["device"] for _, labels in samples(body, Format.TEXT)}
    assert devices == {site.disk.name}
    assert converse(b"GET /metrics HTTP/1.0\n\n").endswith(body.encode()[-40:])
    assert converse(b"HEAD /metrics HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")
    assert converse(b"POST /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405 ")
    assert converse(b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    assert converse(b"GET metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert converse(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 9000).startswith(b"HTTP/1.1 431 ")


def test_who_comes_by_another_name_gets_nothing(site: Site) -> None:
    status, _, body = site.get("/metrics", Host="rebound.example:9586")
    assert (status, "zramd_" in body) == (421, False)


def test_metrics_of_two_servers_differ_by_device_alone_and_each_family_comes_once(site: Site) -> None:
    facts = json.loads(ask(site.status, "json"))
    text = render([facts, facts | {"name": "zram7"}], Format.TEXT)
    assert len(samples(text, Format.TEXT)) == 2 * len(samples(render([facts], Format.TEXT), Format.TEXT))
    types = re.findall("^# TYPE (\\S+)", text, re.MULTILINE)
    assert len(types) == len(set(types))


def test_a_file_for_node_exporter_is_whole_readable_and_gone_with_the_server(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "textfiles" / "zramd.prom"
    target.parent.mkdir()

    def run(*arguments: str, status: Path = site.status) -> tuple[int, str]:
        result = CliRunner().invoke(stat, ["--prometheus", "--status", str(status), *arguments])
        return result.exit_code, result.output

    status, printed = run()
    assert status == 0
    assert run("--output", str(target)) == (0, "")
    assert samples(target.read_text(), Format.TEXT).keys() == samples(printed, Format.TEXT).keys()
    assert target.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in target.parent.iterdir()] == ["zramd.prom"]
    missing = tmp_path / "none" / "zramd.prom"
    assert run("--output", str(missing)) == (1, f"Error: cannot write {missing}: No such file or directory\n")
    status, said = run("--output", str(target), status=tmp_path / "gone")
    assert (status, said.startswith("Error: ")) == (1, True)
    assert not target.exists()


def names_in_use() -> set[str]:
    """Return the names of all samples, as PromQL has them."""
    names = {family.full_name for family in FAMILIES}
    return names | {
        f"{one.name}_{part}" for one in FAMILIES if one.kind == "histogram" for part in ("bucket", "count", "sum")
    }


def test_each_metric_has_its_line_in_the_documentation_and_no_other_has() -> None:
    lines = re.findall(r"^\| `(zramd_\w+)` \| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert lines == [(family.full_name, family.kind) for family in FAMILIES]


def expressions(value: Any) -> Iterator[str]:
    """Yield what a dashboard asks Prometheus for."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "query") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((ROOT / "configs/grafana-zramd.json").read_text())
    asked = {name for text in expressions(dashboard) for name in re.findall(r"zramd_\w+", text)}
    assert asked
    assert asked <= names_in_use()
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"datasource", "device"} <= variables
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
            assert panel["targets"], panel["title"]
