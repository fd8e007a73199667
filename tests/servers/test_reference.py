"""A frozen reference policy beside the moving one: a server stays where it was brought. Needs minutes: `-m server`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hubsync.demo.compare import greedy
from hubsync.replicas.deployment import Deployment
from tests.support.fixtures_server import Served

pytestmark = pytest.mark.server

PROMPTS = ["the quick brown fox", "the lazy dog"]


def test_a_reference_is_served_from_version_0_or_an_anchor_while_the_policy_moves(
    served: Served, start_server: Callable[..., str]
) -> None:
    reference = start_server(served.base, bucket=served.address)
    deployment = Deployment([reference])
    at_start = greedy(reference, PROMPTS)
    deployment.hotload(served.engine.run.origin).raise_for_quorum()  # attached, and so pinned to version 0

    def train() -> None:
        served.train(lr=3e-2)
        assert served.engine.sync().commits[0].position == served.engine.position

    train()
    assert greedy(served.url, PROMPTS) != at_start
    assert greedy(reference, PROMPTS) == at_start
    anchor, policy = served.engine.anchor(), greedy(served.url, PROMPTS)
    deployment.hotload(anchor.position).raise_for_quorum()
    train()
    assert greedy(served.url, PROMPTS) != policy
    assert greedy(reference, PROMPTS) == policy
    assert [replica.position for replica in deployment.status()] == [anchor.position]
    deployment.hotload(served.engine.run.origin).raise_for_quorum()
    assert greedy(reference, PROMPTS) == at_start
    deployment.close()
