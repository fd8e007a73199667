"""Apply deltas to live weights inside the inference process. `engine` is the contract with an inference engine."""
