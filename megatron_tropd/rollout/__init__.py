"""Where sequences come from: samplers that continue prompts and teacher prefixes, and recordings of them."""
