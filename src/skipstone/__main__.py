"""`python -m skipstone MODULE [ARGUMENTS...]`: run another tool's module in a process that knows our classes.

As `python -m pdb -m MODULE` does it. For tools that load models by name and offer no place for an import.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the module that the first argument names, with the arguments behind it."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m skipstone MODULE [ARGUMENTS...]; the command of this package is `skipstone`")
    module = sys.argv[1]
    if find_spec(module.partition(".")[0]) is None:
        sys.exit(f"skipstone: there is no module {module!r} to run")
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
