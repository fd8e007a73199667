"""Health check: exit code 0 if the server's weights are proved, and are the version that the run serves, or nearly.

A server that follows a run is a version behind while it downloads, so two versions are allowed.
"""

import os
import sys

from hubsync.bucket import open_bucket
from hubsync.cache import default_cache
from hubsync.chain import ChainReader
from hubsync.errors import HubsyncError
from hubsync.replicas.engines import connect
from hubsync.replicas.replica import Replica

MAX_LAG = 2


def why_unhealthy(url: str, address: str) -> str | None:
    """None if the server is healthy."""
    server = connect(url, os.environ.get("VLLM_API_KEY"), timeout=10.0)
    status = Replica(server).status()
    if status.position is None:
        return f"the server is at no version of the run: {status.state}"
    if status.verification is None or not status.verification.verified:
        return f"its weights are not proved to be {status.position}: {status.state}"
    served = ChainReader(open_bucket(address), default_cache()).served()
    if abs(served.version - status.position.version) > MAX_LAG:
        return f"it serves {status.position}, and the run {served}"
    return None


if __name__ == "__main__":
    try:
        reason = why_unhealthy(f"http://127.0.0.1:{os.environ.get('PORT', '8000')}", os.environ["HUBSYNC_BUCKET"])
    except HubsyncError as error:
        reason = str(error)
    print(reason or "healthy")
    sys.exit(reason is not None)
