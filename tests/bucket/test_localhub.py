"""The local Hub: real clients work against it, it survives restarts, and refuses malformed and denied requests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st

from hubsync.bucket import Download, Upload, open_bucket
from hubsync.bucket.hub import HubBucket
from hubsync.errors import ConfigError
from hubsync.localhub import LocalHub
from hubsync.localhub.blake3 import keyed_hashes
from hubsync.localhub.hashes import chunk_hashes, file_hash, xorb_hash
from hubsync.localhub.xet import MalformedError, parse_shard, parse_xorb
from tests.support.fixtures_hub import READ_ONLY_TOKEN, TOKEN

HASH = "ab" * 32


def get(hub: LocalHub, path: str, token: str | None = TOKEN, method: str = "GET", **options: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}".encode("latin-1")} if token else {}
    return httpx.request(method, hub.url + path, headers=headers, timeout=60, follow_redirects=True, **options)  # type: ignore[arg-type]


def api_path(bucket: HubBucket, rest: str = "") -> str:
    return "/api/buckets/" + bucket.address.split("/")[3] + "/" + bucket.address.split("/")[4] + rest


def write_token(hub: LocalHub, bucket: HubBucket) -> str:
    return get(hub, api_path(bucket, "/xet-write-token")).json()["accessToken"]


# --- content ------------------------------------------------------------------------------------------


def test_edited_and_shared_content_comes_back_byte_for_byte(hub_bucket: HubBucket, tmp_path: Path) -> None:
    base = os.urandom(3_000_000)
    versions = {
        "base": base,
        "grown": base[:1_000_000] + b"inserted" + base[1_000_000:],
        "cut": base[500_000:2_500_000],
        "swapped": base[1_500_000:] + base[:1_500_000],
        "zeros": bytes(2_000_000),
        "text": b"compressible " * 100_000,
        "one": b"1",
        "empty": b"",
    }
    for name, data in versions.items():
        hub_bucket.put([Upload(name, data)])
    downloads = [Download(n, len(d), hashlib.sha256(d).hexdigest(), tmp_path / n) for n, d in versions.items()]
    hub_bucket.fetch(downloads)
    assert {name: (tmp_path / name).read_bytes() for name in versions} == versions


def test_a_replaced_file_stays_readable_for_earlier_listings(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    hub_bucket.commit("head.json", b"old")
    api = HfApi(endpoint=local_hub.url, token=TOKEN)
    bucket_id = "/".join(hub_bucket.address.split("/")[3:5])
    listed = list(api.list_bucket_tree(bucket_id, recursive=True))
    hub_bucket.commit("head.json", b"new")
    api.download_bucket_files(bucket_id, [(listed[0], tmp_path / "head")])  # type: ignore[list-item]
    assert (tmp_path / "head").read_bytes() == b"old"


def test_a_copy_needs_a_source_and_moves_no_bytes(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.put([Upload("part", b"bytes")])
    etag = hub_bucket.stat(["part"])["part"].etag
    bucket_id = "/".join(hub_bucket.address.split("/")[3:5])
    local_hub.reset()
    HfApi(endpoint=local_hub.url, token=TOKEN).batch_bucket_files(
        bucket_id, copy=[("bucket", bucket_id, etag, "run/alias")]
    )
    assert sum(local_hub.requests().values()) == 1
    assert hub_bucket.read(["alias"]) == {"alias": b"bytes"}


def test_a_listing_of_many_pages_is_complete(tmp_path: Path, hub_address: str) -> None:
    with LocalHub(tmp_path, page=3) as hub:
        bucket = open_bucket(hub_address, create=True, token=TOKEN, endpoint=hub.url)
        names = [f"{folder}/{n}" for folder in ("a", "b", "c", "d") for n in range(4)] + ["e", "f"]
        bucket.put([Upload(name, b"") for name in names])
        assert [s.path for s in bucket.list()] == sorted(names)
        assert [s.path for s in bucket.list(recursive=False)] == ["a/", "b/", "c/", "d/", "e", "f"]


def test_a_restarted_hub_has_everything_and_honours_its_tokens(tmp_path: Path, hub_address: str) -> None:
    data = os.urandom(100_000)
    with LocalHub(tmp_path) as hub:
        bucket = open_bucket(hub_address, create=True, token=TOKEN, endpoint=hub.url)
        bucket.put([Upload("part", data)])
        port = int(hub.url.rpartition(":")[2])
    with LocalHub(tmp_path, port) as hub:
        assert bucket.read(["part"]) == {"part": data}
        bucket.put([Upload("another", data[::-1])])
        assert [s.path for s in open_bucket(hub_address, token=TOKEN, endpoint=hub.url).list()] == ["another", "part"]


def test_a_stopped_hub_answers_no_request(tmp_path: Path) -> None:
    client = httpx.Client()
    with LocalHub(tmp_path) as hub:
        assert client.get(hub.url + "/api/buckets/me", timeout=60).is_success
    with pytest.raises(httpx.NetworkError):
        client.get(hub.url + "/api/buckets/me", timeout=60)


def test_a_port_in_use_is_explained(local_hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another port"):
        LocalHub(tmp_path, int(local_hub.url.rpartition(":")[2]))


def test_the_command_serves_until_terminated(tmp_path: Path, hub_address: str) -> None:
    command = [sys.executable, "-m", "hubsync.cli.main", "hub"]
    command += ["--root", str(tmp_path), "--port", "0", "--token", "hf_mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        try:
            assert words[0] == "export"
            printed = dict(word.split("=", 1) for word in words[1:])
            assert printed["HF_TOKEN"] == "hf_mine"
            bucket = open_bucket(hub_address, create=True, token="hf_mine", endpoint=printed["HF_ENDPOINT"])
            bucket.commit("head.json", b"1")
            assert bucket.read(["head.json"]) == {"head.json": b"1"}
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


# --- access -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "method", "rest", "status"),
    [
        ("hf_unknown", "GET", "", 401),
        (None, "GET", "", 401),
        (READ_ONLY_TOKEN, "GET", "/xet-read-token", 200),
        (READ_ONLY_TOKEN, "GET", "/xet-write-token", 403),
        (READ_ONLY_TOKEN, "POST", "/batch", 403),
        (READ_ONLY_TOKEN, "DELETE", "", 403),
        (None, "POST", "/batch", 401),
    ],
)
def test_hub_tokens_open_only_what_they_may(
    hub_bucket: HubBucket, local_hub: LocalHub, token: str | None, method: str, rest: str, status: int
) -> None:
    assert get(local_hub, api_path(hub_bucket, rest), token, method).status_code == status


def test_tokens_belong_to_users(tmp_path: Path) -> None:
    """As huggingface_hub's own tests expect it of the real Hub."""
    with LocalHub(tmp_path, tokens={"hf_ann": "ann", "hf_bob": "bob"}) as hub:
        for name, visibility in (("closed", "private"), ("open", "public")):
            made = get(hub, f"/api/buckets/ann/{name}", "hf_ann", "POST", json={"visibility": visibility})
            assert made.status_code == 200
        status = {
            (bucket, token): get(hub, f"/api/buckets/ann/{bucket}", token).status_code
            for bucket in ("closed", "open", "none")
            for token in ("hf_ann", "hf_bob", None)
        }
        assert status == {
            ("closed", "hf_ann"): 200,
            ("closed", "hf_bob"): 404,
            ("closed", None): 401,
            ("open", "hf_ann"): 200,
            ("open", "hf_bob"): 200,
            ("open", None): 200,
            ("none", "hf_ann"): 404,
            ("none", "hf_bob"): 404,
            ("none", None): 401,  # it does not say whether there is one
        }
        assert get(hub, "/api/buckets/ann/open/batch", "hf_bob", "POST").status_code == 403
        assert get(hub, "/api/buckets/ann/new", "hf_bob", "POST", json={}).status_code == 403
        assert get(hub, "/api/whoami-v2", "hf_bob").json()["name"] == "bob"
        assert [row["id"] for row in get(hub, "/api/buckets/ann", "hf_bob").json()] == ["ann/open"]


