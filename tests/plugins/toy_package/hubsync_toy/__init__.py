"""One plugin of each kind: a bucket backend, an inference engine, a metric and a command."""
