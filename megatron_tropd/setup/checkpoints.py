"""Check models that are checkpoints of Megatron before one is built: they are whole, and of the config beside them."""

from __future__ import annotations

from megatron_tropd.config.run import RunConfig
from megatron_tropd.convert.megatron.locate import find_megatron
from megatron_tropd.convert.source import open_weights
from megatron_tropd.errors import CheckpointError, ConfigError
from megatron_tropd.teacher.engines.registry import scoring_engine
from megatron_tropd.types import ModelSource


def check_checkpoints(config: RunConfig) -> None:
    """Open every checkpoint of Megatron, of which this reads the table of tensors and no tensor.

    Raises:
        CheckpointError: one is torn, or of another model than its config.
        ConfigError: the teacher's engine reads Hugging Face directories alone.
    """
    models: dict[str, ModelSource] = {
        "student.model": config.student.source,
        "teacher.model": config.teacher.source,
        **{f"teachers[{i}].model": one.source for i, one in enumerate(config.teachers)},
        **({} if config.base.model is None else {"base.model": config.base_source}),
    }
    engine = scoring_engine(config.teacher)
    for name, source in models.items():
        if find_megatron(source.weights) is None:
            continue
        if name == "teacher.model" and engine.needs_vllm:
            raise ConfigError(
                f"teacher.model = '{source.weights}' is a checkpoint of Megatron, which "
                f"teacher.engine={config.teacher.engine} does not read. Convert it, `tropd convert megatron-to-hf "
                f"{source.weights} NEW`, or leave the engine out."
            )
        try:
            open_weights(source)
        except CheckpointError as error:
            raise CheckpointError(f"{name} = '{source.weights}': {error}") from error
