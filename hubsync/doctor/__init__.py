"""`hubsync doctor` checks whether a model can be synced exactly.

`trial` makes a run of two versions, `diagnosis` has engines follow it, `report` prints the outcome.
"""
