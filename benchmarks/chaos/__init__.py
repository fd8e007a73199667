"""Random histories of publishers and replicas with crashes, stalls, lag and faults: exact, or reported."""
