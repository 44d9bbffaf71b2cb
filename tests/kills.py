"""Kill every command between any two file operations, resume it, and compare the result with an uninterrupted run.

    python tests/kills.py --limit 40 train adapt     # at most 40 kills of each of these commands
    python tests/kills.py --out docs/kills.md        # everything, with its table

A command is run in a fork of this process. *Event n* is a SIGKILL just before the n-th call inside the command's folder
that creates, opens for writing, renames or removes something. Every second resumption is killed as well, at another
event. Writers in other languages (safetensors, torch, tokenizers) are interrupted between files, not inside of one;
kills at random moments (`--moments N`) do the latter.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from attacks import markdown, parser_of
from forks import awaited, fork

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {"os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "shutil.rmtree": (0,)}
WITH_TIMES = ("environment.json", "README.md", "report.html", "files.json", "modeling.py", "tiny.md", "tiny.html")
NAMES = ("train", "adapt", "reproduce", "prepare", "convert", "write", "calibrate", "quantise", "isoflop")
TIMES = ("tokens_per_second", "seconds", "started", "finished", "core_share", "made_by", "training_speed")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A command on tiny data.

    act: begins to write the folder that it is given, or continues if that is there.
    """

    name: str
    act: Callable[[Path], object]


@dataclass
class Tally:
    """How the kills of one command ended.

    kills: number of kills. runs: number of tries, each killed once or twice. exact: tries after which the resumed
    command left what an uninterrupted one leaves. wrong: a line for each other try.
    """

    kills: int = 0
    runs: int = 0
    exact: int = 0
    wrong: list[str] = field(default_factory=list)


def forked(
    act: Callable[[], object], log: Path, *, event: int = 0, folder: Path | None = None, after: float | None = None
) -> int:
    """Run `act` in a fork, and return its exit code, -9 if it was killed.

    log: a file for its output. folder: the command's folder, in and beside which events are counted. event: the fork
    kills itself just before this event; 0 means that it does not, and writes their number to the file `events` two
    folders above. after: kill it after so many seconds; None means never.
    """

    def run() -> None:
        if folder is None:
            act()
            return
        seen = at_change(event, folder.parent, lambda: os.kill(os.getpid(), signal.SIGKILL))
        act()
        (folder.parents[1] / "events").write_text(str(seen()))

    return awaited(fork(run, log), after)


def at_change(number: int, folder: Path, act: Callable[[], object]) -> Callable[[], int]:
    """Make this process call `act` just before the `number`-th change below `folder`, and before every later one.

    number: 0 means that it is never called. Returns a function that counts the changes.
    """
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
            if seen >= number > 0:
                busy = True
                try:
                    act()
                finally:
                    busy = False

    sys.addaudithook(hook)
    return lambda: seen


def contents(folder: Path) -> dict[str, str]:
    """Return a hash or the content of every file below a folder, without times and paths, which differ between runs."""
    found = {}
    for path in sorted(
        path for path in folder.rglob("*") if path.suffix != ".lock"
    ):  # without its owner it locks nothing
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name in WITH_TIMES:
            found[name] = "there"
        elif path.suffix in (".json", ".jsonl") and "tokenizer" not in name:
            lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = json.dumps([untimed(json.loads(line)) for line in lines], sort_keys=True)
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def untimed(value: Any) -> Any:
    """Return a JSON value without times, environments and hashes of files that contain them."""
    if isinstance(value, dict):
        drop = (*TIMES, "environment", "sitting", "session", "timed", "sharing", "sha256", "crc32")
        return {key: untimed(inner) for key, inner in value.items() if key not in drop and "second" not in key}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


