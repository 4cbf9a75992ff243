# SPDX-License-Identifier: AGPL-3.0-or-later
"""The end of a run: the delivered checkpoint is checked, and the report, the picture and the page are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ultralytics.utils import LOGGER, colorstr

from yolo_prune.cut import surgery
from yolo_prune.cut.record import read_record, student_of
from yolo_prune.env import ranks
from yolo_prune.env.log import PREFIX
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import PruneError, RunError
from yolo_prune.pages import run_page
from yolo_prune.report import Report, rounds_table, summary_table
from yolo_prune.report.data import FILE_NAME
from yolo_prune.report.page import PAGE
from yolo_prune.report.picture import draw
from yolo_prune.run import journal, live
from yolo_prune.run.state import PruningTrainer, RunState


def finish(trainer: PruningTrainer, run: RunState) -> None:
    """Check that the delivered checkpoint is the pruned one, and complete the report.

    Raises:
        RunError: If rounds are missing, or the checkpoint does not have the final structure.
    """
    delivered = trainer.best if trainer.best.exists() else trainer.last
    if not run.over:
        left = run.rounds[run.done]
        raise RunError(
            f"The run ended after epoch {trainer.epoch + 1}, before round {left.number} (epoch {left.epoch + 1}): "
            f"{delivered} has not reached the target. Train longer, or give the schedule fewer rounds."
        )
    model = student_of(load_checkpoint(delivered)[0])
    expected, record = read_record(live.model_of(trainer)), read_record(model)
    if not (expected and expected.plan and record and record.plan) or record.plan.hash != expected.plan.hash:
        raise RunError(
            f"{delivered} does not have the structure of the last round. Do not use this checkpoint. Please report "
            f"this error with {trainer.save_dir / FILE_NAME}."
        )
    surgery.check_applied(model, record.plan)
    journal.complete(trainer, run, model, record.plan)
    journal.log_if_no_epoch_helped(run.report, trainer.batch_size, live.batches_per_step(trainer))
    journal.write_front(trainer, run, expected)
    _warn_on_failure("prune.png could not be drawn", lambda: draw(run.report, trainer.save_dir / "prune.png"))
    for aside in trainer.wdir.glob("round*.pt"):
        trainer.strip(aside)
    _warn_on_failure(f"{PAGE} could not be written", lambda: _write_page(trainer, run.report))
    LOGGER.info(f"\n{rounds_table(run.report)}\n\n{summary_table(run.report)}")
    LOGGER.info(f"{PREFIX}pruned model {colorstr('bold', delivered)}, report {colorstr('bold', trainer.save_dir)}")


def fail(trainer: PruningTrainer, error: BaseException | None) -> None:
    """A run has failed or was interrupted: mark its report. If no cut held, show the rounds in a picture and a page."""
    run = trainer.pruning
    if not run or run.report.status != "running":
        return
    journal.fail(trainer, error)
    if ranks.first() and isinstance(error, PruneError) and run.report.rounds:
        _warn_on_failure("prune.png could not be drawn", lambda: draw(run.report, trainer.save_dir / "prune.png"))
        page = Path(trainer.save_dir) / PAGE
        _warn_on_failure(f"{PAGE} could not be written", lambda: run_page.at_end(page.parent, run.report))
        LOGGER.info(
            f"\n{rounds_table(run.report)}\n\n{PREFIX}the rounds of this run are shown in {colorstr('bold', page)}"
        )


def _write_page(trainer: PruningTrainer, report: Report) -> None:
    shown = trainer.test_loader.dataset if trainer.args.plots else None
    run_page.at_end(Path(trainer.save_dir), report, dataset=shown, device=trainer.device)


def _warn_on_failure(failure: str, make: Callable[[], object]) -> None:
    """Make a picture or a page. An error becomes a warning, because the finished run must not be lost."""
    try:
        make()
    except Exception as e:
        LOGGER.warning(f"{PREFIX}{failure}: {type(e).__name__}: {e}")
