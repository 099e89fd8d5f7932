"""What a run leaves to look at: metric names, sinks, progress, the accuracy table and the HTML report."""
