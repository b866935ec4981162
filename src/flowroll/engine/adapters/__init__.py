"""LoRA adapters: read from files or pushes, held beside the transformer or merged into a copy of it."""
