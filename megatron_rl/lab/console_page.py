"""Draws the console's page for a terminal of any size: no line is wrapped, and none is too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.text import Text

from megatron_rl.lab.console_figures import LENGTH, POLICY, REWARD, SPEED, Values, phases, rows

WIDE = 150
"""Columns of a terminal from which on four blocks stand side by side, and not two."""
NARROW = 56
"""Columns below which there is one block under the other."""
GAP = 3
PHASES = 7
"""Phases that are shown by name, the longest ones; on 24 lines all blocks then have room."""


@dataclass(frozen=True)
class ServerLoad:
    """What rank 0's share of the rollout asks of the servers at the moment."""

    live: int
    servers: int
    running: int
    """Requests without an answer."""
    waiting: int
    """Responses that wait until rollout.concurrency lets them begin."""


@dataclass(frozen=True)
class Page:
    run: str
    step: int
    steps: int
    elapsed: float
    """Seconds."""
    left: str
    phase: str = ""
    """What runs now; empty between phases."""
    phase_seconds: float = 0.0
    values: Values = field(default_factory=dict)
    """Of the last step, and of the last evaluation."""
    evaluated: int | None = None
    """The step after which held-out prompts were evaluated last."""
    checkpoint: tuple[int, float] | None = None
    """Step of the last whole checkpoint, and seconds since."""
    load: ServerLoad | None = None
    warnings: Sequence[str] = ()
    """The oldest first."""


@dataclass(frozen=True)
class PageBlock:
    title: str
    rows: Sequence[tuple[str, str]]


def draw(page: Page, width: int, height: int) -> Text:
    """Returns at most `height` lines of at most `width` characters."""
    head = [*_head(page, width), Text()]
    warned = _warnings(page, max(height // 8 - 2, 1))
    body = _side_by_side(_columns(page, width), width, height - len(head) - len(warned))
    lines = [*head, *body, *warned]
    return Text("\n", no_wrap=True, end="").join(_fit(line, width) for line in lines[: max(height, 1)])


def clock(seconds: float) -> str:
    """Returns h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _head(page: Page, width: int) -> list[Text]:
    share = page.step / page.steps if page.steps else 1.0
    done = f"step {page.step}/{page.steps}  {share:.0%}"
    name = Text(page.run, style="bold")
    name.truncate(max(width - len(done) - 2, 1), overflow="ellipsis", pad=True)
    filled = int(share * width)
    bar = Text("━" * filled, style="green") + Text("━" * (width - filled), style="bright_black")
    now = f"now {page.phase} {page.phase_seconds:.0f} s" if page.phase else ""
    times = f"elapsed {clock(page.elapsed)}   left {page.left}   {now}"
    return [name + Text("  " + done, style="bold"), bar, Text(times)]


def _warnings(page: Page, most: int) -> list[Text]:
    """Returns the latest ones; a small terminal has one line for all of them."""
    count, latest = len(page.warnings), page.warnings[-most:]
    if count == 0 or most == 1:
        return [Text(f"warnings {count}, the last {each}", style="yellow") for each in latest]
    title = Text(f"Warnings: {count}", style="bold yellow")
    return [Text(), title, *(Text(f"  {each}", style="yellow") for each in latest)]


def _columns(page: Page, width: int) -> list[list[PageBlock]]:
    reward, policy, length, speed = (
        PageBlock(each.title, rows(each, page.values)) for each in (REWARD, POLICY, LENGTH, SPEED)
    )
    if page.evaluated is not None:
        shown = [(f"{a} ({page.evaluated})" if a.startswith("held-out") else a, b) for a, b in reward.rows]
        reward = PageBlock(reward.title, shown)
    if width >= WIDE:
        return [[reward, length], [policy], [_times(page)], [speed, _servers(page)]]
    if width < NARROW:
        return [[reward, length, policy, speed, _times(page), _servers(page)]]
    return [[reward, length, policy], [_times(page), speed, _servers(page)]]


def _times(page: Page) -> PageBlock:
    seconds = phases(page.values)
    total = sum(seconds.values()) or 1.0
    shortest = sorted(seconds, key=lambda name: seconds[name])[: max(len(seconds) - PHASES, 0)]
    if shortest:
        seconds["others"] = sum(seconds.pop(name) for name in shortest)
    return PageBlock(
        "Time of the step", [(name, f"{spent:.2f} s {spent / total:4.0%}") for name, spent in seconds.items()]
    )


def _servers(page: Page) -> PageBlock:
    shown = []
    if (load := page.load) is not None:
        shown.append(("servers", f"{load.live} of {load.servers}"))
        shown.append(("requests", f"{load.running} running, {load.waiting} waiting"))
    if page.checkpoint is not None:
        step, age = page.checkpoint
        shown.append(("checkpoint", f"step {step}, {clock(age)} ago"))
    return PageBlock("Servers and checkpoint", shown)


def _side_by_side(columns: Sequence[Sequence[PageBlock]], width: int, height: int) -> list[Text]:
    each = (width - GAP * (len(columns) - 1)) // len(columns)
    drawn = [_stack(blocks, each, height) for blocks in columns]
    tallest = max(map(len, drawn), default=0)
    blank = Text(" " * each)
    gap = Text(" " * GAP)
    return [gap.join(column[i] if i < len(column) else blank for column in drawn) for i in range(tallest)]


def _stack(blocks: Sequence[PageBlock], width: int, height: int) -> list[Text]:
    """Returns the blocks under each other, with blank lines between them if there is room."""
    filled = [block for block in blocks if block.rows]
    spaced = sum(len(block.rows) + 2 for block in filled) - 1 <= height
    lines: list[Text] = []
    for block in filled:
        lines += [Text("")] if lines and spaced else []
        lines += [Text(block.title, style="bold cyan"), *(_row(label, text, width) for label, text in block.rows)]
    return [_fit(line, width, pad=True) for line in lines[: max(height, 0)]]


def _row(label: str, text: str, width: int) -> Text:
    """Returns the label on the left and the text on the right; the label gives way."""
    name = Text(f"  {label}")
    name.truncate(max(width - len(text) - 1, 0), overflow="ellipsis", pad=True)
    return name + Text(" ") + Text(text, style="red" if text == "not finite" else "")


def _fit(line: Text, width: int, *, pad: bool = False) -> Text:
    line.truncate(width, overflow="ellipsis", pad=pad)
    return line
