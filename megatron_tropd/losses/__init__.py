"""Pure tensor maths of the losses. ``vocab_parallel`` is the only module here that communicates."""
