"""The command line in the process of a test: importing torch in another one costs as much as a hundred small tests."""

from __future__ import annotations

import pytest

from skipstone_cli.main import main


def command(*words: object) -> int:
    """Run `skipstone` with these words and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["skipstone", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)
