"""The only room that knows Megatron-Core: models, forward, step, optimizer, checkpoints, publishing."""

from megatron_tropd.engine.patches.compiler import import_megatron
from megatron_tropd.parallel.te_package import hide_broken

# before anything imports Megatron-Core, which half an installation of Transformer Engine would end
hide_broken()
import_megatron()
