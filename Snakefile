"""CDUL: from images and class names to a trained and evaluated classifier."""

from pathlib import Path

from snakemake.utils import min_version

min_version("9.0")

# A working directory without a config uses that of the demo.
BASE_CONFIG = Path("config/config.yaml")
if not BASE_CONFIG.is_file():
    BASE_CONFIG = Path(str(workflow.current_basedir)) / BASE_CONFIG


configfile: str(BASE_CONFIG)


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/manifest.smk"
include: "workflow/rules/encode.smk"
include: "workflow/rules/similarity.smk"
include: "workflow/rules/label.smk"
include: "workflow/rules/features.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/boxes.smk"
include: "workflow/rules/predict.smk"
include: "workflow/rules/apply.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/sweep.smk"
include: "workflow/rules/ablation.smk"
include: "workflow/rules/model_card.smk"
include: "workflow/rules/gallery.smk"


onstart:
    one_line(check_dates)(Path(RESULTS))


rule all:
    default_target: True
    input:
        made(
            f"{TRAINING}/{{file}}",
            file=["model/README.md", "history.parquet", "refined_labels.parquet"],
        ),
        made(PREDICTIONS),
        made(QUALITY),


rule ablation:
    input:
        expand(
            ABLATION.replace(".parquet", ".md"),
            dataset=CONFIG.ablated.datasets,
            encoder=CONFIG.ablated.encoders,
        ),


include: "workflow/rules/report.smk"
