"""The system model: bytes, FLOPs, memory and wall-clock from the configuration alone."""
