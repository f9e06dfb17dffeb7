"""Mini's text encoder: GPT-OSS's architecture at width 128, pruned vocabulary; features after every layer."""

SEED = 2
TOKENIZER = "train/data/assets/tokenizer"
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
EMBEDDING_STD = 0.5  # word identity then dominates the residual stream from the first captured layer on
LAYERS = (0, 1, 2, 3)
CAPTIONS = {"geneval": 0.10, "brief": 0.45, "dense": 0.10, "translated": 0.35}  # of all classes, in five languages
TRAIN = {
    "batch": 40,
    "pairs": 1,  # of the batch: chats whose assistant turns a short caption into a dense one
    "lr": 2e-3,
    "warmup": 50,
    "steps": 1_700,
    "decay": 400,
    "weight_decay": 0.01,
    "ema": 0.99,
    "probe": 1.0,
}
VALIDATION = 128
SAVE_EVERY, LOG_EVERY = 200, 100
