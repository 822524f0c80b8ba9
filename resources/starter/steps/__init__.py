"""The steps that make the starter model: tokenizer, base model, voice adapter, GGUF."""
