"""The configuration: frozen sections, the tree of a run, reading, messages, and the generated reference."""
