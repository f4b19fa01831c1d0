"""fomoe-pl: Federated Mixture-of-Experts pre-training on PyTorch Lightning, after FoMoE (arXiv 2606.19025)."""

__version__ = "0.1.0"
