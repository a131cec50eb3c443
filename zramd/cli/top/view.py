"""`zramd top` as it is drawn: one disk, in lines that fill the terminal."""

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rich.text import Text

from zramd.cli.columns import format_time
from zramd.cli.progress import describe
from zramd.cli.top.sample import Rate, Sample, ratio
from zramd.cli.top.tracker import Tracker
from zramd.policy.pressure import Pressure, read_pressure
from zramd.sizes import format_size
from zramd.status.classes import ClassUse

ALWAYS = ("read", "write")
"""Operations with a line from the start; the others have one once there was a request."""
NEAR_LIMIT = 0.9
PRESSING = 10.0
"""Per cent of the time that tasks wait for memory, from which on it is worth a warning."""
MEGABYTE = 1e6
BLOCKS, SPARKS = ("█", "░"), "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS, PLAIN_SPARKS = ("#", "."), "_.-=+*#@"
"""For terminals that have no more than ASCII."""
DIM, TITLE, WARNING = "bright_black", "bold", "yellow"
BAR = "cyan"

HELP = """\
q             quit
tab, arrows   the next disk, the one before
p, space      pause, go on
+ -           look more often, less often
s             sort classes: by memory, size, what compaction would give back
h, ?          this help, and back

IOPS, MB/s (of 10^6 bytes) and latency are of the last interval; latency is from
when the server received a request to when the kernel took the answer. max is
the bound of the slowest request's bucket, a quarter of an octave wide.
RATIO is stored data by all the memory that they take.\
"""


class Sort(StrEnum):
    """By what size classes are sorted."""

    MEMORY = "memory"
    SIZE = "size"
    COMPACTABLE = "compactable"

    @property
    def next(self) -> "Sort":
        """The one after it."""
        every = list(Sort)
        return every[(every.index(self) + 1) % len(every)]


