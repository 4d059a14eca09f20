"""What networks cost and what they see."""

from replknet.analysis.cost import Cost, cost
from replknet.analysis.erf import ERF, effective_receptive_field

__all__ = ["ERF", "Cost", "cost", "effective_receptive_field"]
