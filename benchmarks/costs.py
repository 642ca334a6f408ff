"""Estimated costs of 10^5 to 10^8 images with each encoder; prints JSON.

    python benchmarks/costs.py
    python benchmarks/costs.py --images 82081 --speed 0.4

Torch counts floating-point operations on the tower itself; bytes and files follow from the formats
of the results, and GPU hours from rates that `encode.py` measured. Tables in Markdown go to stderr.
"""

import argparse
import sys

import open_clip
import torch
from measuring import print_result
from torch.utils.flop_counter import FlopCounterMode

ENCODERS = {"ViT-B-32": 24_285, "ViT-L-14": 2_196, "RN50x64": 526}
"""Views per second of the bare tower on an H100 in bf16, in batches of 256, for RN50x64 of 128."""
# Per shard: manifest, embeddings, encode table, similarity, log and benchmark.
FILES = 6


def tower(name: str) -> dict[str, float]:
    """Operations per view, dimension, and input size of an image tower, without its weights."""
    torch.backends.mha.set_fastpath_enabled(False)  # whose operator torch does not count
    config = open_clip.get_model_config(name)
    size = config["vision_cfg"].get("image_size", 224)
    network = open_clip.create_model(name, pretrained=None, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.encode_image(torch.zeros(1, 3, size, size, device="meta"))
    flops = counter.get_total_flops()
    return {"GFLOP_a_view": round(flops / 1e9, 1), "dimension": config["embed_dim"], "size": size}


def table(rows: list[dict[str, object]]) -> str:
    """Rows in Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row.values()))} |" for row in rows)])


def main() -> None:
    """Print the estimates."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10**5, 10**6, 10**8])
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--speed", type=float, default=1.0, help="of the GPU, in H100s")
    options = parser.parse_args()
    towers = {name: tower(name) for name in ENCODERS}
    encoders, sets = [], []
    for images in options.images:
        views, shards = images * options.views, -(-images // options.shard_size)
        for name, of_tower in towers.items():
            rate = ENCODERS[name] * options.speed
            encoders.append(
                {
                    "images": f"{images:,}",
                    "encoder": name,
                    "GFLOP a view": of_tower["GFLOP_a_view"],
                    "GPU hours": f"{views / rate / 3600:,.2f}",
                    "embeddings, GB": f"{views * of_tower['dimension'] * 2 / 1e9:,.1f}",
                }
            )
        sets.append(
            {
                "images": f"{images:,}",
                "similarity, GB": f"{views * options.classes * 4 / 1e9:,.2f}",
                "a label table, GB": f"{images * options.classes * 4 / 1e9:,.2f}",
                "encode jobs": f"{shards:,}",
                "files": f"{FILES * shards:,}",
            }
        )
    print(table(encoders), table(sets), sep="\n\n", file=sys.stderr)
    software = ["torch", "open_clip_torch"]
    print_result(software, **vars(options), towers=towers, encoders=encoders, sets=sets)


if __name__ == "__main__":
    main()
