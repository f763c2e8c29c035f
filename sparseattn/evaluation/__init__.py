"""Quality and cost of attention variants on a checkpoint."""

from sparseattn.evaluation.compare import Comparison, compare
from sparseattn.evaluation.single import Perplexity, perplexity

__all__ = ["Comparison", "Perplexity", "compare", "perplexity"]
