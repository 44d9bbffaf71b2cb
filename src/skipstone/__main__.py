"""The command `python -m skipstone VERB ...`, which is the same as `skipstone VERB ...`.

It makes `torchrun -m skipstone train RECIPE` possible.
"""

from __future__ import annotations

from skipstone_cli.main import main

if __name__ == "__main__":
    main()
