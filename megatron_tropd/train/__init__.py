"""A training session: the loop on one page, the queue of rollouts, resuming, preemption, samples for the report."""
