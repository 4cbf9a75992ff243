# SPDX-License-Identifier: AGPL-3.0-or-later
"""Open and save the models of users."""

from __future__ import annotations

import io
from pathlib import Path

from ultralytics import RTDETR, YOLO
from ultralytics.engine.model import Model
from ultralytics.nn.tasks import BaseModel

from yolo_prune.env.files import write_bytes
from yolo_prune.env.releases import DAMAGED
from yolo_prune.errors import RunError, UnsupportedModelError

PICKLES = (b"PK", b"\x80")  # the first bytes of files that torch writes: now, and in releases before 1.6


def open_model(path: str | Path) -> Model:
    """A `YOLO` (or `RTDETR`, ...) object for a checkpoint or YAML file.

    Raises:
        PruneError: If the file is missing or is not a checkpoint that can be pruned.
    """
    path = Path(path).expanduser()
    _check_path(path)
    try:
        model = RTDETR(str(path)) if "rtdetr" in path.stem.lower() else YOLO(str(path))  # as `yolo` does
    except FileNotFoundError as e:
        if path.exists():  # Ultralytics removes quotes from names
            raise RunError(f"Ultralytics cannot open '{path}', because of the quote (') in its path. Rename it.") from e
        raise RunError(f"The model '{path}' does not exist. Pass the path of a .pt or .yaml file.") from e
    except TypeError as e:
        raise UnsupportedModelError(_other_content(path)) from e
    except ImportError as e:
        raise UnsupportedModelError(
            f"'{path}' cannot be loaded here: {e}. "
            + (
                "It is quantized (quantize=8 in training). Prune the checkpoint from which it was quantized instead."
                if "modelopt" in str(e)
                else "It holds a custom block. Add the folder of the block's module to PYTHONPATH."
            )
        ) from e
    except DAMAGED as e:
        if path.suffix != ".pt" and isinstance(e, KeyError):
            raise UnsupportedModelError(
                f"'{path}' does not describe a model: it has no {e}. Pass a .pt checkpoint or the YAML file of a "
                "model. The YAML file of a dataset is for data=."
            ) from e
        raise RunError(f"'{path}' is not a complete Ultralytics checkpoint: {type(e).__name__}: {e}") from e
    if not isinstance(model.model, BaseModel):  # for example the `Sequential` inside a model
        raise UnsupportedModelError(
            f"'{path}' holds a {type(model.model).__name__}, which is no model of Ultralytics. It was saved with "
            "torch.save, or by another program. Save the YOLO object with its method save()."
        )
    return model


def _check_path(path: Path) -> None:
    """Refuse a path that is not that of a checkpoint, or that Ultralytics cannot open."""
    if path.is_dir():
        inside = next((p for p in (path / "weights/best.pt", path / "best.pt") if p.is_file()), None)
        raise RunError(f"'{path}' is a folder. Pass a checkpoint{f': {inside}' if inside else ''}.")
    if path.suffix.lower() == ".pt" != path.suffix:
        raise RunError(f"Ultralytics cannot open '{path}'. Rename it, so that its name ends in .pt in small letters.")
    if path.suffix not in (".pt", ".yaml", ".yml"):
        raise UnsupportedModelError(
            f"'{path}' cannot be pruned. Pass a .pt checkpoint; if this is an exported model, pass its checkpoint and "
            "export it again."
        )


def _other_content(path: Path) -> str:
    """Say what a file holds that Ultralytics does not accept as a checkpoint."""
    with path.open("rb") as file:
        begin = file.read(60)
    if not begin:
        return f"'{path}' is empty. Download or copy it again."
    if begin.startswith(b"version https://git-lfs"):
        return f"'{path}' is only the pointer that Git LFS keeps in place of the file. Run: git lfs pull"
    if not begin.startswith(PICKLES):
        return f"'{path}' is not a checkpoint: it begins with {ascii(begin)[1:]}. Download or copy it again."
    return (
        f"'{path}' holds no Ultralytics YOLO model (SAM, YOLO-NAS and plain state dicts do not). Pass a checkpoint "
        "that 'yolo train' wrote, or one of Ultralytics' own such as yolo26n.pt."
    )


def save(model: Model, path: str | Path) -> Path:
    """Save a model as Ultralytics does, but never leave an incomplete file."""
    buffer = io.BytesIO()
    model.save(buffer)  # it passes this on to torch.save, which takes files as well
    return write_bytes(path, buffer.getvalue())
