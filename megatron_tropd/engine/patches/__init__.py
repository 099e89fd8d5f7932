"""Every change to attributes of foreign code, each with its reason and when it can go."""
