"""The variants; importing this package registers all of them. One file each."""

from sparseattn.variants.base import SpecInfo, Variant, parse, specs, variants
from sparseattn.variants.blockmask import BlockMask
from sparseattn.variants.combine import Intersection, PerHead, PerLayer, Union
from sparseattn.variants.dense import Dense
from sparseattn.variants.prefix import Prefix
from sparseattn.variants.random import RandomKeys
from sparseattn.variants.topk import TopK
from sparseattn.variants.window import Window

__all__ = [
    "BlockMask",
    "Dense",
    "Intersection",
    "PerHead",
    "PerLayer",
    "Prefix",
    "RandomKeys",
    "SpecInfo",
    "TopK",
    "Union",
    "Variant",
    "Window",
    "parse",
    "specs",
    "variants",
]
