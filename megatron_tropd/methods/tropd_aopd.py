"""TrOPD and AOPD combined: a token is trusted when both gates trust it (arXiv 2606.01249).

With gate_gap >= 0 AOPD's gate implies p > q, hence certain acceptance: then TrOPD's test changes nothing, and what
remains of TrOPD is the guidance. A negative gate_gap brings the acceptance test back.
"""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.tropd import TropdOptions, tropd

PRESET = Preset(
    summary="trusted only when TrOPD's and AOPD's gates both trust",
    source="arXiv 2606.01249, combination",
    options=TropdOptions,
    build=tropd,
    defaults={"gate": ("bernoulli", "probability_gap")},
)
