"""Golden files of the wire format: what is stored in a bucket, byte for byte, and what it was made from.

`files/` is committed; `python -m tests.golden` makes it anew. A change of these bytes is a change of the format: runs
that are in buckets, and replicas of another release, do not change with the code. So make them anew only for a new
format, or to add some; never to make `tests/test_golden.py` pass.

    parts/       delta parts: every dtype at both levels, several chunks, dense differences, a merged delta
    documents/   run, manifests and head, made by their constructors
    signed/      the same, signed, under their names in a run
    run/         a signed run as its writer leaves it: anchors, deltas of one and two ranks, a rollback, merged deltas
    adapter/     a run that publishes a LoRA adapter; it is not signed

Not here: `gc.json`, which is about times of the storage and read by nobody but retention.

What depends on more than this code: `safetensors` (made with 0.8.0) writes the anchors' headers; and the codec chooses
parameters by logarithms of numpy (made with 2.3.5), so where two choices cost nearly the same, another numpy or CPU
might take the other one. If only tests of the same bytes fail after an upgrade, and those that read pass, look there.
"""
