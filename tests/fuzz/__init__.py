"""Fuzzing of everything that a reader takes from a bucket: `python -m tests.fuzz deltas`, `... documents`.

An execution reads one mutated input. Only the errors that the reader documents may come out, what is accepted must be
sound, and memory must stay within the bound of docs/FORMAT.md. `make fuzz` runs both for at least 300,000 executions;
`tests/fuzz/test_fuzz.py` runs some thousands with `make test`.
"""
