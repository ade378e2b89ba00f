"""Forbidden contents of a PyTorch file are found before torch reads it: code, and small data that expands."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infvit.checkpoint import load_checkpoint, pickles
from infvit.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS: dict[str, Any] = {"variant": "linear_infsa", "num_heads": 4}


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def doubled(times: int) -> Any:
    """A tuple with 2^times leaves, in a few bytes."""
    value: Any = (1,)
    for _ in range(times):
        value = (value, value)
    return value


def nested(times: int) -> Any:
    """Lists with 2^times leaves."""
    value: Any = [1]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.fixture
def state() -> dict[str, Any]:
    return load_file(GOLDEN / "reference_linear.safetensors")


def refused(content: Any, folder: Path, **options: Any) -> str:
    file = folder / "checkpoint.pth"
    torch.save(content, file, **options)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(file, **OPTIONS)
    return f"{caught.value.summary}\n{caught.value.details}"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(eval, "1"), "eval"),
        (Call(bytearray, 10**11), "bytearray"),
        (Call(torch.FloatTensor, 10**6), "FloatTensor"),
        (Call(torch.Tensor, 10**6), "Tensor"),
        (Call(torch.UntypedStorage, 10**6), "UntypedStorage"),
        (Call(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, (10**6,), None), "torch.Tensor"),
        (Call(torch.load, "x"), "torch.serialization.load"),
        (b"\x00" * 9, "_codecs.encode"),  # as protocol 2 has bytes: `encode` again and again makes any number of them
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])
def test_names_that_rebuild_no_tensor_are_refused(call, name, zipped, state, tmp_path):
    told = refused(state | {"head.bias": call}, tmp_path, _use_new_zipfile_serialization=zipped)
    assert "holds Python objects, which are never loaded" in told
    assert name in told


def test_what_is_kept_of_training_is_taken(state, tmp_path):
    """A schedule's milestones, complex numbers, sets, a parameter, a tensor with an attribute of its own."""
    marked = torch.zeros(2)
    marked.note = "seen"
    kept = {"milestones": Counter({30: 1}), "beta": 1j, "seen": {1, 2}, "p": torch.nn.Parameter(marked), "t": marked}
    torch.save({"model": state, "optimizer": kept}, tmp_path / "checkpoint.pth")
    load_checkpoint(tmp_path / "checkpoint.pth", **OPTIONS)


@pytest.mark.parametrize("torch_names", ["load", "hub", "save", "compile", "nn"])
def test_of_torch_only_dtypes_are_taken(torch_names):
    with pytest.raises(pickles.Refused):
        pickles._check_global(f"torch.{torch_names}")
    pickles._check_global("torch.float16")


def test_a_key_that_would_take_for_ever_to_hash(state, tmp_path):
    """2^60 leaves, which Python hashes one by one."""
    file = tmp_path / "checkpoint.pth"
    made = io.BytesIO()
    pickler = pickle.Pickler(made, 2)
    pickler.dump([doubled(60)])
    # as a key: an empty dict, the tuple, a number, SETITEM
    tuple_only = made.getvalue().removeprefix(b"\x80\x02]q\x00").removesuffix(b"a.")
    torch.save({}, file)
    with zipfile.ZipFile(file) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith("data.pkl"))
        others = {entry: archive.read(entry) for entry in archive.namelist() if entry != name}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"\x80\x02}" + tuple_only + b"K\x01s.")
        for entry, content in others.items():
            archive.writestr(entry, content)
    with pytest.raises(CheckpointError, match="cannot be read as a PyTorch checkpoint"):
        load_checkpoint(file, **OPTIONS)


def test_a_config_that_is_endless_as_text(state, tmp_path):
    assert "too large" in refused({"model": state, "config": {"x": nested(60)}}, tmp_path)
    round_and_round: dict[str, Any] = {}
    round_and_round["self"] = round_and_round
    assert "cannot read the config" in refused({"model": state, "config": round_and_round}, tmp_path)