@dataclass(kw_only=True)
class Attack:
    """Kills of one command.

    given: the folder with what the command starts from. space: a folder that is made anew for every try. tally: how the
    tries ended.
    """

    scenario: Scenario
    given: Path
    space: Path
    tally: Tally = field(default_factory=Tally)

    @property
    def out(self) -> Path:
        return self.space / "work" / "out"

    @property
    def log(self) -> Path:
        return self.space / "log"

    def fresh(self) -> None:
        """Make an empty folder with what the command starts from."""
        shutil.rmtree(self.space, ignore_errors=True)
        self.out.parent.mkdir(parents=True)
        self.out.with_name("given").symlink_to(self.given)

    def begin(self, event: int = 0, after: float | None = None) -> int:
        """Run the command in a fresh folder and return its exit code; event and after as in `forked`."""
        self.fresh()
        return forked(partial(self.scenario.act, self.out), self.log, event=event, folder=self.out, after=after)

    def whole(self) -> tuple[dict[str, str], float, int]:
        """Run the command without kills; return the contents that it leaves, its seconds, and its number of events."""
        began = time.monotonic()
        if self.begin() != 0:
            raise SystemExit(f"{self.scenario.name} fails by itself:\n{self.log.read_text()}")
        return contents(self.out), time.monotonic() - began, int((self.space / "events").read_text())

    def said(self) -> str:
        """The last line of what the command wrote."""
        lines = self.log.read_text(errors="replace").strip().splitlines() or [""]
        return lines[-1][:300]

    def goes_on(self, whole: Mapping[str, str], but: Callable[[str], bool] = lambda name: False) -> str | None:
        """Give the command again; return how its result differs from `whole`, None if it does not.

        but: whether a file of this name may differ.
        """
        if forked(partial(self.scenario.act, self.out), self.log) != 0:
            return f"stuck: {self.said()}"
        found = contents(self.out)
        differing = sorted(name for name in {*whole, *found} if whole.get(name) != found.get(name) and not but(name))
        beside = [path.name for path in self.out.parent.iterdir() if path.name not in ("out", "given", ".out.lock")]
        if differing or beside:
            return f"different: {', '.join(differing)[:300]}; left: {', '.join(beside)}"
        return None

    def kill(self, whole: dict[str, str], event: int, again: int = 0, after: float | None = None) -> None:
        """Run the command, kill it, resume it, and compare what it leaves with `whole`.

        event, after: when it is killed, as in `forked`. again: the event at which the resumed command is killed as
        well, before it is resumed once more; 0 means that it is not.
        """
        if self.begin(event, after) != -signal.SIGKILL:
            return  # it was done before
        self.tally.kills, self.tally.runs = self.tally.kills + 1, self.tally.runs + 1
        where = f"event {event}" if after is None else f"after {after:.2f} s"
        go_on = partial(self.scenario.act, self.out)
        if again and forked(go_on, self.log, event=again, folder=self.out) == -signal.SIGKILL:
            self.tally.kills += 1
            where += f", then {again}"
        if (said := self.goes_on(whole)) is not None:
            self.tally.wrong.append(f"{where}: {said}")
        else:
            self.tally.exact += 1


def attack(scenario: Scenario, limit: int, random_moments: int, given: Path, space: Path) -> Tally:
    """Kill a command at `limit` events and at `random_moments` moments, every second continuation too.

    The events are drawn from all of its events. given, space: as in `Attack`. Returns how the tries ended.
    """
    trial, chance = Attack(scenario=scenario, given=given, space=space), random.Random(scenario.name)
    whole, seconds, last = trial.whole()
    chosen = sorted(chance.sample(range(1, last + 1), min(limit, last)))
    for number, event in enumerate(chosen):
        trial.kill(whole, event, again=chance.randint(1, last) if number % 2 else 0)
    for _ in range(random_moments):
        trial.kill(whole, 0, after=chance.uniform(0.02, seconds))
    tally = trial.tally
    say(f"{scenario.name}: {last} events, {tally.kills} kills, {tally.exact} of {tally.runs} exact", *tally.wrong)
    return tally


def say(*lines: str) -> None:
    sys.stdout.write("\n  ".join(lines) + "\n")
    sys.stdout.flush()


def table(tallies: dict[str, Tally]) -> str:
    """Return the tallies of all commands as a Markdown table."""
    rows: list[list[Any]] = [
        [name, tally.kills, tally.runs, tally.exact, len(tally.wrong)] for name, tally in tallies.items()
    ]
    rows.append(["**all**", *(sum(row[i] for row in rows) for i in range(1, 5))])
    return markdown(["command", "kills", "runs", "as if not killed", "other ends"], rows)


@contextmanager
def laid_out(names: Sequence[str], prefix: str) -> Iterator[tuple[list[Scenario], Path, Path]]:
    """The scenarios of these names, or all; the folder that they start from; a folder for their tries."""
    from kill_scenarios import make_given, scenarios

    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        space = Path(folder)
        given = space / "given"
        given.mkdir()
        if forked(partial(make_given, given), space / "log") != 0:
            raise SystemExit((space / "log").read_text())
        yield [one for one in scenarios() if not names or one.name in names], given, space / "space"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--moments", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if not set(options.names) <= set(NAMES):
        parser.error(f"NAME must be of {', '.join(NAMES)}")
    with laid_out(options.names, "skipstone-kills-") as (chosen, given, space):
        tallies = {one.name: attack(one, options.limit, options.moments, given, space) for one in chosen}
    say(table(tallies))
    if options.out is not None:
        options.out.write_text(table(tallies), encoding="utf-8")
    return sum(len(t.wrong) for t in tallies.values())


if __name__ == "__main__":
    sys.exit(min(main(), 100))
