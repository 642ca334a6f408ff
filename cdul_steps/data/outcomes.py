"""The outcome of each image in the encode jobs: its status, and why it cannot be used."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cdul_steps.data.tables import read_table
from cdul_steps.errors import UserError

# Failures caused by the file. Failures of the model or the image's shape would recur.
RETRIED = (
    *("missing", "unreadable", "truncated", "not_an_image", "too_large", "changed"),
    "unreachable",
)


def outcome_table(images: pa.Table, outcome: Sequence[tuple[str, str, float]]) -> pa.Table:
    """The table of a shard's job: `image_id, row, status, error, seconds`, one row per image.

    `outcome` has `(status, error, seconds)` for each of the `images`.
    """
    status, error, seconds = zip(*outcome, strict=True) if outcome else ((), (), ())
    return pa.table(
        {
            "image_id": images["image_id"],
            "row": images["row"],
            "status": pa.array(status, pa.string()),
            "error": pa.array(error, pa.string()),
            "seconds": pa.array(seconds, pa.float32()),
        }
    )


def check_failures(
    images: Path, split: str, tables: Sequence[Path], max_failed_share: float
) -> pa.Table:
    """The failed images of a split: `image_id, status, error`.

    Raises UserError, naming the first ten, if more than `max_failed_share` of the split failed.
    """
    members = read_table(images, ["image_id", "split", "row"])
    members = members.filter(pc.equal(members["split"], split))
    outcome = pa.concat_tables([read_table(t, ["row", "status", "error"]) for t in tables])
    joined = members.join(outcome, "row", join_type="left outer").sort_by("row")
    status = pc.fill_null(joined["status"], "absent")
    joined = joined.set_column(joined.column_names.index("status"), "status", status)
    failed = joined.filter(pc.not_equal(status, "ok")).select(["image_id", "status", "error"])
    if len(failed) > max_failed_share * len(members):
        first = "; ".join(
            f"{f['image_id']}: {f['status']}" + f" ({f['error']})" * bool(f["error"])
            for f in failed[:10].to_pylist()
        )
        raise UserError(
            f"{split}: {len(failed)} of {len(members)} images cannot be used, more than "
            f"max_failed_share = {max_failed_share:g} allows; replace or remove them, leave them "
            "out with the data set's 'exclude', or raise its max_failed_share. "
            f"{'The first ten' if len(failed) > 10 else 'These'}: {first}"
        )
    return failed
