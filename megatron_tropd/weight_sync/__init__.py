"""New weights from the trainer to the engines that sample: publishers, what receives them, verification."""
