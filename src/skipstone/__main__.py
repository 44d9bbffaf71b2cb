"""`python -m skipstone VERB ...` is the `skipstone` command, so that `torchrun -m skipstone train RECIPE` works."""

from __future__ import annotations

from skipstone_cli.main import main

if __name__ == "__main__":
    main()
