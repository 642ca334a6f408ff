rule ablation_table:
    input:
        images=IMAGES,
        metrics=ablation_files("metrics.json"),
        refined=ablation_files("refined_labels.parquet"),
    output:
        parquet=ABLATION,
        markdown=report(
            ABLATION.replace(".parquet", ".md"),
            category="{dataset}",
            labels=report_labels("ablation"),
        ),
    log:
        f"{LOGS}/ablation_table/{{dataset}}/{{encoder}}.log",
    params:
        # Not an input: if this workflow is a module, Snakemake would add its prefix to the path.
        table=CONFIG.ablation.table,
        content=ablation_content,
        folder=subpath(output.parquet, parent=True),
        trainings=ablation_options,
        difficult=CONFIG.evaluate.difficult,
        ap=CONFIG.evaluate.ap,
        code=code("ablation", "compare_variants"),
    shell:
        "cdul ablation --table {params.table:q} {params.trainings:q} --images {input.images:q} "
        "--difficult {params.difficult} --ap {params.ap} --output {params.folder:q} 2> {log:q}"
