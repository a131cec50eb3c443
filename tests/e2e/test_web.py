"""The web page of a real server, as HTTP has it and as Chromium shows it."""

import base64
import hashlib
import json
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ServerProcess, start_server
from zramd.status.percentile import percentile

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from browser import Browser, Page, browse, find_chromium

nbd = pytest.importorskip("nbd", reason="needs libnbd: apt install python3-libnbd")

PAGE = 4096
MAP_WIDTH = "document.querySelector('#map-picture').getBoundingClientRect().width"


@dataclass
class Site:
    """A server with a page, and a client that loads it."""

    server: ServerProcess
    port: int
    client: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def get(self, path: str, method: str = "GET") -> tuple[dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path)
        answer = connection.getresponse()
        assert answer.status == 200
        return dict(answer.getheaders()), answer.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path)[1])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Return a server of 64 MiB with pages of each kind, except that none is written back."""
    directory = tmp_path_factory.mktemp("web")
    port = free_port()
    server = start_server(directory, "--size", "64M", "--mem-limit", "32M", "--web", f"127.0.0.1:{port}")
    client = nbd.NBD()
    client.connect_uri(server.uri)
    noise = b"".join(hashlib.shake_256(bytes([number])).digest(PAGE) for number in range(50))
    client.pwrite(noise, 0)
    client.pwrite(b"compressible text" * PAGE, 1 << 20)
    server.ask("idle all")
    client.pwrite(noise[:PAGE], PAGE * 3)
    client.pwrite(bytes(PAGE * 20), 2 << 20)
    client.pwrite(b"more text, not idle" * PAGE, 40 << 20)
    yield Site(server, port, client)
    client.shutdown()
    assert server.stop() == (0, "")


def test_the_page_may_run_what_is_in_it_and_nothing_else(site: Site) -> None:
    headers, body = site.get("/")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    (script,) = re.findall(rb"<script>(.*?)</script>", body, re.DOTALL)
    (style,) = re.findall(rb"<style>(.*?)</style>", body, re.DOTALL)
    allowed = [f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in (script, style)]
    assert headers["Content-Security-Policy"].startswith(
        f"default-src 'none'; script-src {allowed[0]}; style-src {allowed[1]}; img-src data:; connect-src 'self'; "
    )
    assert "Set-Cookie" not in headers
    assert set(re.findall(rb"https?://[^\"' ]+", body)) == {b"http://www.w3.org/2000/svg"}
    assert site.get("/", "HEAD") == (headers, b"")
    assert b'\nzramd_disksize_bytes{device="zram0"} 67108864\n' in site.get("/metrics")[1]


def test_the_data_are_those_of_the_status_socket(site: Site) -> None:
    (disk,) = site.json("/data.json")["disks"]
    classes = disk.pop("classes")
    assert disk == json.loads(site.server.ask("json"))
    rows = [line.split() for line in site.server.ask("classes").splitlines()[1:]]
    used = [row for row in rows if len(row) == 18 and row[15] != "0"]
    assert [list(map(str, row)) for row in zip(*classes.values(), strict=True)] == [
        [row[1], row[16], row[13], row[14], row[15], row[17]] for row in used
    ]


def test_the_map_is_what_block_state_says(site: Site) -> None:
    kinds = ["empty"] * (64 << 20 >> 12)
    names = {"s": "same_filled", "h": "huge", "hi": "huge_idle", "": "compressed", "i": "compressed_idle"}
    for line in site.server.ask("block_state").splitlines():
        page, _, flags = line.split()
        kinds[int(page)] = names["".join(flag for flag in flags if flag in "shi")]
    assert set(kinds) == {"empty", *names.values()}
    for cells in (2048, 100, 1):
        found = site.json(f"/map?disk=zram0&cells={cells}")
        size = found["cell_pages"]
        wanted = [Counter(kinds[first : first + size]) for first in range(0, len(kinds), size)]
        assert len(wanted) <= cells
        assert found["cells"] == {kind: [cell[kind] for cell in wanted] for kind in found["cells"]}
        assert sum(map(sum, found["cells"].values())) == len(kinds)


def test_what_was_before_the_page_is_opened_is_known(site: Site) -> None:
    history = site.json("/history.json")
    (columns,) = history["disks"].values()
    assert history["times"] == sorted(history["times"])
    assert {len(column) for column in columns.values()} == {len(history["times"])}
    assert columns["mem_limit"][0] == 32 << 20
    assert columns["writes"] == sorted(columns["writes"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a Chromium."""
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium: apt install chromium")
    with browse(program) as started:
        yield started


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """Return the page, loaded on a desktop."""
    found = browser.page()
    found.look(1440, 900)
    found.open(site.url)
    found.wait_for("document.querySelector('#map-legend tbody tr') !== null")
    yield found
    found.close()


