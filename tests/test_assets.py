"""Fetching packages: real `pip download` from a folder of wheels, no network."""

import hashlib
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from jaxq import assets
from jaxq.assets import Package, Unavailable
from jaxq.errors import JaxqError


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty folder that pip takes for the whole package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder, files: dict[str, bytes], name="toy", version="1.0") -> str:
    """Writes a minimal wheel; gives its sha256."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as bundle:
        for member, data in files.items():
            bundle.writestr(member, data)
        bundle.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        bundle.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        bundle.writestr(f"{info}/RECORD", "")
    return assets.sha256(path)


def test_fetch_downloads_once_and_keeps_only_what_is_wanted(index, tmp_path, monkeypatch):
    digest = wheel(index, {"toy/data/a.bin": b"a", "toy/data/b.bin": b"b", "toy/code.py": b"1/0"})
    package = Package("toy", "1.0", digest, ("toy/data/*.bin",))
    cache = tmp_path / "cache"
    folder = assets.fetch(package, cache)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in files} == {
        "toy/data/a.bin": b"a",
        "toy/data/b.bin": b"b",
    }
    monkeypatch.setattr(assets, "download", lambda *_: pytest.fail("asked the index again"))
    assert assets.fetch(package, cache) == folder
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_fetch_mends_an_incomplete_folder(index, tmp_path):
    package = Package("toy", "1.0", wheel(index, {"a": b"1", "b": b"2"}), ("a", "b"))
    folder = assets.fetch(package, tmp_path)
    (folder / "b").unlink()
    assert (assets.fetch(package, tmp_path) / "b").read_bytes() == b"2"


def test_another_file_than_expected_is_refused(index, tmp_path):
    wheel(index, {"a": b"1"})
    with pytest.raises(JaxqError, match="toy 1.0 has another sha256, expected 0000") as caught:
        assets.fetch(Package("toy", "1.0", "0" * 64, ("a",)), tmp_path / "cache")
    assert not isinstance(caught.value, Unavailable)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_cannot_be_had(index, tmp_path, monkeypatch):
    package = Package("toy", "2.0", "0" * 64, ("a",))
    with pytest.raises(Unavailable, match=r"could not download toy 2.0 \(.*No matching|find a version"):
        assets.fetch(package, tmp_path / "cache")
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="ensurepip"):
        assets.fetch(package, tmp_path / "cache")
    with pytest.raises(Unavailable, match="no apt-get here"):
        assets.fetch(Package("toy", "2.0", "0" * 64, ("a",), "debian"), tmp_path / "cache")
    monkeypatch.setattr(assets.shutil, "which", lambda name: f"/no/such/{name}")
    with pytest.raises(Unavailable, match="/no/such/pip3: "):
        assets.fetch(package, tmp_path / "cache")


def test_members_that_are_missing_or_lead_outside(index, tmp_path):
    digest = wheel(index, {"a": b"1", "../evil": b"2"})
    with pytest.raises(JaxqError, match="holds no file 'b'"):
        assets.fetch(Package("toy", "1.0", digest, ("a", "b")), tmp_path / "cache")
    with pytest.raises(JaxqError, match="outside of itself"):
        assets.fetch(Package("toy", "1.0", digest, ("*evil",)), tmp_path / "cache")
    assert not list(tmp_path.rglob("evil"))


def test_source_distribution(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("hello")
    with tarfile.open(tmp_path / "toy-1.0.tar.gz", "w:gz") as bundle:
        bundle.add(tmp_path / "text", "toy-1.0/data/text")
    served(monkeypatch, "_pip", tmp_path / "toy-1.0.tar.gz")
    package = Package("toy", "1.0", assets.sha256(tmp_path / "toy-1.0.tar.gz"), ("toy-1.0/data/*",), "sdist")
    assert (assets.fetch(package, tmp_path / "cache") / "toy-1.0/data/text").read_text() == "hello"


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_debian_package(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: toy\nVersion: 1.0\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    (tree / "usr/share").mkdir(parents=True)
    (tree / "usr/share/text").write_text("hello")
    (tree / "usr/share/link").symlink_to("text")
    subprocess.run(["dpkg-deb", "-b", tree, tmp_path / "toy.deb"], check=True, capture_output=True)
    served(monkeypatch, "_apt", tmp_path / "toy.deb")
    monkeypatch.setattr(assets.shutil, "which", lambda name: name)
    digest = assets.sha256(tmp_path / "toy.deb")
    folder = assets.fetch(Package("toy", "1.0", digest, ("usr/share/*",), "debian"), tmp_path / "cache")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["text"]
    with pytest.raises(JaxqError, match=f"toy 1.0 has sha256 {digest}, expected 1111"):
        assets.fetch(Package("toy", "1.0", "1" * 64, ("usr/share/*",), "debian"), tmp_path / "cache")


def test_apt_falls_back_on_lists_of_its_own(tmp_path, monkeypatch):
    calls = []

    def run(command, directory=None):
        calls.append(command)
        return "E: Unable to locate package" if len(calls) == 1 else ""

    monkeypatch.setattr(assets, "_run", run)
    monkeypatch.setattr(assets.shutil, "which", lambda name: name)
    with pytest.raises(Unavailable, match="left no file"):
        assets.download(Package("toy", "1.0", "0" * 64, (), "debian"), tmp_path)
    assert [command[-1] for command in calls] == ["toy=1.0", "update", "toy=1.0"]
    assert any(str(tmp_path) in word for word in calls[2])


def served(monkeypatch, client: str, archive) -> None:
    """Makes a client deliver this archive."""
    monkeypatch.setattr(assets, client, lambda package, folder: shutil.copy(archive, folder) and "")


def test_build_makes_once_checks_and_mends(tmp_path):
    calls = []
    digest = hashlib.sha256(b"hello").hexdigest()

    def make(path):
        calls.append(path)
        path.write_bytes(b"hello")

    path = assets.build("a.txt", digest, make, tmp_path)
    assert path == tmp_path / "a.txt" and path.read_bytes() == b"hello"
    assets.build("a.txt", digest, make, tmp_path)
    assert len(calls) == 1
    path.write_bytes(b"hell")
    assert assets.build("a.txt", digest, make, tmp_path).read_bytes() == b"hello" and len(calls) == 2
    with pytest.raises(JaxqError, match="came out with sha256"):
        assets.build("b.txt", "0" * 64, make, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"old")

    def make(path):
        path.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(JaxqError, match="No space left on device"):
        assets.build("a.txt", "0" * 64, make, tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.txt", b"old")]


def test_cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_root() == tmp_path / "jaxq" and assets.cache_root("x").name == "x"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_root().parts[-2:] == (".cache", "jaxq")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxqError, match="another cache"):
        assets.build("a", "0" * 64, lambda path: None, tmp_path / "file")
