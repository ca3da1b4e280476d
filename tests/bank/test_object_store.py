"""Buckets keep every law of a store, on S3's protocol and in memory, and when requests go wrong."""

import itertools
import threading
import uuid
from pathlib import Path

import pytest
import torch
from bank_runs import make_run
from store_contract import StoreContract

from source_proj import bank as banks
from source_proj._errors import BankError
from source_proj.bank.store import LocalStore, open_store
from source_proj.bank.store import objects as module

pytest.importorskip("obstore")
pytest.importorskip("moto")

from buckets import BUCKET, bucket, client


@pytest.fixture(scope="module")
def server():
    with bucket() as (app, settings), pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        yield app, client(settings["AWS_ENDPOINT_URL"])


@pytest.fixture
def s3(server):
    """The URL of an empty folder of a bucket."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self):
        return open_store(f"memory://{uuid.uuid4().hex}")

    def place(self, store, key, content):
        module._MEMORY[store.location()].put(key, content)

    def fetch(self, store, key):
        try:
            return bytes(module._MEMORY[store.location()].get(key).bytes())
        except FileNotFoundError:
            return None

    def twin(self, store):
        return open_store(store.location())


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, server, s3):
        self.boto = server[1]
        return open_store(s3)

    def name(self, store, key):
        return f"{store.location().removeprefix(f's3://{BUCKET}/')}/{key}"

    def place(self, store, key, content):
        self.boto.put_object(Bucket=BUCKET, Key=self.name(store, key), Body=content)

    def fetch(self, store, key):
        try:
            return self.boto.get_object(Bucket=BUCKET, Key=self.name(store, key))["Body"].read()
        except self.boto.exceptions.NoSuchKey:
            return None

    def twin(self, store):
        return open_store(store.location())


@pytest.mark.parametrize("size", [99, 100, 101, 1001])
@pytest.mark.parametrize("place", ["memory", "s3"])
def test_large_objects_are_read_by_ranges(s3, monkeypatch, size, place):
    monkeypatch.setattr(module, "_RANGE", 100)
    store = open_store(s3 if place == "s3" else f"memory://{uuid.uuid4().hex}")
    content = bytes(value % 251 for value in range(size))
    store.put({"a": content})
    assert store.get("a") == content


class Exchanging:
    """A client under whose reader the object is exchanged after the first request."""

    def __init__(self, real):
        self.real, self.requests = real, 0

    def get(self, path, **options):
        self.requests += 1
        if self.requests == 2:
            self.real.put(path, b"second" * 100)
        return self.real.get(path, **options)


def test_ranges_are_of_one_object(s3, monkeypatch):
    monkeypatch.setattr(module, "_RANGE", 100)
    store = open_store(s3)
    store.put({"a": b"first " * 100})
    monkeypatch.setattr(store, "_client", Exchanging(store._client))
    assert store.get("a") == b"second" * 100


# Requests that go wrong ------------------------------------------------------------------------------------------


class Failing:
    """A client whose n-th request fails, before it is made or after it."""

    def __init__(self, real, number, after):
        self.real, self.count = real, itertools.count()
        self.number, self.after = number, after

    def __getattr__(self, name):
        call = getattr(self.real, name)

        def request(*arguments, **options):
            from obstore.exceptions import GenericError

            fails = next(self.count) == self.number
            if fails and not self.after:
                raise GenericError("operation timed out")
            answer = call(*arguments, **options)
            if fails:
                raise GenericError("connection closed before the answer")
            return answer

        return request


@pytest.mark.parametrize("after", [False, True])
def test_a_commit_is_ones_own_whatever_fails(after):
    for number in range(2):
        store = open_store(f"memory://{uuid.uuid4().hex}")
        store._client = Failing(store._client, number, after)
        assert store.put_if_absent({"a": b"mine"}) == set()
        assert store.put_if_absent({"a": b"another's"}) == {"a"}
        assert store.get("a") == b"mine"


def test_what_fails_for_good_is_an_error_of_the_place():
    class Dead:
        def __getattr__(self, name):
            def request(*_, **__):
                from obstore.exceptions import GenericError

                raise GenericError(
                    "error sending request for url (https://user:pw@host/b?sig=abc&se=1): AccountKey=xyz\n\nDebug: pw"
                )

            return request

    store = module.ObjectStore(Dead(), "az://bucket/bank")
    calls = [lambda: store.get("a"), lambda: store.stat("a"), lambda: store.put({"a": b"x"}), lambda: store.delete("a")]
    calls += [lambda: store.put_if_absent({"a": b"x"}), lambda: list(store.keys()), lambda: store.copy({"a": "b"})]
    for call in calls:
        with pytest.raises(OSError, match=r"az://bucket/bank.*error sending request") as caught:
            call()
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
        for secret in ("pw", "sig", "abc", "xyz"):
            assert secret not in str(caught.value)


def test_a_bucket_that_is_not_there_is_said_in_words(s3):
    for ask in (banks.open, make_run().build):
        with pytest.raises(BankError, match=r"s3://absent/x: there is no such bucket: make it, or correct") as caught:
            ask("s3://absent/x")
        assert "xml" not in str(caught.value)


def test_missing_credentials_are_said_in_words():
    from obstore.exceptions import GenericError

    class Elsewhere:  # than in a cloud, where nobody answers what the machine's role is asked at
        def head(self, path):
            raise GenericError("Error performing PUT http://169.254.169.254/latest/api/token in 2s, after 8 retries")

    with pytest.raises(OSError, match=r"no credentials were found: set them .* such as AWS_ACCESS_KEY_ID"):
        module.ObjectStore(Elsewhere(), "s3://bucket").stat("a")


def test_refused_credentials_are_said_at_once_and_not_shown(s3, monkeypatch):
    from obstore.exceptions import UnauthenticatedError

    class Refused:
        requests = 0

        def head(self, path):
            self.requests += 1
            raise UnauthenticatedError("token=abc was refused")

    store = module.ObjectStore(Refused(), "gs://bucket")
    with pytest.raises(OSError, match="UnauthenticatedError") as caught:
        store.stat("a")
    assert "abc" not in str(caught.value)
    assert store._client.requests == 1


# Places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["s3://b/c?token=abc", "s3://abc:abc@b/c", "https://host/bank?sig=abc", "az://c/b#abc"])
def test_urls_with_secrets_are_refused_and_not_repeated(url):
    with pytest.raises(BankError, match="leave them out") as caught:
        open_store(url)
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize("path", [Path("s3://bucket/bank"), "s3:/bucket/bank", "file:/tmp/bank"])
def test_a_url_of_one_slash_is_refused(path):
    with pytest.raises(BankError, match="give it as a string, with '://'"):
        open_store(path)


@pytest.mark.parametrize("path", ["bank", "a/b", "C:\\bank", "with:colon", "std::vector", ".", "~/x://y"])
def test_whatever_is_no_url_is_a_folder(path):
    assert isinstance(open_store(path), LocalStore)
    assert isinstance(open_store(f"file://{path}"), LocalStore)


def test_an_unknown_scheme_is_named():
    with pytest.raises(BankError, match="nowhere://x"):
        open_store("nowhere://x")


# Banks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    return make_run(checkpoints=1, n=40)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    torch.set_num_threads(1)
    return run.build(tmp_path_factory.mktemp("whole") / "bank")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_a_bank_in_a_bucket_is_the_bank_of_a_folder(run, whole, s3, cache, place):
    from source_proj.attribution.source import Source

    url = s3 if place == "s3" else f"memory://{uuid.uuid4().hex}"
    made = run.build(url)
    assert made.path == url
    assert made.fingerprint == banks.open(url).fingerprint == whole.fingerprint
    report = banks.verify(url)
    assert report.ok
    assert not report.leftovers
    assert report.path == url
    mine, theirs = open_store(url), whole.store
    shards = [key for key in theirs.list() if "/c." in key]
    assert shards == [key for key in mine.list() if "/c." in key]
    assert all(mine.get(key) == theirs.get(key) for key in shards)
    scores = [Source(bank, model=run.model, progress=False).score(run.data).to_numpy() for bank in (made, whole)]
    assert (scores[0] == scores[1]).all()
    assert not [key for key in mine.list() if key.startswith("fits")]
    assert list(cache.rglob("zarr.json"))
    assert made.clear_fits() > 0
    assert "fits" not in str(list(cache.rglob("*")))


def test_a_bank_within_a_bank_of_a_bucket_is_refused(run, s3):
    """Its objects would be the outer one's, or go with its fits."""
    bank = run.build(s3)
    for inner in ("inner", "fits/small"):
        with pytest.raises(BankError, match=rf"{s3}/{inner} lies within the bank {s3}; give a path outside of it"):
            run.build(f"{s3}/{inner}")
    assert bank.verify().ok
    assert run.build(f"{s3}-beside/inner").finalized
    with pytest.raises(BankError, match="is no bank"):
        run.build(f"{s3}-beside")


