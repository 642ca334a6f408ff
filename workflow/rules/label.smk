rule label:
    input:
        similarity=SIMILARITY.replace("{split}", "train"),
        images=IMAGES,
    output:
        PSEUDO_LABELS,
    log:
        f"{LOGS}/label/{{dataset}}/{{encoder}}/{{labels}}.log",
    benchmark:
        f"{BENCHMARKS}/label/{{dataset}}/{{encoder}}/{{labels}}.tsv"
    params:
        settings=label_settings,
        corrected=corrections_content,
        code=code("label", "make_labels"),
    shell:
        "cdul label --similarity {input.similarity:q} --images {input.images:q} --split train "
        "--settings {params.settings:q} --output {output:q} 2> {log:q}"
