"""Data set readers: the images of a data set, their splits, and their ground truth."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from cdul_steps.data.files import check_names
from cdul_steps.data.foreign import Tell, ignore, listed
from cdul_steps.data.readers.coco import read_coco
from cdul_steps.data.readers.folder import read_folder, read_remote_folder
from cdul_steps.data.readers.nuswide import read_nuswide
from cdul_steps.data.readers.parquet import read_parquet
from cdul_steps.data.readers.record import ImageRecord, check_utf8, pattern_of
from cdul_steps.data.readers.table import read_table
from cdul_steps.data.readers.voc import read_voc
from cdul_steps.data.readers.webdataset import read_webdataset
from cdul_steps.data.remote import check_packages, is_url, is_web, list_folders
from cdul_steps.data.sources import is_in_archive, state
from cdul_steps.errors import UserError

READERS = {
    "voc": read_voc,
    "coco": read_coco,
    "nuswide": read_nuswide,
    "folder": read_folder,
    "table": read_table,
    "webdataset": read_webdataset,
    "parquet": read_parquet,
}
_LEAVE_OUT = ("folder", "webdataset", "parquet")
"""Readers that handle `exclude` themselves, so that excluded folders or archives are not read."""


def read_dataset(
    reader: str,
    root: Path | str,
    splits: Mapping[str, str],
    classes: Sequence[str],
    *,
    labelled_only: bool = False,
    exclude: Sequence[str] = (),
    tell: Tell = ignore,
) -> list[ImageRecord]:
    """Read a data set with a reader of READERS.

    root: the path of a folder or file, as text or not; or a URL, as text.
    splits: our names of the splits and, for each, the data set's own.
    labelled_only: leave out images that are not known to show any class.
    exclude: patterns of files and folders to leave out; see `pattern_of`.
    tell: takes one line for each kind of thing that was left out or read differently than written.

    Raises UserError if the data set is not as its reader expects it, a split has no images, two
    images have the same id, or a package that a URL needs is missing.
    """
    check_names([str(root)])
    told: list[str] = []
    patterns = (exclude,) if reader in _LEAVE_OUT else ()
    if isinstance(root, Path) or not is_url(root):
        root = Path(root)
        records = READERS[reader](root, splits, classes, told.append, *patterns)
        check_packages((r.path for r in records if is_url(r.path)), f"{root}: the column 'path'")
    elif reader == "folder":
        records = read_remote_folder(root, splits, told.append, exclude)
    else:
        raise UserError(
            f"{root}: the reader '{reader}' reads no 'root' that is a URL; copy the files, or give "
            "a table of your own with URLs in its column 'path'"
        )
    if isinstance(root, Path) and reader != "folder":
        records = _without(records, root, exclude, told.append)
    if labelled_only:
        found = len(records)
        records = [r for r in records if r.positive or r.difficult]
        if found > len(records):
            number = found - len(records)
            told.append(f"{root}: left out {number} image{'s' * (number > 1)} without a label")
    for line in told:
        tell(line)
    filled = {record.split for record in records}
    for split, own in splits.items():
        if split not in filled:
            raise UserError(
                f"{root}: split '{split}' ('{own}') has no {'labelled ' * labelled_only}images; "
                f"check {'its labels and ' * labelled_only}the names under 'splits', or leave this "
                f"split out{''.join(f'; {line}' for line in told)}"
            )
    by_id: dict[str, ImageRecord] = {}
    for record in records:
        check_utf8(record.image_id, root)
        other = by_id.setdefault(record.image_id, record)
        if other is not record:
            raise UserError(
                f"{root}: image id '{record.image_id}' is used twice: {other.path} "
                f"({other.split}) and {record.path} ({record.split}); ids must be unique in a "
                "data set, and each image must belong to one split"
            )
    return records


def _without(
    records: list[ImageRecord], root: Path, exclude: Sequence[str], tell: Tell
) -> list[ImageRecord]:
    """The records that no pattern excludes; patterns match the path relative to the data set.

    In an archive they match the id, which is the archive's path and the name in it; of a remote
    image, the URL.
    """
    if not exclude:
        return records
    top = root.parent if root.is_file() else root
    left_out: Counter[str] = Counter()
    kept = []
    for record in records:
        if is_url(record.path):
            name = record.path
        elif is_in_archive(record.path):
            name = record.image_id
        else:
            path = Path(record.path)
            name = (path.relative_to(top) if path.is_relative_to(top) else path).as_posix()
        if pattern := pattern_of(name, exclude):
            left_out[pattern] += 1
        else:
            kept.append(record)
    if left_out:
        number = left_out.total()
        tell(
            f"{root}: left out {number} image{'s' * (number > 1)} by 'exclude': {listed(left_out)}"
        )
    return kept


def check_counts(
    records: Iterable[ImageRecord], expected: Mapping[str, int], root: Path | str
) -> None:
    """Raise UserError if a split does not have the `expected` number of images."""
    counts = Counter(record.split for record in records)
    off = [
        f"split '{split}' has {counts[split]} images, not {number}"
        for split, number in expected.items()
        if split in counts and counts[split] != number
    ]
    if off:
        raise UserError(
            f"{root}: {', '.join(off)} as 'expected_images' states for the whole data set; "
            "to use only part of it, write 'expected_images: null' into the config"
        )


def check_files(split: str, images: int, absent: Sequence[str], max_failed_share: float) -> str:
    """Describe how many image files of a split are missing; empty if none are.

    images: the split's number of images; absent: the paths of the missing ones, of which at most
    `max_failed_share` (0..1), but not all, are tolerated. Raises UserError if there are more.
    """
    if not absent:
        return ""
    problem = (
        f"{split}: {len(absent)} of {images} image files are missing, the first is {absent[0]}"
    )
    if len(absent) > max_failed_share * images or len(absent) == images:
        raise UserError(
            f"{problem}; check 'root', download the missing files, or raise max_failed_share "
            f"({max_failed_share:g})"
        )
    return problem


def check_headers(
    split: str, looked_at: int, failed: Mapping[str, str], max_failed_share: float
) -> str:
    """Describe how many of a split's examined images cannot be read; empty if all can.

    failed: the error by path. Raises UserError if they are more than `max_failed_share` (0..1) of
    the examined images.
    """
    if not failed:
        return ""
    path, error = next(iter(failed.items()))
    problem = (
        f"{split}: {len(failed)} of {looked_at} images cannot be read, the first is {path}: {error}"
    )
    if len(failed) > max_failed_share * looked_at:
        raise UserError(
            f"{problem}; replace or remove them, leave them out with 'exclude', or raise "
            f"max_failed_share ({max_failed_share:g})"
        )
    return problem


def fingerprint(records: Iterable[ImageRecord]) -> str:
    """32 hex digits that change with any field of any record, their order, and the size or
    modification time of any file or archive with an image. An inaccessible file counts as missing.
    Web servers are not asked, since each image would take a request.
    """
    records, digest = list(records), blake2b(digest_size=16)
    list_folders(record.path for record in records if is_url(record.path))
    for record in records:
        fields = (record.image_id, record.split, record.path, record.positive, record.difficult)
        found = None if is_web(record.path) else state(record.path)
        digest.update(repr((fields, found)).encode())
    return digest.hexdigest()
