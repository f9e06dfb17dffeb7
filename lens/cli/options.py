"""What the options of the commands may be, and what --help says of them. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

from enum import Enum

from ..config import DEFAULT_CHAT_DATE
from ..formats.hub import shipped

DEFAULT_NAME = "{index:03d}-{prompt}-{seed}"  # of a picture's file


class Variant(str, Enum):
    """Which released model the weights are: sets the default steps and guidance."""

    lens = "lens"
    turbo = "turbo"
    base = "base"


class DType(str, Enum):
    """Number type of the weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Truncation(str, Enum):
    """What is cut from a prompt that is too long."""

    reference = "reference"
    prompt = "prompt"


class Solver(str, Enum):
    """How a step follows the velocity."""

    euler = "euler"
    dpm2m = "dpm2m"


class Residence(str, Enum):
    """Which parts of the model stay on the device."""

    auto = "auto"
    resident = "resident"
    trimmed = "trimmed"
    balanced = "balanced"
    lean = "lean"


FILE = 'Prompts from a text file, one per line; # starts a comment line; "-" is stdin.'
LIKE = "Redraw a picture from the recipe inside it; every other option overrides its part of the recipe."
REASON = "Have a reasoner write prompts out and refuse unsafe ones (exit code 3); without it nothing is filtered."
REASONER = "OpenAI-compatible server that reasons, up to /v1 (default: the model's own text encoder)."
REASONER_MODEL = "Name of the server's model; a key, where needed, is read from LENS_CHAT_KEY."
REASONER_PROMPT = "What the reasoner is told: general, geneval, oneig, text, or a text file (default: general)."
PER_PROMPT = "Pictures per prompt (default: 1, or as many as --seed lists)."
SEED = "Starting noise: S gives picture k the seed S + k; a list, one to each (default: random, reported)."
SIZE = "Width x height in pixels, multiples of 16; once, or once per prompt (default: the model's, square)."
BASE = "Base resolution: 512, 768, 1024, 1440 (Mini: 64, 96, 128); needs --aspect."
GUIDANCE = "How strongly the prompt pulls; 1 turns guidance off and halves the work (default: the model's)."
CHAT_DATE = f'Date written into the text encoder\'s chat, or "today" (default: {DEFAULT_CHAT_DATE}).'
SOLVER = "Solver: euler, or dpm2m, second order, so that fewer steps do (default: euler, or the recipe's)."
TRUNCATION = 'Beyond 512 tokens "reference" cuts the end of the whole chat, "prompt" the prompt (default: reference).'
OUTPUT = "One picture's file, or a folder, made where missing; files of the same name are replaced (default: .)."
NAME = f"File names in the folder, from {{index}}, {{prompt}}, {{seed}} (default: {DEFAULT_NAME})."
SCALE = "Whole factor by which the sheet enlarges pictures, unsmoothed (default: small ones to about 192 pixels)."
MODEL = f"{', '.join(shipped())}, a folder in the released layout, a hub id or a .safetensors file (default: mini)."
TRANSFORMER = "The transformer from another place: a .safetensors file or a folder."
TEXT_ENCODER = "The text encoder from another place, with the tokenizer beside it or inside."
VAE = "The VAE from another place."
TOKENIZER = "The tokenizer from another place: a folder or a tokenizer.json."
WEIGHTS_VARIANT = "Which weights, where a folder has several, as diffusers names files, fp16 (default: those without)."
REVISION = "Branch, tag or commit of a hub id (default: its main branch)."
JSON = "Print a line of JSON for every picture, its path and recipe, in place of the path."
LORA = "LoRA to merge into the weights: a .safetensors file or a peft folder; repeatable."
LORA_SCALE = "How strongly a LoRA counts; once, or once per --lora (default: 1, or the recipe's)."
VARIANT = "What the weights are, where the checkpoint does not say: sets default steps and guidance."
DEVICE = '"cpu", "cuda" or "cuda:1" (default: cuda if usable, else cpu).'
DTYPE = "Number type of weights and activations (default: bfloat16 on cuda and for a large model, float32 on cpu)."
RESIDENCY = "Where the parts live: resident, trimmed, balanced or lean, from fast to small; auto: the first that fits."
MEMORY = "GB that drawing may take, such as 24, 16, 12 or 8: picks the residency by what it is predicted to need."
BATCH = "Pictures drawn at once (default: up to 8, fewer when they are large)."
