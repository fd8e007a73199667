"""A language model that was taken from a multimodal checkpoint is published under that checkpoint's names."""

from __future__ import annotations

import pytest

from hubsync.publish.view.naming import names_within

OWN = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (10, 4),
}
TOWER = {"vision_tower.layers.0.self_attn.q_proj.weight": (2, 2), "projector.weight": (4, 2)}


def within(prefix: str, old: str = "") -> dict[str, str]:
    return {name: prefix + name.removeprefix(old) if name.startswith(old) else name for name in OWN}


@pytest.mark.parametrize(
    "names",
    [within("language_model."), within("model.language_model.", "model."), within("thinker.model.", "model.")],
)
def test_the_prefix_is_found(names: dict[str, str]) -> None:
    whole = TOWER | {name: OWN[short] for short, name in names.items()}
    assert names_within(OWN, whole) == names
    tied, tied_names = ({k: v for k, v in found.items() if k != "lm_head.weight"} for found in (OWN, names))
    assert names_within(tied, TOWER | {name: tied[short] for short, name in tied_names.items()}) == tied_names


def test_own_names_stay_where_the_checkpoint_has_them_or_is_another_model() -> None:
    names = within("language_model.")
    whole = TOWER | {name: OWN[short] for short, name in names.items()}
    assert names_within(OWN, OWN | TOWER) == {}
    assert names_within(OWN, whole | {"language_model.model.norm.weight": (5,)}) == {}
    assert names_within(OWN, {name: shape for name, shape in whole.items() if "norm" not in name}) == {}
    assert names_within(OWN, {}) == names_within({}, whole) == {}


def test_two_places_for_it_are_none() -> None:
    whole = {f"{part}.{name}": shape for part in ("thinker", "talker") for name, shape in OWN.items()}
    assert names_within(OWN, whole) == {}
