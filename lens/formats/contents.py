"""What a file or a set of tensor names is, in words: the part of an error message that tells people what they have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"
_UNREAD_SUFFIXES = {".bin": "pickle", ".pt": "pickle", ".pth": "pickle", ".ckpt": "pickle", ".gguf": "GGUF"}
_PICKLE = "a pickle, which could run any code when it is read and is refused on purpose; convert it to safetensors"
_GGUF = "a GGUF file, which is not read; take the safetensors file of the same weights"

# The first that some name ends with, or holds, tells; from the telling to the general.
_TRAITS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("weights quantised by ComfyUI ({}), which are not read yet; take the bf16 file", (".comfy_quant", ".weight_scale")),
    ("scaled fp8 weights ({}), which are not read yet; take the bf16 file", ("scaled_fp8", ".scale_weight")),
    ("weights quantised by bitsandbytes ({}), which are not read; take the bf16 file", (".absmax", ".quant_map")),
    ("SDNQ or GPTQ weights ({}), which are not read; take the bf16 file", (".zero_point", ".qweight", ".qzeros")),
    ("a LoRA ({}): load it beside a model, with --lora or load_lora", (
        ".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight", ".lora.down.weight", ".lokr_w1", ".lokr_w1_a",
        ".hada_w1_a",
    )),
    ("a Lens transformer ({})", (".attn.img_qkv.weight",)),
    ("GPT-OSS ({})", (".self_attn.sinks",)),
    ("another language model ({})", (".self_attn.q_proj.weight",)),
    ("a VAE ({})", ("decoder.conv_in.weight", "decoder.conv_out.weight")),
    ("another model's transformer, such as Qwen-Image or SD 3 ({})", (".attn.add_q_proj.weight", ".attn.to_q.weight")),
    ("a Flux transformer ({})", ("double_blocks.0.img_attn.qkv.weight",)),
    ("a U-Net, as in SD 1.5 or SDXL ({})", ("input_blocks.0.0.weight", "conv_in.weight")),
)  # fmt: skip
_WRAPPED = {
    "model.diffusion_model.": "a ComfyUI file",
    "diffusion_model.": "a ComfyUI file",
    "first_stage_model.": "the VAE of a whole checkpoint in one file",
    "transformer.": "a part inside a diffusers model",
    "module.": "saved by DistributedDataParallel",
    "net.": "saved by a trainer",
}


def of_file(head: bytes) -> str | None:
    """What a file that begins with ``head`` is, as words that follow "is"; None where nothing is recognised."""
    if head.startswith(LFS):
        return "a git-lfs pointer, not the weights; run `git lfs pull`"
    if head.startswith(b"GGUF"):
        return _GGUF
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return _PICKLE
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "a web page; download the file itself"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF")):
        return "a picture"
    return None


def of_folder(folder: Path) -> str:
    """What lies in a folder without safetensors that could be its weights: "; it has x.bin, a pickle, ...", or ""."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _UNREAD_SUFFIXES)
    except OSError:
        return ""
    if not found:
        return ""
    kind = _UNREAD_SUFFIXES[found[0].suffix.lower()]
    return f"; it has {found[0].name}, {_PICKLE if kind == 'pickle' else _GGUF}"


def of_names(names: Iterable[str]) -> str:
    """What tensors of these names are: "they look like ...", with the name that tells it; "" where nothing is known."""
    known = list(names)
    for words, marks in _TRAITS:
        for name in known:
            if name.endswith(marks) or name in marks:
                return "these are " + words.format(name)
    for prefix, words in _WRAPPED.items():
        if known and all(name.startswith(prefix) for name in known):
            return f"keys begin with {prefix}: {words}"
    return f"keys are such as {', '.join(sorted(known)[:3])}" if known else "the file holds no tensors"
