"""The cost of a configuration on a cluster, by arithmetic: memory, traffic, time, and the layouts that fit."""
