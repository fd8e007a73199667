"""Random histories of publishers and replicas that die, stall, lag and meet faults: exact, or loud."""
