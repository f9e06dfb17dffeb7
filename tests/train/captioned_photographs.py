"""24 CC0 photographs of the small world, and what a person wrote of each, as a vision server answers."""

import json
from pathlib import Path

from lens.chat_client import data_url
from train.caption import pixels_of
from train.data.small_world.photographs import ASSETS

CAPTIONS = Path(__file__).parent / "photo_captions.jsonl"


def photographs():
    """Their files -> the encoded bytes."""
    rows = map(json.loads, CAPTIONS.read_text(encoding="utf-8").splitlines())
    return {row["file"]: (ASSETS / row["file"]).read_bytes() for row in rows}


def answers():
    """What `caption` sends of each -> the answer; the file is no part of it."""
    found = {}
    for line in CAPTIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        sent = pixels_of((ASSETS / row.pop("file")).read_bytes(), 1024)
        found[data_url(sent)] = json.dumps(row)
    return found
