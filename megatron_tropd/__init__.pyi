from megatron_tropd.commands.api import TrainingResult as TrainingResult
from megatron_tropd.commands.api import evaluate as evaluate
from megatron_tropd.commands.api import train as train
from megatron_tropd.config.python import Config as Config
from megatron_tropd.losses.vocab_parallel import linear_logprobs as linear_logprobs
from megatron_tropd.methods import build_method as build_method
from megatron_tropd.train.callbacks import Callbacks as Callbacks

__version__: str
