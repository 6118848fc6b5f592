"""Base models: weight formats, checkpoints, and which models are supported."""
