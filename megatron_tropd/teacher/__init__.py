"""Score what the student wrote: with a teacher model here or elsewhere, or from its recorded scores."""
