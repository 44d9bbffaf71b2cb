"""End every command by other means than SIGKILL, and by trouble with its folder; resume it and compare as `kills.py`.

    python tests/troubles.py --each 10 prepare convert   # ten tries of each trouble with each of these commands

    term, int   SIGTERM or SIGINT just before a change of a file (every other try: at a random moment)
    kill        SIGKILL at a random moment, in the middle of a write as often as not
    full        the folder lies on a file system of a random size that is too small for all of it
    read_only   from some change on, nothing can be written (EROFS)
    vanish      just before some change, everything that was written so far is removed
    two         a second process begins the same command while the first is at work

After each, the command is given again, with room and rights, and has to reach the end of an uninterrupted one. An error
has to be one line (exit code 2), never a traceback. `full` mounts a tmpfs, which needs root; elsewhere it is left out.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from attacks import markdown, parser_of
from forks import awaited, ended, fork
from kills import NAMES, Attack, Scenario, at_change, laid_out, say

CHECKPOINT = re.compile(r"(?:.*/)?checkpoints/checkpoint-(\d+)(?:/|$)")
WAYS = ("term", "int", "kill", "full", "read_only", "vanish", "two")
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "kill": signal.SIGKILL}
STOPPED = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT}
LONGEST = 60.0  # seconds from a signal to the end of its process; longer counts as a hang (a busy machine has more)


def earlier(name: str, whole: Mapping[str, str]) -> bool:
    """Return whether a file belongs to another checkpoint than the last one of an uninterrupted run.

    Such files may differ, because a run that is asked to stop saves a checkpoint of its own. whole: contents of the
    uninterrupted run.
    """
    folder = CHECKPOINT.match(name)
    steps = [int(found[1]) for found in map(CHECKPOINT.match, whole) if found]
    return folder is not None and int(folder[1]) != max(steps, default=-1)


@dataclass
class Ends:
    """How the tries with one command ended.

    tries: their number by kind of trouble. exact: those after which the command, given again, left what an untroubled
    one leaves. wrong: a line for each other try. seconds: the longest time from SIGTERM or SIGINT to the end of the
    process.
    """

    tries: Counter[str] = field(default_factory=Counter)
    exact: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def once(act: Callable[[], object]) -> Callable[[], None]:
    """Return a function that calls `act` the first time, and does nothing later."""
    left = [True]

    def first() -> None:
        if left:
            left.clear()
            act()

    return first


def no_writing() -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")


def begun(act: Callable[[], object], log: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """Start `act` in a fork as the command line would, and return its process id.

    log: a file for its output. prepare: called in the fork first. The exit code is 2 after an error of one line, and 1
    after a traceback.
    """
    from skipstone_cli.errors import one_line_errors

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells let it be ignored
        prepare()
        with one_line_errors():
            act()

    return fork(run, log)


def in_time(child: int, limit: float) -> int | None:
    """Wait for the end of a fork, and return its exit code; kill it after `limit` seconds and return None."""
    if (code := ended(child, limit)) is None:
        awaited(child, 0)
    return code


class Troubles:
    """Tries of every kind of trouble with one command.

    scenario: the command. given, space: as in `kills.Attack`.
    """

    def __init__(self, scenario: Scenario, given: Path, space: Path) -> None:
        self.trial = Attack(scenario=scenario, given=given, space=space)
        self.chance, self.ends = random.Random(f"troubles of {scenario.name}"), Ends()
        self.whole, self.seconds, self.last = self.trial.whole()
        self.limit = max(LONGEST, 20 * self.seconds)
        self.bytes = sum(path.stat().st_size for path in self.trial.out.rglob("*") if path.is_file())

    @property
    def act(self) -> Callable[[], object]:
        return partial(self.trial.scenario.act, self.trial.out)

    def go(self, way: str) -> None:
        """Make one try: let the trouble `way` happen, give the command again, and compare the result."""
        self.trial.fresh()
        where = getattr(self, f"_{way}")() if way not in SIGNALS else self._signal(way)
        if where is None:
            return  # it was done before the trouble came
        self.ends.tries[way] += 1
        if where.startswith("!"):
            self.ends.wrong.append(f"{way}, {where[1:]}")
        elif (said := self._goes_on()) is not None:
            self.ends.wrong.append(f"{way}, {where}: {said}")
        else:
            self.ends.exact[way] += 1

    def _goes_on(self) -> str | None:
        """Give the command again; return how its result differs from an uninterrupted one's, None if it does not."""
        return self.trial.goes_on(self.whole, but=partial(earlier, whole=self.whole))

    def _judged(self, where: str, code: int | None, allowed: set[int]) -> str | None:
        if code == 0:
            return None
        if code is None:
            return f"!{where}: hung"
        return where if code in allowed else f"!{where}: exit code {code}: {self.trial.said()}"

    def _signal(self, way: str) -> str | None:
        number = SIGNALS[way]
        if way != "kill" and self.chance.random() < 0.5:
            event = self.chance.randint(1, self.last)
            stop = once(partial(self._stamp_and_kill, number))
            child = begun(self.act, self.trial.log, partial(at_change, event, self.trial.out.parent, stop))
            where, code = f"before change {event}", in_time(child, self.limit)
            stamp = self.trial.space / "stamp"
            sent = float(stamp.read_text()) if stamp.is_file() else time.monotonic()
        else:
            moment = self.chance.uniform(0.01, 0.7 * self.seconds)
            child = begun(self.act, self.trial.log)
            code = ended(child, moment)
            if code is not None:
                return None if code == 0 else f"!by itself: exit code {code}: {self.trial.said()}"
            sent = time.monotonic()
            os.kill(child, number)
            where, code = f"after {moment:.2f} s", in_time(child, self.limit)
        self.ends.seconds = max(self.ends.seconds, time.monotonic() - sent if way != "kill" else 0.0)
        return self._judged(where, code, STOPPED)

    def _stamp_and_kill(self, number: int) -> None:
        (self.trial.space / "stamp").write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)

    def _read_only(self) -> str | None:
        event = self.chance.randint(1, self.last)
        child = begun(self.act, self.trial.log, partial(at_change, event, self.trial.out.parent, no_writing))
        return self._judged(f"from change {event}", in_time(child, self.limit), {2})

    def _vanish(self) -> str | None:
        event, out = self.chance.randint(2, self.last), self.trial.out

        def remove() -> None:
            for path in (out, *out.parent.glob(".out.partial")):
                shutil.rmtree(path, ignore_errors=True)

        child = begun(self.act, self.trial.log, partial(at_change, event, out.parent, once(remove)))
        where = self._judged(f"before change {event}", in_time(child, self.limit), {2})
        shutil.rmtree(out, ignore_errors=True)  # what was written afterwards is no whole folder
        return where

    def _two(self) -> str | None:
        first = begun(self.act, self.trial.log)
        time.sleep(self.chance.uniform(0.0, self.seconds))
        log = self.trial.space / "log-of-the-second"
        second = in_time(begun(self.act, log), self.limit)
        code = in_time(first, self.limit)
        if second not in (0, 2) or code not in (0, 2):
            said = log.read_text(errors="replace").strip().splitlines() or [""]
            return f"!exit codes {code} and {second}: {self.trial.said()}; {said[-1][:200]}"
        return f"exit codes {code} and {second}"

    def _full(self) -> str | None:
        place, size = self.trial.out.parent, self.chance.randint(1, max(2, self.bytes // 1024))
        shutil.rmtree(place)
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", place], check=True)
        try:
            (place / "given").symlink_to(self.trial.given)
            where = self._judged(f"with {size} KiB", in_time(begun(self.act, self.trial.log), self.limit), {2})
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            if where is not None and not where.startswith("!") and (said := self._goes_on()) is not None:
                where = f"!{where}: {said}"
        finally:
            subprocess.run(["umount", place], check=True)
        if where is not None and not where.startswith("!"):
            self.ends.exact["full"] += 1
            self.ends.tries["full"] += 1
            return None
        return where


def trouble(scenario: Scenario, each: int, ways: Sequence[str], given: Path, space: Path) -> Ends:
    """Try each kind of trouble with a command `each` times, print the counts, and return how the tries ended.

    ways: the kinds of trouble. given, space: as in `kills.Attack`.
    """
    troubles = Troubles(scenario, given, space)
    for way in ways:
        if way == "full" and os.geteuid() != 0:
            continue
        for _ in range(2 * each):  # some come too late, when the command is done
            if troubles.ends.tries[way] < each:
                troubles.go(way)
        say(f"  {way}: {troubles.ends.exact[way]} of {troubles.ends.tries[way]}")
    ends = troubles.ends
    counts = ", ".join(f"{way} {ends.exact[way]} of {count}" for way, count in ends.tries.items())
    say(f"{scenario.name}: {counts}; longest stop {ends.seconds:.1f} s", *ends.wrong)
    return ends


def table(found: dict[str, Ends]) -> str:
    """Return a Markdown table of how many tries of each trouble with each command ended as if nothing had happened."""
    rows = [
        [name, *(ends.tries[way] for way in WAYS), ends.tries.total(), ends.exact.total(), f"{ends.seconds:.1f} s"]
        for name, ends in found.items()
    ]
    return markdown(["command", *WAYS, "tries", "as if not troubled", "longest stop"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    options = parser.parse_args(arguments)
    with laid_out(options.names, "skipstone-troubles-") as (chosen, given, space):
        found = {one.name: trouble(one, options.each, options.ways, given, space) for one in chosen}
    say(table(found))
    return sum(len(ends.wrong) for ends in found.values())


if __name__ == "__main__":
    sys.exit(min(main(), 100))
