"""From a configuration to the live objects of a run: validation, data sets, models, the self check."""
