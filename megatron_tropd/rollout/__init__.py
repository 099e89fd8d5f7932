"""The sources of sequences: samplers that continue prompts and teacher prefixes, and recordings of them."""