def rewritten(file: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        change(archive, entries)


def compressed(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> None:
    for name, content in entries.items():
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    archive.writestr("checkpoint/data/99", bytes(10**8), zipfile.ZIP_DEFLATED)


def doubly(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> None:
    """Every entry lies where the largest does."""
    for name, content in entries.items():
        archive.writestr(name, content)
    largest = max(archive.filelist, key=lambda entry: entry.file_size)
    for entry in archive.filelist:
        entry.header_offset, entry.file_size = largest.header_offset, largest.file_size
        entry.compress_size, entry.CRC = largest.compress_size, largest.CRC


@pytest.mark.parametrize("change", [compressed, doubly])
def test_archives_that_unpack_to_more_than_they_are(change, state, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save(state, file)
    load_checkpoint(file, **OPTIONS)
    rewritten(file, change)
    assert file.stat().st_size < 10**6
    with pytest.raises(CheckpointError, match="cannot be read as a PyTorch checkpoint") as caught:
        load_checkpoint(file, **OPTIONS)
    assert "archive" in caught.value.details


def bomb() -> bytes:
    made = io.BytesIO()
    pickle.Pickler(made, 2).dump(Call(bytearray, 10**11))
    return made.getvalue()


@pytest.mark.parametrize("name", ["DATA.PKL", "data.pkL"])
def test_a_name_that_only_torch_takes_for_that_of_the_pickle(name, state, tmp_path):
    def change(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> None:
        for entry, content in entries.items():
            evil = entry.endswith("data.pkl")
            archive.writestr(entry.replace("data.pkl", name), bomb() if evil else content)

    file = tmp_path / "checkpoint.pth"
    torch.save(state, file)
    rewritten(file, change)
    with pytest.raises(CheckpointError, match="holds Python objects") as caught:
        load_checkpoint(file, **OPTIONS)
    assert "bytearray" in caught.value.details


def test_an_archive_with_two_directories(state, tmp_path):
    """Python corrects where the directory begins by where the last record lies, torch does not."""
    clean, evil = tmp_path / "clean.pth", tmp_path / "evil.pth"
    torch.save(state, clean)
    torch.save(state, evil)
    rewritten(clean, lambda archive, entries: [archive.writestr(name, entries[name]) for name in entries])
    rewritten(
        evil,
        lambda archive, entries: [archive.writestr(n, bomb() if n.endswith(".pkl") else entries[n]) for n in entries],
    )
    first, second = evil.read_bytes(), clean.read_bytes()
    both = bytearray(first + second)
    both[-6:-2] = struct.pack("<I", zipfile.ZipFile(evil).start_dir)
    (tmp_path / "checkpoint.pth").write_bytes(both)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "checkpoint.pth", **OPTIONS)
    assert "directory" in caught.value.details


def test_an_archive_whose_large_record_leads_elsewhere(state, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    record = content.rindex(b"PK\x06\x06")
    content[record + 48 : record + 56] = struct.pack("<Q", 0)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(file, **OPTIONS)


def test_an_archive_of_more_than_4_gib_says_elsewhere_where_its_directory_is(tmp_path):
    """Records that torch.save always writes, for archives of any size."""
    file = tmp_path / "checkpoint.pth"
    torch.save({"x": torch.zeros(3)}, file)
    content = file.read_bytes()
    where = content.index(b"PK\x01\x02")
    directory = content[
        where : content.index(b"PK\x05\x06") if b"PK\x06\x06" not in content else content.index(b"PK\x06\x06")
    ]
    count = len(zipfile.ZipFile(file).namelist())
    large = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), where)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, where + len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    file.write_bytes(content[: where + len(directory)] + large + locator + end)
    pickles.check(file)
    assert torch.load(file)["x"].shape == (3,)


def test_a_program_is_no_state_dict(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "checkpoint.pth", **OPTIONS)
    assert "TorchScript" in caught.value.details


def test_another_protocol_is_named(state, tmp_path):
    torch.save(state, tmp_path / "checkpoint.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "checkpoint.pth", **OPTIONS)
    assert "another protocol" in caught.value.details


def test_an_archive_behind_a_pickle_is_not_what_is_checked(state, tmp_path):
    """torch goes by the first bytes, Python's zipfile by the last."""
    legacy, clean = tmp_path / "checkpoint.pth", tmp_path / "clean.pth"
    torch.save({"x": Call(eval, "1")}, legacy, _use_new_zipfile_serialization=False)
    torch.save(state, clean)
    legacy.write_bytes(legacy.read_bytes() + clean.read_bytes())
    assert zipfile.is_zipfile(legacy)
    with pytest.raises(CheckpointError, match="holds Python objects"):
        load_checkpoint(legacy, **OPTIONS)


def test_a_tar_of_old(tmp_path):
    with tarfile.open(tmp_path / "checkpoint.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(CheckpointError, match="cannot be read as a PyTorch checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pth", **OPTIONS)


def test_one_number_seen_many_times_is_no_tensor(state, tmp_path):
    """Tensor saved after `expand`: one number with a stride of zero, repeated any number of times."""
    shared = torch.zeros(1).expand(10**6, 10**6)
    assert "far more numbers than the file" in refused(state | {"head.weight": shared}, tmp_path)
    tied = state | {"head.weight": state["encoder.layers.0.ff.0.weight"][:10]}
    torch.save(tied, tmp_path / "tied.pth")
    load_checkpoint(tmp_path / "tied.pth", **OPTIONS)


def test_a_header_of_a_million_million_numbers(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    for length in (len(header), 10**12, 2**63):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + header + bytes(64))
        with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
            load_checkpoint(tmp_path / "a.safetensors", **OPTIONS)


@pytest.mark.parametrize("opcodes", [b"", b".", b"0.", b"t.", b"R.", b"h\x07.", b"s.", b"\x80\x02]K\x01u."])
def test_pickles_that_take_what_is_not_there(opcodes, tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(opcodes * 5)
    with pytest.raises(CheckpointError, match="cannot be read as a PyTorch checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pth", **OPTIONS)


def test_a_config_that_does_not_end(tmp_path, state):
    torch.save(state, tmp_path / "checkpoint.pth")
    for endless in ("/dev/zero", "/dev/null"):
        with pytest.raises(CheckpointError, match="cannot read /dev"):
            load_checkpoint(tmp_path / "checkpoint.pth", **OPTIONS, config_file=endless)


def test_more_terms_than_anybody_waits_for(state, tmp_path):
    torch.save(
        {"model": state, "config": {"variant": "pure_infsa", "num_heads": 4, "neumann_terms": 10**12}},
        tmp_path / "a.pth",
    )
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "a.pth")
    assert "expected at most 1000" in caught.value.details


def test_labels_that_cannot_be_written(state, tmp_path):
    labels = {str(i): "\ud800" for i in range(10)}
    assert "cannot read" in refused({"model": state, "config": {**OPTIONS, "id2label": labels}}, tmp_path)
