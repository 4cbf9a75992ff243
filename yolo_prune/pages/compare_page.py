# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo-prune compare`: checkpoints side by side on one page, after a validation of each."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics.utils import LOGGER

from yolo_prune.cut.classes import names_of
from yolo_prune.data import datasets
from yolo_prune.env import outputs, trained
from yolo_prune.env.checkpoints import open_model
from yolo_prune.env.files import write_text
from yolo_prune.env.image_size import ImageSize
from yolo_prune.errors import RunError
from yolo_prune.measure import runtimes
from yolo_prune.measure.subjects import Setting
from yolo_prune.pages import evaluate
from yolo_prune.report.compare import Candidate, comparison_table, render_comparison, short_names
from yolo_prune.report.measurement import Measurement


class Compared(NamedTuple):
    """The result of `compare`: tables as text, the measurement if one was requested, and the path of the page."""

    text: str
    measurement: Measurement | None
    page: Path


def compare(
    models: Sequence[str | Path],
    data: str,
    imgsz: ImageSize | None,
    save: str | Path,
    formats: Sequence[str] = (),
    **how: Any,
) -> Compared:
    """Validate checkpoints on a dataset, and write a page that compares them.

    Args:
        models: two or more checkpoints; the others are compared with the first.
        data: the dataset, as for `model.val`.
        imgsz: image size in pixels; None: the size that the first model was trained with.
        save: path of the page.
        formats: formats to measure, as `runtimes.parse` returns them; if empty, nothing is measured.
        how: more arguments for `Setting.of`.

    Raises:
        PruneError: If a checkpoint or the dataset cannot be read, their classes do not agree, or a format cannot be
            measured here.
    """
    setting = Setting.of(imgsz, data=data, **how)
    runtimes.check(formats, setting.quantize, setting.device)
    outputs.check(save)
    paths = [Path(model) for model in models]
    names = short_names(paths)
    opened = [open_model(path) for path in paths]
    tasks = {model.task for model in opened}
    if len(tasks) > 1:
        raise RunError(
            f"Models of different tasks cannot be compared, and these are for {', '.join(sorted(tasks))}. Pass models "
            "of one task."
        )
    setting = setting.sized(opened)
    imgsz, different = setting.imgsz, trained.differences(opened)
    notes = [f"trained and validated with different {', '.join(different)}"] if different else []
    if len({len(names_of(model.model)) for model in opened}) > 1:
        notes.append("validated on different classes, each on its own: compare the accuracy of single classes")
    # All datasets are checked first; timing comes before validation, which fuses the models.
    images = [datasets.validation_set(model, data, imgsz) for model in opened]
    if not all(datasets.labelled(each, model.task) for each, model in zip(images, opened, strict=True)):
        raise RunError(
            f"No validation image of data={data} has a label, so the accuracy of the models cannot be measured. Add "
            "the labels; or use 'bench', which compares latencies without labels."
        )
    measurement = evaluate.time_all(opened, formats, setting).renamed(names) if formats else None
    candidates: list[Candidate] = []
    for name, model in zip(names, opened, strict=True):
        LOGGER.info(f"Validating {name} ({len(candidates) + 1} of {len(names)})")
        candidates.append(evaluate.validate_once(model, name, data, imgsz))
    photos = evaluate.photographs(opened, datasets.spread(images[0], evaluate.PHOTOS), imgsz, None)
    asked = [f"format={','.join(formats)}", *(f"{k}={v}" for k, v in how.items())] if formats else []
    words = ["yolo-prune", "compare", *map(str, paths), f"data={data}", f"imgsz={imgsz}", *asked, f"save={save}"]
    text = render_comparison(candidates, data, imgsz, photos, shlex.join(words), measurement, notes)
    page = outputs.deliver(save, lambda path: write_text(path, text))
    told = "\n".join((f"imgsz {imgsz}", *(f"The models were {note}." for note in notes)))
    parts = [told, comparison_table(candidates), *([str(measurement)] if measurement else [])]
    return Compared("\n\n".join(parts), measurement, page)
