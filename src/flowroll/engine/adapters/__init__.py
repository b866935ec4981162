"""LoRA adapters, which are read from files or pushed, and run beside the transformer or merged into copies of its weights."""
