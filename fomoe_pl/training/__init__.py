"""What training is made of: today the contract between module, data, callbacks and strategy."""
