rule quality:
    input:
        images=IMAGES,
        similarity=similarities,
        labels=PSEUDO_LABELS,
    output:
        report(
            QUALITY,
            category="{dataset}",
            labels=report_labels("quality of the pseudo-labels"),
            caption="../report/measures.rst",
        ),
    log:
        f"{LOGS}/quality/{{dataset}}/{{encoder}}/{{labels}}.log",
    benchmark:
        f"{BENCHMARKS}/quality/{{dataset}}/{{encoder}}/{{labels}}.tsv"
    params:
        similarity=similarity_options,
        difficult=CONFIG.evaluate.difficult,
        ap=CONFIG.evaluate.ap,
        code=code("evaluate", "evaluate_labels"),
    shell:
        "cdul quality {params.similarity:q} --images {input.images:q} --labels {input.labels:q} "
        "--difficult {params.difficult} --ap {params.ap} --output {output:q} 2> {log:q}"


rule evaluate:
    input:
        scores=lambda wildcards: PREDICTIONS.replace(
            "{split}", measured_split(wildcards)
        ),
        images=IMAGES,
    output:
        report(
            METRICS,
            category="{dataset}",
            labels=report_labels("metrics of the classifier"),
            caption="../report/measures.rst",
        ),
    log:
        f"{LOGS}/evaluate/{{dataset}}/{{encoder}}/{{labels}}/{{training}}.log",
    benchmark:
        f"{BENCHMARKS}/evaluate/{{dataset}}/{{encoder}}/{{labels}}/{{training}}.tsv"
    params:
        difficult=CONFIG.evaluate.difficult,
        ap=CONFIG.evaluate.ap,
        code=code("evaluate", "evaluate_scores"),
    shell:
        "cdul evaluate --scores {input.scores:q} --images {input.images:q} "
        "--difficult {params.difficult} --ap {params.ap} --output {output:q} > {log:q} 2>&1"
