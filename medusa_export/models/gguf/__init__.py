"""GGUF files: settings, tensors and tokenizer."""
