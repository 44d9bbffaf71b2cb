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

import argparse
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from kills import NAMES, PATHS, WRITES, Attack, Scenario, contents, forked, say

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


def at_change(number: int, folder: Path, act: Callable[[], None]) -> None:
    """Make this process call `act` just before the `number`-th change below `folder`, and before every later one."""
    seen, busy = 0, False

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen, busy
        if busy:
            return
        if name == "open":
            paths = [args[0]] if isinstance(args[2], int) and args[2] & WRITES else []
        else:
            paths = [args[i] for i in PATHS.get(name, ())]
        if any(isinstance(path, str | Path) and str(path).startswith(f"{folder}{os.sep}") for path in paths):
            seen += 1
            if seen >= number:
                busy = True
                try:
                    act()
                finally:
                    busy = False

    sys.addaudithook(hook)


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


def begun(act: Callable[[], object], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Start `act` in a fork as the command line would, and return its process id.

    log: a file for its output. prepare: called in the fork first. The exit code is 2 after an error of one line, and 1
    after a traceback.
    """
    from skipstone_cli.errors import one_line_errors

    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells let it be ignored
        quiet = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        prepare()
        with one_line_errors():
            act()
        status = 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, limit: float) -> int | None:
    """Wait for the end of a fork, and return its exit code; kill it after `limit` seconds and return None."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


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

    def fresh(self) -> None:
        shutil.rmtree(self.trial.space, ignore_errors=True)
        self.trial.out.parent.mkdir(parents=True)
        self.trial.out.with_name("given").symlink_to(self.trial.given)

    def go(self, way: str) -> None:
        """Make one try: let the trouble `way` happen, give the command again, and compare the result."""
        self.fresh()
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
        if forked(self.act, self.trial.log) != 0:
            return f"stuck: {self._said()}"
        found = contents(self.trial.out)
        differing = sorted(name for name in {*self.whole, *found} if self.whole.get(name) != found.get(name))
        differing = [name for name in differing if not earlier(name, self.whole)]
        left = [p.name for p in self.trial.out.parent.iterdir() if p.name not in ("out", "given", ".out.lock")]
        return f"different: {', '.join(differing)[:300]}; left: {', '.join(left)}" if differing or left else None

    def _said(self) -> str:
        lines = self.trial.log.read_text(errors="replace").strip().splitlines() or [""]
        return lines[-1][:300]

    def _judged(self, where: str, code: int | None, allowed: set[int]) -> str | None:
        if code == 0:
            return None
        if code is None:
            return f"!{where}: hung"
        return where if code in allowed else f"!{where}: exit code {code}: {self._said()}"

    def _signal(self, way: str) -> str | None:
        number = SIGNALS[way]
        if way != "kill" and self.chance.random() < 0.5:
            event = self.chance.randint(1, self.last)
            stop = once(partial(self._stamp_and_kill, number))
            child = begun(self.act, self.trial.log, partial(at_change, event, self.trial.out.parent, stop))
            where, code = f"before change {event}", ended(child, self.limit)
            stamp = self.trial.space / "stamp"
            sent = float(stamp.read_text()) if stamp.is_file() else time.monotonic()
        else:
            moment = self.chance.uniform(0.01, 0.7 * self.seconds)
            child = begun(self.act, self.trial.log)
            code = ended_before(child, moment)
            if code is not None:
                return None if code == 0 else f"!by itself: exit code {code}: {self._said()}"
            sent = time.monotonic()
            os.kill(child, number)
            where, code = f"after {moment:.2f} s", ended(child, self.limit)
        self.ends.seconds = max(self.ends.seconds, time.monotonic() - sent if way != "kill" else 0.0)
        return self._judged(where, code, STOPPED)

    def _stamp_and_kill(self, number: int) -> None:
        (self.trial.space / "stamp").write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)

    def _read_only(self) -> str | None:
        event = self.chance.randint(1, self.last)
        child = begun(self.act, self.trial.log, partial(at_change, event, self.trial.out.parent, no_writing))
        return self._judged(f"from change {event}", ended(child, self.limit), {2})

    def _vanish(self) -> str | None:
        event, out = self.chance.randint(2, self.last), self.trial.out

        def remove() -> None:
            for path in (out, *out.parent.glob(".out.partial")):
                shutil.rmtree(path, ignore_errors=True)

        child = begun(self.act, self.trial.log, partial(at_change, event, out.parent, once(remove)))
        where = self._judged(f"before change {event}", ended(child, self.limit), {2})
        shutil.rmtree(out, ignore_errors=True)  # what was written afterwards is no whole folder
        return where

    def _two(self) -> str | None:
        first = begun(self.act, self.trial.log)
        time.sleep(self.chance.uniform(0.0, self.seconds))
        log = self.trial.space / "log-of-the-second"
        second = ended(begun(self.act, log), self.limit)
        code = ended(first, self.limit)
        if second not in (0, 2) or code not in (0, 2):
            said = log.read_text(errors="replace").strip().splitlines() or [""]
            return f"!exit codes {code} and {second}: {self._said()}; {said[-1][:200]}"
        return f"exit codes {code} and {second}"

    def _full(self) -> str | None:
        place, size = self.trial.out.parent, self.chance.randint(1, max(2, self.bytes // 1024))
        shutil.rmtree(place)
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", place], check=True)
        try:
            (place / "given").symlink_to(self.trial.given)
            where = self._judged(f"with {size} KiB", ended(begun(self.act, self.trial.log), self.limit), {2})
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


def ended_before(child: int, seconds: float) -> int | None:
    """Return the exit code of a fork if it ends within `seconds`, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


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
    head = [
        "| command | " + " | ".join(WAYS) + " | tries | as if not troubled | longest stop |",
        "|---|" + "---:|" * (len(WAYS) + 3),
    ]
    rows = [
        [name, *(ends.tries[way] for way in WAYS), ends.tries.total(), ends.exact.total(), f"{ends.seconds:.1f} s"]
        for name, ends in found.items()
    ]
    return "\n".join([*head, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    from kill_scenarios import make_given, scenarios

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    options = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    space = Path(tempfile.mkdtemp(prefix="skipstone-troubles-"))
    given = space / "given"
    given.mkdir()
    if forked(partial(make_given, given), space / "log") != 0:
        raise SystemExit((space / "log").read_text())
    chosen = [s for s in scenarios() if not options.names or s.name in options.names]
    found = {s.name: trouble(s, options.each, options.ways, given, space / "space") for s in chosen}
    shutil.rmtree(space)
    say(table(found))
    return sum(len(ends.wrong) for ends in found.values())


if __name__ == "__main__":
    sys.exit(min(main(), 100))
