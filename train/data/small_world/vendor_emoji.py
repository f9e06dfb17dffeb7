"""Rebuild the vendored emoji subset from the pinned npm package, pixel for pixel.

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    python -m train.data.small_world.vendor_emoji lobehub-fluent-emoji-3d-1.1.0.tgz            # rewrite assets/emoji
    python -m train.data.small_world.vendor_emoji lobehub-fluent-emoji-3d-1.1.0.tgz --check    # compare: exit 1 if unequal

Every asset is trimmed to its opaque box, reduced to SIDE pixels on its longer side (premultiplied, Lanczos) and
stored as lossless WebP. `manifest.json` holds the SHA-256 of the decoded RGBA bytes under the pinned Pillow: file
bytes may differ between encoder versions, pixels may not.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from lens.formats.files import write_atomic, write_json

from .kinds import KINDS

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
TARBALL_SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
PILLOW = "13.0.0"
SIDE = 96
OPAQUE = 24  # alpha at which a pixel counts as part of the object when trimming
ASSETS = Path(__file__).parent / "assets" / "emoji"

SOURCES = {
    name: kind.stem for name, kind in KINDS.items()
}  # class name -> code points, the file stem inside the package


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of `WxH` and the RGBA bytes, with colour zeroed where alpha is 0 (codecs may drop it there)."""
    rgba = np.array(image.convert("RGBA"))
    rgba[rgba[..., 3] == 0] = 0
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + rgba.tobytes()).hexdigest()


def reduce_asset(data: bytes) -> Image.Image:
    """Package WebP bytes -> trimmed RGBA image whose longer side is SIDE pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    alpha = np.array(image)[..., 3] >= OPAQUE
    rows, cols = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    image = image.crop((int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1))
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def altered(folder: Path = ASSETS) -> list[str]:
    """Names whose file is missing from the folder, is not in its manifest, or does not decode to the recorded pixels."""
    want = json.loads((folder / "manifest.json").read_text())["rgba_sha256"]
    found = {}
    for path in folder.glob("*.webp"):
        with Image.open(path) as image:
            found[path.stem] = pixel_hash(image)
    return differing(want, found)


def differing(want: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names whose hash is in one of the two only, or not the same in both."""
    return sorted(name for name in want.keys() | found.keys() if want.get(name) != found.get(name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.small_world.vendor_emoji", description=__doc__.split("\n")[0]
    )
    parser.add_argument("tarball", type=Path, help=f"the file `npm pack {PACKAGE}` leaves behind")
    parser.add_argument("--check", action="store_true", help="compare with the vendored files, write nothing")
    options = parser.parse_args(argv)
    found = hashlib.sha256(options.tarball.read_bytes()).hexdigest()
    if found != TARBALL_SHA256:
        raise SystemExit(f"{options.tarball}: SHA-256 {found}, expected {TARBALL_SHA256} ({PACKAGE})")
    images = {}
    with tarfile.open(options.tarball) as tar:
        for name, stem in SOURCES.items():
            member = tar.extractfile(f"package/assets/{stem}.webp")
            if member is None:
                raise SystemExit(f"{options.tarball}: package/assets/{stem}.webp is not a file")
            images[name] = reduce_asset(member.read())
    hashes = {name: pixel_hash(image) for name, image in images.items()}
    manifest = {"package": PACKAGE, "pillow": PILLOW, "side": SIDE, "rgba_sha256": hashes}
    if options.check:
        want = json.loads((ASSETS / "manifest.json").read_text())["rgba_sha256"]
        wrong = sorted({*differing(want, hashes), *altered()})
        print(
            f"{len(want.keys() - set(wrong))} of {len(want)} assets equal" + (f", different: {wrong}" if wrong else "")
        )
        return 1 if wrong else 0
    for name, image in images.items():
        save = functools.partial(image.save, format="WEBP", lossless=True, quality=100, method=6, exact=True)
        write_atomic(ASSETS / f"{name}.webp", save)
    write_json(ASSETS / "manifest.json", manifest)
    print(f"{len(images)} assets, {sum(f.stat().st_size for f in ASSETS.glob('*.webp'))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
