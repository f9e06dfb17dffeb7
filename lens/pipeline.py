"""The only file that knows all the others: a prompt becomes tokens, latents, a picture.

The loop below runs on packed rows. Each picture keeps its own schedule (mu depends on its size), its own seed and its
own text; nothing depends on its neighbours. A call keeps its state to itself, so threads may share a pipeline and an
exception or Ctrl-C in mid-call leaves it usable.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import callbacks, sampler
from . import vae as pixels
from .arguments import count, finite, shortened
from .config import MAX_STEPS, Defaults, LensConfig
from .engine.batch_invariance import default as default_invariance
from .engine.graphs import marked
from .engine.job import Job, Text
from .engine.overlap import Pending, host_lane_for
from .engine.progress import counted_steps
from .engine.residency import (
    PRESETS,
    STAGES,
    Placement,
    Residency,
    Sizes,
    choose,
    cpu_sizes,
    free_bytes,
    immovable,
    named,
    sizes_of,
    within,
)
from .engine.run import Engine
from .engine.schedule_table import TableCache, evict
from .engine.threads import number_for, threads_for
from .formats import diffusers_calls
from .formats import parts as locations
from .formats.fingerprint import fingerprint as fingerprint_of
from .formats.gpt_oss import load_gpt_oss
from .formats.lora import Adapter, Adapters
from .formats.lora import merge as merge_adapter
from .formats.lora import parts_of as adapted_weights
from .formats.lora import read as read_adapter
from .formats.mxfp4 import warn_expanded, why_expanded
from .formats.names import released_names
from .formats.parts import Part
from .formats.released import (
    LARGE,
    check_fit,
    check_sampler,
    described_transformer,
    load_scheduler,
    load_transformer,
    read_defaults,
    recall_modulation,
    transformer_tensors,
)
from .formats.released import placement as usable_placement
from .formats.safetensors import Stored
from .formats.text_encoder import load_text_encoder, packed_experts, text_encoder_tensors, vocab_size
from .formats.vae import load_vae, vae_channels, vae_tensors
from .model import LensTransformer2DModel
from .modulation import Modulation, concatenate
from .packing import expect_tensors, offsets_of, pad_features, split_features
from .reasoner import PromptsRefused, Reasoner, Refined
from .request import Request
from .sampler import Scheduler
from .serving import stream
from .text_encoder import DEFAULT_CHAT_DATE, ChatTokenizer, TextEncoder, prompt_list

# of B samples: F tensors [T_b, E] each; positions of the valid tokens, None where all of them are
_Features = tuple[list[list[Tensor]], "list[Tensor] | None"]
ENCODERS = ("lens", "transformers")  # what runs the text encoder
Callback = Callable[["LensPipeline", int, Tensor, dict[str, Any]], "dict[str, Any] | None"]


@dataclass(frozen=True)
class LensPipelineOutput:
    """``images``: see ``output_type``; ``seeds``: one per picture, None where generators or latents gave the noise."""

    images: Any
    seeds: list[int | None]
    reasoned: list[Refined] | None = None  # per prompt, where a reasoner wrote them


class LensPipeline:
    """``LensPipeline.from_pretrained("mini")("a red apple").images[0]``"""

    def __init__(
        self,
        transformer: LensTransformer2DModel,
        text_encoder: TextEncoder,
        codec: pixels.PixelCodec,
        scheduler: Scheduler,
        defaults: Defaults,
        fingerprint: str | None = None,
        batch_invariant: bool | None = None,
    ):
        """batch_invariant: None decides by the device, see ``engine/batch_invariance.py``; later it is the attribute of
        the transformer that counts."""
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.codec = codec
        self.scheduler = scheduler
        self.defaults = defaults
        self.fingerprint = fingerprint
        self.text_encoder_files: Part | None = None  # where the text encoder was loaded from
        self.engine = Engine()
        self.placement: Placement | None = None  # where the parts live, if not simply on one device
        self._batch_invariant = batch_invariant
        self._progress = True
        self._set_batch_invariance(self.device)
        self._tables = TableCache()
        self._adapters = Adapters(transformer, self._adapted)

    @property
    def device(self) -> torch.device:
        return self.transformer.device if self.placement is None else self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @classmethod
    @diffusers_calls.known_arguments("LensPipeline.from_pretrained")
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "mini",
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        residency: str | Residency | None = None,
        torch_dtype: torch.dtype | None = None,
        *,
        transformer: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        weights_variant: str | None = None,
        revision: str | None = None,
        encoder: str | None = None,
        memory: float | None = None,
    ) -> LensPipeline:
        """Load a checkpoint: "mini", "mini-base", "mini-rl", "mini-turbo", a folder in the released layout, an adapter's
        folder that names its base, a hub id, a transformer's .safetensors file.

        variant: "lens" | "turbo" | "base" sets default steps and guidance; None reads our metadata, else the id's or
        folder's name. device, dtype: None means cuda and bfloat16 where usable, else cpu and float32, or bfloat16 for a
        transformer of over 10^9 weights. residency: see ``set_residency``; with a named one each part is loaded straight to
        where it lives; None on a CPU is "trimmed" for so large a transformer, else "resident". memory: GB (10^9 bytes) that
        drawing may take, in place of a residency: the fastest one that is predicted to fit, or MemoryError, on a CPU before
        anything is loaded. torch_dtype: dtype by diffusers' name.

        transformer, text_encoder, vae: a .safetensors file or a folder in place of the source's part; with all three the
        default source is not read. tokenizer: a folder or a tokenizer.json; None: beside or inside the text encoder that was
        named, else the source's. weights_variant: which of several weights, as diffusers names files ("fp16"); where a
        part has none of it, its default. revision: a branch, tag or commit of a hub id; None: its main branch.

        encoder: what runs the text encoder, "lens" or "transformers"; None: ours, but for packed experts that stay on a GPU for
        which transformers has its kernels. Ours keeps MXFP4 experts packed, on any device, and can visit it; transformers expands them on a CPU, and on a GPU where it lacks its kernels.

        A checkpoint that cannot be used raises lens.CheckpointError, which names the file, the key and what was expected.
        """
        if torch_dtype is not None and dtype not in (None, torch_dtype):
            raise ValueError(f"give only one of dtype and torch_dtype, got {dtype} and {torch_dtype}")
        if encoder is not None and encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {shortened(encoder)}")
        if device is not None:
            device = _usable(device, "from_pretrained")
        asked = dtype or torch_dtype
        device, dtype = usable_placement(device, asked)
        if memory is not None:
            _expect_memory(memory, residency, device, encoder)
        files = locations.find(source, transformer, text_encoder, vae, tokenizer, weights_variant, revision)
        defaults = read_defaults(files.root, variant, files.name)
        scheduler = load_scheduler(files.scheduler)
        check_sampler(files.scheduler, defaults, scheduler)
        chat = ChatTokenizer(files.tokenizer, vocab_size(files.text_encoder))
        policy = named(residency, device)
        described, headers = described_transformer(files.transformer)
        large = sum(math.prod(stored.shape) for stored in headers.values()) > LARGE
        if asked is None:
            _, dtype = usable_placement(device, None, large)
        if memory is not None:
            residency = policy = "auto"
            if device.type == "cpu":
                stored = _stored_sizes(files, described, defaults, dtype)
                policy = within(memory, stored)
        elif policy is None and device.type == "cpu" and large and files.adapter is None:
            policy = PRESETS["trimmed"]
        parked = Placement(policy, device) if isinstance(policy, Residency) else None

        def host(part: str) -> torch.device | str:
            """Where a part is loaded: what visits the device later need not pass it now."""
            if parked is None:  # "auto" decides by the free memory: nothing may fill it before
                return "cpu" if residency == "auto" else device
            return "cpu" if parked.residency.tier(part) != "resident" else device

        # on a CPU what need not be in memory stays in the files
        read = not (device.type == "cpu" and isinstance(policy, Residency) and policy.modulation == "host")
        denoiser = load_transformer(files.transformer, dtype, host("transformer"), read)
        adapter = None if files.adapter is None else read_adapter(files.adapter, denoiser)
        if adapter is not None:
            merge_adapter(_changeable(adapter, denoiser), denoiser)
        layers = denoiser.config.selected_layer_index
        depth = max(layers) + 1
        model: Any
        if (
            encoder is None
        ):  # until moe_mxfp4's CUDA kernel is measured, transformers' serve where they are and may stay
            theirs = device.type == "cuda" and packed_experts(files.text_encoder) and not why_expanded()
            stays = parked is None or parked.residency.tier("text_encoder") == "resident"
            encoder = "transformers" if theirs and stays else "lens"
        if encoder == "lens":
            model = load_gpt_oss(files.text_encoder, dtype, host("text_encoder"), depth)
        else:
            packed = packed_experts(files.text_encoder)
            why = why_expanded() if packed and device.type == "cuda" else ""
            # experts that transformers packs are counted, or refused, where they lie
            home = device if packed and not why else host("text_encoder")
            if why and torch.device(home).type == "cpu":  # where loading them is no surprise
                warn_expanded(files.text_encoder.weights, why)
            model = load_text_encoder(files.text_encoder, dtype, home, depth)
        text = TextEncoder(chat, model, layers)
        codec = pixels.PixelCodec(load_vae(files.vae, dtype, host("vae")))
        check_fit(str(files.transformer), denoiser.config, text.width, codec.channels)
        loaded = {
            "transformer": transformer_tensors(files.transformer),
            "text_encoder": text_encoder_tensors(files.text_encoder, depth),
            "vae": vae_tensors(files.vae),
        }
        pipe = cls(
            denoiser,
            text,
            codec,
            scheduler,
            defaults,
            fingerprint_of(loaded, adapter.fingerprint if adapter else ""),
        )
        pipe.text_encoder_files = files.text_encoder
        if policy is not None:
            pipe._reside(policy if memory is None else "auto", device, memory)
        return pipe

    # ------------------------------------------------------------------------------------------------ as diffusers has it

    from_single_file = from_pretrained  # which takes a transformer's file as its source

    @diffusers_calls.known_arguments("LensPipeline.to")
    def to(self, *where: Any, device: Any = None, dtype: torch.dtype | None = None) -> LensPipeline:
        """The parts on a device and in a floating-point type, as ``torch.nn.Module.to``; returns the pipeline.

        A residency that was set ends: all parts live on the device from then on. ValueError for a device that is not there
        or a type that nothing draws in, with nothing changed, and where adapters are loaded and the type changes: what they
        were merged from is in the old one.
        """
        for argument in where:
            if isinstance(argument, torch.dtype):
                dtype = argument
            else:
                device = argument
        place = None if device is None else _usable(device, "to")
        if dtype is not None and dtype != self.dtype:
            if self.loras:
                raise ValueError(f"LensPipeline.to: unload_lora() before the dtype changes to {dtype}")
            if dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise ValueError(
                    f"LensPipeline.to: dtype must be torch.float32, torch.bfloat16 or torch.float64, got {dtype}"
                )
            for part in self.parts().values():
                _cast(part, dtype)
            self.codec = pixels.PixelCodec(self.codec.vae)
            self._tables.forget()
        if place is not None or dtype is not None:
            self.set_residency("resident", place or self.device)
        return self

    @diffusers_calls.known_arguments("LensPipeline.load_lora_weights")
    def load_lora_weights(self, path: str | os.PathLike[str], scale: float = 1.0) -> None:
        """``load_lora`` by diffusers' name."""
        self.load_lora(path, scale)

    def unload_lora_weights(self) -> None:
        """``unload_lora`` by diffusers' name."""
        self.unload_lora()

    @property
    def vae(self) -> Any:
        return self.codec.vae

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.text_encoder.tokenizer

    @property
    def components(self) -> dict[str, Any]:
        """The parts by the names of their folders."""
        return {**self.parts(), "tokenizer": self.tokenizer, "scheduler": self.scheduler}

    @diffusers_calls.known_arguments("LensPipeline.set_progress_bar_config")
    def set_progress_bar_config(self, disable: bool = False) -> None:
        """Steps are counted on stderr, where it is a terminal and a call takes longer than two seconds; or never."""
        self._progress = not disable

    def __getattr__(self, name: str) -> Any:
        """Only asked for what there is not: names of diffusers say what to call instead."""
        hint = f"; {diffusers_calls.METHODS[name]}" if name in diffusers_calls.METHODS else ""
        raise AttributeError(f"LensPipeline has no {name!r}{hint}")

    def __repr__(self) -> str:
        config, where = self.transformer.config, str(self.device)
        if self.placement is not None and self.placement.residency != PRESETS["resident"]:
            where += f", {self.placement.residency}"
        parts = (
            f"{config.num_layers} blocks of width {config.inner_dim}, text encoder of width {self.text_encoder.width} "
            f"{self.text_encoder.kind}"
        )
        steps = f"{self.defaults.num_inference_steps} steps, guidance {self.defaults.guidance_scale:g}"
        loras = f", loras={[name for name, _, _ in self.loras]}" if self.loras else ""
        return f"LensPipeline({self.defaults.variant}: {parts}; {steps}; {self.dtype}, {where}{loras})"

    # ------------------------------------------------------------------------------------------------ adapters

    @diffusers_calls.known_arguments("LensPipeline.load_lora")
    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> None:
        """Merge a LoRA (LoKr, LoHa, DoRA), a folder or a safetensors file, into the transformer: W + scale * alpha / r * up @
        down, rounded once. Further ones add to it. Not while a picture is being drawn.

        CheckpointError, which names the file and the key, for one that is broken or adapts another model; ValueError for
        a scale that is no finite number. All or nothing: after an error or Ctrl-C the weights are those of before.
        """
        factor = finite("load_lora: scale", scale)
        self._adapters.add(_changeable(read_adapter(path, self.transformer), self.transformer), factor)

    def unload_lora(self) -> None:
        """The weights as they were before the first ``load_lora``, bit for bit."""
        self._adapters.clear()

    @property
    def loras(self) -> list[tuple[str, str, float]]:
        """(name, fingerprint, scale) of the LoRAs in force."""
        return [(adapter.name, adapter.fingerprint, scale) for adapter, scale in self._adapters.loaded]

    def _adapted(self, names: set[str]) -> None:
        if any("modulation" in name or name.startswith("time_embedding") for name in names):
            self._tables.forget()  # also where these weights were evicted: the cache does not watch evicted ones

    # ------------------------------------------------------------------------------------------------ residency

    def parts(self) -> dict[str, torch.nn.Module]:
        """The modules a residency policy places, by name."""
        return {"text_encoder": self.text_encoder.model, "transformer": self.transformer, "vae": self.codec.vae}

    def sizes(self, image_tokens: int | None = None, images: int = 1, guided: bool = True) -> Sizes:
        """Bytes of the parts and of the stages' work, for images of ``image_tokens`` (default: the model's size)."""
        return self._sizes(self.device, image_tokens, images, guided)

    def _sizes(self, device: torch.device, image_tokens: int | None, images: int, guided: bool) -> Sizes:
        tokens = (
            (self.defaults.base_resolution // 16) ** 2 if image_tokens is None else count("image_tokens", image_tokens)
        )
        encoder, transformer, autoencoder = self.parts().values()
        work = {"tokens": tokens, "images": count("images", images), "guided": guided}
        return sizes_of(self.transformer.config, encoder, transformer, autoencoder, device, **work)

    @diffusers_calls.known_arguments("LensPipeline.set_residency")
    def set_residency(
        self,
        residency: str | Residency = "auto",
        device: torch.device | str | None = None,
        memory: float | None = None,
        image_tokens: int | None = None,
        images: int = 1,
        guided: bool | None = None,
    ) -> Residency:
        """Place the parts: "resident", "trimmed" (modulation weights on the host), "balanced" (the text encoder visits
        the device, too), "lean" (all parts visit it; on a CPU, which they cannot leave, "balanced"), or "auto": the first of
        these whose predicted peak fits the free memory; or a policy of your own. Returns it. Tables that were prepared are made again where weights visit.

        memory: GB (10^9 bytes) that "auto" may fill, also on a CPU, where the process as a whole counts and only the text
        encoder leaves, layer by layer, to be read again with the next prompt; for ``images`` of ``image_tokens`` at once
        (default: one of the model's size), ``guided`` (default: as the checkpoint is drawn by default).

        ValueError for an unknown name, a device that is not there or a part that cannot move, with nothing changed;
        MemoryError where "auto" finds nothing that fits.
        """
        device = self.device if device is None else _usable(device, "set_residency")
        if memory is not None:
            _expect_memory(memory, residency, device, None)
        return self._reside(residency, device, memory, image_tokens, images, guided)

    def _reside(
        self,
        residency: str | Residency,
        device: torch.device,
        memory: float | None = None,
        image_tokens: int | None = None,
        images: int = 1,
        guided: bool | None = None,
    ) -> Residency:
        guided = (memory is None or self.defaults.guidance_scale != 1.0) if guided is None else guided
        sizes, parts = self._sizes(device, image_tokens, images, guided), self.parts()
        fixed = [part for part, module in parts.items() if immovable(module)]
        if memory is not None and device.type == "cpu":
            policy = within(memory, sizes)
        else:
            free = free_bytes(device, parts.values())
            if memory is not None:
                free = min(int(memory * 1e9), free or int(memory * 1e9))
            policy = choose(named(residency, device), sizes, free, fixed)
        if device != self.device:
            self._set_batch_invariance(device)
        placement = Placement(policy, device)
        for part, module in parts.items():
            placement.add(part, module)
        if policy.modulation == "host":
            evict(self.transformer, "cpu")
        self.engine.weights_move = policy.transformer != "resident"
        self.placement = placement
        return policy

    live = set_residency  # its earlier name

    def _set_batch_invariance(self, device: torch.device) -> None:
        asked = self._batch_invariant
        self.transformer.batch_invariant = default_invariance(self.transformer, device) if asked is None else asked

    @contextlib.contextmanager
    def stage(self, name: str, needed: bool = True) -> Iterator[None]:
        """A stage of a call ("encode", "denoise", "decode"); profilers see its name. Its part is on the device, where it
        is ``needed``.
        """
        visit = self.placement.using(STAGES[name]) if self.placement and needed else contextlib.nullcontext()
        with threads_for(self._width(name), self.device), visit, marked(f"lens {name}"):
            yield

    def _width(self, stage: str) -> int:
        """Of the widest activations of a stage's part."""
        if stage == "decode":
            return max(self.codec.vae.config.block_out_channels)
        return self.text_encoder.width if stage == "encode" else self.transformer.config.inner_dim

    @property
    def threads(self) -> int:
        """CPU threads that images are drawn on: 1 for a small model on a CPU, else what torch is set to."""
        return max(number_for(self._width(stage), self.device) for stage in STAGES)

    # ------------------------------------------------------------------------------------------------ text

    @diffusers_calls.known_arguments("LensPipeline.tokenize")
    def tokenize(
        self,
        prompts: str | Sequence[str],
        max_sequence_length: int = 512,
        truncation: str = "reference",
        chat_date: str | None = DEFAULT_CHAT_DATE,
    ) -> tuple[Tensor, Tensor]:
        """Whole rendered sequences: ids int64 [B, S], right padded, and mask bool [B, S]."""
        return self.text_encoder.tokenize(prompt_list("prompt", prompts), max_sequence_length, truncation, chat_date)

    @diffusers_calls.known_arguments("LensPipeline.encode_text")
    def encode_text(
        self,
        prompts: str | Sequence[str],
        max_sequence_length: int = 512,
        truncation: str = "reference",
        chat_date: str | None = DEFAULT_CHAT_DATE,
    ) -> tuple[list[Tensor], Tensor]:
        """F tensors [B, T, E] (first 97 positions dropped, zero padded on the right) and mask bool [B, T]."""
        texts = prompt_list("prompt", prompts)
        with self.stage("encode"):
            return pad_features(self.text_encoder.encode(texts, max_sequence_length, truncation, chat_date))

    def _text(self, features: list[list[Tensor]], index: list[Tensor] | None = None) -> Text:
        """Features of B samples, projected; those that several samples share are projected once."""
        if index is None:
            index = [torch.arange(len(sample[0])) for sample in features]
        rows: dict[int, Tensor] = {}
        for sample in features:
            if id(sample) not in rows:
                own = [f.to(self.device, self.dtype) for f in sample]
                rows[id(sample)] = self.transformer.project_text(own, [len(own[0])])
        return Text([rows[id(sample)] for sample in features], index, features)

    def _features(self, request: Request, negative: bool) -> _Features:
        """One of the two texts of P prompts -> features of B samples."""
        config, name = self.transformer.config, "negative_prompt" if negative else "prompt"
        given: Sequence[Tensor] | None = getattr(request, f"{name}_embeds")
        if given is not None:
            layers, width = len(config.selected_layer_index), config.enc_hidden_dim
            mask: Tensor | None = getattr(request, f"{name}_mask")
            samples, index = split_features(f"{name}_embeds", given, mask, layers, width)
            if len(samples) == 1:
                samples, index = samples * request.count, index * request.count
            if len(samples) != request.count:
                raise ValueError(
                    f"{name}_embeds must hold one prompt or one per prompt ({request.count}), got {len(samples)}"
                )
            return _repeat(samples, request.num_images_per_prompt), _repeat(index, request.num_images_per_prompt)
        texts = request.texts(negative)
        written = [p for p in texts if p is not None]
        encoded: dict[str | None, list[Tensor]] = dict(
            zip(written, self.text_encoder.encode(written, *request.encoding))
        )
        nothing = torch.zeros(0, config.enc_hidden_dim, device=self.device, dtype=self.dtype)
        encoded[None] = [nothing] * len(config.selected_layer_index)
        return _repeat([encoded[p] for p in texts], request.num_images_per_prompt), None

    # ------------------------------------------------------------------------------------------------ call

    @diffusers_calls.known_arguments("LensPipeline()")
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        base_resolution: int | None = None,
        aspect_ratio: str | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        prompt_mask: Tensor | None = None,
        negative_prompt_embeds: Sequence[Tensor] | None = None,
        negative_prompt_mask: Tensor | None = None,
        max_sequence_length: int = 512,
        truncation: str = "reference",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        chat_date: str | None = DEFAULT_CHAT_DATE,
        solver: str = "euler",
        reason: Reasoner | None = None,
    ) -> LensPipelineOutput | tuple[Any]:
        """Draw pictures. Order is prompt-major: [p0, p0, p1, p1] for two images per prompt; B pictures in all.

        Sizes are pixels, multiples of 16: ``sizes`` one (height, width) per prompt, or height and width, or
        base_resolution and "W:H" aspect_ratio; default the model's base, square. seed: int (picture k gets seed + k) or
        B ints; generator: one per picture, or one for a single draw of [B, I, C]; latents: [B, I, C] or a list of
        [I, C]. negative_prompt: one for all or one per prompt; a blank one carries no text; unread at guidance 1.
        prompt_embeds, negative_prompt_embeds: F tensors [B, T, E] in place of the prompts; masks bool [B, T], True =
        valid, None = all. output_type: "pil" list, "np" float32 [B, H, W, 3] in [0, 1], "pt" the same as tensor [B, 3, H, W], "latent" float32 [B, I, C];
        mixed sizes give lists. callback_on_step_end(pipe, i, t, tensors), t = 1000 sigma ([B] for mixed sizes), gets
        the tensors it names and may return replacements: latents; noise_pred (the guided velocity; the step is taken
        again); embeddings, for the steps to come, where another T means that all T tokens are valid. solver: "euler", or
        "dpm2m", DPM-Solver++(2M), of second order for as many steps; not with a scheduler that adds noise.
        reason: what writes the prompts out before they are drawn (``lens.reasoner``); it may refuse, PromptsRefused, and
        nothing is drawn. None: they are drawn as they stand, and nothing is filtered. Wrong arguments raise ValueError, NaN
        in the final latents FloatingPointError. A distilled checkpoint warns of guidance, negative prompts and other steps
        than it was trained on, and draws by them all the same.
        """
        reasoned: list[Refined] | None = None
        if reason is not None:
            if not callable(reason):
                raise TypeError(f"reason must be a lens.reasoner.Reasoner, got {shortened(reason)}")
            answers = reason(prompt_list("prompt", prompt))
            reasoned = [answer for answer in answers if isinstance(answer, Refined)]
            if len(reasoned) < len(answers):
                raise PromptsRefused(answers)
            prompt = [answer.prompt for answer in reasoned]
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            base_resolution=base_resolution,
            aspect_ratio=aspect_ratio,
            sizes=sizes,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            prompt_mask=prompt_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_mask=negative_prompt_mask,
            max_sequence_length=max_sequence_length,
            truncation=truncation,
            output_type=output_type,
            chat_date=chat_date,
            solver=solver,
        )
        output = self.draw(request, callback_on_step_end, callback_on_step_end_tensor_inputs)
        output = replace(output, reasoned=reasoned)
        return output if return_dict else (output.images,)

    @torch.no_grad()
    def draw(
        self,
        request: Request,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LensPipelineOutput:
        """A call whose arguments are a `Request`."""
        shown = callbacks.check_names(callback_on_step_end_tensor_inputs)
        if not isinstance(request, Request):
            raise TypeError(f"request must be a lens.request.Request, got {shortened(request)}")
        if not isinstance(self.scheduler, Scheduler):
            raise TypeError(f"pipe.scheduler must be a lens.sampler.Scheduler, got {shortened(self.scheduler)}")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end must be callable, got {shortened(callback_on_step_end)}")
        request = request.resolved(self.defaults)
        if self.scheduler.stochastic_sampling and request.solver != "euler":
            raise ValueError(
                f"solver must be 'euler' where the scheduler adds noise to steps, got {shortened(request.solver)}"
            )
        if self.placement is None or self.placement.residency.transformer == "resident":
            with threads_for(self._width("denoise"), self.device):
                self._tables.watch(self.transformer)
                self.engine.watch(self.transformer)
        shapes = [(h * w, self.transformer.config.in_channels) for h, w in request.grids]
        draw, seeds = sampler.plan_noise(shapes, request.seed, request.generator, request.latents)
        drawn = host_lane_for(self.device).submit(lambda: [_pinned(n, self.device) for n in draw()], ())
        read = any(text is not None for negative in (False, True) for text in request.texts(negative))
        with self.stage("encode", needed=read):
            features = self._features(request, negative=False)
            unwanted = self._features(request, negative=True) if request.guided else None
        with self.stage("denoise"):
            text, negative = self._text(*features), None if unwanted is None else self._text(*unwanted)
            job = self._job(request, text, negative, drawn, seeds)
            final = self._denoise(job, callback_on_step_end, shown)
        return LensPipelineOutput(self._finish(final, job, request.output_type), seeds)

    def stream(
        self,
        requests: Sequence[Request],
        max_tokens: int = 32768,
        max_images: int = 8,
        output_type: str = "pil",
        max_pictures: int | None = None,
        **encoding: Any,
    ) -> Iterator[tuple[int, Any, int | None]]:
        """Draw many pictures: (index in ``requests``, image, seed), each as soon as it is done.

        Requests of equal steps and guidance are packed into batches of at most ``max_tokens`` rows (image and text,
        both halves under guidance) and ``max_images`` (``max_pictures``: its earlier name), see ``packing.TokenQueue``; on CUDA of one size, for the
        captured step. A batch is decoded while the next is denoised. What shares a batch changes a picture by rounding
        at most, on a CPU by no bit. encoding: max_sequence_length, truncation, chat_date. Errors as of a call.
        """
        return stream(self, requests, max_tokens, max_pictures or max_images, output_type, **encoding)

    # ------------------------------------------------------------------------------------------------ denoise

    @diffusers_calls.known_arguments("LensPipeline.prepare")
    def prepare(self, image_tokens: int, num_inference_steps: int) -> None:
        """Make and keep the modulation table of a schedule, so that ``lens.engine.schedule_table.evict`` may drop its weights."""
        tokens, steps = (
            count("image_tokens", image_tokens),
            count("num_inference_steps", num_inference_steps, MAX_STEPS),
        )
        with self.stage("denoise"):
            self._schedules([tokens], steps, prepared=True)

    def _schedules(self, lengths: list[int], steps: int, prepared: bool = False) -> tuple[Tensor, Tensor, Modulation]:
        """Sigmas float32 [B, steps + 1], each sample's first table row [B], one table of the distinct schedules."""
        tokens = sorted(set(lengths))
        sigmas = [self.scheduler.sigmas(n, steps) for n in tokens]
        times = [sampler.conditioning_time(s[:-1], self.dtype, self.defaults.time_dtype) for s in sigmas]
        table = concatenate([self._tables.get(self.transformer, t, prepared) for t in times])
        which = torch.tensor([tokens.index(n) for n in lengths])
        return torch.stack(sigmas)[which], which * steps, table

    def _job(
        self,
        request: Request,
        text: Text,
        negative: Text | None,
        drawn: Pending[list[Tensor]],
        seeds: Sequence[int | None],
    ) -> Job:
        """What the engine draws. drawn: the starting noise, which a thread may still be at."""
        assert request.num_inference_steps is not None, "of a request that was not resolved"
        assert request.guidance_scale is not None, "of a request that was not resolved"
        sigma, first, table = self._schedules([h * w for h, w in request.grids], request.num_inference_steps)
        noise = drawn.result()
        keys = None
        if self.scheduler.stochastic_sampling:
            keys = [sampler.noise_key(n) if s is None else s for n, s in zip(noise, seeds)]
        return Job(
            grids=request.grids,
            text=text,
            negative=negative,
            guidance=request.guidance_scale,
            sigma=sigma,
            first=first,
            table=table,
            x=torch.cat([n.to(self.device, non_blocking=True) for n in noise]),
            noise_keys=keys,
            solver=request.solver,
        )

    def _denoise(self, job: Job, callback: Callback | None, wanted: tuple[str, ...]) -> list[Tensor]:
        offsets = offsets_of(job.lengths, self.device)
        run = self.engine.start(self.transformer, job)
        try:
            for i in counted_steps(job.steps, self._progress and callback is None):
                run.step(self._step_noise(job, i))
                if callback is None:
                    continue
                shown = {name: callbacks.shown(name, job, run, offsets) for name in wanted}
                t = 1000 * (job.sigma[0, i] if job.same_size else job.sigma[:, i])
                given = callbacks.replaced(
                    callback(self, i, t, {k: callbacks.copied(v) for k, v in shown.items()}), shown
                )
                if "noise_pred" in given:
                    run.retake(callbacks.packed("noise_pred", given["noise_pred"], job, run.x))
                if "latents" in given:
                    run.x.copy_(callbacks.packed("latents", given["latents"], job, run.x))
                if any(name.endswith("embeds") for name in given):
                    if "prompt_embeds" in given:
                        job = replace(job, text=self._new_text("prompt_embeds", given["prompt_embeds"], job.text))
                    if (name := "negative_prompt_embeds") in given:
                        job = replace(job, negative=self._new_text(name, given[name], job.negative))
                    if i + 1 == job.steps:
                        continue  # no step is left to read them, nor a row of the table to begin with
                    job = job.resumed(run.x, i + 1, run.clean)
                    run.close()
                    run = self.engine.start(self.transformer, job)
            return list(run.x.clone().split(job.lengths))
        finally:
            run.close()

    def _step_noise(self, job: Job, step: int) -> Tensor | None:
        if job.noise_keys is None:
            return None
        channels = self.transformer.config.in_channels
        return torch.cat([sampler.step_noise(k, step, n, channels) for k, n in zip(job.noise_keys, job.lengths)])

    def _new_text(self, name: str, features: Any, old: Text | None) -> Text:
        """Features a callback returned: of the old T, their masks hold on; of another T, all tokens are valid."""
        if old is None:
            raise ValueError(f"callback_on_step_end: {name} cannot be replaced at guidance 1, where nothing reads it")
        config = self.transformer.config
        _, held = pad_features(old.features)
        name = f"callback_on_step_end: {name}"
        moved = any(part.shape[:2] != held.shape for part in expect_tensors(name, features)[:1])
        mask = None if moved else held
        samples, index = split_features(name, features, mask, len(config.selected_layer_index), config.enc_hidden_dim)
        if len(samples) != len(old.index):
            raise ValueError(f"{name} must hold B = {len(old.index)} samples, got {len(samples)}")
        return self._text(samples, index if mask is None else old.index)

    # ------------------------------------------------------------------------------------------------ pixels

    def _finish(self, rows: list[Tensor], job: Job, output_type: str) -> Any:
        self._expect_finite("final latents", rows)
        if output_type == "latent":
            return job.shaped(torch.cat(rows))
        with self.stage("decode"):
            images = [self.codec.decode(r, grid) for r, grid in zip(rows, job.grids)]
        self._expect_finite("decoded pixels", images)
        if output_type == "pil":
            return [pixels.to_pil(p) for p in images]
        if output_type == "pt":
            planes = [((p + 1) / 2).permute(2, 0, 1) for p in images]
            return torch.stack(planes) if job.same_size else planes
        arrays = [pixels.to_numpy(p) for p in images]
        return np.stack(arrays) if job.same_size else arrays

    def _expect_finite(self, what: str, found: list[Tensor]) -> None:
        """Errors: FloatingPointError naming the weights that are to blame, of which only now all are read."""
        for k, x in enumerate(found):
            if not torch.isfinite(x).all():
                names = list(_not_finite(self.parts()))
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                blame = f"; so do the weights {', '.join(names[:4])}{more}" if names else "; no weight does"
                raise FloatingPointError(f"picture {k}: the {what} hold NaN or infinity{blame}")


def _changeable(adapter: Adapter, transformer: LensTransformer2DModel) -> Adapter:
    """Modulation weights that were left in the files are read where the adapter changes some."""
    if any(".modulation." in name for name in adapted_weights(transformer, [(adapter, 1.0)])):
        recall_modulation(transformer)
    return adapter


def _not_finite(parts: Mapping[str, torch.nn.Module]) -> Iterator[str]:
    """The weights that hold NaN or infinity, as their files name them. On the meta device there is nothing to read."""
    for part, module in parts.items():
        for name, p in module.named_parameters():
            if p.is_floating_point() and not p.is_meta and not torch.isfinite(p).all():
                own = released_names(name) if part == "transformer" else [name]
                yield from (f"{part}/{key}" for key in own)


def _expect_memory(memory: Any, residency: Any, device: torch.device, encoder: str | None) -> None:
    """Errors: ValueError for a limit that is none, and for one beside what it would decide."""
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory < math.inf:
        raise ValueError(f"memory must be a positive number of GB, got {shortened(memory)}")
    if residency not in (None, "auto"):
        raise ValueError(f"give only one of memory and residency, got {memory:g} and {residency!r}")
    if encoder == "transformers" and device.type == "cpu":
        raise ValueError(
            "memory needs encoder='lens': transformers expands the experts on a CPU, which is not predicted"
        )


def _stored_sizes(files: Any, config: LensConfig, defaults: Defaults, dtype: torch.dtype) -> Sizes:
    """Sizes on a CPU of a checkpoint that is still to be loaded, by the headers of its files: its weights as they lie there."""

    def nbytes(stored: Mapping[str, Stored]) -> int:
        spans = (s.shard.entries[s.key][2:] for s in stored.values())
        return sum(end - begin for begin, end in spans)

    depth = max(config.selected_layer_index) + 1
    encoder = text_encoder_tensors(files.text_encoder, depth)
    encoder.pop("embed_tokens.weight", None)
    layer = nbytes({name: s for name, s in encoder.items() if name.startswith("layers.0.")})
    codec, itemsize = vae_tensors(files.vae), dtype.itemsize
    values = itemsize * sum(math.prod(s.shape) for s in codec.values())
    tokens, guided = (defaults.base_resolution // 16) ** 2, defaults.guidance_scale != 1.0
    channels = vae_channels(files.vae)
    return cpu_sizes(config, nbytes(encoder), layer, values, channels, tokens, 1, guided, itemsize)


def _usable(device: str | torch.device, method: str) -> torch.device:
    """A device that parts can live on. Errors: ValueError naming it and the method that was given it.

    One that is there but that no target of this build serves is taken: its ops run their reference, and say so once.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"LensPipeline.{method}: device {str(device)[:80]!r}: {error}") from None
    if found.type == "meta":
        why = "holds no data"
    elif found.type not in ("cpu", "cuda"):
        why = 'expected "cpu", "cuda" or "cuda:N"'
    elif found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        why = f"torch sees {torch.cuda.device_count()} usable GPUs; `lens doctor` says why"
    else:
        return found
    raise ValueError(f"LensPipeline.{method}: device {str(found)!r}: {why}")


def _cast(part: torch.nn.Module, dtype: torch.dtype) -> None:
    """What a checkpoint holds, in another type, as loading makes it: tables computed in float32 stay as they are."""
    for module in part.modules():
        kept = [b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set]
        for tensor in (*module._parameters.values(), *kept):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _pinned(noise: Tensor, device: torch.device) -> Tensor:
    """The device fetches pinned memory by itself; for any other the host waits until the text encoder is done."""
    if device.type != "cuda" or noise.device.type != "cpu":
        return noise
    with torch.cuda.device(device):  # a thread begins on the first GPU, and pinning opens a context there
        return noise.pin_memory()


def _repeat(items: Sequence[Any], times: int) -> list[Any]:
    return [item for item in items for _ in range(times)]
