"""The web page, and the data that it asks for, which cost the same however many ask."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Generic, TypeVar

from zramd.device.disk import Disk
from zramd.device.life import UninitialisedError
from zramd.device.page_map import MOST_CELLS, PageKind, PageMap, map_pages
from zramd.status.attributes import Served, everything
from zramd.status.history import History
from zramd.status.http import Answer, HttpError, Paths, Request

DATA_SECONDS = 0.5
"""The data of a moment are the answer for so long."""
MAP_SECONDS = 3.0
MAP_SHARE = 15
"""A map is the answer for that long, and for so many times the time that it took to make, most of which was pauses."""
CLASS_COLUMNS = ("size", "pages_per_zspage", "obj_allocated", "obj_used", "pages_used", "freeable")
"""Of the classes that have memory: as in the attribute `classes`."""

_NO_PAGES = PageMap(0, 1, {}, 0, 0)

Made = TypeVar("Made")


class _Latest(Generic[Made]):
    """What is made by one client at a time, and anew once it is too old."""

    def __init__(self, make: Callable[[], Made], seconds: float, share: float = 0) -> None:
        self._make = make
        self._seconds = seconds
        self._share = share
        self._lock = threading.Lock()
        self._until = 0.0
        self._made: Made | None = None

    def get(self) -> Made:
        with self._lock:
            started = time.monotonic()
            if self._made is None or started >= self._until:
                self._made = self._make()
                ended = time.monotonic()
                self._until = ended + max(self._seconds, (ended - started) * self._share)
            return self._made


class Web:
    """The paths of the page. Times are in seconds of CLOCK_MONOTONIC, tables are by column."""

    def __init__(self, served: Sequence[Served], history: History) -> None:
        self._served = tuple(served)
        self._history = history
        self._data = _Latest(self._make_data, DATA_SECONDS)
        self._maps = {one.disk.name: _Latest(partial(_draw, one.disk), MAP_SECONDS, MAP_SHARE) for one in self._served}

    def paths(self) -> Paths:
        """Return what there is, for an HTTP server."""
        page = load_page()
        return {
            "/": lambda _: page,
            "/data.json": lambda _: Answer(self._data.get()),
            "/history.json": lambda _: Answer(self._tell_history()),
            "/map": self._tell_map,
        }

    def _make_data(self) -> bytes:
        """Return everything about every disk: what the attribute json has, and its size classes."""
        disks = [everything(one) | {"classes": _classes(one.disk)} for one in self._served]
        return _json({"monotonic": time.monotonic(), "disks": disks})

    def _tell_history(self) -> bytes:
        """Return the last minutes of every disk."""
        times, disks = self._history.columns()
        return _json({"times": times, "disks": disks})

    def _tell_map(self, request: Request) -> Answer:
        """Return the map of a `disk` in at most so many `cells`.

        Raises:
            HttpError: there is no such disk, or that is no number of cells.
        """
        name, cells = request.query.get("disk", ""), request.query.get("cells", str(MOST_CELLS))
        if name not in self._maps:
            raise HttpError(HTTPStatus.NOT_FOUND, f"no such disk; there are: {' '.join(self._maps)}")
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", cells, re.ASCII):
            raise HttpError(HTTPStatus.BAD_REQUEST, "cells is a number from 1 on")
        return next(Answer(body) for size, body in self._maps[name].get() if size <= int(cells))


def _draw(disk: Disk) -> list[tuple[int, bytes]]:
    """Return the map of a disk with its number of cells, and with half as many, and so on to one.

    Each has the pages by kind; a kind that no page is of is left out, unless it is empty.
    """
    opened, now = disk.opened, time.monotonic()
    found = (map_pages(opened.device) if opened else None) or _NO_PAGES
    drawn = [(len(found), _encode(found, disk.name, now))]
    while len(found) > 1:
        found = found.coarser(-(-len(found) // 2))
        drawn.append((len(found), _encode(found, disk.name, now)))
    return drawn


def _encode(found: PageMap, disk: str, now: float) -> bytes:
    kinds = [kind for kind in PageKind if kind is PageKind.EMPTY or any(found.counts.get(kind, ()))]
    return _json(
        {
            "disk": disk,
            "monotonic": now,
            "pages": found.pages,
            "cell_pages": found.cell_pages,
            "looked_at": found.looked_at,
            "in_use": found.in_use,
            "cells": {kind.name.lower(): list(found.counts.get(kind, ())) for kind in kinds},
        }
    )


def _classes(disk: Disk) -> dict[str, list[int]]:
    try:
        stats = [stat for stat in disk.class_stats() if stat.pages_used]
    except UninitialisedError:
        stats = []
    return {title: [getattr(stat, title) for stat in stats] for title in CLASS_COLUMNS}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def load_page() -> Answer:
    """Return the page, with a Content-Security-Policy that lets it run what is in it and ask this server."""
    body = Path(__file__).with_name("page.html").read_bytes()
    script, style = (
        base64.b64encode(hashlib.sha256(re.findall(rb"<%b>(.*?)</%b>" % (name, name), body, re.DOTALL)[0]).digest())
        for name in (b"script", b"style")
    )
    return Answer(
        body,
        "text/html; charset=utf-8",
        f"default-src 'none'; script-src 'sha256-{script.decode()}'; style-src 'sha256-{style.decode()}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )
