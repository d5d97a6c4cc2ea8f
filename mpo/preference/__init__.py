"""Everything that is computed on pairs: losses, objective, reward-gap split."""
