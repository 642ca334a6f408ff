rule ablation_table:
    input:
        images=IMAGES,
        table=CONFIG.ablation.table,
        metrics=ablation_files("metrics.json"),
        refined=ablation_files("refined_labels.parquet"),
    output:
        parquet=ABLATION,
        markdown=ABLATION.replace(".parquet", ".md"),
    log:
        f"{LOGS}/ablation_table/{{dataset}}/{{encoder}}.log",
    conda:
        "../../environment.yml"
    params:
        folder=subpath(output.parquet, parent=True),
        trainings=ablation_options,
        difficult=CONFIG.evaluate.difficult,
        ap=CONFIG.evaluate.ap,
        code=code("ablation", "compare_variants"),
    shell:
        "cdul ablation --table {input.table:q} {params.trainings:q} --images {input.images:q} "
        "--difficult {params.difficult} --ap {params.ap} --output {params.folder:q} 2> {log:q}"
