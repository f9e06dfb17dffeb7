"""Data of the training stages: the small world, its assets, tokenizers."""
