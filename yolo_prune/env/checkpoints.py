# SPDX-License-Identifier: AGPL-3.0-or-later
"""Open and save the models of users."""

from __future__ import annotations

import io
from pathlib import Path

from ultralytics import RTDETR, YOLO
from ultralytics.engine.model import Model

from yolo_prune.env.files import write_bytes
from yolo_prune.env.releases import DAMAGED
from yolo_prune.errors import RunError, UnsupportedModelError


def open_model(path: str | Path) -> Model:
    """A `YOLO` (or `RTDETR`, ...) object for a checkpoint or YAML file.

    Raises:
        PruneError: If the file is missing or is not a checkpoint that can be pruned.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".yaml", ".yml"):
        raise UnsupportedModelError(
            f"'{path}' cannot be pruned. Pass a .pt checkpoint; if this is an exported model, pass its checkpoint and "
            "export it again."
        )
    try:
        return RTDETR(str(path)) if "rtdetr" in path.stem.lower() else YOLO(str(path))  # as `yolo` does
    except FileNotFoundError as e:
        if path.exists():  # Ultralytics removes quotes from names
            raise RunError(f"Ultralytics cannot open '{path}', because of the quote (') in its path. Rename it.") from e
        raise RunError(f"The model '{path}' does not exist. Pass the path of a .pt or .yaml file.") from e
    except TypeError as e:
        raise UnsupportedModelError(
            f"'{path}' holds no Ultralytics YOLO model (SAM, YOLO-NAS and plain state dicts do not). Pass a checkpoint "
            "that 'yolo train' wrote, or one of Ultralytics' own such as yolo26n.pt."
        ) from e
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


def save(model: Model, path: str | Path) -> Path:
    """Save a model as Ultralytics does, but never leave an incomplete file."""
    buffer = io.BytesIO()
    model.save(buffer)  # it passes this on to torch.save, which takes files as well
    return write_bytes(path, buffer.getvalue())
