"""Explains what is wrong with a weights file, and what to do about it."""

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from cdul_steps.errors import first_line

PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")
PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "RAR",
}
ZIP, ZIP_END, PICKLE, NUMPY = b"PK\x03\x04", b"PK\x05\x06", b"\x80", b"\x93NUMPY"
TAIL = 1 << 20
"""Bytes at the end of an archive that contain the names of its members."""


@dataclass(frozen=True)
class Fault:
    """What a file contains instead of weights, and what to do about it."""

    what: str
    remedy: str


def why_not_loaded(error: Exception, files: list[Path], *, cached: bool = False) -> str:
    """Why those of `files` that exist cannot be loaded as weights, given torch's `error`.

    The file's own bytes are checked first, then the error. `cached` files are in the hub's cache,
    and should be downloaded again.
    """
    for file in files:
        if file.is_file() and (fault := fault_of(file)):
            if cached:
                # If only the link were deleted, the cache would use the same blob again.
                return f"{file.resolve()} {fault.what}; delete it and run once with network"
            return f"{'it' if len(files) == 1 else file} {fault.what}; {fault.remedy}"
    return _in_words(error)


def cached_files(repository: str, names: Iterable[str]) -> list[Path]:
    """The files of a repository that are in the hub's cache."""
    try:
        found = [try_to_load_from_cache(repository, name) for name in names]
    except HFValidationError:
        return []
    return [Path(place) for place in found if isinstance(place, str)]


def fault_of(file: Path) -> Fault | None:
    """What a file is according to its bytes; None if it looks like weights."""
    with file.open("rb") as stream:
        start = stream.read(512)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return Fault("is empty", "copy or download it again")
    if text.startswith(PAGES):
        return Fault("is a web page", "download the file itself")
    if text.startswith(b"version https://git-lfs"):
        return Fault("is a Git LFS pointer", "fetch the file itself with 'git lfs pull'")
    if b"/annex/objects/" in start:
        return Fault("is a git-annex pointer", "fetch the file itself with 'git annex get'")
    if start.startswith(ZIP):
        return _fault_of_zip(file)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return _fault_of_safetensors(file)
    if start[257:262] == b"ustar":
        return Fault("is a tar archive", "unpack it")
    for magic, name in PACKED.items():
        if start.startswith(magic):
            return Fault(f"is compressed ({name})", "unpack it")
    if start.startswith(PICKLE):
        return _misnamed(file)
    if start.startswith(NUMPY):
        return None
    return Fault("is neither safetensors nor a PyTorch file", "give one of these")


def _fault_of_zip(file: Path) -> Fault | None:
    # The list of members is at the end; nothing is unpacked.
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL))
        end = stream.read()
    if ZIP_END not in end:
        return Fault("is truncated or corrupt", "copy or download it again")
    if b"/constants.pkl" in end:
        return Fault(
            "is a TorchScript program, as OpenAI ships CLIP, and programs are not run",
            "use the tag 'openai', or extract the weights as described in docs/faq.md",
        )
    if b"/data.pkl" in end:
        return _misnamed(file)
    if b".npy" in end:
        return None
    return Fault("is a ZIP archive", "unpack it")


def _misnamed(file: Path) -> Fault | None:
    if file.suffix != ".safetensors":
        return None
    return Fault("is a PyTorch file", "rename it to end in .pt")


def _fault_of_safetensors(file: Path) -> Fault | None:
    try:
        with safe_open(file, "numpy"):
            pass
    except SafetensorError:
        return Fault("is truncated or corrupt", "copy or download it again")
    if file.suffix == ".safetensors":
        return None
    return Fault("is a safetensors file", "rename it to end in .safetensors")


def _in_words(error: Exception) -> str:
    """The libraries' message, in one line and without their advice to trust the file."""
    text = str(error)
    if re.search("weights_only|WeightsUnpickler|allow_pickle", text):
        found = re.search(r"Unsupported globals?: (?:GLOBAL )?([\w.]+)", text)
        if not found and "allow_pickle" not in text:
            return "it is corrupt or not a weights file; copy or download it again"
        return (
            "it contains Python objects besides tensors"
            + (f" ({found[1]})" if found else "")
            + ", which are not loaded because they could run code; if you trust the file, save "
            "only its tensors as described in docs/faq.md"
        )
    if isinstance(error, EOFError | struct.error) or re.search("unexpected EOF|truncated", text):
        return "it is truncated or corrupt; copy or download it again"
    if "state_dict" in text and "\n" in text:
        return f"it is from another model: {_mismatch(text)}"
    if isinstance(error, AttributeError) and "ndim" in text:
        return (
            "it contains a logit_bias, like SigLIP's weights, but this model has none; give the "
            "model that the weights belong to"
        )
    if isinstance(error, AttributeError | KeyError | StopIteration):
        return f"it contains no state dict of this model ({first_line(error)})"
    return first_line(error)


def _mismatch(text: str) -> str:
    """The kinds of differences in torch's long message about a state dict, with examples."""
    kinds: dict[str, list[str]] = {}
    for line in text.splitlines():
        if found := re.search(r"(Missing|Unexpected) key\(s\) in state_dict: (.+)", line):
            kind = {"Missing": "it lacks", "Unexpected": "it also contains"}[found[1]]
            kinds[kind] = re.findall('"([^"]+)"', found[2])
        elif found := re.search(r"size mismatch for (\S+):", line):
            has, wants = re.findall(r"torch\.Size\((\[.*?\])\)", line)
            kinds.setdefault("size mismatch for", []).append(f"{found[1]} ({has}, not {wants})")
    return "; ".join(
        f"{kind} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for kind, names in kinds.items()
    )
