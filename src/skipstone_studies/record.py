"""Records: one JSON file per run with its configuration, environment and results.

Tables are rendered from these alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from skipstone.core.atomic_write import write_whole
from skipstone.core.sealed import read_sealed, sealed
from skipstone.core.strict import PlainDict, PlainMapping, from_dict
from skipstone.evaluate.tables import plain

FORMAT_VERSION = 1
DIGEST_LENGTH = 16
ON_DISK = {"study": "experiment", "timing_session": "sitting"}  # names of fields in files, kept from earlier releases


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of one run of one arm (compared recipe) of a study, stored as a JSON file.

    study, scale, arm, seed: names of study, scale (size, such as "laptop") and arm, and the seed of the run. config:
    the arm's recipe, without the seed. digest: hash of that recipe. environment: versions, commit and machine, as
    environment.json of a run has them. command: the shell command that makes the result. figures: the measurements,
    nested. timing_session: time and arms of the session in which figures that compare arms were taken; None until then.
    converted: for a record made from the output of an earlier script, {"file", "commit"}; such a record has no digest,
    and its config is what that output says of the run. format_version: version of the file format.
    """

    study: str
    scale: str
    arm: str
    seed: int
    config: PlainDict
    digest: str
    environment: PlainDict
    command: str
    figures: PlainDict
    timing_session: PlainDict | None = None
    converted: PlainDict | None = None
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version {self.format_version} is not {FORMAT_VERSION}: another release wrote it")


def digest(recipe: PlainMapping) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a recipe, which do not depend on the order of its keys."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def folder(out: Path, name: str) -> Path:
    """Return the folder of a study's records (one JSON file for each run), below the folder `out` of all records.

    name: the name of the study.
    """
    return out / name / "records"


def path_of(out: Path, name: str, scale: str, arm: str, seed: int) -> Path:
    """Return the path of the JSON file that holds the record (result) of one run.

    out: folder of all records. name, scale: name of the study, and of its scale (size, such as "laptop"). arm, seed:
    arm (compared recipe) and seed of the run.
    """
    return folder(out, name) / scale / f"{arm}-seed{seed}.json"


def write(record: Record, out: Path) -> Path:
    """Write a record, the result of one run, as a JSON file below the folder `out` of all records; return the path.

    An earlier record of the same run is replaced. The file appears complete or not at all.
    """
    path = path_of(out, record.study, record.scale, record.arm, record.seed)
    values = {ON_DISK.get(name, name): value for name, value in asdict(record).items()}
    if record.converted is None:
        del values["converted"]
    write_whole(
        path, json.dumps(sealed(plain(values)), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return path


def read(path: Path) -> Record:
    """Read the record (result of one run) in the JSON file `path`.

    Raises ValueError, naming the file, if it is damaged or not a record.
    """
    try:
        names = {there: here for here, there in ON_DISK.items()}
        return from_dict(Record, {names.get(name, name): value for name, value in read_sealed(path).items()})
    except ValueError as error:
        raise ValueError(f"{path} is no record that can be read: {error}") from None


def find(out: Path, name: str, scale: str, arm: str, seed: int) -> Record | None:
    """Return the record (stored result) of a run; None if there is none.

    out: folder of all records. name, scale: name of the study, and of its scale (size, such as "laptop"). arm, seed:
    arm (compared recipe) and seed of the run. Raises ValueError for a damaged file.
    """
    path = path_of(out, name, scale, arm, seed)
    return read(path) if path.is_file() else None


def read_all(out: Path, name: str) -> list[Record]:
    """Return every record (stored result of a run) of the study `name`, ordered by scale, arm and seed.

    An arm is a compared recipe. out: folder of all records. Raises ValueError for a damaged file.
    """
    paths: Iterable[Path] = folder(out, name).glob("*/*.json")
    return sorted(map(read, paths), key=lambda record: (record.scale, record.arm, record.seed))
