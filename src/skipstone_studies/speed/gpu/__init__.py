"""A study of the library on a GPU (tests, kernels, training, decoding), in parts of about a minute, run by `make gpu`.

On a CPU it is rehearsed with tiny sizes.
"""

from __future__ import annotations

from skipstone_studies.speed.gpu.page import details
from skipstone_studies.speed.gpu.parts import arms
from skipstone_studies.speed.gpu.runner import measured
from skipstone_studies.study import Column, Study

GPU = Study(
    name="gpu",
    purpose="On one GPU: laws, kernels, training, decoding, prompts, FSDP2 and the 597M recipe",
    about=(
        "`make gpu` runs every part in a process of its own under a limit of time, 525 seconds in all, and needs "
        "neither data nor network. A part that fails or is stopped says so here and keeps what it had measured; the "
        "next `make gpu` repeats it. Scale `paper` is a run on a GPU; scale `laptop` is the **rehearsal on a CPU with "
        "tiny sizes**, which shows that every part runs from start to end and nothing else: its times are of "
        "interpreted kernels and models of a few thousand parameters. Weights and texts are random unless a part says "
        "otherwise."
    ),
    arms=arms,
    seeds={"laptop": (0,), "paper": (0,)},
    clock=measured,
    details=details,
    columns=(
        Column(key="seconds", title="seconds", format=".0f"),
        Column(key="limit", title="limit", format=".0f"),
        Column(key="measured", title="measured", format="d"),
        Column(key="failed", title="failed", format="d"),
        Column(key="wrong", title="not equal", format="d"),
    ),
)
