"""Train and measure those runs of a study that have no record yet; it can be interrupted at any moment and resumed.

A run's folder is RUNS/NAME/SCALE/ARM-seedN; ARM-seedN.recipe.json beside it has the recipe that it belongs to. Folders
of earlier recipes are renamed, never overwritten.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from skipstone.core.atomic_write import write_whole
from skipstone.core.lock import Busy, locked
from skipstone.core.plain_text import read_object
from skipstone.core.strict import PlainDict
from skipstone.runs import CONFIG, MODEL_CONFIG, Run, last_checkpoint
from skipstone.train.environment import describe
from skipstone_studies import record as records
from skipstone_studies.pace import TimeLeft, duration, work
from skipstone_studies.record import Record, digest
from skipstone_studies.study import RecipeDict, Study, recipe_file, seeded

USER_ERRORS = (ValueError, OSError)


@dataclass(kw_only=True)
class Session:
    """One study at one scale, with its run folders and records (stored results of runs); it runs what is missing.

    Several processes may share its folders: each arm (compared recipe) of a seed is locked while it runs. study, scale:
    the study, and the name of its scale (size), such as "laptop". arms: recipes by name, without seeds. runs: parent
    folder of the run folders. out: parent folder of the records. console: where messages are printed. only: names of
    the arms to run; None means all. jobs: number of arms that run at a time. made_by: the shell command that makes the
    records; "" means `skipstone reproduce ...`. failures: one message for each arm that failed. busy: arms that were
    left out because another process runs them. spent: for each arm that was run in this process, its seconds.
    """

    study: Study
    scale: str
    arms: Mapping[str, RecipeDict]
    runs: Path
    out: Path
    console: Console
    only: Sequence[str] | None = None  # the arms to run; all if None
    jobs: int = 1  # arms that run at a time, each in a process of its own
    made_by: str = ""  # the command that makes the records, if it is not `skipstone reproduce`
    failures: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)  # arms left out because another process runs them
    spent: list[float] = field(default_factory=list)  # seconds of each arm that was run in this process

    @property
    def command(self) -> str:
        """The shell command that reproduces the records (stored results of runs) of the study."""
        return self.made_by or f"skipstone reproduce {self.study.name} --scale {self.scale}"

    def folder(self, arm: str, seed: int) -> Path:
        """Return the run folder of an arm (compared recipe) and seed."""
        return self.runs / self.study.name / self.scale / f"{arm}-seed{seed}"

    def recorded(self, arm: str, seed: int) -> Record | None:
        """Return the record (stored result) of the run of an arm (compared recipe) with a seed; None if there is none.

        A record that was made with another recipe of this arm counts as none.
        """
        record = records.find(self.out, self.study.name, self.scale, arm, seed)
        return record if record is not None and record.digest == digest(self.arms[arm]) else None

    def finished(self, seeds: list[int]) -> int:
        """Return how many runs have a record (stored result) already, of all compared recipes with each of `seeds`."""
        return sum(self.recorded(arm, seed) is not None for arm in self.arms for seed in seeds)

    def run(self, seeds: list[int]) -> None:
        """Run each recipe (arm) with each of these seeds, unless its result is stored, and compare the arms of a seed.

        seeds: the seeds. Arms that fail are noted in `failures` and passed over.
        """
        for at, seed in enumerate(seeds):
            self.run_arms([seed], then=seeds[at + 1 :])
            if not self.busy:  # speeds measured beside another training would be wrong
                self.measure_together(seed)

    def run_arms(self, seeds: Sequence[int], then: Sequence[int] = ()) -> None:
        """Train and measure each recipe (arm) with each of these seeds, unless that run has a stored result already.

        Measurements that compare arms are not taken. Arms that fail are noted in `failures` and passed over. seeds: the
        seeds. then: seeds that will be run afterwards, which count for the estimate of the time left.
        """
        wanted = list(self.arms) if self.only is None else list(self.only)
        left = [(arm, seed) for seed in (*seeds, *then) for arm in wanted if self.recorded(arm, seed) is None]
        for arm, seed in [one for one in left if one[1] in seeds]:
            left.remove((arm, seed))
            self._guarded(arm, seed, [other for other, _ in left])

    def _guarded(self, arm: str, seed: int, after: Sequence[str]) -> None:
        """Run one arm unless another process runs it, and note failures in `failures`.

        after: the arms that are still to come, for the estimate of the time left.
        """
        where, start = f"{self.study.name}, arm {arm!r}, seed {seed}", time.perf_counter()
        doing = "running" if self.study.clock is None else "timing"
        try:
            with locked(self.folder(arm, seed)):
                if self.recorded(arm, seed) is not None:
                    return  # another process has just finished it
                self.say(f"[bold]{arm}[/bold], seed {seed}: {doing} ({len(after) + 1} to do)")
                self._record(arm, seed, self._made_and_measured(arm, seed, after))
        except Busy as error:
            self.busy.append(arm)
            self.say(f"[bold]{arm}[/bold], seed {seed}: left out, because {error}")
            return
        except USER_ERRORS as error:
            self.failures.append(f"{where}: {' '.join(str(error).split())}")
            self.console.print(self.failures[-1], style="red", markup=False, highlight=False, soft_wrap=True)
            return
        self.spent.append(time.perf_counter() - start)
        self.say(f"[bold]{arm}[/bold], seed {seed}: recorded after {duration(self.spent[-1])}")

    def _made_and_measured(self, arm: str, seed: int, after: Sequence[str]) -> PlainDict:
        folder, recipe = self.folder(arm, seed), seeded(self.arms[arm], seed)
        if self.study.clock is not None:
            return dict(self.study.clock(recipe))
        self._claim(folder, recipe)
        if not is_made(folder):
            if folder.is_dir() and last_checkpoint(folder) is None:
                shutil.rmtree(folder)  # interrupted before its first checkpoint
            following = sum(work(self.arms[other]) for other in after) / work(recipe)
            time_left = TimeLeft(following, lambda line: self.say(f"{arm}, seed {seed}: {line}"))
            self.study.make(recipe, folder, folder.is_dir(), [time_left])
        self.say(f"[bold]{arm}[/bold], seed {seed}: measuring")
        return dict(self.study.measure(folder))

    def _claim(self, folder: Path, recipe: RecipeDict) -> None:
        """Make sure that an existing run folder belongs to `recipe`, renaming the folder of another recipe."""
        note = recipe_file(folder)
        if folder.exists() and not note.is_file():
            raise ValueError(f"{str(folder)!r} exists but was not made by this command; remove it or use --runs")
        if folder.exists() and (before := read_object(note)) != recipe:
            aside = folder.with_name(f"{folder.name}.{digest(before)}")
            if aside.exists():
                raise ValueError(f"{str(aside)!r} is in the way of moving {str(folder)!r} aside; remove one of them")
            folder.rename(aside)
            self.say(f"an earlier run with another recipe was renamed to {aside}")
        write_whole(note, json.dumps(recipe, indent=1) + "\n")

    def _record(self, arm: str, seed: int, figures: PlainDict) -> None:
        record = Record(
            study=self.study.name,
            scale=self.scale,
            arm=arm,
            seed=seed,
            config=self.arms[arm],
            digest=digest(self.arms[arm]),
            environment=_public(self._environment(arm, seed)) | ({"jobs": self.jobs} if self.jobs > 1 else {}),
            command=self.command,
            figures=figures,
        )
        records.write(record, self.out)

    def _environment(self, arm: str, seed: int) -> PlainDict:
        """Return the environment (versions, commit, machine) of a run, or of this process if nothing was trained."""
        folder = self.folder(arm, seed)
        trained = self.study.clock is None and not Run(folder).is_saved_model
        return Run(folder).environment() if trained else describe(seed)

    def measure_together(self, seed: int) -> None:
        """Take the measurements that compare the recipes (arms) of a seed, if the stored result of any arm lacks them.

        All arms whose run folders exist take part.
        """
        if self.study.measure_together is None or self.study.clock is not None:
            return
        found = {arm: record for arm in self.arms if (record := self.recorded(arm, seed)) is not None}
        here = {arm: self.folder(arm, seed) for arm in found if self._is_here(arm, seed)}
        if all(record.timing_session is not None for record in found.values()) or not here:
            return
        self.say(f"seed {seed}: timing {', '.join(here)}, interleaved")
        try:
            figures = self.study.measure_together(here)
        except USER_ERRORS as error:
            self.failures.append(f"{self.study.name}, seed {seed}, timing: {' '.join(str(error).split())}")
            return
        session = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "arms": list(here)}
        for arm in here:
            record = found[arm]
            records.write(replace(record, figures={**record.figures, **figures[arm]}, timing_session=session), self.out)

    def _is_here(self, arm: str, seed: int) -> bool:
        """Return whether the run folder exists, is finished and belongs to the recipe."""
        folder = self.folder(arm, seed)
        note = recipe_file(folder)
        if not (note.is_file() and is_made(folder)):
            return False
        return bool(read_object(note) == seeded(self.arms[arm], seed))

    def say(self, text: str) -> None:
        """Print a message after the study's name.

        text: the message.
        """
        self.console.print(f"[dim]{self.study.name}[/dim]  {text}", highlight=False, soft_wrap=True)


def is_made(folder: Path) -> bool:
    """Return whether a folder contains a finished run or a saved model."""
    if not folder.is_dir() or not any((folder / name).is_file() for name in (CONFIG, MODEL_CONFIG)):
        return False
    return Run(folder).finished or Run(folder).is_saved_model


def _public(environment: PlainDict) -> PlainDict:
    """Return the environment without the command lines of processes, which contain paths of the machine."""
    resumed = [{k: v for k, v in entry.items() if k != "command"} for entry in environment.get("resumed", [])]
    kept = {name: value for name, value in environment.items() if name not in ("command", "resumed")}
    return {**kept, "resumed": resumed} if resumed else kept
