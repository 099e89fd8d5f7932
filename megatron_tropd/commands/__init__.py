"""The verbs of the command line, one file each: what ``tropd generate``, ``score``, ``check`` ... do."""
