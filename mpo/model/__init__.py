"""Everything that a model does: transformer, LoRA, checkpoints, generation, log-probs, scores."""
