"""The first call after loading, in this process: `python -m bench.work.first_image --variant turbo --out FILE`.

Weights are made on the device, which stands for loading them; then one call is timed, kernels' modules, libraries,
tables and captured steps with it. FILE, by torch.save: {"seconds", "stages": seconds by stage on the clock, "results":
pictures, or the latents' way from the noise}.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .drawing import DrawingSetup, way
from .host import HostClock
from .scale import RELEASED, TINY


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.work.first_image", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=["lens", "turbo"], default="turbo")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the small stand-in of the model")
    parser.add_argument("--pixels", action="store_true", help="prompt to pixels; else the denoiser alone")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    scale = TINY if options.tiny else RELEASED
    d = DrawingSetup(scale, torch.device(options.device), options.variant, [scale.sizes[scale.main]], scale.texts[-2])
    pipe: Any = d.pipeline(d.encoder, d.codec) if options.pixels else d.pipeline(d.prepared(1), None)
    prompts = d.prompts(0) if options.pixels else ["0 0"]

    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    def draw() -> list[torch.Tensor]:
        made = pipe(prompts, seed=d.seed(0), sizes=d.sizes, output_type="np" if options.pixels else "latent").images
        return [torch.as_tensor(one) for one in made]

    clock = HostClock(pipe, time.perf_counter)
    wait()
    began = time.perf_counter()
    results: list[torch.Tensor] = []
    clock.seconds(lambda: results.extend(draw()))
    wait()
    seconds = time.perf_counter() - began
    if not options.pixels:
        results = way(lambda noise: results)(d.noise(0))
    torch.save({"seconds": seconds, "stages": clock.parts, "results": [r.cpu() for r in results]}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
