"""Where the grades come from: a teacher model in the same processes, or its recorded answers."""
