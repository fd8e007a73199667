"""Names of a language model's tensors in the checkpoint of the multimodal model that it was taken from."""

from __future__ import annotations

from collections.abc import Mapping

_OWN = "model."  # of a language model's own layers, in transformers

Shapes = Mapping[str, tuple[int, ...]]


def names_within(own: Shapes, whole: Shapes) -> dict[str, str]:
    """Own name -> name in the whole checkpoint, if that holds the model under another prefix; else empty.

    Two ways are in use: all names have a prefix (`language_model.model.layers...`), or another one than `model.`
    (`model.language_model.layers...`). Every tensor must be there with its shape, in exactly one way.

    Args:
        own: published name -> shape.
        whole: name -> shape of the base checkpoint, or of the run.
    """
    longest = max(own, key=lambda name: (name.count("."), name), default="")
    if not own or longest in whole:
        return {}
    found: list[dict[str, str]] = []
    for old in ("", _OWN):
        if not longest.startswith(old):
            continue
        ending = longest.removeprefix(old)
        for prefix in sorted({name.removesuffix(ending) for name in whole if name.endswith(f".{ending}")}):
            names = {name: prefix + name.removeprefix(old) if name.startswith(old) else name for name in own}
            if names not in found and all(whole.get(name) == own[short] for short, name in names.items()):
                found.append(names)
    return found[0] if len(found) == 1 else {}
