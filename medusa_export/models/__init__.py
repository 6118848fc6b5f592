"""Base models: checkpoints, GGUF files, and which models are supported."""
