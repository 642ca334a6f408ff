rule sweep:
    input:
        made(SWEEP),


rule sweep_labels:
    input:
        images=IMAGES,
        similarity=similarities,
    output:
        table=SWEEP,
        figure=report(
            SWEEP.replace(".parquet", ".svg"),
            category="{dataset}",
            labels=report_labels("sweep of label settings"),
        ),
    log:
        f"{LOGS}/sweep/{{dataset}}/{{encoder}}.log",
    threads: 8
    params:
        similarity=similarity_options,
        settings=CONFIG.sweep.model_dump_json(by_alias=True),
        difficult=CONFIG.evaluate.difficult,
        ap=CONFIG.evaluate.ap,
        code=code("sweep", "sweep_labels"),
    shell:
        "cdul sweep {params.similarity:q} --images {input.images:q} "
        "--settings {params.settings:q} --difficult {params.difficult} --ap {params.ap} "
        "--threads {threads} --output {output.table:q} --figure {output.figure:q} 2> {log:q}"
