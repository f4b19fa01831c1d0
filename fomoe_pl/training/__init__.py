"""What training is made of: the contract between module, data, callbacks and strategy, shortcuts, and its pace."""
