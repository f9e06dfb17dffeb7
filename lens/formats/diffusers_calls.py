"""What users of diffusers' pipelines type and Lens does not have: names of methods and arguments, and what to write instead."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

METHODS = {
    **dict.fromkeys(
        ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
        "set_residency('auto'), 'balanced' or 'lean' keeps parts on the host",
    ),
    **dict.fromkeys(
        ("enable_vae_tiling", "enable_vae_slicing", "enable_attention_slicing"), "images are decoded one by one"
    ),
    **dict.fromkeys(("cuda", "cpu", "half", "float", "bfloat16"), "to('cuda', torch.bfloat16) moves and casts"),
    **dict.fromkeys(
        ("enable_xformers_memory_efficient_attention", "enable_flash_attention", "set_attention_backend"),
        "the fastest library that can serve is chosen, and `lens doctor` says which",
    ),
    "compile": "the kernels are compiled already",
    "eval": "it never trains",
    "encode_prompt": "encode_text(prompts) gives (features, mask) for prompt_embeds and prompt_mask",
    "set_adapters": "load_lora(path, scale) merges one, unload_lora() takes all out",
    "fuse_lora": "load_lora merges into the weights at once",
    "save_pretrained": "lens.formats.released.save_transformer writes the transformer",
    **dict.fromkeys(("get_active_adapters", "get_list_adapters"), "loras lists what is in force"),
    "image_processor": "output_type gives 'pil', 'np', 'pt' or 'latent'",
}

_SCHEDULE = (
    "the schedule follows from num_inference_steps, the image's size and pipe.scheduler, which may be replaced by another "
    "lens.sampler.Scheduler(shift=..., use_dynamic_shifting=False)"
)
_ONE_ENCODER = "there is one text encoder, and it reads prompt"
_FROM_TEXT = "images are drawn from text alone"
ARGUMENTS = {
    **dict.fromkeys(("sigmas", "timesteps", "mu"), _SCHEDULE),
    **dict.fromkeys(("true_cfg_scale", "cfg_scale", "guidance"), "guidance_scale is the one guidance"),
    **dict.fromkeys(("callback", "callback_steps"), "callback_on_step_end is called after every step"),
    **dict.fromkeys(
        ("attention_kwargs", "cross_attention_kwargs", "joint_attention_kwargs"), "load_lora(path, scale) has the scale"
    ),
    **dict.fromkeys(("prompt_2", "prompt_3"), _ONE_ENCODER),
    **dict.fromkeys(("negative_prompt_2", "negative_prompt_3"), _ONE_ENCODER.replace("prompt", "negative_prompt")),
    **dict.fromkeys(
        ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), "features are not pooled: prompt_embeds"
    ),
    **dict.fromkeys(("prompt_embeds_mask", "prompt_attention_mask"), "prompt_mask"),
    **dict.fromkeys(("negative_prompt_embeds_mask", "negative_prompt_attention_mask"), "negative_prompt_mask"),
    **dict.fromkeys(("image", "mask_image", "strength", "control_image", "ip_adapter_image"), _FROM_TEXT),
    "eta": "pipe.scheduler decides whether steps add noise",
    "clip_skip": "the layers that are read are the checkpoint's",
    # of loading
    "cache_dir": "set HF_HOME",
    "token": "set HF_TOKEN",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "subfolder": "name the folder itself, or one part's with transformer=, text_encoder= or vae=",
    "device_map": "device= is for all parts, residency= says where each lives",
    "quantization_config": "weights are loaded as they are stored",
    "scheduler": "assign pipe.scheduler after loading",
    "safety_checker": "nothing is filtered",
    **dict.fromkeys(("use_safetensors", "low_cpu_mem_usage"), "it is always so"),
    # of LoRAs
    "weight_name": "name the file itself",
    **dict.fromkeys(
        ("adapter_name", "adapter_weights"), "load_lora(path, scale) merges one, unload_lora() takes all out"
    ),
}


def known_arguments(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A method whose unknown keyword arguments are a TypeError that says what there is instead, called ``name`` in it."""

    def of(method: Callable[P, R]) -> Callable[P, R]:
        kinds = inspect.signature(method).parameters
        parameters = [name for name, p in kinds.items() if p.kind is not p.VAR_POSITIONAL]

        @functools.wraps(method)
        def checked(*arguments: P.args, **keywords: P.kwargs) -> R:
            for unknown in (key for key in keywords if key not in parameters):
                close = difflib.get_close_matches(unknown, parameters, 1)
                hint = ARGUMENTS.get(unknown) or (f"did you mean {close[0]!r}?" if close else "")
                has = f"it has {', '.join(p for p in parameters if p not in ('self', 'cls'))}"
                raise TypeError(f"{name} has no argument {unknown!r}; {hint or has}")
            return method(*arguments, **keywords)

        return checked

    return of
