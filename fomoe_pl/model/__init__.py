"""The transformer of one device. Knows nothing of sites beyond which expert ids are resident.

Import from the modules: `config` and `sizes` do without torch.
"""