def test_a_listing_has_the_asked_depth_and_length(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.put([Upload(f"a/{n}", b"") for n in range(3)])
    rows = [(query, get(local_hub, api_path(hub_bucket, f"/tree{query}"))) for query in ("", "?recursive=false")]
    assert [len(answer.json()) for _, answer in rows] == [3, 1]  # absent means everything
    page = get(local_hub, api_path(hub_bucket, "/tree?limit=2"))
    assert len(page.json()) == 2
    assert 'rel="next"' in page.headers["Link"]


def test_a_request_limit_is_reported_and_enforced(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.limit(2, seconds=300)
    answers = [get(local_hub, api_path(hub_bucket)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert re.fullmatch(r'"api";r=0;t=(300|299)', answers[2].headers["RateLimit"])
    assert answers[2].headers["RateLimit-Policy"] == '"fixed window";"api";q=2;w=300'
    local_hub.reset()
    assert get(local_hub, api_path(hub_bucket)).status_code == 200


def test_storage_accepts_only_its_own_unexpired_tokens(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    good = write_token(local_hub, hub_bucket)
    kind, scope, expires, signature = good.split("_")
    read = get(local_hub, api_path(hub_bucket, "/xet-read-token")).json()["accessToken"]
    path = f"/v2/reconstructions/{HASH}"
    assert get(local_hub, path, good).status_code == 404  # let in, but there is no such file
    for forged in (
        TOKEN,
        "",
        f"{kind}_{scope}_{int(expires) + 1}_{signature}",
        f"{kind}_{scope}_1_{signature}",
        f"{kind}_{scope}_{expires}_",
        f"{kind}_{scope}_²_{signature}",
        "xet",
    ):
        assert get(local_hub, path, forged.encode("utf-8").decode("latin-1")).status_code == 401
    assert get(local_hub, f"/v1/xorbs/default/{HASH}", read, "POST", content=b"").status_code == 403
    assert get(local_hub, f"/v1/xorbs/default/{HASH}", read.replace("read", "write"), "POST").status_code == 401


# --- faults -------------------------------------------------------------------------------------------


def test_a_truncated_answer_ends_in_the_middle(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.commit("object", b"bytes")
    local_hub.fail("/tree", truncate=True)
    with pytest.raises(httpx.RequestError):
        get(local_hub, api_path(hub_bucket, "/tree"))
    assert get(local_hub, api_path(hub_bucket, "/tree")).json()


# --- what is malformed --------------------------------------------------------------------------------


def batch(hub: LocalHub, bucket: HubBucket, *lines: object) -> httpx.Response:
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path = hub.url + api_path(bucket, "/batch")
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-ndjson"}
    return httpx.post(path, content=body, headers=headers, timeout=60)


@pytest.mark.parametrize("path", ["../up", "a/../b", "/absolute", "a//b", "", ".", "a\nb", "x" * 2000])
def test_unsafe_and_unlistable_paths_are_refused(hub_bucket: HubBucket, local_hub: LocalHub, path: str) -> None:
    answer = batch(local_hub, hub_bucket, {"type": "addFile", "path": path, "xetHash": "0" * 64})
    assert (answer.status_code, answer.json()["failed"][0]["error"]) == (422, "Invalid path")


@pytest.mark.parametrize("xet_hash", [None, 5, "", "0" * 63, "../" * 21 + "a", "AB" * 32, HASH])
def test_names_cannot_point_to_bad_or_unknown_content(
    hub_bucket: HubBucket, local_hub: LocalHub, xet_hash: object
) -> None:
    good = {"type": "addFile", "path": "run/good", "xetHash": "0" * 64}
    answer = batch(local_hub, hub_bucket, good, {"type": "addFile", "path": "run/bad", "xetHash": xet_hash})
    assert (answer.status_code, answer.json()["succeeded"]) == (200, 1)
    assert [s.path for s in hub_bucket.list()] == ["good"]


@pytest.mark.parametrize("line", [[], "text", {}, {"type": "addFile"}, {"type": "other", "path": "a"}, {"path": "a"}])
def test_a_batch_with_a_malformed_line_is_refused(hub_bucket: HubBucket, local_hub: LocalHub, line: object) -> None:
    good = {"type": "addFile", "path": "run/good", "xetHash": "0" * 64}
    assert batch(local_hub, hub_bucket, good, line).status_code == 400
    assert hub_bucket.list() == []


@pytest.mark.parametrize("path", ["/xorbs/../hub.db", "/xorbs/..%2Fhub.db", "/xorbs/" + "a" * 63, "/", "/hub.db"])
def test_nothing_but_known_routes_is_served(local_hub: LocalHub, path: str) -> None:
    with socket.create_connection(("127.0.0.1", int(local_hub.url.rpartition(":")[2]))) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b" 404 " in raw.makefile("rb").readline()


@pytest.mark.parametrize("bucket_id", ["me/..", "../me", "me/a%2Fb", "me/.hidden"])
def test_malformed_bucket_ids_are_refused(local_hub: LocalHub, bucket_id: str) -> None:
    # Percent-encoded: requests would resolve the dots itself.
    path = "/api/buckets/" + bucket_id.replace("..", "%2e%2e")
    assert get(local_hub, path, method="POST", json={}).status_code == 400


@pytest.mark.parametrize("length", ["-1", "many", str(1 << 40)])
def test_absurd_request_lengths_are_refused(local_hub: LocalHub, length: str) -> None:
    with socket.create_connection(("127.0.0.1", int(local_hub.url.rpartition(":")[2]))) as raw:
        raw.sendall(f"POST /v1/shards HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        assert raw.makefile("rb").readline().split()[1] in (b"400", b"413")


def make_xorb(*sizes: int) -> bytes:
    """Uncompressed chunks: u8 version, u24 packed size, u8 scheme, u24 size, bytes."""
    return b"".join(b"\0" + n.to_bytes(3, "little") + b"\0" + n.to_bytes(3, "little") + bytes(n) for n in sizes)


def record(raw: bytes, *numbers: int) -> bytes:
    return raw + struct.pack("<4I", *numbers)


ZEROS = list(zip(chunk_hashes([bytes(10), bytes(20)]), (10, 20), strict=True))  # the chunks of make_xorb(10, 20)
XORB, FILE = xorb_hash(ZEROS), file_hash(ZEROS)


def raw(text: str) -> bytes:
    """The bytes of a hash from its text form."""
    return struct.pack("<4Q", *struct.unpack(">4Q", bytes.fromhex(text)))


def make_shard(size: int, start: int, end: int, sizes: tuple[int, ...], file: str = FILE) -> bytes:
    """One file of one segment in one xorb with the given chunks."""
    xorb, bookend = raw(XORB), record(b"\xff" * 32, 0, 0, 0, 0)
    return b"".join(
        [
            b"HFRepoMetaData".ljust(48, b"\0"),
            record(raw(file), 0, 1, 0, 0),
            record(xorb, 0, size, start, end),
            bookend,
            record(xorb, 0, len(sizes), sum(sizes), 0),
            *(record(raw(ZEROS[n % 2][0]), 0, chunk, 0, 0) for n, chunk in enumerate(sizes)),
            bookend,
        ]
    )


@pytest.mark.parametrize(
    ("shard", "status"),
    [
        (make_shard(30, 0, 2, (10, 20)), 200),
        (make_shard(30, 0, 2, (10, 20), file=HASH), 400),
        (make_shard(30, 0, 2, (20, 10)), 400),
        (make_shard(31, 0, 2, (10, 20)), 400),
        (make_shard(30, 0, 3, (10, 20)), 400),
        (make_shard(0, 1, 1, (10, 20)), 400),
        (make_shard(30, 0, 2, (10, 20))[:-48], 400),
        (b"something else", 400),
    ],
    ids=["right", "other-hash", "other-chunks", "too-many-bytes", "past-the-end", "nothing", "truncated", "no-shard"],
)
def test_a_shard_must_fit_the_xorbs_it_refers_to(tmp_path: Path, shard: bytes, status: int) -> None:
    with LocalHub(tmp_path) as hub:
        get(hub, "/api/buckets/me/b", method="POST", json={})
        token = get(hub, "/api/buckets/me/b/xet-write-token").json()["accessToken"]
        early = get(hub, "/v1/shards", token, "POST", content=make_shard(30, 0, 2, (10, 20)))
        assert early.status_code == 400  # no xorb yet
        wrong = get(hub, f"/v1/xorbs/default/{HASH}", token, "POST", content=make_xorb(10, 20))
        assert wrong.status_code == 400
        xorb = get(hub, f"/v1/xorbs/default/{XORB}", token, "POST", content=make_xorb(10, 20))
        assert xorb.json() == {"was_inserted": True}
        assert get(hub, "/v1/shards", token, "POST", content=shard).status_code == status


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 9000, 300_000])
@pytest.mark.parametrize("make", [os.urandom, bytes, lambda size: (b"compressible" * size)[:size]])
def test_hashes_are_those_of_hf_xet(tmp_path: Path, size: int, make) -> None:
    """hf_xet uploads to a Hub that checks the hash of each xorb and file, for all kinds of compression."""
    with LocalHub(tmp_path) as hub:
        bucket = open_bucket("hf://buckets/me/b/run", create=True, endpoint=hub.url)
        data = make(size)
        bucket.put([Upload("object", data)])
        assert bucket.read(["object"]) == {"object": data}
        names = [path.name for path in (tmp_path / "xorbs").iterdir()]
        assert all(chunk.hash for name in names for chunk in hub._store.chunks(name) or [])


def test_hashes_of_the_official_test_vectors() -> None:
    """https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json, keyed"""
    text = bytes(n % 251 for n in range(31744))
    hashes = keyed_hashes(b"whats the Elvish word for friend", [b"", text[:1], text[:1024], text])
    assert [value.hex()[:32] for value in hashes] == [
        "92b2b75604ed3c761f9d6f62392c8a92",
        "6d7878dfff2f485635d39013278ae14f",
        "75c46f6f3d9eb4f55ecaaee480db732e",
        "efa53b389ab67c593dba624d898d0f73",
    ]


@pytest.mark.parametrize("length", range(1, len(make_xorb(5, 9))))
def test_a_truncated_xorb_is_malformed_unless_it_ends_between_chunks(length: int) -> None:
    data = make_xorb(5, 9)
    if length == len(make_xorb(5)):
        assert len(parse_xorb(data[:length])) == 1
        return
    with pytest.raises(MalformedError):
        parse_xorb(data[:length])


@given(st.binary(max_size=400), st.integers(0, 400), st.binary(max_size=8))
def test_damaged_uploads_are_malformed_or_parsed_never_worse(noise: bytes, at: int, patch: bytes) -> None:
    shard, xorb = make_shard(30, 0, 2, (10, 20)), make_xorb(10, 20)
    for parse, data in ((parse_shard, shard), (parse_xorb, xorb)):
        for damaged in (noise, data[:at] + patch + data[at + len(patch) :], data[:48] + noise):
            with contextlib.suppress(MalformedError):
                parse(damaged)  # type: ignore[operator]
