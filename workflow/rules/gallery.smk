# Not part of `all`: asked for by its folder.
rule gallery:
    input:
        similarity=SIMILARITY,
        labels=f"{LABELS}/pseudo_labels.parquet",
        refined=f"{TRAINING}/refined_labels.parquet",
        predictions=f"{TRAINING}/predictions/{{split}}.parquet",
        images=IMAGES,
    output:
        directory(f"{TRAINING}/gallery/{{split}}"),
    log:
        f"{LOGS}/gallery/{{dataset}}/{{encoder}}/{{labels}}/{{training}}/{{split}}.log",
    conda:
        "../../environment.yml"
    threads: 8
    params:
        training=subpath(input.refined, parent=True),
        code=code("gallery", "make_gallery"),
        page=digest(Path(workflow.basedir) / "cdul_steps/web"),
    shell:
        "cdul gallery {params.training:q} --split {wildcards.split} --output {output:q} 2> {log:q}"
