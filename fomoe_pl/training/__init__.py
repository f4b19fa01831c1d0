"""Training: the contract between module, data, callbacks and strategy; shortcuts; elastic runs."""
