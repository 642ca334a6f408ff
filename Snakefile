"""CDUL: from images and class names to a trained, measured classifier."""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/manifest.smk"
include: "workflow/rules/encode.smk"
include: "workflow/rules/similarity.smk"
include: "workflow/rules/label.smk"
include: "workflow/rules/features.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/predict.smk"
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
        expand(
            f"{TRAINING}/{{file}}",
            dataset=RUN.datasets,
            encoder=RUN.encoders,
            labels=RUN.labels,
            training=RUN.trainings,
            file=["model/README.md", "history.parquet", "refined_labels.parquet"],
        ),
        [
            expand(
                PREDICTIONS,
                dataset=dataset,
                encoder=RUN.encoders,
                labels=RUN.labels,
                training=RUN.trainings,
                split=list(CONFIG.datasets[dataset].splits),
            )
            for dataset in RUN.datasets
        ],
        expand(
            QUALITY,
            dataset=RUN.datasets,
            encoder=RUN.encoders,
            labels=RUN.labels,
        ),


rule ablation:
    input:
        expand(
            ABLATION.replace(".parquet", ".md"),
            dataset=RUN.datasets,
            encoder=RUN.encoders,
        ),


include: "workflow/rules/report.smk"
