"""Secrets of URLs are in no output: of any segment of a chain, however they are quoted."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from urllib.parse import quote, quote_plus, unquote

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import ZOO

from infexport.errors import InfexportError
from infexport.images.fetch import find, local_copy, named
from infexport.system.urls import name_of_url, scrubbed, shown

DIGIT = min((ZOO / "digits-held-out").glob("*.png"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://host/a.png", "https://host/a.png"),
        ("https://user:pw@host:8080/a.png?sig=x#part", "https://host:8080/a.png"),
        ("https://host?token=x", "https://host"),
        ("https://host#token", "https://host"),
        ("zip://a.png::https://user:pw@host/a.zip?sig=x", "zip://a.png::https://host/a.zip"),
        ("zip://a.png::simplecache::s3://key:secret@bucket/a.zip", "zip://a.png::simplecache::s3://bucket/a.zip"),
        ("zip://a.png::/data/a.zip?x", "zip://a.png::/data/a.zip"),
        ("https://user:p::w@host/a.png", "https://host/a.png"),
        ("https://host/a.png?x=1::secret", "https://host/a.png"),
        ("s3://KEY:sec/ret@bucket/a.png", "s3://bucket/a.png"),
        ("https://user:p?w#d@host/a.png", "https://host/a.png"),
        ("https://us@er:pw@host/a@b.png", "https://host/a@b.png"),
        ("https://[::1]:80/a.png?sig", "https://[::1]:80/a.png"),
        ("hf://user/repo@main/a.png", "hf://user/repo@main/a.png"),
        ("s3://bucket/me@home/a:b.png", "s3://bucket/me@home/a:b.png"),
        # of one slash, it is a mistake, and read as a file's name
        ("https:/user:pw@host/a.png?x", "https:/host/a.png"),
    ],
)
def test_shown(url, expected):
    assert shown(url) == expected


NAMES = st.text("abcdefghij", min_size=1, max_size=8)
SECRETS = st.text(st.characters(blacklist_categories=("Cs",)), min_size=4, max_size=12)
ENDS = set("@/?#:&;=%+")
"""Characters that must be quoted in a secret."""


@st.composite
def chains(draw):
    """A chain of URLs, and the secrets in it as they are meant."""
    secrets, texts = [], []

    def secret():
        # marked, so that it is in nothing else
        secrets.append(f"Z{draw(SECRETS)}Q")
        ways = [lambda text: quote(text, safe=""), quote_plus, *([] if ENDS & set(secrets[-1]) else [str, quote])]
        return draw(st.sampled_from(ways))(secrets[-1])

    for scheme in draw(st.lists(st.sampled_from(["zip", "https", "s3", "simplecache", "gs"]), min_size=1, max_size=4)):
        userinfo = f"{secret()}:{secret()}@" if draw(st.booleans()) else ""
        host, path = draw(NAMES), draw(st.sampled_from(["", "/a.png", "/deep/b@c.tif"]))
        query = f"?a={secret()}&{secret()}" if draw(st.booleans()) else ""
        fragment = f"#{secret()}" if draw(st.booleans()) else ""
        texts.append(f"{scheme}://{userinfo}{host}{path}{query}{fragment}")
    return "::".join(texts), secrets


def written(secret):
    """A secret as others write it."""
    return {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]}


@settings(deadline=None)
@given(chains(), st.sampled_from(["{url}", "403, url='{url}'", "gone: {decoded}", "{secrets}", "{quoted}"]))
@example(("https://host?token=Zabc%2fdQ", ["Zabc/dQ"]), "lost: {url}")
def test_no_secret_is_in_what_is_shown(chain, text):
    url, secrets = chain
    message = text.format(
        url=url,
        decoded=unquote(url),
        secrets=repr(secrets),
        quoted=" ".join(quote_plus(secret) for secret in secrets),
    )
    for told in (shown(url), scrubbed(message, url)):
        for secret in secrets:
            for way in written(secret):
                assert way not in told


def test_other_urls_in_a_text_are_cleaned_too():
    """A server may send one elsewhere, with a signature of its own."""
    text = "403 at https://cdn/x.png?X-Amz-Signature=abc, see https://docs/errors"
    assert scrubbed(text, "https://host/a.png") == "403 at https://cdn/x.png see https://docs/errors"


def test_a_short_one_leaves_words_alone():
    assert scrubbed("version 12: not found (2)", "https://host/a?v=2") == "version 12: not found (…)"


def test_how_http_sends_a_password():
    assert "dXNlcjpwYXNz" not in scrubbed("Basic dXNlcjpwYXNz", "https://user:pass@host")


def raising(error):
    class Raises:
        def url_to_fs(self, url):
            raise error

    return Raises()


@settings(deadline=None)
@given(chains())
def test_no_secret_is_in_the_error_of_a_file_system(chain):
    url, secrets = chain
    error = ValueError(f"{url} and {unquote(url)!r}, {secrets}")
    error.__cause__ = OSError(5, "lost", url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsspec, "core", raising(error))
        with pytest.raises(InfexportError) as caught:
            find([url])
    told = json.dumps(caught.value.to_dict(), ensure_ascii=False)
    assert not [secret for secret in secrets if secret in told or json.dumps(secret)[1:-1] in told]
    assert caught.value.__suppress_context__


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        file.write(DIGIT, "digit.png")
        file.writestr("bad.png", DIGIT.read_bytes()[:80])
    return tmp_path / "all.zip"


def test_an_error_about_a_copy_names_the_url(archive):
    from infexport.images.decode import read_image

    url = f"zip://bad.png::file://{archive}"
    copies = []
    with pytest.raises(InfexportError) as caught, local_copy(url) as file:
        read_image(copies.append(file) or file)
    (copy,) = copies
    told = json.dumps(caught.value.to_dict())
    assert caught.value.summary.endswith(url)
    assert str(caught.value) == caught.value.summary
    assert str(copy.parent) not in told
    with pytest.raises(OSError, match="gone") as lost, named(url, copy):
        raise OSError(2, "gone", str(copy))
    assert lost.value.filename == url


def test_a_warning_about_a_copy_names_the_url(tmp_path, caplog):
    from infexport.images.decode import read_image

    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    url = f"file://{tmp_path}/two.gif"
    with caplog.at_level(logging.WARNING, "infexport"), local_copy(url) as file:
        read_image(file)
    assert [record.getMessage() for record in caplog.records] == [f"{url} has more than one frame; the first is used"]
    assert not logging.getLogger("infexport").filters


def test_a_full_disk_is_no_matter_of_credentials(archive, monkeypatch):
    import shutil

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    monkeypatch.setattr(fsspec.implementations.zip.ZipFileSystem, "get_file", full)
    with pytest.raises(InfexportError, match="cannot read zip://") as caught, local_copy(f"zip://digit.png::{archive}"):
        pass
    assert "make room in" in caught.value.hint
    assert not re.search("credentials", caught.value.hint)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a/scan.png?key=1", "scan.png"),
        ("https://host/a%20b.tif", "a%20b.tif"),
        ("zip://top.png::https://host/all.zip", "top.png"),
        ("zip://in/it.png::simplecache::s3://bucket/all.zip", "it.png"),
        ("https://me:word@host", "host"),
    ],
)
def test_the_name_of_a_file(url, name):
    assert name_of_url(url) == name
