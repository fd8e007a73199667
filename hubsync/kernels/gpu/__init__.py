"""Passes over all tensors of a model in one launch each, in Triton. Imported only for tensors on a GPU."""
