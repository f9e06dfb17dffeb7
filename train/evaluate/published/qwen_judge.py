"""Qwen2.5-VL by transformers: the published reader and answerer on this machine, from a folder with its released weights.

Greedy, with the folder's own repetition penalty (1.05 as released): the published code calls `generate` with the folder's
settings, which sample at a temperature of 1e-6. Images are resized with Pillow, as there, whatever else is installed. Calls are
batched with padding on the left; on a GPU in bfloat16 an answer can depend on its batch at rounding level.

soft: p(Yes) / (p(Yes) + p(No)) of the answer's first token, before the repetition penalty; p sums over all tokens that are the word
but for blanks. Answers are kept by the content of weights, image and question, so that a run that was interrupted asks for no
answer twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lens.chat_client import Chat
from lens.formats.files import read_json, write_json
from lens.formats.fingerprint import fingerprint
from lens.formats.safetensors import open_shards, stored_as

from .chat_judges import ANSWER_TOKENS, ASK, MODEL, READ, Said
from .judging import Card
from .models import complete, device_name, exact_matmul, load

KIND = "qwen2_5_vl"  # of config.json
PUBLISHED = (28, 3584)  # layers and width of MODEL's language model
DTYPES = {"bfloat16": "bfloat16", "float32": "float32, TF32 off"}  # as the card says it
PLACE = "<|image_pad|>"  # where the chat template puts an image
TOGETHER = 8  # calls of a batch


class QwenJudge:
    """`Reader` and `Answerer`. A call that fails in a batch is made again alone; one that fails alone is a missing judgement."""

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: str | None = None,
        soft: bool = False,
        cache: Path | None = None,
    ):
        """dtype: default bfloat16 on CUDA, as published, float32 on a CPU. Errors: ValueError where the folder is not one."""
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        config = expect_folder(folder)
        self.device, self.soft, self.cache = torch.device(device), soft, cache
        self.dtype = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.weights = fingerprint({"": stored_as(open_shards(folder))})[:16]
        self.tokenizer: Any = load(AutoTokenizer, str(folder), local_files_only=True)
        self.tokenizer.padding_side = "left"
        self.pixels: Any = load(Qwen2VLImageProcessorPil, str(folder), local_files_only=True)
        self.template = template_of(folder, self.tokenizer.chat_template)
        self.place = self.tokenizer.convert_tokens_to_ids(PLACE)
        if self.place != config.get("image_token_id", self.place):
            raise ValueError(
                f"{folder / 'config.json'}: image_token_id {config['image_token_id']}, but {PLACE} is {self.place}"
            )
        self.model: Any = complete(Qwen2_5_VLForConditionalGeneration, folder, dtype=getattr(torch, self.dtype))
        self.model.eval().to(self.device)
        settings = self.model.generation_config
        settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, None, None, None
        text = self.model.config.text_config
        own = (text.num_hidden_layers, text.hidden_size)
        differs = (
            [] if own == PUBLISHED else [f"the published judge is {MODEL}, {own[0]} layers of width {own[1]} here"]
        )
        differs += [] if self.dtype == "bfloat16" else [f"published in bfloat16, {self.dtype} here"]
        self.card = Card(
            f"Qwen2.5-VL {folder.name}", f"local {self.weights}", DTYPES[self.dtype], device_name(self.device), "; ".join(differs)
        )  # fmt: skip
        self.words = {word: self.ids_of(word) for word in ("Yes", "No")}

    def ids_of(self, word: str) -> Tensor:
        """All tokens that are the word, blanks aside. Errors: ValueError where there is none."""
        vocabulary = self.tokenizer.get_vocab().values()
        found = sorted(i for i in vocabulary if self.tokenizer.decode([i]).strip() == word)
        if not found:
            raise ValueError(f"judge {self.tokenizer.name_or_path}: its tokenizer has no token {word!r}")
        return torch.tensor(found, device=self.device)

    # ------------------------------------------------------------------------------------------------ the model

    def prepared(self, calls: Sequence[tuple[np.ndarray, str]]) -> dict[str, Tensor]:
        """Images uint8 [H, W, 3] with their texts -> what `generate` takes, padded on the left."""
        seen = self.pixels(images=[Image.fromarray(image) for image, _ in calls], return_tensors="pt")
        texts = []
        for (_, text), grid in zip(calls, seen["image_grid_thw"]):
            words = [{"type": "image"}, {"type": "text", "text": text}]
            chat = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": words}],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
            )
            before, place, after = chat.partition(PLACE)
            if not place or PLACE in after:
                raise ValueError(f"judge: expected {PLACE} once in a chat with one image, got {chat[:200]!r}")
            texts.append(before + PLACE * (int(grid.prod()) // self.pixels.merge_size**2) + after)
        ids = self.tokenizer(texts, padding=True, return_tensors="pt")
        out = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], **seen}
        out["mm_token_type_ids"] = (out["input_ids"] == self.place).int()
        return {name: value.to(self.device) for name, value in out.items()}

    @torch.no_grad()
    def generated(self, calls: Sequence[tuple[np.ndarray, str]], limit: int) -> list[tuple[str, float | None]]:
        """(text, soft) of each call, all in one batch, at most `limit` tokens."""
        inputs = self.prepared(calls)
        with exact_matmul():
            out = self.model.generate(
                **inputs, max_new_tokens=limit, return_dict_in_generate=True, output_logits=self.soft
            )
        written = out.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not self.soft:
            return [(text, None) for text in texts]
        first = out.logits[0].float()
        yes, no = (first[:, ids].logsumexp(-1) for ids in self.words.values())
        return list(zip(texts, torch.sigmoid(yes - no).tolist()))

    def asked(self, calls: Sequence[tuple[np.ndarray, str]], limit: int) -> list[tuple[str, float | None] | Exception]:
        """As `generated`, out of the cache where it is there; in parts of TOGETHER of like length."""
        paths = [self.cached_at(call, limit) for call in calls]
        found: list[tuple[str, float | None] | Exception | None] = [self.kept(path) for path in paths]
        todo = sorted((k for k, one in enumerate(found) if one is None), key=lambda k: len(calls[k][1]))
        for k in range(0, len(todo), TOGETHER):
            part = todo[k : k + TOGETHER]
            for index, one in zip(part, self.each([calls[i] for i in part], limit)):
                found[index] = one
                if isinstance(one, tuple) and (path := paths[index]) is not None:
                    write_json(path, {"text": one[0], "soft": one[1]})
        return [one for one in found if one is not None]

    def each(
        self, calls: Sequence[tuple[np.ndarray, str]], limit: int
    ) -> Sequence[tuple[str, float | None] | Exception]:
        """A batch; where that fails (memory, an image of odd sides), its calls one by one, each with its own failure."""
        try:
            return self.generated(calls, limit)
        except Exception as error:
            if len(calls) == 1:
                return [error]
        return [self.each([call], limit)[0] for call in calls]

    def cached_at(self, call: tuple[np.ndarray, str], limit: int) -> Path | None:
        if self.cache is None:
            return None
        key = Chat(call[1], images=(call[0],), max_tokens=limit).key(f"{self.weights} {self.dtype}")
        return self.cache / key[:2] / f"{key}.json"

    def kept(self, path: Path | None) -> tuple[str, float | None] | None:
        """An answer of before; None where there is none, or none with a probability where one is wanted."""
        if path is None or not path.is_file():
            return None
        values = read_json(path)
        return None if self.soft and values["soft"] is None else (values["text"], values["soft"])

    # ------------------------------------------------------------------------------------------------ the judge

    def read(self, images: Sequence[np.ndarray], limit: int) -> list[str | Exception]:
        found = self.asked([(image, READ) for image in images], limit)
        return [one if isinstance(one, Exception) else one[0] for one in found]

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Said | Exception]:
        found = self.asked([(image, ASK.format(question)) for question in questions], ANSWER_TOKENS)
        return [
            one if isinstance(one, Exception) else Said(one[0] == "Yes", one[1] if self.soft else None) for one in found
        ]


def expect_folder(folder: Path) -> Mapping[str, Any]:
    """config.json's values. Errors: ValueError naming the file, what was expected and what is there."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; --judge-model takes a folder with the released weights of {MODEL}")
    config = read_json(path)
    if config.get("model_type") != KIND:
        raise ValueError(f"{path}: expected model_type {KIND!r}, got {config.get('model_type')!r}")
    return config


def template_of(folder: Path, own: str | None) -> str:
    """The tokenizer's chat template, or chat_template.json's. Errors: ValueError without either."""
    path = folder / "chat_template.json"
    if own is None and path.is_file():
        own = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    if own is None:
        raise ValueError(f"{folder}: no chat template, neither in tokenizer_config.json nor in {path.name}")
    return own
