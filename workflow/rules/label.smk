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
    wildcard_constraints:
        labels=one_of(CONFIG.labels.keys() - JOINED),
    params:
        settings=label_settings,
        corrected=corrections_content,
        code=code("label", "make_labels"),
    shell:
        "cdul label --similarity {input.similarity:q} --images {input.images:q} --split train "
        "--settings {params.settings:q} --output {output:q} 2> {log:q}"


rule join_labels:
    input:
        joined_labels,
    output:
        PSEUDO_LABELS,
    log:
        f"{LOGS}/join_labels/{{dataset}}/{{encoder}}/{{labels}}.log",
    benchmark:
        f"{BENCHMARKS}/join_labels/{{dataset}}/{{encoder}}/{{labels}}.tsv"
    wildcard_constraints:
        labels=one_of(JOINED),
    params:
        labels=lambda wildcards, input: [f"--labels={table}" for table in input],
        settings=label_settings,
        corrected=corrections_content,
        code=code("label", "join_labels"),
    shell:
        "cdul join-labels {params.labels:q} --settings {params.settings:q} --output {output:q} "
        "2> {log:q}"
