"""The loop that SFT, reward model and DPO share, optimisers, guards."""
