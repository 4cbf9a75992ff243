# SPDX-License-Identifier: AGPL-3.0-or-later
"""A small synthetic detection dataset. It needs no download, and a model can learn it on a CPU.

The images show five kinds of shapes in various colours, sizes and rotations, on textured backgrounds with clutter. Some
shapes partly hide others. Each image depends only on the seed and its own number, not on the global random state. The
same seed gives the same pixels, and a larger dataset begins with the images of a smaller one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_prune.env.files import move
from yolo_prune.errors import PruneError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAMES = ("disc", "ring", "square", "triangle", "cross")
SPLITS = ("train", "val")
YAML_NAME = "scenes.yaml"
STAMP_NAME = "scenes.json"
FORMAT = 1  # version of the drawing code; datasets of another version are made again

SHIFT = 4  # fractional bits of the coordinates given to OpenCV
SIZES = (0.09, 0.25)  # half the extent of a shape, as a fraction of the image
MOST_HIDDEN = 0.25  # largest share of a shape that later shapes may hide
HUE_SPREAD = 0.08  # standard deviation, in turns of the colour wheel, of the hue of one kind of shape
Box = tuple[int, float, float, float, float]  # class; centre x, centre y, width, height / size of the image


def make_dataset(folder: Path, train: int = 320, val: int = 48, imgsz: int = 128, seed: int = 0) -> Path:
    """Make a detection dataset in YOLO format in `folder`. An existing dataset with the same parameters is reused.

    Args:
        folder: Folder for images/, labels/ and scenes.yaml. It is made if it is missing, and replaced only if an
            earlier call made it. It is never incomplete.
        train: Number of training images.
        val: Number of validation images.
        imgsz: Width and height of the images, in pixels.
        seed: Another seed gives other images.

    Returns:
        The absolute path of scenes.yaml, to pass as `data=`.

    Raises:
        PruneError: A parameter is out of range, or `folder` holds other files.
    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("imgsz", imgsz, 64), ("seed", seed, 0)):
        if value < least:
            raise PruneError(f"make_dataset: {name}={value} is too small; give {least} or more.")
    folder = Path(folder).resolve()
    stamp = {"format": FORMAT, "train": train, "val": val, "imgsz": imgsz, "seed": seed}
    if _complete(folder, stamp):
        return folder / YAML_NAME
    ours = (folder / STAMP_NAME).is_file()
    if folder.exists() and not ours and (folder.is_file() or any(folder.iterdir())):
        raise PruneError(f"{folder} exists and is not a scenes dataset; give another folder, or empty this one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        made = temporary / "made"  # the folder of mkdtemp itself can be read by its owner only
        _write(made, stamp)
        if folder.exists():
            move(folder, temporary / "old")
        move(made, folder)
    except OSError:
        if not _complete(folder, stamp):  # else another process has made the same dataset in the meantime
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / YAML_NAME


def _complete(folder: Path, stamp: dict[str, int]) -> bool:
    try:
        saved = json.loads((folder / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if saved != stamp or not (folder / YAML_NAME).is_file():
        return False
    return all(
        (folder / "images" / split / f"{index:05d}.png").is_file()
        and (folder / "labels" / split / f"{index:05d}.txt").is_file()
        for split in SPLITS
        for index in range(stamp[split])
    )


def _write(folder: Path, stamp: dict[str, int]) -> None:
    import cv2

    for number, split in enumerate(SPLITS):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(stamp[split]):
            image, boxes = draw_scene(stamp["imgsz"], (stamp["seed"], number, index))
            done, png = cv2.imencode(".png", image)
            if not done:
                raise PruneError("OpenCV could not encode a PNG image; check its installation.")
            (images / f"{index:05d}.png").write_bytes(png.tobytes())
            lines = [f"{kind} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for kind, x, y, w, h in boxes]
            (labels / f"{index:05d}.txt").write_text("".join(lines), encoding="utf-8")
    # Without the key `path`, Ultralytics uses the folder of this file, so the dataset can be moved.
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(NAMES))
    text = f"# Synthetic shapes, made by yolo-prune\ntrain: images/train\nval: images/val\nnames:\n{names}"
    (folder / YAML_NAME).write_text(text, encoding="utf-8")
    (folder / STAMP_NAME).write_text(json.dumps(stamp) + "\n", encoding="utf-8")


def draw_scene(imgsz: int, seed: tuple[int, ...]) -> tuple[NDArray[np.uint8], list[Box]]:
    """One image `(imgsz, imgsz, 3)`, BGR, and the boxes of its shapes."""
    import numpy as np

    rng = np.random.default_rng(seed)
    image = _background(rng, imgsz)
    _clutter(rng, image)
    kinds: list[int] = []
    masks: list[NDArray[np.bool_]] = []
    visible: list[NDArray[np.bool_]] = []
    wanted = int(rng.integers(2, 6))
    for _ in range(4 * wanted):
        if len(kinds) == wanted:
            break
        kind = int(rng.integers(len(NAMES)))
        mask = _shape(rng, kind, imgsz)
        area = mask > 127
        left = [old & ~area for old in visible]
        if any(new.sum() < (1 - MOST_HIDDEN) * old.sum() for new, old in zip(left, masks, strict=True)):
            continue
        _paint(rng, image, mask, kind)
        kinds.append(kind)
        masks.append(area)
        visible = [*left, area]
    noise = rng.normal(0.0, rng.uniform(2.0, 8.0), image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), [
        _box(kind, mask) for kind, mask in zip(kinds, masks, strict=True)
    ]


def _box(kind: int, mask: NDArray[np.bool_]) -> Box:
    """The box around a complete shape, also around a part that another shape hides."""
    import numpy as np

    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    centre = ((left + right) / 2 / width, (top + bottom) / 2 / height)
    return kind, *centre, (right - left) / width, (bottom - top) / height


def _background(rng: np.random.Generator, imgsz: int) -> NDArray[np.float32]:
    """A muted colour, clouds of two sizes and a gradient `(imgsz, imgsz, 3)`."""
    import cv2
    import numpy as np

    image = np.full((imgsz, imgsz, 3), rng.uniform(70, 180, 3), dtype=np.float32)
    for cells, strength in ((4, 26.0), (int(rng.integers(10, 28)), 11.0)):
        tint, light = (
            rng.normal(0.0, strength, (cells, cells, 3)),
            rng.normal(0.0, strength, (cells, cells, 1)),
        )
        clouds = tint * 0.5 + light
        image += cv2.resize(clouds.astype(np.float32), (imgsz, imgsz), interpolation=cv2.INTER_CUBIC)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 50)
    along = np.linspace(-1, 1, imgsz, dtype=np.float32)
    image += (slope * (np.cos(angle) * along[None, :] + np.sin(angle) * along[:, None]))[..., None]
    return image.astype(np.float32)


def _clutter(rng: np.random.Generator, image: NDArray[np.float32]) -> None:
    """Draw strokes, arcs and specks: they have edges, but they are none of the five shapes."""
    import cv2
    import numpy as np

    imgsz = image.shape[0]
    for _ in range(int(rng.integers(2, 7))):
        mask = np.zeros((imgsz, imgsz), dtype=np.uint8)
        x, y = (int(v) for v in rng.integers(0, imgsz, 2))
        thickness = 1 + int(rng.integers(0, max(1, imgsz // 60) + 1))
        choice = int(rng.integers(3))
        if choice == 0:
            end = rng.integers(0, imgsz, 2)
            cv2.line(mask, (x, y), (int(end[0]), int(end[1])), 255, thickness, cv2.LINE_AA)
        elif choice == 1:
            axes = rng.integers(imgsz // 20, imgsz // 4, 2)
            start = int(rng.integers(0, 360))
            arc = (start, start + int(rng.integers(50, 160)))
            cv2.ellipse(mask, (x, y), (int(axes[0]), int(axes[1])), 0, *arc, 255, thickness, cv2.LINE_AA)
        else:
            for dx, dy in rng.normal(0, imgsz / 25, (int(rng.integers(4, 12)), 2)):
                cv2.circle(mask, (x + int(dx), y + int(dy)), 1, 255, -1, cv2.LINE_AA)
        _paint(rng, image, mask)


def _shape(rng: np.random.Generator, kind: int, imgsz: int) -> NDArray[np.uint8]:
    """Coverage `(imgsz, imgsz)`, 0..255, of one shape with random size, place and rotation, inside the image."""
    import cv2
    import numpy as np

    mask = np.zeros((imgsz, imgsz), dtype=np.uint8)
    radius = imgsz * float(np.exp(rng.uniform(*np.log(SIZES))))
    x, y = (float(v) for v in rng.uniform(radius + 1, imgsz - radius - 1, 2))
    turn, thick = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.28, 0.42))
    unit = 1 << SHIFT
    if kind in (0, 1):
        centre = (round(x * unit), round(y * unit))
        cv2.circle(mask, centre, round(radius * unit), 255, -1, cv2.LINE_AA, SHIFT)
        if kind == 1:
            cv2.circle(mask, centre, round(radius * (1 - thick) * unit), 0, -1, cv2.LINE_AA, SHIFT)
        return mask
    if kind == 2:
        angles, radii = np.pi / 2 * np.arange(4), np.ones(4)
    elif kind == 3:
        angles, radii = 2 * np.pi / 3 * np.arange(3), np.ones(3)
    else:  # a plus sign of arms 2 t wide: per arm two outer corners and one inner corner
        t = thick * 0.75
        out, bend = np.hypot(1.0, t), np.arctan(t)
        angles = np.concatenate([[q - bend, q + bend, q + np.pi / 4] for q in np.pi / 2 * np.arange(4)])
        radii = np.tile([1.0, 1.0, t * np.sqrt(2) / out], 4)
    corners = radius * radii[:, None] * np.stack([np.cos(angles + turn), np.sin(angles + turn)], axis=1)
    points = np.round((corners + np.array([x, y])) * unit).astype(np.int32)
    cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, SHIFT)
    return mask


def _paint(
    rng: np.random.Generator, image: NDArray[np.float32], mask: NDArray[np.uint8], kind: int | None = None
) -> None:
    """Blend a colour into `image` under the mask, in place. It differs from the image there, and is lit unevenly."""
    import numpy as np

    inside = mask > 127
    under = image[inside].mean(axis=0) if inside.any() else np.full(3, 128.0)
    colour = _colour(rng, kind)
    while np.abs(colour - under).max() < 70:
        colour = _colour(rng, kind)
    along = np.linspace(-1, 1, image.shape[0])
    light = 1 + rng.uniform(-0.2, 0.2) * along[None, :] + rng.uniform(-0.2, 0.2) * along[:, None]
    opacity = mask[..., None] / 255 * rng.uniform(0.8, 1.0)
    image += opacity * (colour * light[..., None] - image)


def _colour(rng: np.random.Generator, kind: int | None) -> NDArray[np.float64]:
    """A random colour, BGR. The hue of a shape is near the hue of its kind, so colour helps to recognise the kind."""
    import numpy as np

    hue = rng.uniform() if kind is None else kind / len(NAMES) + rng.normal(0.0, HUE_SPREAD)
    saturation, value = rng.uniform(0.35, 1.0), rng.uniform(80, 250)
    wheel = np.clip(np.abs((hue + np.array([1 / 3, 2 / 3, 0.0])) % 1 * 6 - 3) - 1, 0, 1)
    return np.asarray(value * (1 - saturation + saturation * wheel), dtype=np.float64)
