# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pictures of the report of a run, for the README and the pages: docs/images/report.png and report-dark.png.

    python docs/pictures.py runs/detect/train

Needs Chromium (`apt-get install chromium`) and the tests beside this folder, whose `browser.py` drives it. The pictures
show the top of the page. They are reduced to 256 colours, or to fewer if they are too large then.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import browser

DOCS = Path(__file__).resolve().parent

WIDTH, HEIGHT = 1100, 1000
"""Of the part of the page that is shown, in CSS pixels."""
LIMIT = 300_000
"""Bytes."""


def main() -> int:
    """Write the pictures; returns the exit status."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    page = Path(sys.argv[1]) / "report.html"
    if not page.is_file():
        print(f"{page} does not exist: pass the folder of a run.", file=sys.stderr)
        return 1
    if browser.CHROMIUM is None:
        print("Chromium is not installed: apt-get install chromium.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        shown = browser.Browser(Path(folder) / "profile")
        try:
            shown.call("Emulation.setScrollbarsHidden", hidden=True)
            for name, dark in (("report.png", False), ("report-dark.png", True)):
                shown.open(page, width=WIDTH, dark=dark)
                shown.screenshot(Path(folder) / name)
                with Image.open(Path(folder) / name) as whole:
                    target = DOCS / "images" / name
                    target.write_bytes(small(whole))
                print(f"saved {target} ({target.stat().st_size // 1000} kB)")
        finally:
            shown.close()
    return 0


def small(whole: Image.Image) -> bytes:
    """The top of a screenshot, as a PNG below the limit."""
    top, method = whole.convert("RGB").crop((0, 0, whole.width, min(HEIGHT, whole.height))), Image.Quantize.MEDIANCUT
    for colours in (256, 128, 64, 32):
        data = io.BytesIO()
        top.quantize(colours, method, dither=Image.Dither.NONE).save(data, "png", optimize=True)
        if data.tell() <= LIMIT:
            break
    return data.getvalue()


if __name__ == "__main__":
    sys.exit(main())
