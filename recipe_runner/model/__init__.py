"""The base model, its tokenizer and its adapter, up to the loaded result of a run."""
