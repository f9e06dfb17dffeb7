"""Data of the training stages: images, shards, buckets, the loader, tokenizers; the toy world in `small_world`."""
