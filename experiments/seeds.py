"""Run a config with several seeds and print each measure's mean and deviation as JSON.

    python experiments/seeds.py --seeds 0 1 2
    python experiments/seeds.py --configfile experiments/voc2007.yaml --seeds 0 1 2

The demo draws new scenes for every seed; other data sets are encoded once, and the seed affects
only the training. A table in Markdown goes to stderr.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import yaml
from snakemake.utils import update_config

from cdul_steps.config import load
from cdul_steps.provenance import versions


def run(overlay: dict, folder: Path, cores: str) -> None:
    """Run the workflow with the default config overridden by `overlay`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay))
    command = ["snakemake", "--cores", cores, "--quiet", "rules", "--configfile", str(file)]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)


def measures(results: Path, seed: int) -> dict[str, float]:
    """mAP of every label construction on every split, of the refined labels and classifiers."""
    found = {}
    for quality in sorted(results.glob("*/*/*/quality.json")):
        labels = quality.parent.name
        for split, constructions in json.loads(quality.read_text())["splits"].items():
            for name, values in constructions.items():
                found[f"CLIP, {name.replace('_', ' ')}, {labels}, {split}"] = values["mAP"]
        for metrics in sorted(quality.parent.glob(f"*-{seed}/metrics.json")):
            name = f"{labels}, {metrics.parent.name.removesuffix(f'-{seed}')}"
            found[f"classifier, {name}, test"] = json.loads(metrics.read_text())["mAP"]
            command = [sys.executable, "-m", "cdul_steps.cli", "evaluate", "--output"]
            refined = metrics.parent / "refined_metrics.json"
            images = quality.parents[2] / "manifest/images.parquet"
            table = metrics.parent / "refined_labels.parquet"
            command += [refined, "--scores", table, "--images", images]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            value = json.loads(refined.read_text())["mAP"]
            found[f"labels after training, {name}, train"] = value
    return found


def main() -> None:
    """Run every seed and print the measures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configfile", type=Path, help="overlay; default: the demo")
    parser.add_argument("--labels", nargs="+", help="default: those of the config's run")
    parser.add_argument("--trainings", nargs="+", default=["aligned", "fixed"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("results/seeds"))
    parser.add_argument("--cores", default="all")
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("a deviation needs at least two seeds")
    config = yaml.safe_load(Path("config/config.yaml").read_text())
    if options.configfile:
        update_config(config, yaml.safe_load(options.configfile.read_text()))
    (dataset,) = {made.dataset for made in load(config).made}
    is_demo = config["datasets"][dataset]["reader"] == "demo"
    values = defaultdict(list)
    for seed in options.seeds:
        names = {f"{name}-{seed}": config["trainings"][name] for name in options.trainings}
        results = options.results / (str(seed) if is_demo else dataset)
        overlay = {
            **config,
            "results": str(results),
            "run": {**config["run"], "trainings": list(names)}
            | ({"labels": options.labels} if options.labels else {}),
            "trainings": {name: {**section, "seed": seed} for name, section in names.items()},
        }
        if is_demo:
            section = config["datasets"][dataset]
            scenes = {**section.get("scenes", {}), "seed": seed}
            overlay["datasets"] = {dataset: {**section, "scenes": scenes}}
        run(overlay, results, options.cores)
        for name, value in measures(results, seed).items():
            values[name].append(value)
    table = {
        name: {"mean": statistics.mean(v), "deviation": statistics.stdev(v), "values": v}
        for name, v in values.items()
    }
    print("| scores | mAP | deviation |\n|---|---|---|", file=sys.stderr)
    for name, row in table.items():
        print(f"| {name} | {row['mean']:.2f} | {row['deviation']:.2f} |", file=sys.stderr)
    software = versions("torch", "timm", "open_clip_torch", "snakemake")
    print(json.dumps({"seeds": options.seeds, "mAP": table, "software": software}, indent=2))


if __name__ == "__main__":
    main()
