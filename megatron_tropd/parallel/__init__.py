"""Process groups and collectives. ``group=None`` means one rank, and the same code runs."""

from megatron_tropd.parallel.te_package import hide_broken

# before anything imports Megatron-Core, which half an installation of Transformer Engine would end
hide_broken()
