"""hubsync's worker extension with two more methods: read a real server's memory, and damage it."""

from __future__ import annotations

import random
from typing import Any

from vllm_plugin.extension import DeltaWorkerExtension

# Modules that import numba are imported late: see `vllm_plugin.compat`.


class Probe(DeltaWorkerExtension):
    """For `--worker-extension-cls`."""

    def chaos_memory(self) -> dict[str, Any]:
        """`status`, fingerprints of the live weights in checkpoint coordinates, and hashes of all that vLLM holds."""
        from hubsync.apply.served_model import ServedModel
        from vllm_plugin.exam import memory_of
        from vllm_plugin.worker import session_of, status

        from .model import fingerprint

        served, tensors = session_of(self).served, {}
        assert isinstance(served, ServedModel), "histories are of whole models"
        applier = served.applier
        if applier is not None and applier.position is not None:
            held, everything = applier.old_bits(), slice(None)
            for index, spec in enumerate(applier.table):
                bits = held.rectangle(index, everything, everything)
                tensors[spec.name] = fingerprint(bits).hex()  # type: ignore[arg-type]
        return {"status": status(self), "tensors": tensors, "parameters": memory_of(self)}

    def chaos_flip(self, seed: int) -> dict[str, Any]:
        """Flip one bit of a weight."""
        from hubsync.kernels.bits import bits_of

        chance = random.Random(seed)
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("o_proj.weight"))
        bits = bits_of(parameter.detach())
        place, bit = chance.randrange(len(bits)), chance.randrange(8 * bits.itemsize)
        bits[place] ^= bits.dtype.type(1 << bit)
        return {"where": f"bit {bit} of element {place} of {name}"}
