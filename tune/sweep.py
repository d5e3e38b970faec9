"""One sweep from config to candidate: check, prepare once, try on the train cards, compare, register the best.

Knows Ray Tune's driver and the order of things. Does not know how a trial is trained, or who is stopped when.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.home import home_folder
from cluster.placement import card_selector, is_usable, job_resources
from cluster.registry import Version
from configs.errors import RunError
from configs.loader import with_settings
from configs.schema import ChatbotConfig, SweepConfig
from train.driver import ASKED, Say, Start, count_cards, make_ready, make_task, on_record
from train.job import make_manifest
from train.places import on_disk, runs_place
from train.record import CONFIG_FILE, FINISHED, SWEEP, Record
from train.sizing import size_prepared
from tune.outcome import Row, best_row, read_rows, summary

if TYPE_CHECKING:
    from tune.progress import Show

NUM_KEPT, NUM_KEPT_PBT = 1, 4  # checkpoints of a trial beside its newest; PBT lets others copy from them
# Tune reads these as it is imported.
SETTINGS = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # and after each trial's checkpoint, so that a killed driver forgets nothing
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # what waits for a card is one new trial; else it would stand before those that are to go on
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow is where figures are
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the older of its two ways to report is silent when told to be
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended: its trials and the best one's version, or the reason why it stopped before its end."""

    sweep_id: str
    sweep: SweepConfig
    rows: tuple[Row, ...] = ()
    best: Row | None = None
    version: Version | None = None
    figures: Mapping[str, float] | None = None
    folder: Path | None = None
    stop_reason: str | None = None


def sweep(config: ChatbotConfig, say: Say, show: "Callable[[ChatbotConfig], Show]", resume: str | None = None) -> Outcome:
    """Try settings from the config's space, and register the best trial as the chatbot's candidate.

    Args:
        config: The chatbot, checked by `configs.space`; with `resume` the sweep's own config takes its place.
        say: Told of each stage, in words.
        show: Makes what is told of each trial's looks.
        resume: Id of a sweep to go on with.

    Raises:
        TandemError: What the user can mend; nothing was registered.
    """
    start = make_ready(config, say, SWEEP, resume)
    os.environ.update(SETTINGS)
    sweep_id = ""
    try:
        with on_record(start, num_cards=1) as record:
            sweep_id = record.run_id
            say(f"sweep {sweep_id}, on {count_cards()} train cards" if count_cards() > 1 else f"sweep {sweep_id}")
            rows = _try_all(start, record, show)
            say("comparing the trials")
            outcome = _conclude(start, record, rows)
    except KeyboardInterrupt:
        if not sweep_id:
            raise
        return Outcome(sweep_id, start.config.tune, stop_reason=ASKED)
    record.end(FINISHED)
    return outcome


def sweeps_folder() -> Path:
    """Return where sweeps are kept, each by its id."""
    return home_folder() / "sweeps"