@dataclass(slots=True)
class View:
    """What is to be seen: which disk of how many, how it is sorted, and how large the terminal is."""

    width: int = 80
    height: int = 24
    unicode: bool = True
    interval: float = 1.0
    paused: bool = False
    help: bool = False
    sort: Sort = Sort.MEMORY

    def draw(self, trackers: Sequence[Tracker], selected: int) -> list[Text]:
        """Return the lines, as many as fit."""
        tracker = trackers[selected]
        lines = [self._heading(trackers, selected)]
        if self.help:
            lines += [Text(line) for line in ["", *HELP.splitlines()]]
        elif tracker.now is None:
            lines += [Text(), self._trouble(tracker)]
        else:
            lines += self._disk(tracker, tracker.now)
        for line in lines:
            line.truncate(self.width, overflow="ellipsis" if self.unicode else "crop")
        return lines[: self.height]

    def _heading(self, trackers: Sequence[Tracker], selected: int) -> Text:
        line = Text("zramd top ", TITLE)
        for number, tracker in enumerate(trackers):
            style = "reverse" if number == selected else WARNING if tracker.trouble else ""
            line.append(f" {tracker.name} ", style)
        right = f"every {self.interval:g} s  {time.strftime('%H:%M:%S')}  h help"
        if self.paused:
            right = f"PAUSED  {right}"
        line.append(right.rjust(self.width - line.cell_len - 1), DIM)
        return line

    def _trouble(self, tracker: Tracker) -> Text:
        what = "no answer" if tracker.runs else "not running"
        return Text(f"{what} for {time.monotonic() - tracker.gone:.0f} s: {tracker.trouble}", "bold red")

    def _disk(self, tracker: Tracker, sample: Sample) -> list[Text]:
        top = [*self._memory(sample), Text(), *self._operations(tracker, sample), Text()]
        bottom = [Text(), *self._policy(sample), self._work(tracker, sample), *self._pressure(read_pressure())]
        if tracker.trouble:
            top[3] = self._trouble(tracker)
        # The heading is a line too.
        return [*top, *self._classes(sample, self.height - 1 - len(top) - len(bottom)), *bottom]

    def _memory(self, sample: Sample) -> list[Text]:
        facts, memory = sample.facts, sample.facts["mm_stat"]
        stored, used, limit, size = (
            memory["orig_data_size"],
            memory["mem_used_total"],
            memory["mem_limit"],
            facts["disksize"],
        )
        found, most = ratio(sample), limit or size
        share = used / most if most else 0.0
        what = f"of {format_size(limit)}, the limit" if limit else f"of {format_size(size)}, no limit"
        warns = bool(limit) and share >= NEAR_LIMIT
        bar = self._bar(share, max(self.width - 60, 8), "red" if warns else BAR)
        first = Text.assemble(("memory  ", TITLE), bar, f" {format_size(used)} {what} ({share:.0%})")
        if warns:
            first.stylize(WARNING, 8 + len(bar))
        first.append(f"  peak {format_size(memory['mem_used_max'])}", DIM)
        filled = self._bar(stored / size if size else 0.0, len(bar), "green")
        shown = f"{found:.2f}" if found else "-"
        second = Text.assemble(
            ("stored  ", TITLE),
            filled,
            f" {format_size(stored)} of {format_size(size)}  compressed {format_size(memory['compr_data_size'])}",
            ("  ratio ", DIM),
            (shown, "bold"),
        )
        third = Text.assemble(("pages   ", TITLE), "  ".join(self._pages(facts)))
        return [first, second, third]

    @staticmethod
    def _pages(facts: dict[str, Any]) -> list[str]:
        memory = facts["mm_stat"]
        counts = [
            f"same-filled {memory['same_pages']:,}",
            f"huge {memory['huge_pages']:,}",
            f"written back {facts['bd_stat']['pages']:,}",
        ]
        return [*counts, f"clients {facts['connections']}", f"in flight {facts['inflight']}"]

    def _operations(self, tracker: Tracker, sample: Sample) -> list[Text]:
        heading = f"{'':12}{'IOPS':>9}{'MB/s':>9}{'p50':>8}{'p99':>8}{'max':>8}{'errors/s':>10}"
        lines = [Text(heading, TITLE)]
        for op, request in sample.facts["requests"].items():
            if op in ALWAYS or request["count"]:
                lines.append(self._operation(op, (tracker.rates or {}).get(op)))
        room = self.width - len(heading) - 2
        if room >= len(SPARKS) and len(tracker.history) > 1:
            spark = self._spark(list(tracker.history)[-room:])
            lines[0].append(f"  {'requests/s':.{room}}", DIM)
            lines[1].append("  ").append(spark, BAR)
            lines[2].append(f"  {f'peak {max(tracker.history):,.0f}':.{room}}", DIM)
        return lines

    @staticmethod
    def _operation(op: str, rate: Rate | None) -> Text:
        line = Text(f"{op:12}")
        if rate is None:
            return line.append(f"{'-':>9}{'-':>9}{'-':>8}{'-':>8}{'-':>8}{'-':>10}", DIM)
        times = "".join(
            f"{'-' if each is None else format_time(each):>8}" for each in (rate.p50, rate.p99, rate.longest)
        )
        line.append(f"{rate.requests:9,.0f}{rate.bytes / MEGABYTE:9,.1f}{times}", "" if rate.requests else DIM)
        return line.append(f"{rate.errors:10,.0f}", "bold red" if rate.errors else DIM)

    def _classes(self, sample: Sample, room: int) -> list[Text]:
        """Return the pool in this many lines: a heading, the classes that come first, all together."""
        pool = sample.pool
        heading = Text.assemble((f"{'class':>7}{'memory':>9}{'objects':>11}{'compactable':>13}  occupancy", TITLE))
        heading.append(f"   by {self.sort}", DIM)
        classes = sorted(sample.classes, key=self._key, reverse=self.sort is not Sort.SIZE)
        lines = [self._class(str(use.size), use) for use in classes[: max(room - 2, 0)]]
        empty = [Text() for _ in range(room - 2 - len(lines))]
        return [heading, *lines, self._class("pool", pool), *empty][: max(room, 0)]

    def _key(self, use: ClassUse) -> int:
        return {Sort.MEMORY: use.memory, Sort.SIZE: use.size, Sort.COMPACTABLE: use.compactable}[self.sort]

    def _class(self, name: str, use: ClassUse) -> Text:
        spare = format_size(use.compactable) if use.freeable else "-"
        line = Text(
            f"{name:>7}{format_size(use.memory):>9}{use.used:11,}{spare:>13}  ", TITLE if name == "pool" else ""
        )
        shown = self._bar(use.occupancy if use.allocated else 0.0, max(self.width - 49, 8))
        return line.append(shown).append(f" {use.occupancy:4.0%}" if use.allocated else "    -")

    def _policy(self, sample: Sample) -> list[Text]:
        wrapped = textwrap.wrap(" ".join(sample.policy), self.width - 8, max_lines=2, placeholder=" ...")
        return [
            Text.assemble((f"{'policy' if not number else '':8}", TITLE), line) for number, line in enumerate(wrapped)
        ]

    @staticmethod
    def _work(tracker: Tracker, sample: Sample) -> Text:
        line = Text.assemble(("work    ", TITLE))
        works = [describe(work, cancelled=work["cancelled"]) for work in sample.facts["work"]]
        if works or tracker.ended is None:
            return line.append("; ".join(works) or "none", "" if works else DIM)
        work, at = tracker.ended
        return line.append(f"none; {describe(work, cancelled=False)}, ended {sample.at - at:.0f} s ago", DIM)

    @staticmethod
    def _pressure(pressure: Pressure | None) -> list[Text]:
        line = Text.assemble(("pressure", TITLE), " ")
        if pressure is None:
            return [line.append("on memory: this kernel does not tell (psi=1)", DIM)]
        text = f"on memory, of the last 10 s: some tasks waited {pressure.some:.1f}%, all {pressure.full:.1f}%"
        return [line.append(text, WARNING if pressure.some >= PRESSING else "")]

    def _bar(self, share: float, width: int, style: str = BAR) -> Text:
        full, rest = BLOCKS if self.unicode else PLAIN_BLOCKS
        length = round(min(share, 1.0) * width)
        return Text(full * length, style).append(rest * (width - length), DIM)

    def _spark(self, values: list[float]) -> str:
        marks, top = SPARKS if self.unicode else PLAIN_SPARKS, max(values) or 1.0
        return "".join(marks[round(value / top * (len(marks) - 1))] for value in values)
