"""`skipstone generate RUN --prompt ...`: print text that a model generates."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from skipstone_cli.arguments import CacheBits, RunFolder, check_cache_bits
from skipstone_cli.errors import UserError
from skipstone_cli.paths import existing_dir, existing_run
from skipstone_cli.shading import show

Draft = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="Speculative decoding; source of the guesses: lookup (earlier text), exit (first half of the blocks), "
        "skip (every other block), int8 or int4 (the model in fewer bits), budget:SHARE (the model at a lower budget), "
        "head (what `skipstone draft-head` has trained), or the folder of another model.",
    ),
]


def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Largest number of new tokens. Default: 128, or fewer if the context ends."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the sampling, above 0. Default: 0.8.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from the k most likely tokens only. Default: from all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; the same seed gives the same text.")] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the most likely token each time instead of sampling.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(help="Share of the dense model's FLOPs to execute, as .8; run `skipstone calibrate` first."),
    ] = None,
    draft: Draft = None,
    cache_bits: CacheBits = None,
    show_depth: Annotated[
        bool, typer.Option("--show-depth", help="Colour each token by the share of compute that it took.")
    ] = False,
) -> None:
    """Generate text from a model, printing it as it is generated.

    Example: skipstone generate runs/mine --prompt "Once upon a time" --show-depth
    """
    sampling = {"--temperature": temperature, "--top-k": top_k, "--seed": seed}
    idle = [option for option, value in sampling.items() if value is not None]
    if greedy and idle:
        raise UserError(f"--greedy does not sample, so {idle[0]} would have no effect; give only one of them")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise UserError(f"--temperature must be above 0, got {temperature:g}; use --greedy for the most likely token")
    check_cache_bits(cache_bits)
    existing_dir(run, "run folder")

    existing_run(run)

    from skipstone.generate.text_generation import stream_text

    compiling = logging.getLogger("skipstone.ops.decode_stack")  # silence of half a minute would look like a fault
    compiling.setLevel(logging.INFO)
    compiling.addHandler(logging.StreamHandler())
    pieces = stream_text(
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        greedy=greedy,
        budget=budget,
        draft=draft,
        cache_bits=cache_bits,
    )
    show(pieces, colour=show_depth)
