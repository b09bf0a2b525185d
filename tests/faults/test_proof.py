"""What a verification says: the word that was earned, and none that a writer of the bucket could make stronger."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from blobflow import open_store, upload, verify
from blobflow.checksum import crc32c
from blobflow.cli import run
from blobflow.errors import IntegrityError
from blobflow.stores.base import Store
from blobflow.stores.local.store import LocalStore
from blobflow.stores.probe import REPORT_KEY, ProbedStore
from blobflow.transport import PROOF_MEANS
from tests.kit import SMALL, artifact_of
from tests.strict_s3 import StrictS3

KEY = "orders/1.tar"


@pytest.fixture
def attesting() -> Iterator[Store]:
    """A store whose server computes and checks CRC32C, as AWS does."""
    with StrictS3() as server:
        endpoint = server.endpoint
        options: dict[str, Any] = {
            "endpoint_url": endpoint.endpoint_url,
            "region": endpoint.region,
            "access_key_id": endpoint.access_key_id,
            "secret_access_key": endpoint.secret_access_key,
        }
        with closing(open_store(f"s3://{endpoint.new_bucket()}/team", **options)) as store:
            yield store
        endpoint.client.close()


def forged(payload: bytes, at: int) -> bytes:
    """Other bytes with the same CRC32C: one bit is turned, and the four bytes after it make up for it."""
    wanted = crc32c(payload)
    data = bytearray(payload)
    data[at] ^= 1
    base = crc32c(data)
    # What each of the 32 bits does to the checksum; then elimination, as CRCs are linear.
    rows: list[tuple[int, int]] = []
    for bit in range(32):
        data[at + 1 + bit // 8] ^= 1 << bit % 8
        effect, used = crc32c(data) ^ base, 1 << bit
        data[at + 1 + bit // 8] ^= 1 << bit % 8
        for other, also in rows:
            if effect ^ other < effect:
                effect, used = effect ^ other, used ^ also
        rows.append((effect, used))
        rows.sort(reverse=True)
    left, bits = wanted ^ base, 0
    for effect, used in rows:
        if left ^ effect < left:
            left, bits = left ^ effect, bits ^ used
    data[at + 1 : at + 5] = (int.from_bytes(data[at + 1 : at + 5], "little") ^ bits).to_bytes(4, "little")
    assert crc32c(data) == wanted
    assert data != payload
    return bytes(data)


def forge(store: Store, content: bytes) -> None:
    """Change the stored payload inside of a file with this content; sizes, manifests and CRC32C stay as they were."""
    payload = store.get(KEY, max_bytes=10**7).data
    store.put(KEY, forged(payload, payload.index(content) + 10))


def test_a_forged_payload_is_attested_and_never_proven(tmp_path: Path, attesting: Store) -> None:
    """CRC32C is no defence against intent: what only its equality speaks for is called by the weaker word."""
    artifact = artifact_of(tmp_path, {"a": b"first " * 1000, "b": b"second" * 1000})
    upload(attesting, KEY, artifact, profile=SMALL)
    forge(attesting, b"first " * 10)
    assert verify(attesting, KEY).proof == "attested"
    assert verify(attesting, KEY, mode="shallow").proof == "attested"
    for sample in (None, (1, 1)):
        with pytest.raises(IntegrityError):
            verify(attesting, KEY, mode="deep", sample=sample)


def test_each_word_is_earned(tmp_path: Path, attesting: Store) -> None:
    """Reading all is `proven`, reading a share `sampled`, the server's checksum `attested`, nothing `unproven`."""
    local = LocalStore(tmp_path / "store")
    artifact = artifact_of(tmp_path)
    for store in (attesting, local):
        upload(store, KEY, artifact, profile=SMALL)
        assert verify(store, KEY, mode="deep").proof == "proven"
        assert verify(store, KEY, sample=(1, 2)).proof == "sampled"
        assert verify(store, KEY, sample=(1, 1)).proof == "proven"
    assert (verify(attesting, KEY).proof, verify(attesting, KEY, mode="shallow").proof) == ("attested", "attested")
    assert (verify(local, KEY).proof, verify(local, KEY, mode="shallow").proof) == ("proven", "unproven")
    assert set(PROOF_MEANS) == {"attested", "unproven", "sampled", "proven"}


def test_a_checksum_that_is_only_repeated_attests_nothing(tmp_path: Path, attesting: Store) -> None:
    """Where the server was not seen to compute it, an equal checksum in HEAD is no more than none."""
    upload(attesting, KEY, artifact_of(tmp_path), profile=SMALL)
    assert isinstance(attesting, ProbedStore)
    unproven = attesting.store  # which nobody probed
    assert unproven.head(KEY).crc32c is not None
    assert verify(unproven, KEY, mode="shallow").proof == "unproven"
    assert verify(unproven, KEY).proof == "proven"


def test_no_report_in_the_bucket_makes_a_word_stronger(tmp_path: Path, moto_s3: Any) -> None:
    """Moto repeats checksums: a report that says otherwise, planted before or after, changes neither word nor mode."""
    url = f"s3://{moto_s3.new_bucket()}/team"
    options = {
        "endpoint_url": moto_s3.endpoint_url,
        "region": moto_s3.region,
        "access_key_id": moto_s3.access_key_id,
        "secret_access_key": moto_s3.secret_access_key,
    }
    with closing(open_store(url, **options)) as store:
        upload(store, KEY, artifact_of(tmp_path), profile=SMALL)
        document = json.loads(store.get(REPORT_KEY, max_bytes=10**6).data)
        for name, finding in document["reports"][0].items():
            if isinstance(finding, dict):
                document["reports"][0][name] = {**finding, "holds": True}
        document["reports"][0]["probed_at"] = datetime.now(timezone.utc).isoformat()
        store.put(REPORT_KEY, json.dumps(document).encode())
    for _ in range(2):
        with closing(open_store(url, **options)) as store:
            assert verify(store, KEY).proof == "proven"
            assert verify(store, KEY, mode="shallow").proof == "unproven"


@pytest.mark.parametrize(
    ("option", "proof"), [("--deep", "proven"), ("--shallow", "unproven"), ("--sample=1/2", "sampled")]
)
def test_the_command_says_the_word(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, proof: str) -> None:
    """The first line begins with the word, the second says what it means, and the document has it as `proof`."""
    upload(LocalStore(tmp_path / "store"), KEY, artifact_of(tmp_path), profile=SMALL)
    arguments = ["--store", str(tmp_path / "store"), "verify", KEY, option]
    assert run(arguments) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{proof} {KEY}  sha256:")
    assert second.startswith(f"{proof}: ")
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proof"] == proof
