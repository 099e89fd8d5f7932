"""Reports of a run: metric names, sinks, progress, the accuracy table and the HTML report."""
