"""`train`: train a recipe into a run folder."""

from __future__ import annotations

import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from skipstone.core.lock import locked
from skipstone.core.strict import PlainMapping
from skipstone.data.prepare import PreparedData, prepare
from skipstone.measure.model_view import view_model
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import METRICS, TOKENIZER, Run, last_checkpoint
from skipstone.train import checkpoints, parallel, peers, setup
from skipstone.train import folder as folders
from skipstone.train.best import KeepBest
from skipstone.train.recipe import Recipe, read_recipe, to_dict
from skipstone.train.trainer import RunTrainer
from skipstone.train.watch import Interrupted, MetricsFile, ProgressReporter, StopSignals, quiet


def train(
    config: PlainMapping,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    data: PreparedData | None = None,
    save_minutes: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train the recipe `config` into a run folder and return the folder.

    config: the recipe as a plain dict. out: the run folder; None means `runs/NAME`, or `runs/CORPUS-TIME` for a recipe
    without a name. resume: continue an existing run from its last checkpoint (from the start if it has none) with the
    recipe that it was started with; a finished run is left unchanged. progress: show a progress bar. data: the recipe's
    rows if they are already prepared; None means that this function prepares them. save_minutes: largest interval
    between checkpoints, unless the recipe sets one; None means that steps alone decide. callbacks: further callbacks
    for Trainer.

    Raises ValueError for mistakes in the recipe and while another process uses the folder, FileNotFoundError if there
    is nothing to resume, FileExistsError if the folder of a new run is not empty, and `Interrupted` after a stop
    signal.
    """
    recipe = read_recipe(config)
    setup.check_early(recipe)
    with held(recipe, out, resume) as folder:
        return _train(recipe, folder, resume, progress, data, save_minutes, callbacks)


def _train(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    progress: bool,
    data: PreparedData | None,
    save_minutes: float | None,
    more: Sequence[TrainerCallback],
) -> Path:
    if resume and Run(folder).finished:
        _check_sections(Run(folder), recipe)
        _check_model(Run(folder), recipe)
    run = open_run(recipe, folder, resume)
    if run is not None and run.finished:
        return folder
    data = _data(recipe, run, data)
    model_config = setup.model_config(recipe.model, recipe.data.context, setup.data_defaults(data))
    resolved = to_dict(recipe) | {"model": setup.plain(model_config)}
    if run is not None:
        folders.check_same(run.config(), resolved)
        folders.check_data(folder, data.fingerprint)
    arguments = setup.arguments(recipe.train, folder)
    model = setup.build_model(model_config, recipe.train)
    parallel.prepare(model, recipe.train, arguments.device)
    if arguments.process_index == 0:
        parts = {} if data.tokenizer is None else {TOKENIZER: partial(folders.save_tokenizer, data.tokenizer)}
        if run is None:
            folders.create(folder, resolved, recipe.train.seed, parts, data.fingerprint)
        else:
            folders.add_absent(folder, parts)

    kept = [KeepBest(folder, data.tokenizer)] if recipe.train.keep_best else []

    def trainer_of(callbacks: list[TrainerCallback]) -> RunTrainer:
        found = [*callbacks, *kept, *more]
        return RunTrainer(recipe=recipe.train, data=data, model=model, args=arguments, callbacks=found)

    return fit(recipe, arguments, folder, progress, trainer_of, partial(finish, data, folder), save_minutes)


@contextmanager
def held(recipe: Recipe, out: Path | None, resume: bool) -> Iterator[Path]:
    """Yield the folder of a run, locked against other processes during a `with` block.

    recipe: names the folder if `out` does not. out: the folder that the user named; None means `runs/NAME`, or
    `runs/CORPUS-TIME` for a recipe without a name. resume: whether an existing run is continued. Raises FileExistsError
    if the folder of a new run is not empty, `Busy` (a ValueError) if another process holds it, FileNotFoundError if a
    run to resume does not exist, and ValueError if neither `out` nor the recipe names that run.
    """
    folder = folders.chosen(recipe, out, resume)
    with locked(folder) if folders.is_first_process() else nullcontext():
        if not resume and folders.is_first_process():
            folders.check_new(folder)
        yield folder


def open_run(recipe: Recipe, folder: Path, resume: bool) -> Run | None:
    """Return the run to resume, or None for a new one, and set the number of torch's CPU threads.

    recipe: provides the number, `train.threads`; None leaves it unchanged. folder: the run's folder. resume: whether
    the run is resumed. If that run is already finished, it is returned, and a message on stderr says so.
    """
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    run = Run(folder) if resume else None
    if run is not None and run.finished:
        print(f"run {str(folder)!r} is finished already; nothing to resume", file=sys.stderr)  # noqa: T201
    return run


def _check_sections(run: Run, recipe: Recipe) -> None:
    """Raise ValueError if the sections `data` and `train` of a recipe differ from those of the run to be resumed.

    Nothing has to be loaded for it; the model's section is compared once its defaults are known from the data.
    """
    saved, given = run.config(), to_dict(recipe)
    folders.check_same({key: saved[key] for key in ("data", "train")}, {key: given[key] for key in ("data", "train")})


def _check_model(run: Run, recipe: Recipe) -> None:
    """Raise ValueError if what a recipe says of the model differs from that of the finished run to be resumed.

    Only the keys that the recipe has are compared, with what follows from the data taken from the run.
    """
    saved = run.config()["model"]
    names = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")
    known = {**{name: saved.get(name) for name in names}, setup.TOKENIZER: run.load_tokenizer()}
    given = setup.plain(setup.model_config(recipe.model, recipe.data.context, known))
    written = [key for key in recipe.model if key in saved or key in given]
    folders.check_same({"model": {k: saved.get(k) for k in written}}, {"model": {k: given.get(k) for k in written}})


def _data(recipe: Recipe, run: Run | None, ready: PreparedData | None) -> PreparedData:
    """Return the rows for training and validation.

    recipe: the recipe. run: the run that is resumed, whose tokenizer is used; None for a new one. ready: the recipe's
    rows if they were prepared before; None means that they are prepared now. Raises ValueError if the recipe differs
    from that of the run, or if `ready` was prepared for another one.
    """
    if run is not None:
        _check_sections(run, recipe)
    if ready is not None and ready.config != recipe.data:
        raise ValueError(f"the rows were prepared for {ready.config}, not for {recipe.data}")
    data = ready or prepare(recipe.data, tokenizer=None if run is None else run.load_tokenizer())
    return setup.training_rows(data, recipe.train)


def fit(
    recipe: Recipe,
    arguments: TrainingArguments,
    folder: Path,
    progress: bool,
    trainer_of: Callable[[list[TrainerCallback]], RunTrainer],
    finish: Callable[[RunTrainer], None],
    save_minutes: float | None = None,
) -> Path:
    """Train to the end, from the folder's last checkpoint if there is one, call `finish`, and return the folder.

    recipe: the recipe of the run. arguments: the arguments for Trainer. folder: the run folder. progress: show a
    progress bar. trainer_of: a function that builds the trainer from a list of callbacks. finish: called in the first
    process with the trainer, to save the model and the summary. save_minutes: minutes after which a checkpoint is saved
    at the latest if the recipe sets none; None means that steps alone decide. Raises `Interrupted` after a stop signal,
    and ValueError for a damaged checkpoint.
    """
    checkpoint = last_checkpoint(folder)
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    main = arguments.process_index == 0
    if checkpoint is not None:
        checkpoints.check(checkpoint)
        if main:
            checkpoints.tidy(folder, recipe.train.keep_checkpoints)
    stop, bar = StopSignals(recipe.train.save_minutes or save_minutes), ProgressReporter()
    callbacks = [stop, *setup.integrations(recipe.train, folder, step), MetricsFile(folder / METRICS)]
    trainer = trainer_of(callbacks + ([bar] if progress else []))
    trainer.remove_callback(PrinterCallback)
    if trainer.obstacle is not None and main:
        print(f"skipstone: no causal loss in validation: {trainer.obstacle}", file=sys.stderr)  # noqa: T201
    lines = None if checkpoint is None else trainer.window.load(checkpoint, main)
    trainer.guard.skipped = trainer.window.total_skipped
    if main and ((folder / METRICS).exists() or step):
        folders.cut_metrics(folder, step, lines)
        folders.note_resumption(folder, step)
    trainer.window.start()
    try:
        with peers.together(), stop.installed(), quiet():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
    if trainer.state.global_step < recipe.train.steps:
        parallel.leave()
        _interrupted(stop, folder, trainer.state.global_step)
    trainer.leave_to_first()
    parallel.leave()
    if main:
        with quiet():
            finish(trainer)
    if stop.received is not None:
        signal.raise_signal(stop.received)  # it came during the last step, which ended the run as usual
    return folder


def _interrupted(stop: StopSignals, folder: Path, step: int) -> None:
    """Print how to resume the run in `folder`, and raise `Interrupted`.

    stop: the signal handler, which knows the signal. step: the last finished optimizer step.
    """
    assert stop.received is not None
    name = signal.Signals(stop.received).name
    print(  # noqa: T201
        f"skipstone: stopped by {name} after step {step}; a checkpoint is saved. Go on with the same command and "
        f"--resume --out {folder}",
        file=sys.stderr,
    )
    raise Interrupted(128 + stop.received)


def finish(data: PreparedData, folder: Path, trainer: RunTrainer, **more: object) -> None:
    """Save the final model to RUN/model with its model card, then the summary of the run to RUN/result.json.

    What reports show of the model is measured on a few validation rows and saved as well. data: provides the tokenizer
    and these rows. folder: the run folder, RUN. trainer: the trainer after its last step. more: further entries of the
    summary.
    """
    lines = Run(folder).metrics()
    training = [line for line in lines if line["split"] == "train"]
    validation = next(line for line in reversed(lines) if line["split"] == "validation")
    losses = {name: validation[name] for name in ("oracle_loss", "causal_loss")}
    model = trainer.alone
    assert model is not None  # the trainer has left the rest to this process
    model.config.use_cache = True  # Trainer has switched it off
    realised: dict[int, dict[str, float]] = {}
    for name, value in validation.items():
        if name.startswith("capacity/"):
            _, layer, mechanism = name.split("/")
            realised.setdefault(int(layer), {})[mechanism] = value
    card = {"realised": realised, "losses": {k: v for k, v in losses.items() if v is not None}}
    folders.save_model(folder, model, data.tokenizer, card)
    _keep_view(folder, model, data, trainer.recipe.routing == "difficulty")
    window = trainer.window
    speeds = [line["tokens_per_second"] for line in training if "tokens_per_second" in line]
    folders.save_result(
        folder,
        {
            "steps": trainer.state.global_step,
            "tokens": window.total_tokens,
            "seconds": window.total_seconds,
            # the first window includes warm-up
            "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,
            "train_loss": training[-1]["loss"] if training else None,  # None if every step was skipped
            "validation": losses,
            **({"skipped_steps": window.total_skipped} if window.total_skipped else {}),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **more,
        },
    )


def _keep_view(folder: Path, model: SkipstoneForCausalLM, data: PreparedData, forced: bool) -> None:
    """Save what reports show of the trained model (`Run.keep_view`), from one pass over a few validation rows.

    folder: the run folder. data: the rows. forced: whether training imposed the known difficulty on the mechanisms.
    """
    try:
        with torch.compiler.set_stance("force_eager"):
            view = view_model(model, data, forced)
    except ValueError:  # the model needs masks that its data cannot provide; a report will say so
        return
    Run(folder).keep_view(view.to_dict())
