"""Golden files of the wire format: the exact bytes stored in a bucket, and the data they encode.

`files/` is committed; `python -m tests.golden` regenerates it. A change of these bytes is a change of the format:
existing runs in buckets and replicas of another release do not change with the code. So regenerate the files only for
a new format or to add some, never to make `tests/test_golden.py` pass.

    parts/       delta parts: every dtype at both levels, several chunks, dense differences, a merged delta
    documents/   run, manifests and head, made by their constructors
    signed/      the same, signed, under their names in a run
    run/         a signed run as its writer leaves it: anchors, deltas of one and two ranks, a rollback, merged deltas
    adapter/     a run that publishes a LoRA adapter; it is not signed

`gc.json` is not included: it records storage times, and only retention reads it.

The bytes also depend on two libraries. `safetensors` (0.8.0) writes the anchors' headers. The codec chooses parameters
by numpy logarithms (2.3.5), so if two choices cost nearly the same, another numpy or CPU may take the other one. If
after an upgrade only the byte comparisons fail and the reading tests pass, suspect these libraries.
"""
