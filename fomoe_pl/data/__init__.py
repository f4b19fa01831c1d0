"""Corpora: documents to tokens to webdataset shards to endless per-site streams of packed sequences."""

from fomoe_pl.data.manifest import Manifest, load_manifest
from fomoe_pl.data.module import FoMoEData

__all__ = ["FoMoEData", "Manifest", "load_manifest"]
