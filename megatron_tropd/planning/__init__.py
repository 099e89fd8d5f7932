"""What a configuration would cost on a cluster, by arithmetic: memory, traffic, time, and the layouts that fit."""
