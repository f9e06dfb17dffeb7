"""Stage "vae": latents <-> pixels, in the released layout (AutoencoderKLFlux2).

    python -m train vae --config mini --out runs/vae                       # codec, then decoder, then encoder
    python -m train vae --config mini --out runs/vae --part decoder --stop-after 25m     # again to resume
    python -m train vae --config mini_gpu --out runs/gpu/vae --part joint --device cuda   # everything together
    python -m train vae --config mini --out runs/vae --part probe          # what the latents say about their tokens
    python -m train vae --config mini --out runs/vae --export lens/mini/base/vae

Two ways to a latent space. On a CPU it is fixed first and cheaply: an overlapped linear transform (one strided
convolution, learned in a minute or two together with its transposed inverse, under noise, every channel at unit
variance) is the *codec*. Then

    decoder:  minimise  |D(z + noise) - x|   over z = codec(x)      what draws every picture
    encoder:  minimise  |E(x) - codec(x)|^2  and a posterior width equal to the codec's noise

are two independent regressions. Nothing downstream waits for them: a generator trained on codec(x) stays valid while the
decoder keeps improving. Where there is a GPU, encoder and decoder are trained together (train/vae/joint.py) and the encoder's
posterior mode is the latent space. Latents of a picture: c channels per 8x8 pixels; patchified (c p1 p2) to 4c per token
and normalised with BatchNorm statistics measured once over STATISTICS_SCENES scenes. A folder holds one of the two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import torch

from lens.formats.vae import save_vae

from .. import configs
from ..loop.checkpoints import load_state
from ..loop.clock import Clock, duration
from ..loop.ranks import device_of
from ..networks.codec import Half, Latents
from .codec import probe, train_codec
from .halves import build, train_half
from .joint import train_joint


def export(config: ModuleType, out: Path, folder: Path) -> None:
    """Averaged weights and the token statistics as a released VAE folder in bfloat16; both halves, or the joint training's."""
    latents = Latents(out)
    vae = latents.vae
    if vae is None:
        vae = build(config)
        for part in ("decoder", "encoder"):
            half = Half(vae, part)
            half.load_state_dict(load_state(out / f"{part}.pt", f"vae {part}")["ema"]["average"])
    vae.bn.running_mean.copy_(latents.mean)
    vae.bn.running_var.copy_(latents.var)
    save_vae(vae, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs, or a file .py (default: mini)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/vae"), help="folder of states, logs, sheets (default: runs/vae)"
    )
    parser.add_argument(
        "--part",
        choices=("codec", "decoder", "encoder", "joint", "probe"),
        help="train this part only (default: codec, decoder, encoder); probe: measure what frozen latents say",
    )
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=int, help="total steps of the part instead of the recipe's")
    parser.add_argument("--decay", type=int, help="length of the final linear decay in steps instead of the recipe's")
    parser.add_argument("--lr", type=float, help="learning rate instead of the recipe's")
    parser.add_argument(
        "--init",
        type=Path,
        metavar="PATH",
        help="start a part from the weights of a state file or a checkpoint folder; joint: also from a folder of halves",
    )
    parser.add_argument("--head", type=float, help="joint: weight of the class and colour head instead of the recipe's")
    parser.add_argument("--device", default="cpu", help="joint, probe: cpu or cuda (bfloat16 there; default: cpu)")
    parser.add_argument("--compile", action="store_true", help="joint: compile encoder and decoder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="train nothing; write the VAE in the released layout"
    )


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    config = configs.load(options.config, "vae")
    if options.export:
        export(config, options.out, options.export)
        return 0
    clock = Clock(options.stop_after)
    if options.part == "joint":
        train_joint(config, options, clock)
        return 0
    if options.part == "probe":
        probe(config, Latents(options.out, device_of(options.device)), options.out, clock)
        return 0
    if not (options.out / "codec.pt").is_file() and not train_codec(config, options.out, clock):
        return 0
    for part in ("decoder", "encoder"):
        if options.part in (None, part):
            train_half(config, part, options.out, clock, options.init, options.steps, options.lr, options.decay)
    return 0
