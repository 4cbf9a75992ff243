# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m yolo_prune`: the same as the console script `yolo-prune`."""

import sys

from yolo_prune.cli import main

sys.exit(main())
