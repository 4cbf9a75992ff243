# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recovery right after a cut, before training goes on."""

from yolo_prune.recover.batchnorm import recalibrate
from yolo_prune.recover.refit import refit
from yolo_prune.recover.rewind import Early

__all__ = ["Early", "recalibrate", "refit"]
