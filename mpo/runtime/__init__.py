"""The machine room: stage folders, saves, processes, devices, flags, files. Knows nothing of models."""