def test_the_page_shows_the_numbers_of_the_socket_and_follows_them(site: Site, page: Page) -> None:
    names = ("orig_data_size", None, "mem_used_total", "mem_limit", None, "same_pages", None, "huge_pages")
    before = site.server.mm_stat()[0]
    for added in (0, 19):
        site.client.pwrite(b"and still more text" * PAGE, 50 << 20) if added else None
        numbers = {name: number for name, number in zip(names, site.server.mm_stat(), strict=False) if name}
        assert numbers["orig_data_size"] == before + added * PAGE
        page.wait_for(
            f"Object.entries({json.dumps(numbers)}).every(([name, number]) => "
            "document.getElementById(name).value === String(number))"
        )
    legend = page.evaluate(
        "[...document.querySelectorAll('#map-legend tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    assert ["huge, idle", "49", "196 KiB", "0.3 %"] in legend


def test_percentiles_on_the_page_are_those_of_other_clients(site: Site, page: Page) -> None:
    told = json.loads(site.server.ask("json"))
    bounds, buckets = told["latency_bounds"], told["requests"]["write"]["buckets"]
    assert sum(buckets) >= 5
    for counts in (buckets, [0, 3, 0, 40, 2], [5], []):
        for share in (0.5, 0.99, 1):
            shown = page.evaluate(f"percentile({json.dumps(counts)}, {share})")
            assert shown == pytest.approx(percentile(bounds, counts, share))


def test_the_page_fits_a_desktop_and_a_phone_in_light_and_dark(site: Site, page: Page) -> None:
    for width, dark in ((1440, True), (360, True), (360, False)):
        page.look(width, 800, dark=dark)
        page.wait_for(f"document.querySelector('#map-picture').width === Math.round({MAP_WIDTH} * devicePixelRatio)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        colours = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('h1')).color]"
        )
        ground, ink = (sum(map(int, re.findall(r"\d+", colour))) for colour in colours)
        assert (ground < ink) == dark
    pictures = page.evaluate("[...document.querySelectorAll('[role=img]')].map(one => one.getAttribute('aria-label'))")
    assert len(pictures) >= 5
    assert all(pictures)
    assert page.complaints == []
    assert {url.partition("?")[0] for url in page.asked if not url.startswith("data:")} == {
        site.url + path for path in ("", "data.json", "history.json", "map")
    }


def test_the_arrow_keys_look_at_a_cell_of_the_map(page: Page) -> None:
    page.evaluate("document.getElementById('map-picture').focus()")
    page.press("ArrowRight")
    page.wait_for("document.getElementById('map-readout').textContent === '0 B on: 1 huge, 7 huge, idle'")


def test_nothing_is_asked_while_the_page_is_hidden(page: Page) -> None:
    def hide(hidden: bool) -> None:
        how = f"{{value: {str(hidden).lower()}, configurable: true}}"
        page.evaluate(f"Object.defineProperty(document, 'hidden', {how})")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    hide(True)
    page.evaluate("new Promise(done => setTimeout(done, 500))")  # what was asked before is answered
    before = len(page.asked)
    page.evaluate("new Promise(done => setTimeout(done, 1500))")
    assert len(page.asked) == before
    hide(False)
    page.wait_for(
        "performance.getEntriesByType('resource').filter(({name}) => name.endsWith('/history.json')).length === 2"
    )


def test_it_says_that_the_server_is_gone_and_goes_on_when_it_is_back(browser: Browser, tmp_path: Path) -> None:
    options = ("--size", "64M", "--web", f"127.0.0.1:{free_port()}")
    server = start_server(tmp_path, *options)
    page = browser.page()
    page.open(f"http://{options[-1]}/")
    page.wait_for("document.getElementById('connection')?.innerText.startsWith('live')")
    assert server.stop() == (0, "")
    page.wait_for("!document.getElementById('lost').hidden")
    assert f"The server at {options[-1]} is gone" in page.evaluate("document.getElementById('lost').innerText")
    server = start_server(tmp_path, *options)
    page.wait_for("document.getElementById('connection')?.innerText.startsWith('live')")
    assert page.evaluate("document.getElementById('lost').hidden")
    page.close()
    assert server.stop() == (0, "")