def _try_all(start: Start, record: Record, show: "Callable[[ChatbotConfig], Show]") -> tuple[Row, ...]:
    """Run the trials, from where an earlier driver of this sweep left them; return what became of each."""
    from ray import tune as ray_tune

    from train.control import make_control
    from tune.beside import TrainBeside, choose_sharing, start_bases
    from tune.callback import ProgressCallback
    from tune.schedule import Budget, make_search
    from tune.seats import Seat
    from tune.trial import Sweep, run_trial

    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        os.chdir(home_folder())  # a job's own folder may be unpacked anew for another card, and Tune asks where it is
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what it says is in the table
    session, config, folder, data = start.session, start.config, start.folder, start.data
    presence = make_control(record.run_id)  # while it is there, nobody else goes on with this sweep
    num_cards = count_cards()
    on_gpu = any("gpu-share" in card for card in session.cards if is_usable(card))
    sharing = choose_sharing(config, data, folder, on_gpu)
    num_beside, sizing = sharing.num_trials, size_prepared(config, folder, data, session.job_cards)
    if sizing and num_beside > 1:
        config, sizing = sizing.settle_base(config, num_beside), None
        sharing = replace(sharing, recompute=sharing.recompute or config.train.gradient_checkpointing is True)
    shown = show(with_settings(config, {"tune.trials_per_card": num_beside}))
    task = make_task(start, config, record.run_id, sizing)
    trials = Sweep(task, data.num_train, num_cards)
    if num_beside > 1:
        Seat.bases = start_bases(task, sharing, num_cards, on_gpu)
        trials = replace(trials, train_trial=TrainBeside(Seat.bases.actors))
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(run_trial, sweep=trials), Seat(num_beside) if num_beside > 1 else _one_card(on_gpu)
    )
    root = runs_place(session.storage, "sweeps")
    place = f"{root}/{record.run_id}"
    if ray_tune.Tuner.can_restore(place):
        tuner = ray_tune.Tuner.restore(place, trainable, resume_errored=True)  # what made them fail may be mended
    else:
        space, search = make_search(config.tune, num_cards * num_beside)
        tune = config.tune
        tuner = ray_tune.Tuner(
            trainable,
            param_space=space,
            tune_config=search,
            run_config=ray_tune.RunConfig(
                name=record.run_id,
                storage_path=root,
                stop=Budget(tune.budget.tokens, tune.budget.hours, num_beside),
                checkpoint_config=ray_tune.CheckpointConfig(
                    num_to_keep=NUM_KEPT_PBT if tune.scheduler == "pbt" else NUM_KEPT,
                    checkpoint_score_attribute=tune.metric,
                    checkpoint_score_order=tune.mode,
                ),
                failure_config=ray_tune.FailureConfig(max_failures=config.train.max_failures),
                callbacks=[ProgressCallback(shown)],
                verbose=0,
            ),
        )
    try:
        results = tuner.fit()
    except KeyError:
        # Tune miscounts what it asked for where a raylet was killed, and stumbles over it as it clears up; all is on disk.
        results = ray_tune.Tuner.restore(place, trainable).fit()
    finally:
        shown.close()
        Seat.bases = None
        del presence
    return read_rows(results, config.tune)


def _one_card(on_gpu: bool) -> Any:
    """What a trial asks for: one train card, and nothing that the driver or another trial could hold while it waits for it."""
    from ray import tune as ray_tune

    return ray_tune.PlacementGroupFactory([job_resources(on_gpu)], bundle_label_selector=[card_selector()])


def _conclude(start: Start, record: Record, rows: tuple[Row, ...]) -> Outcome:
    """Draw, write down and register what the trials gave."""
    from tune.plots import draw
    from tune.record import close_trials, write_summary
    from tune.trial import trial_config

    config, registry, figures = start.config, start.registry, summary(rows)
    folder = sweeps_folder() / record.run_id / "summary"
    best = best_row(rows, config.tune)
    draw(folder, rows, config.tune)
    write_summary(registry.client, record.run_id, folder, rows, figures)
    run_ids = close_trials(registry.client, record.run_id, rows)
    if best is None:
        reasons = "\n".join(f"  trial {row.number}: {row.reason}" for row in rows if row.reason)
        raise RunError(
            "no trial came to a score", reasons or "the budget ended before the first look", "mend the reasons, or widen tune.budget"
        )
    settings, run_id = trial_config(config, best.settings, start.data.num_train), run_ids[best.name]
    Record(registry.client, run_id).attach(CONFIG_FILE, settings.model_dump_json(indent=2))
    checkpoint = on_disk(best.checkpoint)
    manifest = make_manifest(replace(start, config=settings), run_id, checkpoint, best.metrics)
    made = registry.of_run(run_id) or registry.register(manifest, checkpoint)  # a driver may have been killed then
    version = registry.nominate(made.name)
    return Outcome(record.run_id, config.tune, rows, best, version, figures, folder)
