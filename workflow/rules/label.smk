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
    conda:
        "../../environment.yml"
    params:
        construction=labels_key("construction"),
        tau=option("--tau", labels_key("tau")),
        zeta=labels_key("zeta"),
        lam=labels_key("lambda_"),
        further=label_options,
        corrections=option("--corrections", labels_key("corrections")),
        corrected=corrections_content,
        code=code("label", "make_labels"),
    shell:
        "cdul label --similarity {input.similarity:q} --images {input.images:q} --split train "
        "--construction {params.construction} {params.tau} --zeta {params.zeta} "
        "--lambda={params.lam} {params.further:q} {params.corrections:q} --output {output:q} 2> {log:q}"