def test_a_place_above_that_may_not_be_read_is_in_nobodys_way(run, s3, monkeypatch):
    get, head = module.ObjectStore.get, module.ObjectStore.stat

    def denied(read):
        def call(self, key):
            if self.location() != f"{s3}/a/bank":
                raise PermissionError(self.location(key))
            return read(self, key)

        return call

    monkeypatch.setattr(module.ObjectStore, "get", denied(get))
    monkeypatch.setattr(module.ObjectStore, "stat", denied(head))
    assert run.build(f"{s3}/a/bank").finalized


def test_nothing_there_is_said_so(s3):
    with pytest.raises(BankError, match=f"there is no bank at {s3}"):
        banks.open(s3)


def test_two_builders_under_faults(run, whole, server, s3):
    app = server[0]
    app.share = 0.1
    try:
        workers = [threading.Thread(target=lambda i=i: run.build(s3, shard=(i, 2), takeover=60)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        app.share = 0.0
    assert len(app.faults) == 5
    assert banks.open(s3).fingerprint == whole.fingerprint
    assert banks.verify(s3).ok


def test_an_archive_is_read_where_it_lies(run, whole, tmp_path):
    import shutil

    pytest.importorskip("fsspec")
    shutil.make_archive(str(tmp_path / "bank"), "zip", whole.path)
    url = f"zip://::file://{tmp_path}/bank.zip"
    bank = banks.open(url)
    assert bank.fingerprint == whole.fingerprint
    assert banks.verify(url).ok
    with pytest.raises(OSError, match="can only be read"):
        bank.store.put({"a": b"x"})
    with pytest.raises(OSError, match="can only be read"):
        bank.store.put_if_absent({"a": b"x"})
    assert bank.store.put_if_absent({"zarr.json": b"x"}) == {"zarr.json"}
    run.build(url)  # it is whole: nothing is written


@pytest.mark.parametrize("name", ["zip", "gztar"])
def test_a_damaged_archive_is_whole_where_it_counts_or_refused_by_name(whole, tmp_path, name):
    import random
    import shutil

    pytest.importorskip("fsspec")
    folder = Path(whole.path)
    archive = Path(shutil.make_archive(str(tmp_path / "bank"), name, folder.parent, folder.name))
    url = f"{'zip' if name == 'zip' else 'tar'}://{folder.name}::{archive}"
    content, draw = archive.read_bytes(), random.Random(0)
    assert banks.verify(url).ok
    refused = []
    for _ in range(30):
        place = draw.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        archive.write_bytes(draw.choice([content[:place], bytes(changed)]))
        try:
            assert banks.open(url).fingerprint == whole.fingerprint
        except BankError as error:
            refused.append(str(error))
    assert refused
    assert all(str(archive) in message for message in refused)
